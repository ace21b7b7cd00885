"""What the texts of dev/EVIDENCE.md share: bytes to token shards, an end of text (256) behind each file."""
import hashlib
import os

import numpy as np


def number(name):
    """A large number that is the same on every machine: what is held out, and in which order."""
    return int(hashlib.md5(name.encode()).hexdigest(), 16)


def write(out, split):
    """split: {"train": [bytes of a file, ...], "val": [...]} to out/train.bin and out/val.bin."""
    os.makedirs(out, exist_ok=True)
    for name, texts in split.items():
        tokens = np.concatenate([np.append(np.frombuffer(t, np.uint8).astype(np.uint16), np.uint16(256)) for t in texts])
        header = np.zeros(256, np.int32)
        header[:3] = [20240520, 1, len(tokens)]
        with open(f"{out}/{name}.bin", "wb") as f:
            f.write(header.tobytes() + tokens.tobytes())
        print(f"{out}/{name}.bin: {len(tokens):,} tokens, {len(texts):,} files")
