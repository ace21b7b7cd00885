"""Which tokenizer a model was trained with, and its tokenizer.json: for export_hf and export_gguf.

A run's log.jsonl names its data, and the data's manifest.json the tokenizer and the id of the end of text. Nothing is
concluded from the size of a vocabulary.
"""
from __future__ import annotations

import glob
import hashlib
import json
import os
from dataclasses import dataclass

from model_file import FileError, load_json, read_tokenizer

# Of OpenAI's vocab.bpe: a tokenizer whose merges hash to this is GPT-2's.
GPT2_MERGES_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"


@dataclass
class ModelTokenizer:
    eot: int | None        # the id of the end of text
    eot_text: str | None
    json: bytes | None     # tokenizer.json
    source: str            # where that is from, for the closing line
    tokens: int = 0        # ids that it has


# ---- the data of a run --------------------------------------------------------------------------------------------

def run_data(model):
    """The folder of the data that a run's model was last trained on, by the log.jsonl beside it; None without a log."""
    folder = os.path.dirname(os.path.abspath(model))
    try:
        with open(os.path.join(folder, "log.jsonl"), encoding="utf-8", errors="replace") as f:
            lines = [line for line in f if line.startswith('{"event":"config"')]
        pattern = json.loads(lines[-1])["options"]["train-data"]
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return None
    # It was typed relative to the folder where the run was started: this one, or one above the run's own.
    bases = [os.getcwd(), os.path.dirname(os.path.dirname(os.path.abspath(__file__)))]
    while folder != os.path.dirname(folder):
        folder = os.path.dirname(folder)
        bases.append(folder)
    for base in bases:
        data = os.path.dirname(os.path.join(base, pattern))
        for found in [data, *sorted(glob.glob(data))]:
            if os.path.exists(os.path.join(found, "manifest.json")):
                return os.path.relpath(found) if not os.path.isabs(pattern) else found
    print(f"note: the run's data, {pattern}, is not to be found from here, or has no manifest.json")
    return None


def of_data(folder, vocab_size, json_file=None):
    """The tokenizer of a data folder; json_file is the tokenizer.json of a vocabulary of one's own."""
    path = os.path.join(folder, "manifest.json")
    manifest = load_json(path)
    try:
        eot, tokens, kind = manifest["eot"], manifest["vocab_size"], manifest["tokenizer"]
        digest = manifest["options"].get("tokenizer_sha256")
    except (KeyError, TypeError, AttributeError):
        raise FileError(f"{path}: it does not say eot, vocab_size, tokenizer and options: data/prepare.py writes them")
    if type(eot) is not int or type(tokens) is not int or not 0 <= eot < tokens <= vocab_size:
        raise FileError(f"{path}: the end of text is {eot} of {tokens} ids, the model has a vocabulary of {vocab_size}")
    if kind != "tokenizer.json":
        if json_file:
            raise FileError(f"{json_file}: the run's data, {folder}, was made with the tokenizer {kind}")
        return of_tokenizer_bin(os.path.join(folder, "tokenizer.bin"), tokens)
    json_file = json_file or os.path.join(folder, "tokenizer.json")
    if not os.path.exists(json_file):
        return ModelTokenizer(eot, None, None, f"none: {folder} was made with a tokenizer.json of one's own, which "
                              "--tokenizer FILE.json adds", tokens)
    with open(json_file, "rb") as f:
        raw = f.read()
    if digest and hashlib.sha256(raw).hexdigest() != digest:
        raise FileError(f"{json_file} is not the tokenizer that {folder} was made with: its SHA-256 is "
                        f"{hashlib.sha256(raw).hexdigest()}, wanted {digest}")
    return of_tokenizer_json(json_file, raw, vocab_size, eot)


def of_tokenizer_bin(path, vocab_size):
    tokens, eot = read_tokenizer(path)
    if len(tokens) != vocab_size:
        raise FileError(f"{path}: it has {len(tokens)} tokens, wanted {vocab_size}")
    eot_text, value = tokenizer_json(tokens, eot, path)
    return ModelTokenizer(eot, eot_text, json_bytes(value), path, len(tokens))


def of_tokenizer_json(path, raw, vocab_size, eot):
    """raw is the file's bytes; eot is what is known of the end of text already."""
    try:
        value = json.loads(raw)
        vocab = value["model"]["vocab"]  # a dict, or Unigram's list of pairs
        ids = {name: i for i, (name, _) in enumerate(vocab)} if isinstance(vocab, list) else dict(vocab)
        ids.update((t["content"], t["id"]) for t in value.get("added_tokens") or [])
        count = max(ids.values()) + 1
    except (ValueError, KeyError, TypeError):
        raise FileError(f"{path}: this is no tokenizer.json with a vocabulary in model.vocab")
    if count > vocab_size:
        raise FileError(f"{path}: it has ids up to {count - 1}, the model has a vocabulary of {vocab_size}")
    text = next((name for name, i in ids.items() if i == eot), None)
    if eot is not None and text is None:
        raise FileError(f"{path}: it has no token {eot}, the end of text of this model")
    if value.get("truncation") or value.get("padding"):  # left from an earlier use; data/prepare.py takes them off too
        raw = json_bytes({**value, "truncation": None, "padding": None})
    return ModelTokenizer(eot, text, raw, path, count)


def choose(model, config, given):
    """The tokenizer of a model: what --tokenizer names, else the run's, else what the model file itself knows."""
    data, eot = run_data(model), config.eot
    if given and os.path.isdir(given):
        data, given = given, None
    if given and given.endswith(".json"):
        if data:
            return of_data(data, config.vocab_size, given)
        with open(given, "rb") as f:
            return of_tokenizer_json(given, f.read(), config.vocab_size, eot)
    if given or data and not os.path.exists(os.path.join(data, "manifest.json")):
        found = of_tokenizer_bin(given or os.path.join(data, "tokenizer.bin"), config.vocab_size)
    elif data:
        found = of_data(data, config.vocab_size)
    else:
        found = ModelTokenizer(eot, None, None, "none: --tokenizer DIR adds the one of the data in DIR")
    return found


# ---- tokenizer.json -----------------------------------------------------------------------------------------------

def byte_characters():
    """GPT-2's printable stand-in for each byte: itself where it prints, else a character from 256 on."""
    prints = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {b: chr(b) for b in prints}
    for b in range(256):
        if b not in table:
            table[b] = chr(256 + len(table) - len(prints))
    return table


def merges_of(tokens):
    """The pair that each token was merged from: what byte pair encoding with the earlier tokens leaves of it. None
    for a vocabulary that such merges do not make."""
    rank = {token: i for i, token in enumerate(tokens)}
    merges = []
    for i, token in enumerate(tokens):
        if len(token) == 1:
            continue
        parts = [token[j:j + 1] for j in range(len(token))]
        while len(parts) > 2:
            ranks = [rank.get(a + b, i) for a, b in zip(parts, parts[1:])]
            j = min(range(len(ranks)), key=ranks.__getitem__)
            if ranks[j] >= i:
                return None
            parts[j:j + 2] = [parts[j] + parts[j + 1]]
        if len(parts) < 2 or any(rank.get(p, i) >= i for p in parts):
            return None
        merges.append(tuple(parts))
    return merges


def tokenizer_json(tokens, eot, path):
    plain = [token for i, token in enumerate(tokens) if i != eot]
    chars = byte_characters()

    def text(token):
        return "".join(chars[b] for b in token)

    is_bytes = plain == [bytes([b]) for b in range(256)]
    merges = [] if is_bytes else merges_of(plain)
    merges = merges and [f"{text(a)} {text(b)}" for a, b in merges]
    bpe = "#version: 0.2\n" + "".join(m + "\n" for m in merges or [])
    if eot != len(plain) or not (is_bytes or hashlib.sha256(bpe.encode()).hexdigest() == GPT2_MERGES_SHA256):
        raise FileError(f"{path}: {len(tokens)} tokens that are neither GPT-2's vocabulary nor plain bytes, so how "
                        "text is cut before merging is unknown: name the tokenizer.json that the data was made with, "
                        "--tokenizer FILE.json")
    try:
        name = tokens[eot].decode()
    except UnicodeDecodeError:
        name = ""
    name = name or "<|endoftext|>"
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": not is_bytes}
    return name, {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": eot, "content": name, "single_word": False, "lstrip": False, "rstrip": False,
                          "normalized": False, "special": True}],
        "normalizer": None, "pre_tokenizer": byte_level, "post_processor": None, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                  "vocab": {**{text(token): i for i, token in enumerate(plain)}, name: eot}, "merges": merges},
    }


def json_bytes(value):
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
