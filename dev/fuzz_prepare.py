#!/usr/bin/env python3
"""Proves that data/prepare.py answers damaged input of every kind it reads with one message, or with a data set that
has all of the text: no traceback, nothing lost silently.

    python3 dev/fuzz_prepare.py [--count 3000] [--seed 0] [--kind NAME]

Each mutation is prepared in a process of its own, so that a crash inside a library counts as what it is. Where the
format has checksums, what is made must be the whole text; in plain text and tables no more than what was changed may be
missing.
"""
import argparse
import bz2
import codecs
import collections
import gzip
import io
import json
import lzma
import os
import random
import shutil
import struct
import sys
import tarfile
import tempfile
import time

os.environ["TOKENIZERS_PARALLELISM"] = "false"
sys.path.insert(0, os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "data"))
import prepare  # noqa: E402

TEXTS = ["Document %d.\nIt has a few words, \u00e9\u4e2d, and \"quotes\".\n" % i + "more text %d\n" % (i * i) * 9
         for i in range(12)]
JSONL = "".join(json.dumps({"id": i, "text": t, "meta": {"n": [i]}}) + "\n" for i, t in enumerate(TEXTS)).encode()
TEXT = "".join(TEXTS).encode()
KERNEL = [("linux-1/a/%d.c" % i, t.encode()) for i, t in enumerate(TEXTS)]


def tar_of(members, mode=""):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:" + mode) as t:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            t.addfile(info, io.BytesIO(data))
    return out.getvalue()


def deb_of(data):
    out = b"!<arch>\n"
    for name, body in ((b"debian-binary", b"2.0\n"), (b"data.tar.xz", data)):
        out += b"%-16s%-12d%-6d%-6d%-8s%-10d`\n" % (name, 0, 0, 0, b"100644", len(body))
        out += body + b"\n" * (len(body) % 2)
    return out


def parquet(**more):
    import pyarrow as pa
    import pyarrow.parquet as pq
    out = io.BytesIO()
    pq.write_table(pa.table({"id": list(range(len(TEXTS))), "text": TEXTS}), out, row_group_size=5, **more)
    return out.getvalue()


def tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    t = Tokenizer(models.BPE())
    t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    t.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=290, special_tokens=["<|endoftext|>"],
                                                     show_progress=False))
    return t.to_str().encode()


def mds():
    """A shard of MosaicML's streaming format: texts, and ids with the begin and end of their documents."""
    about = json.dumps({"format": "mds", "version": 2, "column_names": ["ids", "text"], "column_sizes": [None, None],
                        "column_encodings": ["ndarray:uint16", "str"]}).encode()
    bodies = []
    for text in TEXTS:
        ids = bytes([1 << 2, 4]) + struct.pack("<4H", 1, 2, 3, 4)
        bodies.append(struct.pack("<2I", len(ids), len(text.encode())) + ids + text.encode())
    at, offsets = 4 * (len(bodies) + 2) + len(about), []
    for body in bodies + [b""]:
        offsets.append(at)
        at += len(body)
    return struct.pack("<%dI" % (len(offsets) + 1), len(bodies), *offsets) + about + b"".join(bodies)


def kinds():
    """name: (file's name, its bytes, options, whether the format has checksums, the least of the text or None)"""
    import zstandard
    zst = zstandard.ZstdCompressor(write_checksum=True).compress
    utf16 = codecs.BOM_UTF16_LE + "".join(TEXTS).encode("utf-16-le")
    rows = "id,text\n" + "".join('%d,"%s"\n' % (i, t.replace('"', '""')) for i, t in enumerate(TEXTS))
    files = {"txt": ("t.txt", TEXT, False), "txt.gz": ("t.txt.gz", gzip.compress(TEXT), True),
             "jsonl": ("t.jsonl", JSONL, False), "jsonl.gz": ("t.jsonl.gz", gzip.compress(JSONL), True),
             "two.gz": ("t.jsonl.gz", gzip.compress(JSONL[:900]) + gzip.compress(JSONL[900:]), True),
             "jsonl.xz": ("t.jsonl.xz", lzma.compress(JSONL), True),
             "two.xz": ("t.jsonl.xz", lzma.compress(JSONL[:900]) + lzma.compress(JSONL[900:]), True),
             "jsonl.bz2": ("t.jsonl.bz2", bz2.compress(JSONL), True),
             "two.bz2": ("t.jsonl.bz2", bz2.compress(JSONL[:900]) + bz2.compress(JSONL[900:]), True),
             "jsonl.zst": ("t.jsonl.zst", zst(JSONL), True),
             "two.zst": ("t.jsonl.zst", zst(JSONL[:900]) + zst(JSONL[900:]), True),
             "json": ("t.json", json.dumps([{"text": t} for t in TEXTS], indent=1).encode(), False),
             "json.gz": ("t.json.gz", gzip.compress(JSONL), True), "csv": ("t.csv", rows.encode(), False),
             "tsv": ("t.tsv", rows.replace(",", "\t", 1).replace(',"Doc', '\t"Doc').encode(), False),
             "utf-16": ("t.txt", utf16, False), "mds": ("t.mds", mds(), False),
             "mds.zst": ("t.mds.zst", zst(mds()), True),
             "parquet": ("t.parquet", parquet(write_page_checksum=True), True),
             "parquet plain": ("t.parquet", parquet(write_page_checksum=True, compression="none", use_dictionary=False),
                               True)}
    out = {k: (name, data, ["--source", "files", "--input"], sums) for k, (name, data, sums) in files.items()}
    linux = ["--source", "linux", "--linux-archive"]
    out["tar.xz"] = ("linux-1.tar.xz", tar_of(KERNEL, "xz"), linux, True)
    out["tar.gz"] = ("linux-1.tar.gz", tar_of(KERNEL, "gz"), linux, True)
    out["tar"] = ("linux-1.tar", tar_of(KERNEL), linux, False)
    out["deb"] = ("l.deb", deb_of(tar_of([("./usr/src/linux-1.tar.xz", tar_of(KERNEL, "xz"))], "xz")), linux, True)
    text = ["--source", "files", "--input", "%s/plain.jsonl" % os.getcwd()]
    ids = ["--source", "files", "--text-field", "ids", "--detokenize", "%s/ids.json" % os.getcwd(), "--input"]
    out["mds ids"] = ("t.mds", mds(), ids, None)
    out["tokenizer"] = ("tokenizer.json", tokenizer(), text + ["--tokenizer"], None)
    out["manifest"] = ("out/manifest.json", None, text, None)
    out["progress"] = ("out/progress.json", None, text, None)
    return out


def mutated(data, rng):
    data, what = bytearray(data), rng.choice(["flip", "byte", "insert", "delete", "cut", "double", "zero"])
    at = rng.randrange(len(data))
    size = rng.choice([1, 1, 2, 4, rng.randrange(1, 1 + min(64, len(data)))])
    if what == "flip":
        data[at] ^= 1 << rng.randrange(8)
    elif what == "byte":
        data[at] = rng.randrange(256)
    elif what == "insert":
        data[at:at] = rng.choice([bytes(size), rng.randbytes(size), b'"', b"{", b"]", b"\n", b"\\u", b"-1",
                                  b"99999999999"])
    elif what == "delete":
        del data[at:at + size]
    elif what == "cut":
        del data[at:]
    elif what == "double":
        data[at:at] = data[at:at + size]
    else:
        data[at:at + size] = bytes(len(data[at:at + size]))
    return what, bytes(data)


def text_made(out):
    with open(os.path.join(out, "manifest.json")) as f:
        manifest = json.load(f)
    text = b""
    for shard in manifest["shards"]:
        with open(os.path.join(out, shard["name"]), "rb") as f:
            tokens = memoryview(f.read()[1024:]).cast("H")
        text += bytes(t for t in tokens if t < 256) if manifest["tokenizer"] == "bytes" else b""
    return text, manifest


def attempt(argv, out, good, sums, what):
    """In a child: the reason why this is a fault, or None; and whether a data set was made."""
    log = tempfile.TemporaryFile()
    pid = os.fork()
    if pid == 0:
        status = 99
        try:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            status = prepare.main(argv)
            sys.stdout.flush()
            if status == 0 and sums is not None:
                text, manifest = text_made(out)
                if sums and text != good and not manifest["left_out"]:
                    status = 98
                elif not sums and what != "cut" and len(text) < len(good) - 1000 and not manifest["left_out"]:
                    status = 98
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    log.seek(0)
    said = log.read().decode("utf-8", "replace")
    messages = [line for line in said.splitlines() if line.startswith("prepare.py: ")]
    if status == 98:
        return "text is lost: " + said, True
    if status not in (0, 1, 2) or "Traceback" in said:
        return "status %d: %s" % (status, said), False
    if status and len(messages) != 1:
        return "%d messages: %s" % (len(messages), said), False
    return None if status == 0 or what != "nothing" else said, status == 0


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--count", type=int, default=3000)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--kind")
    a = p.parse_args()
    import tokenizers, zstandard, pyarrow.parquet  # noqa: E401, F401    (once, not in every child)
    os.fsync = lambda fd: None
    faults, made, start = 0, collections.Counter(), time.time()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        with open("plain.jsonl", "wb") as f:
            f.write(JSONL)
        with open("ids.json", "wb") as f:
            f.write(tokenizer())
        every = {k: v for k, v in kinds().items() if a.kind in (None, k)}
        whole = ["--source", "files", "--input", folder + "/plain.jsonl", "--out", folder + "/whole"]
        whole += ["--val-fraction", "0"]
        assert attempt(whole, "whole", b"", None, "")[1]
        with open("whole/manifest.json", "rb") as f:
            manifest = f.read()
        options = json.loads(manifest)["options"]
        none = {"documents": 0, "tokens": 0, "bytes": 0}
        state = {"shards": [], "open_tokens": 0}
        progress = json.dumps({"options": options, "pieces": 0, "crc": 0, "counts": {"train": none, "val": none},
                               "noted": {}, "noted_names": {}, "splits": {"train": state, "val": state}}).encode()
        good = {}
        for n in range(-len(every), a.count):    # first each as it is
            kind = list(every)[n % len(every)]
            name, data, options, sums = every[kind]
            data = {"manifest": manifest, "progress": progress}.get(kind, data)
            rng = random.Random(a.seed * 1000003 + n)
            what, bad = mutated(data, rng) if n >= 0 else ("nothing", data)
            shutil.rmtree("out", ignore_errors=True)
            if kind == "manifest":
                shutil.copytree("whole", "out")
            os.makedirs(os.path.dirname(name) or ".", exist_ok=True)
            with open(name, "wb") as f:
                f.write(bad)
            argv = options + ([] if name.startswith("out/") else [folder + "/" + name]) + [
                "--out", folder + "/out", "--val-fraction", "0", "--workers", "1"]
            fault, complete = attempt(argv, "out", good.get(kind, b""), sums, what)
            if n < 0:
                assert complete, (kind, fault)
                if sums is not None:
                    good[kind] = text_made("out")[0]
                continue
            made[kind] += complete
            if fault:
                faults += 1
                print("%s, mutation %d (--seed %d), %s: %s\n" % (kind, n, a.seed, what, fault))
    print("%d mutations of %d kinds in %.0f s: %d faults; of them made a data set: %s"
          % (a.count, len(every), time.time() - start, faults, ", ".join("%s %d" % kv for kv in sorted(made.items()))))
    return faults > 0


if __name__ == "__main__":
    sys.exit(main())
