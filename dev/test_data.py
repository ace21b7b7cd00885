"""Proves that data/prepare.py turns every source into exactly the shards that data/README.md describes, that a killed
run goes on to the same bytes, and that each bad input gets one clear message.

    python3 -m pytest dev/test_data.py

It needs tiktoken, tokenizers, pyarrow, zstandard and datasets. GPT-2's ranks are fetched once into data/.cache.
"""
import argparse
import codecs
import errno
import gzip
import hashlib
import io
import json
import os
import random
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import pytest

os.environ["TOKENIZERS_PARALLELISM"] = "false"    # this process forks
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SCRIPT = os.path.join(ROOT, "data", "prepare.py")
sys.path.insert(0, os.path.join(ROOT, "data"))
import prepare  # noqa: E402
from conftest import command_lines  # noqa: E402


def prepared(out, *args):
    """Run in this process; a data set that was made is given back as (manifest, {split: documents of token ids})."""
    assert prepare.main(["--out", str(out)] + [str(a) for a in args]) == 0
    return load(out)


def load(out):
    with open(os.path.join(str(out), "manifest.json")) as f:
        manifest = json.load(f)
    width = {"uint16": 2, "uint32": 4}[manifest["dtype"]]
    split = {}
    for name in ("train", "val"):
        tokens = []
        for shard in manifest["shards"]:
            if shard["name"].startswith(name):
                data = read(out, shard["name"])
                head = struct.unpack("<256i", data[:1024])
                assert head[:3] == ((20240520, 1) if width == 2 else (20240801, 7)) + (shard["tokens"],)
                assert not any(head[3:]) and len(data) == 1024 + width * shard["tokens"]
                assert hashlib.sha256(data).hexdigest() == shard["sha256"]
                tokens += struct.unpack("<%d%s" % (shard["tokens"], "H" if width == 2 else "I"), data[1024:])
        assert len(tokens) == manifest["counts"][name]["tokens"]
        documents = []
        for t in tokens:
            if t == manifest["eot"]:
                documents.append([])
            else:
                documents[-1].append(t)    # fails where a split does not begin with the end-of-text id
        assert len(documents) == manifest["counts"][name]["documents"]
        split[name] = documents
    left = set(os.listdir(str(out))) - {s["name"] for s in manifest["shards"]} - {"manifest.json", "tokenizer.bin"}
    left -= {"tokenizer.json"} if manifest["tokenizer"] == "tokenizer.json" else set()
    assert not left, "left behind: %s" % left
    return manifest, split


def read(*path):
    with open(os.path.join(*map(str, path)), "rb") as f:
        return f.read()


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def contents(out):
    return {name: read(out, name) for name in sorted(os.listdir(str(out)))}


def texts(split, which):
    return [bytes(d) for d in split[which]]


@pytest.fixture(scope="session")
def ranks():
    try:
        return prepare.gpt2_ranks(os.path.join(prepare.DATA_DIR, ".cache"))
    except prepare.Failure as e:
        pytest.fail("GPT-2's ranks are needed for this test: %s" % e)


# ---------------------------------------------------------------------------- the formats, byte by byte

def test_golden_shard(tmp_path):
    write(tmp_path / "in" / "a.txt", "Hi\n")
    write(tmp_path / "in" / "b.txt", b"\xff!")
    prepared(tmp_path / "out", "--source", "files", "--input", tmp_path / "in")

    def shard(body):
        head = bytes.fromhex("88d83401" "01000000") + struct.pack("<i", len(body) // 2)    # 0x0134d888 is 20240520
        return head + bytes(1024 - len(head)) + body
    assert read(tmp_path, "out", "train_000000.bin") == shard(bytes.fromhex("0001" "4800" "6900" "0a00"))
    assert read(tmp_path, "out", "val_000000.bin") == shard(bytes.fromhex("0001" "ff00" "2100"))


def test_golden_tokenizer_file(tmp_path):
    write(tmp_path / "in.txt", "x")
    prepared(tmp_path / "out", "--source", "files", "--input", tmp_path / "in.txt")
    data = read(tmp_path, "out", "tokenizer.bin")
    assert struct.unpack("<5i", data[:20]) == (20240328, 2, 257, 256, 0) and data[20:1024] == bytes(1004)
    assert data[1024:] == b"".join(b"\x01" + bytes([i]) for i in range(256)) + b"\x0d<|endoftext|>"


def word_tokenizer(path, words, **more):
    from tokenizers import Tokenizer, models, pre_tokenizers
    tok = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tok.pre_tokenizer = pre_tokenizers.Whitespace()
    for name, value in more.items():
        setattr(tok, name, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    tok.save(str(path))
    return path


def test_wide_shards(tmp_path):
    path = word_tokenizer(tmp_path / "wide" / "tokenizer.json",
                          ["w%d" % i for i in range(69998)] + ["[UNK]", "</s>"])
    write(tmp_path / "in.txt", "w1 w65535\nw65536 what w69997")
    manifest, split = prepared(tmp_path / "out", "--source", "files", "--input", tmp_path / "in.txt",
                               "--tokenizer", path)
    assert (manifest["vocab_size"], manifest["eot"], manifest["dtype"]) == (70000, 69999, "uint32")
    assert read(tmp_path, "out", "train_000000.bin")[:12] == struct.pack("<iii", 20240801, 7, 6)
    assert read(tmp_path, "out", "train_000000.bin")[1024:] == bytes.fromhex(
        "6f110100" "01000000" "ffff0000" "00000100" "6e110100" "6d110100")


def test_a_token_longer_than_the_format_holds(tmp_path, capsys):
    """tokenizer.bin has its first 255 bytes, and says so; the tokens behind it are where they should be."""
    path = word_tokenizer(tmp_path / "long" / "tokenizer.json", ["[UNK]", "x" * 300, "b", "</s>"])
    write(tmp_path / "in.txt", "b")
    prepared(tmp_path / "out", "--source", "files", "--input", tmp_path / "in.txt", "--tokenizer", path)
    assert read(tmp_path, "out", "tokenizer.bin")[1024:] == \
        b"\x05[UNK]" + b"\xff" + b"x" * 255 + b"\x01b" + b"\x04</s>"
    assert "token 1 has 300 bytes, of which the format holds the first 255" in capsys.readouterr().err


def test_vocabulary_border(tmp_path):
    write(tmp_path / "in.txt", "w1")
    for words, dtype in ((65535, "uint16"), (65536, "uint32")):
        path = word_tokenizer(tmp_path / str(words) / "tokenizer.json",
                              ["[UNK]", "</s>"] + ["w%d" % i for i in range(words - 2)])
        manifest, _ = prepared(tmp_path / ("out%d" % words), "--source", "files", "--input", tmp_path / "in.txt",
                               "--tokenizer", path)
        assert (manifest["vocab_size"], manifest["dtype"]) == (words, dtype)


def test_readme_recipe(tmp_path):
    """The ten lines of data/README.md that write a shard of one's own do so."""
    text = read(ROOT, "data", "README.md").decode()
    code = re.search(r"```python\n(.*?)```", text, re.S).group(1)
    os.mkdir(str(tmp_path / "data"))
    subprocess.run([sys.executable, "-c", code], cwd=str(tmp_path), check=True)
    want = struct.pack("<256i", 20240520, 1, 12, *[0] * 253) + struct.pack("<12H", 256, *b"Hello", 256, *b"World")
    assert read(tmp_path, "data", "mine", "train_000000.bin") == want


def test_the_line_to_train_with(tmp_path, capsys):
    """It gives what the trainer cannot guess: another tokenizer's vocabulary, and that there is no validation split."""
    path = word_tokenizer(tmp_path / "words" / "tokenizer.json", ["[UNK]", "</s>", "a", "b"])
    for name in ("1.txt", "2.txt"):
        write(tmp_path / "in" / name, "a b")
    for more, val, end in (([], "val_*.bin", ""), (["--val-fraction", "0"], "", ""),
                           (["--tokenizer", path], "val_*.bin", " --vocab-size 4"),
                           (["--tokenizer", path, "--val-fraction", "0"], "", " --vocab-size 4")):
        out = os.path.relpath(str(tmp_path / ("out%d" % len(os.listdir(str(tmp_path))))))
        prepared(out, "--source", "files", "--input", tmp_path / "in", *more)
        want = "train with: --train-data '%s/train_*.bin' --val-data '%s'%s" % (out, val and out + "/" + val, end)
        assert capsys.readouterr().out.splitlines()[-1] == want


def test_the_line_to_train_with_is_for_a_shell(tmp_path, capsys):
    write(tmp_path / "in.txt", "text")
    prepared(tmp_path / "it's [v1]", "--source", "files", "--input", tmp_path / "in.txt")
    line = capsys.readouterr().out.splitlines()[-1]
    assert shlex.split(line)[2:] == ["--train-data", os.path.relpath(str(tmp_path / "it's [v1]")) + "/train_*.bin",
                                     "--val-data", ""]


# ---------------------------------------------------------------------------- tokenizers

def test_gpt2(tmp_path, ranks):
    tok = prepare.Gpt2Tokenizer(ranks)
    assert struct.unpack("<2H", tok.encode(b"Hello world")[0]) == (15496, 995)
    assert len(tok.token_bytes()) == 50257 and tok.token_bytes()[15496] == b"Hello"
    write(tmp_path / "in" / "a.txt", "Hello world")
    write(tmp_path / "in" / "b.txt", "I say <|endoftext|> here")
    write(tmp_path / "in" / "c.txt", b"caf\xc3\xa9 \xff")
    manifest, split = prepared(tmp_path / "out", "--source", "files", "--input", tmp_path / "in", "--tokenizer",
                               "gpt2", "--val-fraction", "0", "--workers", "2")
    a, b, c = split["train"]    # load() splits at 50256: the spelled end of text has not become one
    assert a == [15496, 995]
    table = tok.token_bytes()
    assert b"".join(table[i] for i in b) == b"I say <|endoftext|> here"
    assert b"".join(table[i] for i in c) == "caf\u00e9 \ufffd".encode()
    assert list(manifest["left_out"].values()) == [1]    # said, not hidden
    assert manifest["counts"]["train"] == {"documents": 3, "tokens": 3 + len(a + b + c), "bytes": 11 + 24 + 7}
    data, tokens = read(tmp_path, "out", "tokenizer.bin"), []
    at = 1024
    while at < len(data):
        tokens.append(data[at + 1:at + 1 + data[at]])
        at += 1 + data[at]
    assert struct.unpack("<4i", data[:16]) == (20240328, 2, 50257, 50256)
    assert tokens == table and tokens[50256] == b"<|endoftext|>"


def test_pieces_do_not_change_tokens(monkeypatch, ranks):
    """Where a document is cut, GPT-2's tokens are those of the whole; and the cuts do not depend on the chunks."""
    monkeypatch.setattr(prepare, "PIECE", 300)
    rng = random.Random(5)
    alphabet = ["a", "Zz", "7", "'s", "'re", " ", "  ", "\n", "\n\n", "\t", "\r\n", "...", "{", "\u00e9",
                "\u4e2d\u6587", "\u3000", "\u00a0", "\x1c", "\x85", "\U0001f600", "\u0301",
                "int x;\n", "\u0434\u0430\n"]
    documents = ["".join(rng.choice(alphabet) for _ in range(4000)).encode() for _ in range(30)]
    documents.append(read(os.path.join(os.path.dirname(os.__file__), "argparse.py")))
    tok = prepare.Gpt2Tokenizer(ranks)
    total = 0
    for d in documents:
        pieces = list(prepare.cut_pieces([d], "line"))
        total += len(pieces)
        assert b"".join(pieces) == d
        assert b"".join(tok.encode(p)[0] for p in pieces) == tok.encode(d)[0]
        chunks = [d[i:i + 7] for i in range(0, len(d), 7)]
        assert list(prepare.cut_pieces(chunks, "line")) == pieces
        assert list(prepare.cut_pieces(chunks, "never")) == [d]
        assert list(prepare.cut_pieces(chunks, "anywhere")) == list(prepare.cut_pieces([d], "anywhere"))
    assert total > 300
    assert list(prepare.cut_pieces([b"x" * 5000], "line")) == [b"x" * 5000]


def test_where_a_line_ends(monkeypatch):
    """Between a sign that is no space and a letter, each of one byte or several: text of any script is cut, and nowhere else."""
    for text, cuts in (("a.\nb", True), ("\u044f\u00e9\n\u044f", True), ("\u4e00\u3002\n\u4e00", True), ("a\u00a0\nb", False), ("a\u3000\nb", False),
                       ("a \nb", False), ("a\n\u00a0b", False), ("a\n b", False), ("a\n1", False), ("\nb", False)):
        data = bytearray(text.encode())
        assert prepare.line_end(data, 0, len(data), +1) == (data.index(b"\n") + 1) * cuts, ascii(text)
    monkeypatch.setattr(prepare, "PIECE", 300)
    text = "\u0421\u043b\u043e\u0432\u043e \u0438 \u0434\u0435\u043b\u043e.\n".encode() * 100
    pieces = list(prepare.cut_pieces([text], "line"))
    assert b"".join(pieces) == text and 200 < min(map(len, pieces[:-1])) and max(map(len, pieces)) <= 300


def test_gpt2_words(ranks):
    """Text is cut into words as Hugging Face's own byte-level pre-tokenizer cuts it, contractions in capitals too."""
    from tokenizers import pre_tokenizers
    cut, tok = pre_tokenizers.ByteLevel(add_prefix_space=False), prepare.Gpt2Tokenizer(ranks)
    rng = random.Random(6)
    texts = ["".join(rng.choice("aZ7\u00e9\u4e2d'sStTdDmM rRlLveVE.\n\t\u00b2\u0663\u00a0") for _ in range(2000)) for _ in range(20)]
    for text in texts + ["it'S it's 'LL 'll 'Ve\u00e9'd 12'3"]:
        words = [text[a:b].encode() for _, (a, b) in cut.pre_tokenize_str(text)]
        assert b"".join(words) == text.encode() and len(words) > 8
        ids = [i for word in words for i in tok.encoding._encode_single_piece(word)]
        assert tok.encode(text.encode())[0] == prepare.little_endian(ids, False)


def test_tokenizer_json(tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    tok.train_from_iterator(["the cat sat on the mat\n" * 20], trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|im_start|>", "<|endoftext|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tok.enable_truncation(3)    # such settings are often left in a file; they must not shorten documents
    tok.enable_padding(length=50)
    tok.save(str(tmp_path / "tokenizer.json"))
    text = "the cat <|endoftext|> <|im_start|> sat\n\u00e9\U0001f600\x00\n"
    write(tmp_path / "in.jsonl", json.dumps({"text": text}))
    manifest, split = prepared(tmp_path / "out", "--source", "files", "--input", tmp_path / "in.jsonl",
                               "--tokenizer", tmp_path / "tokenizer.json")
    assert read(tmp_path / "out", "tokenizer.json") == read(tmp_path / "tokenizer.json")  # for scripts/export_hf
    ours = prepare.JsonTokenizer(str(tmp_path / "tokenizer.json"))
    assert (ours.eot, ours.cut) == (1, "line") and manifest["eot"] == 1
    table = ours.token_bytes()
    assert b"".join(table[i] for i in split["train"][0]) == text.encode()
    assert 0 not in split["train"][0] and table[1] == b"<|endoftext|>"
    assert prepare.JsonTokenizer(str(tmp_path / "tokenizer.json"), "<|im_start|>").eot == 0

    # SentencePiece's manner: a space before every text, "<0x0A>" for a byte; documents must stay whole
    sp = word_tokenizer(tmp_path / "sp.json", ["[UNK]", "</s>", "\u2581int", "<0x0A>"],
                        pre_tokenizer=pre_tokenizers.Metaspace(), decoder=decoders.Metaspace())
    ours = prepare.JsonTokenizer(str(sp))
    assert ours.cut == "never" and ours.token_bytes() == [b"[UNK]", b"</s>", b" int", b"\n"]


def test_long_white_space(tmp_path, ranks):
    """tiktoken panics on it; the tokens are those that it would give."""
    tok, rng = prepare.Gpt2Tokenizer(ranks), random.Random(0)
    for _ in range(50):
        text = "".join(rng.choice(["a", " ", "\n", "\t", "\u3000", "\x85", "7", "...", "\x1c"])
                       * rng.choice([1, 2, 900, 1500]) for _ in range(8))
        assert tok.encode(text.encode())[0] == struct.pack("<%dH" % len(tok.encoding.encode_ordinary(text)),
                                                           *tok.encoding.encode_ordinary(text))
    write(tmp_path / "in.jsonl", json.dumps({"text": "a" + " \n" * 500000 + " b"}) + '\n{"text": "last"}\n')
    for workers in (1, 2):
        _, split = prepared(tmp_path / ("out%d" % workers), "--source", "files", "--input", tmp_path / "in.jsonl",
                            "--tokenizer", "gpt2", "--workers", workers, "--val-fraction", "0")
        table = tok.token_bytes()
        assert b"".join(table[t] for t in split["train"][0]) == b"a" + b" \n" * 500000 + b" b"
        assert len(split["train"]) == 2


class Panic(BaseException):
    """As pyo3 raises it."""


Panic.__name__ = "PanicException"


def test_tokenizer_that_fails(tmp_path, ranks, monkeypatch, capsys):
    """One record does not end the preparation: its text is cut until what fails is small, and only that is left out."""
    class Fragile(prepare.Gpt2Tokenizer):
        def encode(self, data):
            if len(data) > 1000 and b"long" in data or b"\xe2\x98\xa0" in data:
                raise Panic("it broke")
            return super().encode(data)

    monkeypatch.setattr(prepare, "Gpt2Tokenizer", Fragile)
    bad = "x" * 3000 + "\u2620" + "y" * 3000
    write(tmp_path / "in.jsonl", "".join(json.dumps({"text": t}) + "\n"
                                         for t in ("one", "so long " * 200, bad, "four")))
    manifest, split = prepared(tmp_path / "out", "--source", "files", "--input", tmp_path / "in.jsonl", "--tokenizer",
                               "gpt2", "--workers", "1", "--val-fraction", "0")
    table = Fragile(ranks).token_bytes()
    got = [b"".join(table[t] for t in d) for d in split["train"]]
    lost = manifest["left_out"]["bytes of text that the tokenizer could not take"]
    assert got[0] == b"one" and got[1] == b"so long " * 200 and got[3] == b"four"
    assert set(got[2]) == set(b"xy") and len(got[2]) == len(bad.encode()) - lost and 3 <= lost <= 64
    assert manifest["counts"]["train"]["bytes"] == sum(map(len, got))
    name = manifest["left_out_names"]["bytes of text that the tokenizer could not take"]
    assert name == ["%s:3: PanicException: it broke" % (tmp_path / "in.jsonl")]
    write(tmp_path / "all.txt", "\u2620")
    fails(capsys, ["--source", "files", "--input", tmp_path / "all.txt", "--tokenizer", "gpt2", "--out",
                   tmp_path / "none", "--workers", "1"], 1, "gave no text.*could not take .*it broke")


def test_what_a_tokenizer_changes(tmp_path, capsys):
    """A sample is decoded and compared, and unknown tokens are counted."""
    from tokenizers import normalizers
    path = word_tokenizer(tmp_path / "words" / "tokenizer.json", ["[UNK]", "</s>", "the", "cat"],
                          normalizer=normalizers.Lowercase())
    write(tmp_path / "in" / "a.txt", "the cat")
    write(tmp_path / "in" / "b.txt", "The\r\ncat sat \u00e9")
    write(tmp_path / "in" / "c.txt", "the </s> cat")
    manifest, _ = prepared(tmp_path / "out", "--source", "files", "--input", tmp_path / "in", "--tokenizer", path,
                           "--val-fraction", "0")
    assert manifest["left_out"] == {"of 3 samples that the tokenizer does not give back as they were": 2,
                                    "unknown tokens, for text that the tokenizer has no token for": 5}
    out = capsys.readouterr().out
    assert r"(%s: 'The\r\ncat sat \xe9' becomes 'the cat [UNK] [U'" % (tmp_path / "in" / "b.txt") in out
    tokens = word_tokenizer(tmp_path / "narrow" / "tokenizer.json", ["</s>", "the"])    # no [UNK]: it refuses words
    write(tmp_path / "in" / "d.txt", "the")
    manifest, split = prepared(tmp_path / "two", "--source", "files", "--input", tmp_path / "in", "--tokenizer", tokens,
                               "--val-fraction", "0")
    assert manifest["left_out"]["bytes of text that the tokenizer could not take"] == 7 + 15 + 12
    assert split["train"][-1] == [1] and manifest["counts"]["train"]["bytes"] == 3


# ---------------------------------------------------------------------------- sources

def test_pystdlib(tmp_path):
    """With no package but Python's own (-S hides them), and the same bytes again."""
    made = []
    for name in ("one", "two"):
        subprocess.run([sys.executable, "-I", "-S", SCRIPT, "--out", str(tmp_path / name), "--max-bytes", "2.5M",
                        "--exclude", "encodings/*"], check=True, capture_output=True)
        made.append(contents(tmp_path / name))
    assert made[0] == made[1]
    manifest, split = load(tmp_path / "one")
    total = sum(c["bytes"] for c in manifest["counts"].values())
    assert 1000000 < total <= 2500000
    documents = texts(split, "train") + texts(split, "val")
    asyncio = [d for d in documents if d.startswith(b"# asyncio/")]
    assert len(asyncio) == 1 and b"\n# asyncio/base_events.py\n" in asyncio[0]    # a package is one document
    names = re.findall(rb"^# (asyncio/[a-z_]+\.py)$", asyncio[0], re.M)
    assert names == sorted(names) and len(names) > 20
    assert any(d.startswith(b"# argparse.py\n") for d in documents)
    assert not any(d.startswith(b"# encodings") for d in documents)


KERNEL = [("linux-9.9/.config", "no"), ("linux-9.9/Makefile", "all:\n"), ("linux-9.9/b/Kconfig.x", "config X\n"),
          ("linux-9.9/b/a.c", "int a;"), ("linux-9.9/b/fw.bin", b"\0\1"), ("linux-9.9/b/c/t.S", "nop\n"),
          ("linux-9.9/b/z.h", "int z;\n"), ("linux-9.9/doc/i.rst", "Title\n"), ("linux-9.9/doc/n.txt", "n\n")]
KERNEL_DOCUMENTS = [b"# Makefile\nall:\n", b"# b/Kconfig.x\nconfig X\n/* b/a.c */\nint a;\n", b"/* b/c/t.S */\nnop\n",
                    b"/* b/z.h */\nint z;\n", b".. doc/i.rst\nTitle\n# doc/n.txt\nn\n"]


def tar_of(members, compression):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:" + compression) as t:
        for name, data in members:
            data = data if isinstance(data, bytes) else data.encode()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            t.addfile(info, io.BytesIO(data))
    return out.getvalue()


def ar_of(members):
    out = b"!<arch>\n"
    for name, data in members:
        out += b"%-16s%-12d%-6d%-6d%-8s%-10d`\n" % (name, 0, 0, 0, b"100644", len(data))
        out += data + b"\n" * (len(data) % 2)
    return out


def test_linux(tmp_path):
    import zstandard
    inner = tar_of(KERNEL, "xz")
    data = [("./usr/share/doc/linux-source-9.9/copyright", "GPL"), ("./usr/src/linux-source-9.9.tar.xz", inner)]
    control = (b"control.tar.xz", b"odd")
    archives = {
        "linux-9.9.tar.xz": inner, "linux-9.9.tar.gz": tar_of(KERNEL, "gz"), "linux-9.9.tar": tar_of(KERNEL, ""),
        "xz.deb": ar_of([(b"debian-binary", b"2.0\n"), control, (b"data.tar.xz", tar_of(data, "xz"))]),
        "zst.deb": ar_of([(b"debian-binary/", b"2.0\n"), control,
                          (b"data.tar.zst/", zstandard.ZstdCompressor().compress(tar_of(data, "")))]),
    }
    for name, archive in archives.items():
        write(tmp_path / name, archive)
        manifest, split = prepared(tmp_path / (name + ".out"), "--source", "linux", "--linux-archive",
                                   tmp_path / name, "--val-fraction", "0")
        assert texts(split, "train") == KERNEL_DOCUMENTS, name
        assert manifest["options"]["archive_sha256"] == hashlib.sha256(archive).hexdigest()
    manifest, split = prepared(tmp_path / "some", "--source", "linux", "--linux-archive", tmp_path / "xz.deb",
                               "--val-fraction", "0", "--exclude", "b/*")
    assert texts(split, "train") == [KERNEL_DOCUMENTS[0], KERNEL_DOCUMENTS[4]]
    assert manifest["left_out"] == {"excluded files": 4, "files that are no source text": 2}
    assert manifest["left_out_names"]["files that are no source text"] == [".config", "b/fw.bin"]


def test_linux_spools_long_directories(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "SPOOL", 1000)    # so that the documents go through a file
    write(tmp_path / "linux-1.tar.xz", tar_of([("l/a/1.c", b"x" * 5000), ("l/b/2.c", b"y" * 7000)], "xz"))
    _, split = prepared(tmp_path / "out", "--source", "linux", "--linux-archive", tmp_path / "linux-1.tar.xz")
    assert texts(split, "val") == [b"/* a/1.c */\n" + b"x" * 5000 + b"\n"]
    assert texts(split, "train") == [b"/* b/2.c */\n" + b"y" * 7000 + b"\n"]


def test_files(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq
    import zstandard
    d = tmp_path / "in"
    lines = [json.dumps({"text": "line %d \u00e9" % i, "id": i}) for i in range(3)]
    lines += ["", '{"text": ""}', '{"text": null}']
    write(d / "a.jsonl", "\n".join(lines))
    write(d / "b.jsonl.gz", gzip.compress("\n".join(lines).encode()))
    write(d / "c.jsonl.zst", zstandard.ZstdCompressor().compress("\n".join(lines).encode() + b"\n"))
    pq.write_table(pa.table({"id": [1, 2], "text": ["row 0", "row 1"]}), str(d / "d.parquet"))
    write(d / "e" / "plain.md", "plain\n")
    write(d / "e" / "empty", "")
    write(d / "e.txt.gz", gzip.compress(b"packed"))
    write(d / "f.png", b"\x89PNG\0\0")
    write(d / ".hidden" / "g.txt", "hidden")
    jsonl = [("line %d \u00e9" % i).encode() for i in range(3)]
    want = jsonl + jsonl + jsonl + [b"row 0", b"row 1", b"plain\n", b"packed"]
    manifest, split = prepared(tmp_path / "out", "--source", "files", "--input", d, "--val-fraction", "0")
    assert texts(split, "train") == want
    assert manifest["left_out"] == {"empty documents": 7, "files that are not text": 1, "hidden files and folders": 1}
    assert manifest["counts"]["train"] == {"documents": 13, "tokens": 13 + sum(map(len, want)),
                                           "bytes": sum(map(len, want))}
    # single files, in the order given, and another field
    write(tmp_path / "x.jsonl", '{"body": "x\\ud800"}\n{"body": "y"}\n')
    _, split = prepared(tmp_path / "out2", "--source", "files", "--input", tmp_path / "x.jsonl", "--text-field", "body")
    assert texts(split, "train") + texts(split, "val") == [b"x\xed\xa0\x80", b"y"]


def test_a_long_text_is_no_records(tmp_path):
    """What a text is read as goes by its first line, not by the one that the second block happens to begin with."""
    text = (b"x" * 1023 + b"\n") * 1024 + b'{"text": "y"}\n'
    write(tmp_path / "a.txt", text)
    _, split = prepared(tmp_path / "out", "--source", "files", "--input", tmp_path / "a.txt", "--val-fraction", "0")
    assert texts(split, "train") == [text]


@pytest.mark.parametrize("change", [lambda f: f.write(b"more"), lambda f: f.truncate(3)])
def test_a_file_that_changes_while_it_is_read(tmp_path, change):
    path = str(write(tmp_path / "a.txt", "a text\n"))
    _, size, chunks = prepare.text_document(path, None, str(tmp_path), 0, prepare.Meter())
    with open(path, "ab") as f:
        change(f)
    with pytest.raises(prepare.Failure, match="a.txt changed its size while it was read"):
        list(chunks)
    assert size == 7


def test_excluded_folders(tmp_path):
    """A pattern is compared with a folder's path and a slash: 'e/*' leaves it out whole, 'e' is a file's name."""
    for name in ("e/x", "e/y", "f/e", "z"):
        write(tmp_path / "in" / name, name)
    for pattern, want, left_out in (("e/*", ["f/e", "z"], {"excluded folders": 1}),
                                    ("e", ["e/x", "e/y", "f/e", "z"], {}),
                                    ("*e", ["e/x", "e/y", "z"], {"excluded files": 1}),
                                    ("z", ["e/x", "e/y", "f/e"], {"excluded files": 1})):
        manifest, split = prepared(tmp_path / "out", "--source", "files", "--input", tmp_path / "in", "--val-fraction", "0",
                                   "--exclude", pattern, "--force")
        assert texts(split, "train") == [t.encode() for t in want] and manifest["left_out"] == left_out, pattern


def packed(kind, data):
    """One whole stream of compressed data."""
    import bz2
    import lzma
    import zstandard
    return {"gz": gzip.compress, "xz": lzma.compress, "bz2": bz2.compress,
            "zst": zstandard.ZstdCompressor(write_checksum=True).compress}[kind](data)


@pytest.mark.parametrize("kind", ["gz", "xz", "bz2", "zst"])
def test_compressed_to_the_end(tmp_path, capsys, kind):
    """Every stream is read, and each must be whole: Python's readers take a damaged second one for the end."""
    parts = [b"".join(b"%d line %d\n" % (n, i * i) for i in range(2000)) for n in (1, 2)]
    one, two = (packed(kind, p) for p in parts)
    padding = {"gz": b"\0" * 300, "xz": b"\0" * 8}.get(kind, b"")
    skipped = b"\x5a\x2a\x4d\x18" + struct.pack("<I", 5) + b"hello" if kind == "zst" else b""
    good = {"one": (one, parts[:1]), "two": (one + two, parts),
            "more": (skipped + one + skipped + two + padding, parts)}
    if padding:    # the second stream's head is cut where a block of 16 KiB ends
        good["cut"] = one + bytes((16384 - {"gz": 1, "xz": 4}[kind] - len(one)) % 16384) + two, parts
    for name, (data, want) in good.items():
        for path in (tmp_path / name / ("t.txt." + kind), tmp_path / name / "t.txt"):    # the content tells
            write(path, data)
            _, split = prepared(tmp_path / ("out_%s_%s" % (name, path.name)), "--source", "files", "--input", path)
            assert texts(split, "train") == [b"".join(want)]
    damaged = bytearray(one + two)
    damaged[len(one) + 1] ^= 0x55    # the second header
    flipped = bytearray(one)
    flipped[len(one) // 2] ^= 0x10
    for name, data in {"half": one[:len(one) // 2], "end": (one + two)[:-1], "head": one + two[:3], "flipped": flipped,
                       "damaged": damaged, "garbage": one + b"garbage behind the end", "none": b""}.items():
        path = write(tmp_path / (name + ".txt." + kind), bytes(data))
        fails(capsys, ["--source", "files", "--input", path, "--out", tmp_path / ("bad_" + name)], 1,
              "%s.txt.%s cannot be decompressed" % (name, kind))
    lines = write(tmp_path / ("r.jsonl." + kind), packed(kind, b'{"text": "a"}\n') + one[:3])    # cut at a line end
    fails(capsys, ["--source", "files", "--input", lines, "--out", tmp_path / "bad_lines"], 1, "cannot be decompressed")


def test_large_zstd_windows(tmp_path):
    """As zstd --long=31 writes them."""
    import zstandard
    c = zstandard.ZstdCompressor(compression_params=zstandard.ZstdCompressionParameters(window_log=30)).compressobj()
    path = write(tmp_path / "t.zst", c.compress(b"far apart") + c.flush())
    _, split = prepared(tmp_path / "out", "--source", "files", "--input", path)
    assert texts(split, "train") == [b"far apart"]


RECORDS = [{"text": "one,\n\"1\" \u00e9", "meta": {"kind": "a"}}, {"text": "two", "meta": {"kind": "b"}}]
RECORD_TEXTS = [r["text"].encode() for r in RECORDS]
RECORD_FILES = {
    "c4-train.00000-of-01024.json.gz": gzip.compress("".join(json.dumps(r) + "\n" for r in RECORDS).encode()),
    "array.json": json.dumps(RECORDS), "pretty.json": json.dumps(RECORDS, indent=4) + "\n",
    "side by side.JSON": "\n".join(json.dumps(r, indent=1) for r in RECORDS),
    "C.JSONL": "\ufeff" + "\r\n".join(json.dumps(r, ensure_ascii=False) for r in RECORDS),
    "part-00000": "".join(json.dumps(r) + "\n" for r in RECORDS),
    "utf16.jsonl": codecs.BOM_UTF16_LE + "\n".join(json.dumps(r) for r in RECORDS).encode("utf-16-le"),
    "t.csv": 'id,text\r\n1,"one,\n""1"" \u00e9"\r\n\r\n2,two\r\n', "T.TSV.gz": gzip.compress(
        'text\tid\n"one,\n""1"" \u00e9"\t1\ntwo\t2'.encode())}


@pytest.mark.parametrize("name", RECORD_FILES)
def test_records_under_every_name(tmp_path, monkeypatch, name):
    for piece in (1 << 20, 7):    # also where a record does not fit into what is read at once
        monkeypatch.setattr(prepare, "PIECE", piece)
        path = write(tmp_path / name, RECORD_FILES[name])
        _, split = prepared(tmp_path / ("out%d" % piece), "--source", "files", "--input", path, "--val-fraction", "0")
        assert texts(split, "train") == RECORD_TEXTS
    manifest, split = prepared(tmp_path / "plain", "--source", "files", "--input", path, "--as-text", "*" + name[-4:])
    assert manifest["counts"]["train"]["documents"] == 1 and len(texts(split, "train")[0]) > sum(map(len, RECORD_TEXTS))


def test_bad_records(tmp_path, capsys):
    for name, data, pattern in [
        ("a.json", '[{"text": "x"}', "not JSON behind its record 1: its array has no end"),
        ("b.json", '[{"text": "x"} {"text": "y"}]', "behind its record 1: a comma or ] is due"),
        ("c.json", '[{"text": "x"}]\n[]', "behind its record 1: there is more behind the end"),
        ("d.json", '{"text": "x"}{"text": ', "behind its record 1: "),
        ("l.json", '[, {"text": "x"}]', "l.json is not JSON behind its record 0: "),
        ("e.json", '{"name": "package", "version": 2}', "e.json, record 1, has no field 'text' .*--as-text"),
        ("f.csv", "id,text\n1\n", "f.csv, line 2, is not a row of such a table: the row has 1 values"),
        ("g.csv", 'id,text\n1,"open\n2,x\n', "g.csv, line 3, is not a row"),
        ("h.csv", "id,body\n1,x\n", r"h.csv, line 2, has no field 'text' \(it has: body, id\)"),
        ("i.jsonl", "[" * 100000 + "\n", "i.jsonl, line 1, is not JSON"),
        ("j.json", "[" * 100000, "j.json is not JSON"),
        ("k.txt", codecs.BOM_UTF16_LE + b"a", "k.txt is not utf-16 text, of which it has the byte-order mark"),
    ]:
        path = write(tmp_path / name, data)
        fails(capsys, ["--out", tmp_path / ("out_" + name), "--source", "files", "--input", path], 1, pattern)


def test_text_as_it_is(tmp_path):
    """A byte-order mark is no text; a zero byte anywhere says that a file is none; line ends stay."""
    d = tmp_path / "in"
    write(d / "a.txt", codecs.BOM_UTF8 + b"marked\r\n")
    write(d / "b.txt", codecs.BOM_UTF16_BE + "wide \u00e9".encode("utf-16-be"))
    write(d / "c.txt", b"x" * 3000000 + b"\0")
    write(d / "d.txt", b"late mark \xef\xbb\xbf\r")
    write(d / "e.jsonl", b'{"text": "not \xff UTF-8"}\n{"text": "\\u0000"}\n')
    manifest, split = prepared(tmp_path / "out", "--source", "files", "--input", d, "--val-fraction", "0")
    assert texts(split, "train") == [b"marked\r\n", "wide \u00e9".encode(), b"late mark \xef\xbb\xbf\r",
                                     "not \ufffd UTF-8".encode(), b"\0"]
    assert manifest["left_out"] == {"files that are not text": 1,
                                    "bytes that are not UTF-8 in records, replaced by U+FFFD": 1}
    assert manifest["left_out_names"]["files that are not text"] == [str(d / "c.txt")]


def test_what_a_folder_holds(tmp_path, capsys):
    """Links are followed, each file is taken once, and what cannot be taken is counted and named."""
    d = tmp_path / "in"
    write(d / "books" / "a.txt", "a")
    write(tmp_path / "elsewhere" / "b.txt", "behind a link")
    write(d / ".git" / "config", "hidden")
    os.symlink(str(tmp_path / "elsewhere"), str(d / "wiki"))
    os.symlink("../gone", str(d / "books" / "c.txt"))
    os.symlink("self", str(d / "self"))
    os.symlink(str(d), str(d / "wiki" / "loop"))
    os.symlink("a.txt", str(d / "books" / "z.txt"))
    os.mkfifo(str(d / "pipe"))
    manifest, split = prepared(tmp_path / "out", "--source", "files", "--input", d, d / "books", "--val-fraction", "0")
    assert texts(split, "train") == [b"a", b"behind a link"]
    assert manifest["left_out"] == {
        "links to nothing": 3, "hidden files and folders": 1, "pipes, sockets and devices": 1,
        "folders that were taken already, under another name": 1,
        "files that were taken already, under another name": 3}
    assert manifest["left_out_names"]["links to nothing"][:1] == [str(d / "self")]
    fails(capsys, ["--source", "files", "--input", d / "pipe", "--out", tmp_path / "o"], 2,
          "neither a file nor a folder")


def test_closed_folders(tmp_path):
    """Run as a user who may not read them."""
    if os.geteuid():
        pytest.skip("only root can become another user")
    with tempfile.TemporaryDirectory() as made:
        top = Path(made)
        os.chmod(str(top), 0o777)
        for name in ("corpus/a.txt", "corpus/closed/b.txt", "corpus/shut.txt", "corpus/blind/c.txt"):
            write(top / name, name)
        os.chmod(str(top / "corpus" / "closed"), 0o700)
        os.chmod(str(top / "corpus" / "shut.txt"), 0o600)
        os.chmod(str(top / "corpus" / "blind"), 0o744)    # its names may be read, its files not
        shutil.copy(SCRIPT, str(top))
        done = subprocess.run(["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "/usr/bin/python3",
                               str(top / "prepare.py"), "--source", "files", "--input", str(top / "corpus"),
                               "--out", str(top / "out")], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        manifest, split = load(top / "out")
        assert texts(split, "train") == [b"corpus/a.txt"]
        assert manifest["left_out"] == {"folders that may not be read": 1, "files that may not be read": 2}
        assert "left out: 1 folders that may not be read (%s/corpus/closed)" % top in done.stdout


def test_hf(tmp_path):
    write(tmp_path / "set" / "train.jsonl", "".join('{"body": "record %d"}\n' % i for i in range(40)))
    done = subprocess.run([sys.executable, SCRIPT, "--source", "hf", "--hf-name", str(tmp_path / "set"),
                           "--text-field", "body", "--out", str(tmp_path / "out")],
                          capture_output=True, text=True, env=dict(os.environ, HF_HUB_OFFLINE="1",
                                                                   HF_HOME=str(tmp_path / "home")))
    assert done.returncode == 0, done.stderr
    manifest, split = load(tmp_path / "out")
    assert manifest["counts"]["train"]["documents"] + manifest["counts"]["val"]["documents"] == 40
    assert sorted(texts(split, "train") + texts(split, "val")) == sorted(b"record %d" % i for i in range(40))
    assert manifest["counts"]["val"]["documents"] >= 1


def test_hf_errors_without_a_text(tmp_path, capsys, monkeypatch):
    """Such as fsspec's, when the hub does not answer in time: at the start, and amid the records."""
    class Silent(Exception):
        pass

    def broken():
        yield {"text": "one"}
        raise Silent

    def opening(name, *args, **more):
        if name == "late":
            return broken()
        raise Silent

    class Datasets:
        disable_progress_bars = staticmethod(lambda: None)
        load_dataset = staticmethod(opening)

    monkeypatch.setitem(sys.modules, "datasets", Datasets)
    base = ["--source", "hf", "--force", "--out", tmp_path / "out", "--hf-name"]
    fails(capsys, base + ["never"], 1, "--hf-name never .* cannot be opened: Silent$")
    fails(capsys, base + ["late"], 1, "late stopped after 1 records: Silent. The same command goes on")


def test_what_is_said_of_what_is_left_out():
    left_out = prepare.LeftOut()
    for name in ["a"] * 3 + ["n%d" % i for i in range(12)]:
        left_out.add("odd files", name)
    left_out.add("bytes", "b", 7)
    assert left_out.names["odd files"] == ["a"] + ["n%d" % i for i in range(9)]
    assert list(left_out.lines()) == ["left out: 7 bytes (b)", "left out: 15 odd files (a, n0, n1, ...)"]


def test_conditions_and_fields():
    """What --keep may say, and which field a name with a dot is."""
    def parts(text):
        try:
            return prepare.parse_keep(text)
        except argparse.ArgumentTypeError as e:
            return str(e)
    for text, want in (("a=x=y", ("a", "=", "x=y")), ("n>=-1.5e-3", ("n", ">=", "-1.5e-3")), ("n<3", ("n", "<", "3")),
                       ("a.b!=", ("a.b", "!=", ""))):
        assert parts(text) == want
    for have, relation, want, holds in ((1, "=", "1.0", True), ("1", "!=", "1.0", False), (True, "=", "True", True), (-2, "<", "-1", True),
                                        (None, "<", "3", False), ("x", ">", "3", False), (3, "<=", "3", True), (3, ">", "3", False)):
        assert prepare.RELATIONS[relation](have, want) == holds, (have, relation, want)
    records = prepare.Records("text", [], prepare.LeftOut())
    assert records.find({"a.b": "its own", "a": {"b": "within"}}, "a.b", "here") == "its own"
    assert records.find({"a": {"b": "within"}}, "a.b", "here") == "within"
    with pytest.raises(prepare.Failure, match="here has no field 'a.b' .it has: a."):
        records.find({"a": {"c": 1}}, "a.b", "here")


def test_keep(tmp_path, capsys):
    """Conditions on numbers, words and fields of fields, for records of every kind."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    rows = [{"text": "t%d" % i, "score": i / 2, "meta": {"lang": "en" if i % 2 else "fr"}} for i in range(10)]
    path = write(tmp_path / "r.jsonl", "".join(json.dumps(r) + "\n" for r in rows))
    pq.write_table(pa.Table.from_pylist(rows), str(tmp_path / "r.parquet"))
    for n, (keep, want) in enumerate([(["score>=3"], "6789"), (["score<1"], "01"), (["text=t4"], "4"),
                                      (["meta.lang=fr", "score!=2"], "0268"), (["score=1.50"], "3")]):
        for source in (path, tmp_path / "r.parquet"):
            manifest, split = prepared(tmp_path / ("out%d%s" % (n, source.suffix)), "--source", "files", "--input",
                                       source, "--val-fraction", "0", "--keep", *keep)
            assert texts(split, "train") == [b"t%s" % c.encode() for c in want]
            assert manifest["left_out"] == {"records that --keep leaves out": 10 - len(want)}
    out = ["--out", tmp_path / "o", "--source", "files", "--input", path]
    fails(capsys, out + ["--keep", "size>3"], 1, "r.jsonl, line 1, has no field 'size'")
    fails(capsys, out + ["--keep", "size>x"], 2, "'size>x' is not a condition such as")
    _, split = prepared(tmp_path / "lang", "--source", "files", "--input", path, "--text-field", "meta.lang",
                        "--max-bytes", "4", "--val-fraction", "0")
    assert texts(split, "train") == [b"fr", b"en"]


@pytest.mark.parametrize("ahead", [1000, 10])
def test_weights(tmp_path, capsys, monkeypatch, ahead):
    """Documents of an input are taken that often; of what is repeated nothing is in both splits. Of a small source and a large."""
    monkeypatch.setattr(prepare, "LOOK_AHEAD_DOCUMENTS", ahead)
    for name, n in (("a", 300), ("b", 200)):
        lines = ['{"text": "%s%03d"}\n' % (name, i) for i in range(n)]
        write(tmp_path / (name + ".jsonl"), '{"text": ""}\n' + "".join(lines))
    args = ["--source", "files", "--input", tmp_path / "a.jsonl", "--weight", "0.25", "--input", tmp_path / "b.jsonl",
            "--weight", "2.5"]
    manifest, split = prepared(tmp_path / "out", *args)
    train, val = texts(split, "train"), texts(split, "val")
    assert not set(train) & set(val) and len(set(val)) == len(val) and any(t[:1] == b"b" for t in val)
    a = [t for t in train + val if t[:1] == b"a"]
    assert len(set(a)) == len(a) and 50 < len(a) < 100
    repeats = [train.count(b"b%03d" % i) for i in range(200)]
    assert set(repeats) == {0, 2, 3} and repeats.count(0) == sum(t[:1] == b"b" for t in val)
    assert 0.35 < repeats.count(3) / 200 < 0.65
    positions = [i for i, t in enumerate(train) if t == train[-1]]
    assert len(positions) == 3 and min(b - a for a, b in zip(positions, positions[1:])) > 50    # not side by side
    assert manifest["left_out"] == {"documents that --weight leaves out": 300 - len(a), "empty documents": 2}
    assert manifest["options"]["weights"] == [[1, 0.25], [1, 2.5]]
    # a weight belongs to the --input before it alone
    groups = prepare.parse_arguments("--source files --input a b --input c --weight 2 --input d".split()).input
    assert groups == [(["a", "b"], 1), (["c"], 2), (["d"], 1)]
    out = ["--out", tmp_path / "o", "--source", "files"]
    fails(capsys, out + ["--weight", "2", "--input", tmp_path], 2, "--weight 2 stands behind the --input")
    fails(capsys, out + ["--input", tmp_path, "--weight", "0"], 2, "--weight 0 is not above 0")


def mds_shard(columns, samples):
    """A shard of MosaicML's streaming format, of samples of encoded columns."""
    names = sorted(columns)
    about = json.dumps({"format": "mds", "version": 2, "column_names": names, "column_sizes":
                        [8 if columns[n] == "int" else None for n in names],
                        "column_encodings": [columns[n] for n in names]}).encode()
    bodies = []
    for sample in samples:
        sizes = [len(sample[n]) for n in names if columns[n] != "int"]
        bodies.append(struct.pack("<%dI" % len(sizes), *sizes) + b"".join(sample[n] for n in names))
    at, offsets = 4 * (len(bodies) + 2) + len(about), []
    for body in bodies + [b""]:
        offsets.append(at)
        at += len(body)
    return struct.pack("<%dI" % (len(offsets) + 1), len(bodies), *offsets) + about + b"".join(bodies)


def mds_array(values, shape, code):
    width, wcode = (1, "B") if max(shape) < 256 else (2, "H")
    return bytes([len(shape) << 2 | {1: 0, 2: 1}[width]]) + struct.pack("<%d%s" % (len(shape), wcode), *shape) \
        + struct.pack("<%d%s" % (len(values), code), *values)


def prolong_set(folder, ranks):
    """A miniature of ProLong's data: packed ids, with begin and end of each document; GPT-2's ids for Llama's."""
    tok, texts, samples = prepare.Gpt2Tokenizer(ranks).encoding, [], []
    for n in range(4):
        parts = ["ProLong %d.%d \u00e9\n" % (n, k) + "a long document. " * 60 for k in range(3)]
        ids, spans = [], []
        for part in parts:
            mine = [50256] + tok.encode_ordinary(part)
            spans += [len(ids), len(ids) + len(mine)]
            ids += mine
        texts += parts
        samples.append({"input_ids": mds_array(ids, [len(ids)], "I"), "indices": mds_array(spans, [3, 2], "I"),
                        "id": struct.pack("<q", n), "domain": b"books"})
    columns = {"input_ids": "ndarray:uint32", "indices": "ndarray:uint32", "id": "int", "domain": "str"}
    write(folder / "README.md", "# a card")
    write(folder / "book-65536" / "proc00-64" / "shard.00000.mds", mds_shard(columns, samples[:3]))
    import zstandard
    write(folder / "book-65536" / "proc00-64" / "shard.00001.mds.zstd",
          zstandard.ZstdCompressor().compress(mds_shard(columns, samples[3:])))
    index = {"version": 2, "shards": [{"raw_data": {"basename": "shard.00000.mds"}, "zip_data": None}, {
        "raw_data": {"basename": "shard.00001.mds"}, "zip_data": {"basename": "shard.00001.mds.zstd"}}]}
    write(folder / "book-65536" / "proc00-64" / "index.json", json.dumps(index))
    return texts


def gpt2_tokenizer_json(path, ranks):
    """GPT-2's ids as a tokenizer.json: for what is only decoded, no merges are needed."""
    from tokenizers import Tokenizer, decoders, models
    plain = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or b >= 174]
    shown = {b: chr(b) for b in plain}
    shown.update({b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in plain)})
    table = prepare.Gpt2Tokenizer(ranks).token_bytes()
    words = {"".join(shown[b] for b in t): i for i, t in enumerate(table[:-1])}
    tok = Tokenizer(models.WordLevel(words, unk_token="!"))
    tok.decoder = decoders.ByteLevel()
    tok.add_special_tokens(["<|endoftext|>"])
    path.parent.mkdir(parents=True, exist_ok=True)
    tok.save(str(path))


def test_real_sets(tmp_path, ranks):
    """The commands of data/README.md for real sets, on miniatures of their schemas."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    text = read(ROOT, "data", "README.md").decode()
    block = re.search(r"## Real sets\n.*?```\n(.*?)```", text, re.S).group(1)
    commands = {shlex.split(c)[-1].split("/")[1]: shlex.split(c) for c in block.splitlines() if c[0] != "#"}
    assert list(commands) == ["fineweb_edu", "pg19", "code", "prolong", "mixture"]

    def card(folder, path, config="default"):
        write(folder / "README.md", "---\nconfigs:\n- config_name: %s\n  data_files:\n  - split: train\n    path: %s\n"
              "---\n" % (config, path))

    pages = [{"text": "page %d \u00e9" % i, "id": "u%d" % i, "dump": "CC", "url": "http://x", "file_path": "s3://y",
              "language": "fr" if i == 3 else "en", "language_score": 0.9, "token_count": 7, "score": 2.4 + i / 8,
              "int_score": 2 if i < 3 else 3} for i in range(9)]
    fineweb = tmp_path / "fineweb-edu"
    card(fineweb, "sample/10BT/*.parquet", "sample-10BT")
    (fineweb / "sample" / "10BT").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(pages), str(fineweb / "sample" / "10BT" / "000_00000.parquet"))
    books = [{"short_book_title": "B%d" % i, "publication_date": 1800 + i, "url": "http://x",
              "text": "Book %d. " % i + "It was a dark night. " * n} for i, n in enumerate([3000, 20, 2500])]
    pg19 = tmp_path / "pg19"
    card(pg19, "data/train-*")
    (pg19 / "data").mkdir()
    pq.write_table(pa.Table.from_pylist(books), str(pg19 / "data" / "train-00000-of-00001.parquet"))
    sources = [{"id": str(i), "text": "def f%d():\n    return 1\n" % i * n, "source": "stackv2", "added": "2025",
                "created": "", "metadata": {"path": "a.py", "repo_name": "r", "language": "Python"}}
               for i, n in enumerate([400, 5, 600])]
    code = tmp_path / "stackv2_edu_filtered"
    card(code, "stack-edu-*.json.gz")
    write(code / "stack-edu-0001.json.gz", gzip.compress("".join(json.dumps(r) + "\n" for r in sources).encode()))
    prolong = prolong_set(tmp_path / "prolong", ranks)
    gpt2_tokenizer_json(tmp_path / "llama3" / "tokenizer.json", ranks)
    for name, n in (("pg19/b.txt", 3), ("code/c.txt", 4), ("books/d.txt", 5)):
        write(tmp_path / "mixture" / name, "mixture %s " % name * n)
    table = prepare.Gpt2Tokenizer(ranks).token_bytes()
    want = {"fineweb_edu": [p["text"] for p in pages if p["int_score"] >= 3 and p["language"] == "en"],
            "pg19": [b["text"] for b in books if len(b["text"]) > 1000],
            "code": [s["text"] for s in sources if len(s["text"]) > 1000], "prolong": prolong, "mixture": None}
    for name, command in commands.items():
        command = ["prolong" if w == "prolong" else str(tmp_path / w.split("/")[1]) if a == "--hf-name" else w
                   for a, w in zip([""] + command, command)]
        done = subprocess.run([sys.executable, SCRIPT] + command[2:] + ["--workers", "1", "--val-fraction", "0"],
                              cwd=str(tmp_path / "mixture" if name == "mixture" else tmp_path), capture_output=True,
                              text=True, env=dict(os.environ, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "home")))
        assert done.returncode == 0, done.stderr
        out = tmp_path / ("mixture" if name == "mixture" else "") / "data" / name
        got = [b"".join(table[t] for t in d).decode() for d in load(out)[1]["train"]]
        if want[name] is not None:
            assert got == want[name], name
        else:
            assert [g for g in got if "books" in g] == ["mixture books/d.txt " * 5] * 3 and "pg19" in got[0]


def test_mds(tmp_path, ranks, capsys):
    """Missing and damaged shards of that format, and tokens of another tokenizer, are said."""
    prolong_set(tmp_path / "in", ranks)
    folder = tmp_path / "in" / "book-65536" / "proc00-64"
    gpt2_tokenizer_json(tmp_path / "t.json", ranks)
    base = ["--source", "files", "--exclude", "*.md", "--text-field", "input_ids", "--out", tmp_path / "out", "--force"]
    given = base + ["--input", tmp_path / "in"]
    kept = given + ["--detokenize", tmp_path / "t.json", "--keep", "domain=books", "id<2"]
    assert prepare.main([str(x) for x in kept]) == 0
    manifest = load(tmp_path / "out")[0]
    assert manifest["left_out"] == {"excluded files": 1, "records that --keep leaves out": 2}
    assert sum(c["documents"] for c in manifest["counts"].values()) == 6
    fails(capsys, given, 1, "field 'input_ids' is a tuple, not text: .*--detokenize")
    fails(capsys, given + ["--detokenize", word_tokenizer(tmp_path / "w.json", ["[UNK]", "a"])], 1,
          "holds ids from .* to 50256, but .*w.json has 2: they are of another tokenizer")
    fails(capsys, given + ["--detokenize", tmp_path / "no.json"], 2, "--detokenize .*no.json: there is no such file")
    fails(capsys, base + ["--input", tmp_path / "in", "--text-field", "domain", "--detokenize", tmp_path / "t.json"], 1,
          "does not hold token ids")
    data = read(folder, "shard.00000.mds")
    for bad in (data[:-1], data[:3], data + b"x", data.replace(b"ndarray:uint32", b"ndarray:uint99")):
        write(folder / "shard.00000.mds", bad)
        fails(capsys, given + ["--detokenize", tmp_path / "t.json"], 1, "shard.00000.mds is not an .mds shard behind")
    write(folder / "shard.00000.mds", data)
    os.remove(str(folder / "shard.00001.mds.zstd"))
    fails(capsys, given + ["--detokenize", tmp_path / "t.json"], 1,
          "index.json names the shard shard.00001.mds or shard.00001.mds.zstd, which is missing")


def test_ids_beyond_the_tokenizer(tmp_path):
    detokenizer = prepare.Detokenizer(str(word_tokenizer(tmp_path / "w.json", ["[UNK]", "a", "b"])))
    assert list(detokenizer.documents([2, 1], None, "here", "n")) == [("n[0:2]", 3, [b"b a"])]
    for ids in ([1, 3], [-1, 1]):
        with pytest.raises(prepare.Failure, match="here holds ids from .* but .*w.json has 3"):
            list(detokenizer.documents(ids, None, "here", "n"))


def test_values_of_mds():
    """Numbers with their signs, and arrays of one or two axes, by the format's description."""
    for encoding, data, value in (
            ("int", struct.pack("<q", -3), -3), ("int", struct.pack("<q", 2**40), 2**40), ("int8", b"\xfe", -2),
            ("uint8", b"\xfe", 254), ("int32", struct.pack("<i", -5), -5), ("json", b'{"a": [1]}', {"a": [1]}),
            ("str", b"\xff", b"\xff"), ("ndarray:int16", bytes([1 << 2, 2]) + struct.pack("<2h", -1, 7), (-1, 7)),
            ("ndarray:uint8", bytes([2 << 2 | 1]) + struct.pack("<2H", 2, 3) + b"abcdef", [(97, 98, 99), (100, 101, 102)])):
        assert prepare.mds_value(encoding, data) == value, encoding


def test_packages_are_installed_when_asked_for(tmp_path, capsys, monkeypatch):
    """With pip, and only then; where pip fails its last line is said."""
    monkeypatch.setitem(sys.modules, "datasets", None)
    calls = []

    def pip(command, **more):
        calls.append(command[1:])
        return subprocess.CompletedProcess(command, 1, stderr="one\nERROR: no such package\n")

    argv = ["--source", "hf", "--hf-name", "x", "--out", tmp_path / "out"]
    venv = tmp_path / "checkout" / ".venv" / "bin" / "python"
    monkeypatch.setattr(prepare, "DATA_DIR", str(tmp_path / "checkout" / "data"))
    fails(capsys, argv, 1, "needs the Python package 'datasets' .*install it: .*pip install datasets, or give --install")
    venv.parent.mkdir(parents=True)
    for has_it, hint in ((1, "install it: .*pip install datasets"), (0, r"call .*\.venv/bin/python data/prepare\.py")):
        venv.write_text("#!/bin/sh\nexit %d\n" % has_it)
        venv.chmod(0o755)
        fails(capsys, argv, 1, "needs the Python package 'datasets' .*%s.*, or give --install" % hint)
    monkeypatch.setattr(prepare.subprocess, "run", pip)
    fails(capsys, argv + ["--install"], 1, "pip install datasets' failed: ERROR: no such package")
    assert calls == [["-m", "pip", "install", "datasets"]]


# ---------------------------------------------------------------------------- the split

def splits_of(sizes, fraction, seed=0):
    left = prepare.LeftOut()
    return [s for s, *_ in prepare.assigned([("d", n, None) for n in sizes], fraction, seed, None, left)]


def test_split_by_document():
    rng = random.Random(1)
    sizes = [int(rng.lognormvariate(8, 1.5)) + 1 for _ in range(5000)]
    chosen = {}
    for seed in range(3):
        got = splits_of(sizes, 0.05, seed)
        assert got == splits_of(sizes, 0.05, seed)
        val = [n for n, s in zip(sizes, got) if s == "val"]
        assert 0.045 < sum(val) / sum(sizes) < 0.055
        assert 0.04 < len(val) / len(sizes) < 0.065    # long documents are taken like short ones
        chosen[seed] = got
    assert chosen[0] != chosen[1] != chosen[2]
    few = [1, 3, 50, 7, 2, 900, 13, 4, 120, 31]    # of a small source the splits are near, whatever the order
    for order in (few, sorted(few), sorted(few, reverse=True)):
        got = splits_of(order, 0.05)
        assert 0.045 < sum(n for n, s in zip(order, got) if s == "val") / sum(few) < 0.055
    assert len({tuple(splits_of([10] * 40, 0.2, seed)) for seed in range(5)}) == 5, "another seed, another split"
    assert splits_of([10], 0.05) == ["train"]
    assert splits_of([10, 10], 0.05) == ["train", "val"]
    assert splits_of([10, 10, 10], 0.01).count("val") == 1
    assert "val" not in splits_of([10] * 100, 0)
    assert splits_of([10] * 50 + [10**6] + [10] * 50, 0.05)[50] == "train"    # the giant
    for seed in range(9):    # also where val is just short of its share
        assert splits_of([10] * 1501 + [10**5] + [10], 0.05, seed)[1501] == "train"
    assert 0.45 < splits_of([10] * 1000, 0.5).count("val") / 1000 < 0.55


@pytest.mark.parametrize("sizes,why", [([10] * 1000, None), ([10] * 3, "33%"), ([10, 30, 20], "17%"), ([10] * 100 + [10**6], "has 1e"),
                                       ([10, 10, 700], "2.8%"),
                                       ([2**i for i in range(18)], None), (list(range(1000, 0, -1)), None),
                                       ([10] * 2000 + [10**6], "has 98%"), ([10**5] + [10] * 20000, None)])
def test_validation_has_its_share_or_says_why(tmp_path, capsys, sizes, why):
    write(tmp_path / "in.jsonl", "".join('{"text": "%s"}\n' % ("x" * n) for n in sizes))
    manifest, _ = prepared(tmp_path / "out", "--source", "files", "--input", tmp_path / "in.jsonl")
    share = manifest["counts"]["val"]["bytes"] / sum(sizes)
    said = re.search(r"^validation has (\S+)% of the text, not 5%: it takes whole documents, and the largest, "
                     r".*in.jsonl:(\d+), has (\S+)%$", capsys.readouterr().out, re.M)
    assert (said is None) == (why is None) == (0.033 <= share <= 0.075)
    assert manifest["counts"]["val"]["documents"] <= max(1, len(sizes) * 3 / 4)
    if said:
        assert abs(float(said.group(1)) / (100 * share) - 1) < 0.05
        assert int(said.group(2)) == 1 + sizes.index(max(sizes))
        assert abs(float(said.group(3)) / (100 * max(sizes) / sum(sizes)) - 1) < 0.05


def test_max_bytes_cuts_whole_documents(tmp_path):
    write(tmp_path / "in.jsonl", "".join('{"text": "%s"}\n' % ("x" * 10) for _ in range(9)))
    manifest, _ = prepared(tmp_path / "out", "--source", "files", "--input", tmp_path / "in.jsonl", "--max-bytes", "45")
    assert sum(c["bytes"] for c in manifest["counts"].values()) == 40


# ---------------------------------------------------------------------------- shards, resume, repetition

def small_set(folder, n=60):
    rng = random.Random(3)
    write(folder / "in.jsonl", "".join(json.dumps({"text": "%d " % i + "ab c\n" * rng.randrange(1, 60)}) + "\n"
                                       for i in range(n)))
    return ["--source", "files", "--input", str(folder / "in.jsonl"), "--val-fraction", "0.2"]


@pytest.mark.parametrize("tokenizer,workers", [("bytes", 1), ("gpt2", 1), ("gpt2", 2)])
def test_one_end_of_text_a_document(tmp_path, ranks, tokenizer, workers):
    """However long it is: a document of several pieces has it once, before its first token."""
    text = ("a line of a long document\n" * 200).encode()
    sizes = [3 * (1 << 20), 10, (1 << 20) + 50, 30]
    for i, n in enumerate(sizes):
        write(tmp_path / "in" / ("%d.txt" % i), (text * (n // len(text) + 1))[:n])
    manifest, split = prepared(tmp_path / "out", "--source", "files", "--input", tmp_path / "in", "--tokenizer",
                               tokenizer, "--workers", workers, "--val-fraction", "0")
    used = prepare.BytesTokenizer() if tokenizer == "bytes" else prepare.Gpt2Tokenizer(ranks)
    table = used.token_bytes()
    assert [sum(len(table[t]) for t in d) for d in split["train"]] == sizes
    data = read(tmp_path, "out", "train_000000.bin")[1024:]
    assert struct.unpack("<H", data[:2])[0] == manifest["eot"]
    assert manifest["counts"]["train"]["tokens"] == 4 + sum(map(len, split["train"]))


def test_min_document_tokens(tmp_path, monkeypatch, ranks):
    """Short documents are left out, counted in tokens; killed anywhere, the same bytes come out."""
    monkeypatch.setattr(prepare, "PIECE", 300)
    lengths = [40, 99, 100, 101, 1, 2000, 100, 99]
    documents = ["\u00e9 x\n" * n for n in lengths] + ["\u00e9 x\n" * 99 + "\u00e9 x", "\u00e9 x\n" * 99 + "\u00e9"]
    write(tmp_path / "in.jsonl", "".join(json.dumps({"text": d}) + "\n" for d in documents))
    args = ["--source", "files", "--input", str(tmp_path / "in.jsonl"), "--val-fraction", "0", "--workers", "1"]
    manifest, split = prepared(tmp_path / "gpt2", *args, "--tokenizer", "gpt2", "--min-document-tokens", "300")
    assert [len(d) for d in split["train"]] == [3 * n for n in lengths if n >= 100]
    assert manifest["left_out"] == {"documents shorter than --min-document-tokens": 6}    # one of them has 299
    assert manifest["counts"]["train"] == {"documents": 4, "tokens": 4 + 3 * 2301, "bytes": 5 * 2301}
    assert manifest["options"]["min_document_tokens"] == 300
    for least, kept in (("4", True), ("5", True), ("6", False)):    # of bytes each is a token
        write(tmp_path / "short.jsonl", '{"text": "of 5!"}\n{"text": "a line of several"}\n')
        manifest, split = prepared(tmp_path / ("bytes" + least), "--source", "files", "--input", tmp_path / "short.jsonl",
                                   "--val-fraction", "0", "--min-document-tokens", least)
        assert texts(split, "train") == [b"of 5!"] * kept + [b"a line of several"]
    path = word_tokenizer(tmp_path / "words" / "tokenizer.json", ["[UNK]", "</s>", "\u00e9", "x"])
    more = args + ["--tokenizer", str(path), "--min-document-tokens", "200", "--shard-tokens", "1000"]
    manifest, split = prepared(tmp_path / "want", *more)
    assert [len(d) for d in split["train"]] == [200, 202, 4000, 200, 200]    # one with 199 is out
    monkeypatch.setattr(prepare, "COMMIT_SECONDS", 0.0)
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    for n in range(1, 60, 3):
        out = tmp_path / ("out%d" % n)
        if not die_at(n, more + ["--out", str(out)]):
            assert prepare.main(more + ["--out", str(out)]) == 0
        assert contents(out) == contents(tmp_path / "want"), n


def test_documents_span_shards(tmp_path):
    args = small_set(tmp_path)
    _, one = prepared(tmp_path / "one", *args)
    manifest, many = prepared(tmp_path / "many", *args, "--shard-tokens", "100")
    assert one == many
    for split in ("train", "val"):
        tokens = [s["tokens"] for s in manifest["shards"] if s["name"].startswith(split)]
        assert set(tokens[:-1]) == {100} and 1 <= tokens[-1] <= 100
    assert [s["name"] for s in manifest["shards"]][:2] == ["train_000000.bin", "train_000001.bin"]


def die_at(n, argv):
    """Run in a child that dies, as by kill -9, before its n-th write, sync, rename or removal; True: it lived."""
    pid = os.fork()
    if pid == 0:
        left = [n]

        def deadly(call):
            def wrapped(*args, **kw):
                left[0] -= 1
                if left[0] == 0:
                    os._exit(9)
                return call(*args, **kw)
            return wrapped

        class Watched:    # a buffered file: what was not flushed dies with the process
            def __init__(self, f):
                self.f, self.write, self.flush = f, deadly(f.write), deadly(f.flush)

            def __getattr__(self, name):
                return getattr(self.f, name)

            def __enter__(self):
                return self

            def __exit__(self, *exception):
                self.f.close()

        def watched_open(path, mode="r", *args, **kw):
            f = open(path, mode, *args, **kw)
            return Watched(f) if "w" in mode or "+" in mode else f

        try:
            prepare.open = watched_open
            for name in ("fsync", "replace", "remove", "truncate"):
                setattr(os, name, deadly(getattr(os, name)))
            sys.stdout = sys.stderr = open(os.devnull, "w")
            os._exit(prepare.main([str(x) for x in argv]))
        finally:
            os._exit(99)    # an exception got out
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, 9), status
    return status == 0


def test_killed_anywhere(tmp_path, monkeypatch):
    """Die at every single step, and die again at some step of each continuation: the same bytes in the end."""
    monkeypatch.setattr(prepare, "COMMIT_SECONDS", 0.0)
    monkeypatch.setattr(prepare, "PIECE", 1000)
    monkeypatch.setattr(os, "fsync", lambda fd: None)    # nobody cuts the power here
    args = small_set(tmp_path, 20) + ["--shard-tokens", "600", "--workers", "1"]
    prepared(tmp_path / "want", *args)
    want = contents(tmp_path / "want")
    assert len(want) > 6
    n, deaths = 1, 0
    while True:
        out = tmp_path / ("out%d" % n)
        argv = args + ["--out", str(out)]
        if die_at(n, argv):
            break
        deaths += 1
        deaths += not die_at(1 + n * 7 % 40, argv)
        assert prepare.main(argv) == 0
        assert contents(out) == want, "killed at step %d" % n
        n += 1
    assert deaths > 100


def test_killed_between_commits(tmp_path, monkeypatch):
    """Several shards are finished after the last commit, then the run dies: they are made again."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    args = small_set(tmp_path, 400) + ["--shard-tokens", "3000"]
    prepared(tmp_path / "want", *args)
    for n in range(10, 120, 9):
        out = tmp_path / ("out%d" % n)
        if not die_at(n, args + ["--out", str(out)]):
            assert prepare.main(args + ["--out", str(out)]) == 0
        assert contents(out) == contents(tmp_path / "want")


def test_the_order_of_calls(tmp_path, monkeypatch):
    """What keeps a preparation through a cut of the power: a file's bytes are on the disk before it gets its name, those of the
    shards before the commit that counts them, and the name before anything else is done."""
    monkeypatch.setattr(prepare, "COMMIT_SECONDS", 0.0)
    monkeypatch.setattr(prepare, "PIECE", 1000)
    synced, named, commits, (fsync, replace) = {}, [], [], (os.fsync, os.replace)

    def watched_fsync(fd):
        path = os.readlink("/proc/self/fd/%d" % fd)
        if os.path.isdir(path):
            assert named and os.path.dirname(named.pop()) == path
        else:
            synced[path] = read(path)
        fsync(fd)

    def watched_replace(a, b):
        assert not named, "%s is not on the disk" % named
        assert synced.get(a) == read(a), a
        if b.endswith("progress.json"):
            for split, state in json.loads(read(a))["splits"].items():
                open_shard, size = str(tmp_path / "out" / ("%s_%06d.bin.tmp" % (split, len(state["shards"])))), 1024 + 2 * state["open_tokens"]
                assert not state["open_tokens"] or synced.get(open_shard, b"").ljust(size, b"?") == read(open_shard)[:size]
                commits.append(state["open_tokens"])
        named.append(b)
        replace(a, b)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_replace)
    prepared(tmp_path / "out", *small_set(tmp_path, 20), "--shard-tokens", "600", "--workers", "1")
    assert len(set(commits)) > 4 and not named


def alive(text):
    return [line for line in command_lines() if text in line]


def test_real_kill_with_workers(tmp_path, ranks):
    """kill -9, then Ctrl-C, then to the end, with worker processes: the same bytes, and no process left."""
    source = b"".join(read(os.path.dirname(os.__file__), n) for n in ("argparse.py", "typing.py", "inspect.py"))
    lines = source.decode().splitlines(True)
    rng = random.Random(2)
    with open(str(tmp_path / "in.jsonl"), "w") as f:
        for i in range(1000):  # so much that a busy machine, too, is still at it when it is stopped
            at = rng.randrange(len(lines) - 400)
            f.write(json.dumps({"text": "".join(lines[at:at + 400])}) + "\n")
    args = ["--source", "files", "--input", str(tmp_path / "in.jsonl"), "--tokenizer", "gpt2", "--workers", "2",
            "--shard-tokens", "50K"]
    want = subprocess.Popen([sys.executable, SCRIPT, "--out", str(tmp_path / "want")] + args)
    command = [sys.executable, SCRIPT, "--out", str(tmp_path / "out")] + args
    for signal_number, shard in ((signal.SIGKILL, 0), (signal.SIGINT, 6), (signal.SIGTERM, 9)):
        p = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        p.stderr.readline()     # it runs: the run before may have got further than the shard that is waited for
        for _ in range(3000):
            if (tmp_path / "out" / ("train_%06d.bin" % shard)).exists() or p.poll() is not None:
                break
            time.sleep(0.01)
        assert p.poll() is None, "it was over before it was killed: %s" % p.stderr.read()
        p.send_signal(signal_number)
        _, err = p.communicate(timeout=30)
        if signal_number == signal.SIGKILL:
            assert p.returncode == -9
        else:
            assert p.returncode == 130 and "goes on from the last commit" in err and "Traceback" not in err
        assert (tmp_path / "out" / "progress.json").exists()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "continuing an interrupted run" in done.stderr
    assert want.wait(timeout=60) == 0
    load(tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "want")
    one = subprocess.run([sys.executable, SCRIPT, "--out", str(tmp_path / "one")] + args[:-3] + ["1"] + args[-2:],
                         capture_output=True, text=True)    # and one worker gives the same as two
    assert one.returncode == 0, one.stderr
    assert contents(tmp_path / "one") == contents(tmp_path / "want")
    for _ in range(100):
        if not alive(str(tmp_path)):
            break
        time.sleep(0.1)
    assert not alive(str(tmp_path))


def test_done_refused_forced(tmp_path, capsys):
    args = small_set(tmp_path)
    prepared(tmp_path / "out", *args)
    before = {n: os.stat(str(tmp_path / "out" / n)).st_mtime_ns for n in os.listdir(str(tmp_path / "out"))}
    capsys.readouterr()
    prepared(tmp_path / "out", *args)
    assert "nothing to do" in capsys.readouterr().out
    assert before == {n: os.stat(str(tmp_path / "out" / n)).st_mtime_ns for n in os.listdir(str(tmp_path / "out"))}

    fails(capsys, args + ["--out", tmp_path / "out", "--seed", "1"], 2, "seed was 0, now 1.*another --out.*--force")
    fails(capsys, args + ["--out", tmp_path / "out", "--min-document-tokens", "2"], 2,
          "min_document_tokens was null, now 2; |min_document_tokens was null, now 2[)]")    # which it did not have before
    write(tmp_path / "out" / "mine.txt", "kept")
    assert prepare.main(args + ["--out", str(tmp_path / "out"), "--seed", "1", "--force"]) == 0
    assert read(tmp_path, "out", "mine.txt") == b"kept"
    os.remove(str(tmp_path / "out" / "mine.txt"))
    assert load(tmp_path / "out")[0]["options"]["seed"] == 1

    path = str(tmp_path / "out" / "train_000000.bin")
    os.truncate(path, 1030)
    fails(capsys, args + ["--out", tmp_path / "out", "--seed", "1"], 1, "train_000000.bin has 1030 bytes, where .* due")
    good = read(tmp_path, "out", "manifest.json")
    os.remove(str(tmp_path / "out" / "manifest.json"))
    fails(capsys, args + ["--out", tmp_path / "out"], 2, "shards but no manifest")
    write(tmp_path / "out" / "manifest.json", "{")
    fails(capsys, args + ["--out", tmp_path / "out"], 1, "manifest.json cannot be read.*--force")
    for wrong in (b"[]", b"3", b"{}", b'{"options": []}', good.replace(b'"tokens": ', b'"tokens": -', 1),
                  good.replace(b'"name": "train_000000.bin"', b'"name": "../train_000000.bin"'),
                  good.replace(b'"uint16"', b'"uint8"'), good.replace(b'"sha256": "', b'"sha256": 5, "x": "')):
        assert wrong != good
        write(tmp_path / "out" / "manifest.json", wrong)
        fails(capsys, args + ["--out", tmp_path / "out"], 1, "manifest.json is not what prepare.py writes: --force")
    os.remove(str(tmp_path / "out" / "manifest.json"))
    write(tmp_path / "out" / "progress.json", good)
    fails(capsys, args + ["--out", tmp_path / "out"], 1, "progress.json is not what prepare.py writes: --force")


def test_whatever_changes_the_data_is_another_data_set(tmp_path, capsys):
    """Each option that decides on the shards is compared with those that are there."""
    path = write(tmp_path / "in" / "a.jsonl", '{"text": [1, 2]}\n{"text": [2]}\n')
    words = [str(word_tokenizer(tmp_path / name / "tokenizer.json", ["[UNK]", "a", name, "</s>"])) for name in ("b", "c")]
    args = ["--source", "files", "--input", tmp_path / "in", "--detokenize", words[0]]
    prepared(tmp_path / "out", *args)
    for name, more in (("exclude", ["--exclude", "x"]), ("max_bytes", ["--max-bytes", "1G"]), ("val_fraction", ["--val-fraction", "0.1"]),
                       ("seed", ["--seed", "1"]), ("shard_tokens", ["--shard-tokens", "5"]), ("text_field", ["--text-field", "body"]),
                       ("keep", ["--keep", "n=1"]), ("as_text", ["--as-text", "*.x"]), ("weights", ["--weight", "2"]),
                       ("min_document_tokens", ["--min-document-tokens", "1"]), ("tokenizer", ["--tokenizer", words[0]]),
                       ("detokenize_sha256", ["--detokenize", words[1]]), ("input", ["--input", path])):
        fails(capsys, args + more + ["--out", tmp_path / "out"], 2, r"made with other options .*\b%s was " % name)
    prepared(tmp_path / "words", *args, "--tokenizer", words[0])
    for name, more in (("tokenizer_sha256", ["--tokenizer", words[1]]), ("eot_token", ["--tokenizer", words[0], "--eot-token", "a"])):
        fails(capsys, args + more + ["--out", tmp_path / "words"], 2, r"made with other options .*\b%s was " % name)


def test_source_changed_under_a_broken_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prepare, "COMMIT_SECONDS", 0.0)
    monkeypatch.setattr(prepare, "PIECE", 1000)
    args = small_set(tmp_path) + ["--out", str(tmp_path / "out")]
    assert not die_at(60, args)
    stat = os.stat(str(tmp_path / "in.jsonl"))
    text = read(tmp_path, "in.jsonl")
    write(tmp_path / "in.jsonl", text.replace(b"ab", b"ba", 1))
    fails(capsys, args, 2, "listing_sha256 was .* now")                    # by its time
    os.utime(str(tmp_path / "in.jsonl"), ns=(stat.st_atime_ns, stat.st_mtime_ns))
    fails(capsys, args, 1, "no longer gives the text .*--force")           # by its text, where the time says nothing
    assert prepare.main(args + ["--force"]) == 0


def test_out_inside_input(tmp_path, capsys):
    """A run does not read what an earlier one wrote: the same command has nothing to do, --force gives the same."""
    for name in ("a.txt", "b.txt", "z.txt"):
        write(tmp_path / "in" / name, "text of " + name)
    args = ["--source", "files", "--input", str(tmp_path / "in")]
    out = tmp_path / "in" / "shards"
    want = prepared(out, *args)
    capsys.readouterr()
    assert prepared(out, *args) == want and "nothing to do" in capsys.readouterr().out
    assert prepared(out, *args, "--force") == want and want[0]["counts"]["train"]["documents"] == 2
    os.symlink(str(tmp_path / "in"), str(tmp_path / "same"))
    fails(capsys, args + ["--out", tmp_path / "same"], 2, "--out .*/in is --input itself")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
@pytest.mark.parametrize("size", [1000, 3 << 20])
@pytest.mark.parametrize("name", ["train_000000.bin.tmp", "train_000001.bin.tmp", "progress.json.tmp"])
def test_full_disk(tmp_path, capsys, name, size):
    """The message names the file that had no room; with room, the same command ends with the same bytes."""
    for i in range(3):
        write(tmp_path / "in" / ("%d.txt" % i), "%d" % i * size)
    args = ["--source", "files", "--input", tmp_path / "in", "--shard-tokens", size]
    want = prepared(tmp_path / "want", *args)
    os.mkdir(str(tmp_path / "out"))
    os.symlink("/dev/full", str(tmp_path / "out" / name))
    fails(capsys, args + ["--out", tmp_path / "out"], 1,
          "/out/%s(.tmp)? cannot be written: No space left on device. .*the same command .*goes on" % name[:-4])
    os.remove(str(tmp_path / "out" / name))
    assert prepared(tmp_path / "out", *args) == want


@pytest.mark.parametrize("source", ["linux", "files"])
def test_full_disk_while_spooling(tmp_path, capsys, monkeypatch, source):
    """A document of unknown size waits in a temporary file: that this has no room says nothing against the archive."""
    class Full(io.BytesIO):
        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(prepare.tempfile, "SpooledTemporaryFile", lambda *args, **kw: Full())
    given = {"linux": ["--linux-archive", write(tmp_path / "k.tar.xz", tar_of(KERNEL, "xz"))],
             "files": ["--input", write(tmp_path / "t.txt.gz", gzip.compress(b"text"))]}[source]
    fails(capsys, ["--source", source, "--out", tmp_path / "out"] + given, 1,
          "a temporary file in .*/out cannot be written: No space left on device")


def test_two_at_once(tmp_path, capsys, monkeypatch):
    args, second = small_set(tmp_path) + ["--out", str(tmp_path / "out")], []

    def first(a):
        monkeypatch.setattr(prepare, "prepare", second.append)
        fails(capsys, args, 1, "another prepare.py is writing to")
    monkeypatch.setattr(prepare, "prepare", first)
    assert prepare.main(args) == 0 and not second
    assert prepare.main(args) == 0 and len(second) == 1    # one after the other they may


def test_folders_that_cannot_be_locked(tmp_path, capsys, monkeypatch):
    """As on some network file systems: that is no second writer."""
    def flock(fd, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(prepare.fcntl, "flock", flock)
    prepared(tmp_path / "out", *small_set(tmp_path))
    assert "out cannot be locked (No locks available)" in capsys.readouterr().err


# ---------------------------------------------------------------------------- bad input

def fails(capsys, argv, status, pattern):
    capsys.readouterr()
    got = prepare.main([str(a) for a in argv])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("prepare.py: ")]
    assert len(lines) == 1, "one message is due: %s" % lines
    assert got == status and re.search(pattern, lines[0]), "status %s: %s" % (got, lines[0])


def test_bad_options(tmp_path, capsys):
    out = ["--out", tmp_path / "out"]
    t = write(tmp_path / "t.txt", "some text")
    files = out + ["--source", "files", "--input"]
    for argv, status, pattern in [
        (["--source", "web"], 2, "invalid choice: 'web'.*pystdlib"),
        (["--nonsense"], 2, "unrecognized arguments: --nonsense"),
        (["--shard-tokens", "many"], 2, "'many' is not a number such as"),
        (["--shard-tokens", "0"], 2, "--shard-tokens 0 is not between 1 and 2147483647"),
        (["--shard-tokens", "3G"], 2, "--shard-tokens 3000000000 is not between"),
        (["--val-fraction", "0.7"], 2, "--val-fraction 0.7 is not between 0 and 0.5"),
        (["--val-fraction", "nan"], 2, "--val-fraction nan is not between"),
        (["--max-bytes", "0"], 2, "--max-bytes 0 is less than 1"),
        (["--workers", "0"], 2, "--workers 0 is less than 1"),
        (["--tokenizer", "gpt3"], 2, "--tokenizer gpt3 is neither bytes nor gpt2 nor"),
        (["--eot-token", "x"], 2, "--eot-token belongs to a tokenizer.json"),
        (["--input", t], 2, "--input belongs to --source files, not to --source pystdlib"),
        (["--hf-split", "x", "--source", "linux"], 2, "--hf-split belongs to --source hf"),
        (["--source", "files"], 2, "--source files needs --input"),
        (["--source", "hf"], 2, "--source hf needs --hf-name"),
        (["--source", "linux", "--linux-archive", "no.deb"], 2, "--linux-archive no.deb: there is no such file"),
        (files + [tmp_path / "no"], 2, "/no: there is no such file or folder"),
        (files + [t, "--max-bytes", "3"], 2, "--max-bytes 3 is less than the first document, .*t.txt, of 9 bytes"),
        (["--out", t], 2, "--out .*t.txt cannot be used"),
        (["--exclude", "*"], 2, r"--exclude \* leaves no file of /.*: name fewer"),
        (files + [tmp_path, "--exclude", "*.t*", "x*"], 2, r"--exclude \*.t\* x\* leaves no file of"),
    ]:
        fails(capsys, out + argv, status, pattern)


def test_bad_files(tmp_path, capsys):
    def bad(name, data, pattern, *more, status=1):
        path = write(tmp_path / name, data)
        fails(capsys, ["--out", tmp_path / ("out_" + name), "--source", "files", "--input", path] + list(more),
              status, pattern)

    bad("a.jsonl", '{"text": "x"}\n{"text": \n', r"a.jsonl, line 2, is not JSON")
    bad("b.jsonl", '{"content": "x", "id": 1}\n',
        r"b.jsonl, line 1, has no field 'text' \(it has: content, id\).*--text-field")
    bad("c.jsonl", '{"text": 5}\n', r"c.jsonl, line 1,: field 'text' is a int, not text")
    bad("d.jsonl", '[1]\n', r"d.jsonl, line 1, has no field 'text' \(it has: list\)")
    bad("e.jsonl.gz", b"not gzip", r"e.jsonl.gz cannot be decompressed: it is not gzip data")
    bad("f.jsonl.zst", b"not zstd", r"f.jsonl.zst cannot be decompressed: it is not zstd data")
    bad("g.parquet", b"not parquet", r"g.parquet is not a parquet file")
    bad("h.bin", b"a\0b", r"h.bin is not text: it holds zero bytes")
    bad("i.txt", b"", r"--source files gave no text")
    bad("j.txt.gz", gzip.compress(b"x" * 100000)[:-20], r"j.txt.gz cannot be")
    os.mkdir(str(tmp_path / "empty"))
    fails(capsys, ["--out", tmp_path / "o", "--source", "files", "--input", tmp_path / "empty"], 2, "no files in it")
    import pyarrow as pa
    import pyarrow.parquet as pq
    pq.write_table(pa.table({"id": [1], "body": ["x"]}), str(tmp_path / "k.parquet"))
    fails(capsys, ["--out", tmp_path / "k", "--source", "files", "--input", tmp_path / "k.parquet"], 1,
          r"k.parquet has no column 'text' \(it has: id, body\)")
    for name, data, pattern in [
        ("l.deb", b"hello", "l.deb is not a .deb"),
        ("m.deb", ar_of([(b"debian-binary", b"2.0\n")]), "holds no data.tar"),
        ("n.deb", ar_of([(b"data.tar.xz", tar_of([("./x", "y")], "xz"))]), "holds no kernel archive"),
        ("o.tar.xz", b"junk" * 100, "cannot be read as an archive"),
        ("p.tar.xz", tar_of(KERNEL, "xz")[:-30], "cannot be read as an archive"),
        ("q.tar", tar_of([("a/b.o", b"\0")], ""), "gave no text"),
    ]:
        write(tmp_path / name, data)
        fails(capsys, ["--out", tmp_path / ("out_" + name), "--source", "linux", "--linux-archive", tmp_path / name],
              1, pattern)
    write(tmp_path / "r.tar.xz", tar_of(KERNEL, "xz"))
    fails(capsys, ["--out", tmp_path / "out_r", "--source", "linux", "--linux-archive", tmp_path / "r.tar.xz",
                   "--exclude", "*"], 1, r"--exclude \* leaves no file of --source linux")


def test_damaged_parquet(tmp_path, capsys):
    """Page checksums are verified; text that is not UTF-8 is taken as it is; fewer rows than promised are an error."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    rows = ["row %d with some text" % i for i in range(500)]
    path = tmp_path / "p.parquet"
    base = ["--source", "files", "--input", path, "--val-fraction", "0", "--force", "--out", tmp_path / "out"]
    pq.write_table(pa.table({"text": rows}), str(path), compression="none", use_dictionary=False,
                   write_page_checksum=True)
    data = read(path)
    assert data.count(b"row 77 with") >= 1
    write(path, data.replace(b"row 77 with", b"row 78 with"))
    fails(capsys, base, 1, "p.parquet cannot be read behind row [0-9]+: .*|p.parquet is not a parquet file")
    latin = pa.array([b"caf\xe9", b"fine", None]).cast(pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": latin}), str(path))
    assert prepare.main([str(x) for x in base]) == 0
    assert texts(load(tmp_path / "out")[1], "train") == [b"caf\xe9", b"fine"]


def test_the_newest_kernel_at_hand(tmp_path):
    for name in ("linux-source-6.1_6.1.9-1_all.deb", "linux-source-6.1_6.1.10-1_all.deb", "linux-source-5.10_5.10.99_all.deb",
                 "linux-source-x.deb", "linux-source-7.deb.part"):
        write(tmp_path / name, "")
    assert prepare.linux_archive(str(tmp_path), print) == str(tmp_path / "linux-source-6.1_6.1.10-1_all.deb")


def test_no_apt(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(prepare, "DATA_DIR", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    fails(capsys, ["--source", "linux"], 1, "apt-get, which this machine does not have.*--linux-archive FILE")
    for name, script in (("apt-cache", "echo linux-source-9.9"), ("apt-get", "echo E: no such host >&2; exit 100")):
        write(tmp_path / name, "#!/bin/sh\n%s\n" % script).chmod(0o755)
    fails(capsys, ["--source", "linux"], 1, "no linux-source package.*apt-get update.*--linux-archive FILE")


def test_bad_tokenizers(tmp_path, capsys, monkeypatch):
    t = write(tmp_path / "t.txt", "some text")
    base = ["--out", tmp_path / "out", "--source", "files", "--input", t, "--tokenizer"]
    fails(capsys, base + [t], 1, "t.txt is not a tokenizer.json")
    path = word_tokenizer(tmp_path / "tokenizer.json", ["[UNK]", "a"])
    fails(capsys, base + [path], 1, "none of the usual end-of-text tokens .*--eot-token")
    fails(capsys, base + [path, "--eot-token", "b"], 1, "--eot-token 'b' is not among the 2 tokens")
    for name, change, pattern in [
        ("empty", lambda d: d["model"].update(vocab={}), "has no vocabulary|reads"),
        ("large", lambda d: d["model"]["vocab"].update(b=3000000000), "has ids up to 3000000000; .* 16777215"),
        ("shape", lambda d: d.update(model=[]), "is not a tokenizer.json that the tokenizers package reads"),
        ("added", lambda d: d.update(added_tokens=[{"id": 1}]), "is not a tokenizer.json"),
    ]:
        changed = json.loads(read(path))
        change(changed)
        write(tmp_path / (name + ".json"), json.dumps(changed))
        fails(capsys, base + [tmp_path / (name + ".json"), "--eot-token", "a"], 1, "%s.json .*(%s)" % (name, pattern))
    # a package that is missing
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    fails(capsys, base + [path], 1, "needs the Python package 'tokenizers'.*(pip install tokenizers|which has it), or give")


def test_ranks_not_to_be_had(tmp_path, monkeypatch):
    """A damaged cache and no network: one message that says where the file may be put."""
    write(tmp_path / "gpt2.tiktoken", "IQ== 0\n")
    for name in ("https_proxy", "HTTPS_PROXY", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "none"))
    said = []
    with pytest.raises(prepare.Failure, match="neither at .*gpt2.tiktoken nor to be had .*openai-whisper.*sha256"):
        prepare.gpt2_ranks(str(tmp_path), said.append, seconds=10)
    assert "damaged" in said[0]


def test_dead_worker(tmp_path, ranks, capsys, monkeypatch):
    """A worker that the system kills ends the run with a message, not with a wait for ever."""
    monkeypatch.setattr(prepare, "PIECE", 1000)
    monkeypatch.setattr(prepare, "start_worker", os.abort)
    fails(capsys, small_set(tmp_path) + ["--out", tmp_path / "out", "--tokenizer", "gpt2", "--workers", "2"], 1,
          "a worker process died")


def test_mutated_files():
    """A few mutations of every kind of file; dev/fuzz_prepare.py does thousands."""
    done = subprocess.run([sys.executable, os.path.join(ROOT, "dev", "fuzz_prepare.py"), "--count", "120"],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
