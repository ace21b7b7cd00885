#!/usr/bin/env python3
"""Shows which kinds of attention see the future: trains tiny models on ids that nobody can predict.

The ids are uniform and independent, so no causal model can have a loss below ln(ids) on fresh ones. A loss below it
says that an output knows something of the tokens after it. Each --attention is trained alone, never dense, and
validated under itself and, with the same weights, under dense attention:

    dev/leak.py                          every kind that the trainer has; a few seconds each on a CPU
    dev/leak.py --attention WL DWL -- --depth 3 --steps 1000     patterns; options of the trainer after --
    dev/leak.py --trainer ./train_gpt_lighthouse --ids 8

That a loss is not below proves nothing by itself: the model may not have learned to look (dev/test_causality.cu
exchanges tokens instead). Exit status 1: L alone, the published Lighthouse, shows nothing, or what has no L does.
"""
import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
# Below ln(ids) by more than this is no chance: losses scatter by 0.1 to 0.3, so the mean of VALIDATED is good to 0.001.
TOLERANCE = 0.003
T, BATCH, VALIDATED = 256, 8, 50 * 8 * 256
# The smallest setting found that shows it: pairs of tokens, half of which are expanded. Of four ids about as many pairs
# hold the one whose norms are largest: a token with a slot of its own but a small norm knows what follows it.
SETTING = {"depth": 1, "channels": 32, "heads": 1, "seq-len": T, "batch-size": BATCH, "steps": 300,
           "switch-step": "1.0", "window": 64, "levels": 2, "pool": 2, "topk": 64, "tile": 64, "learning-rate": "1e-2",
           "lr-schedule": "constant", "warmup-steps": 20, "val-every": 0, "val-batches": VALIDATED // (T * BATCH),
           "checkpoint-every": 0}
CAUSAL_TILE = 16  # of patterns with a C: four tiles, since in one alone Causal Lighthouse is dense attention


def kinds():
    """The letters of the trainer's --attention."""
    source = (ROOT / "train_gpt_lighthouse.cu").read_text()
    return re.search(r'attention_letters\[\] = "([A-Z]+)"', source).group(1)


def write_ids(path, ids, count, seed):
    header = np.zeros(256, "<i4")
    header[:3] = [20240520, 1, count]
    path.write_bytes(header.tobytes() + np.random.default_rng(seed).integers(0, ids, count, dtype="<u2").tobytes())


def train(trainer, attention, ids, seed, folder, options):
    """Loss of fresh ids under the attention, and dense with the same weights."""
    write_ids(folder / "train.bin", ids, 2 ** 20, 2 * seed)
    write_ids(folder / "val.bin", ids, VALIDATED + T, 2 * seed + 1)
    setting = {**SETTING, "train-data": folder / "train.bin", "val-data": folder / "val.bin", "out-dir": folder / "run",
               "attention": attention, "vocab-size": ids, "seed": seed}
    if "C" in attention:
        setting["tile"] = CAUSAL_TILE
    command = [trainer] + [f"--{name}={value}" for name, value in setting.items()] + options
    # So small a model is fastest on one thread.
    done = subprocess.run(command, env={"OMP_NUM_THREADS": "1", **os.environ}, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, universal_newlines=True)
    if done.returncode:
        sys.exit(f"leak.py: {' '.join(map(str, command))} failed: {done.stderr.strip()}")
    events = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]
    last = [e for e in events if e["event"] == "eval"][-1]
    return last["loss_dense"] if last["loss_first"] is None else last["loss_first"], last["loss_dense"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attention", nargs="+", default=list(kinds()),
                        help="patterns of letters; default: each letter alone")
    parser.add_argument("--ids", type=int, default=4, help="default 4")
    parser.add_argument("--seed", type=int, default=1, help="default 1")
    parser.add_argument("--trainer", default=str(ROOT / "train_gpt_lighthouse_cpu"))
    parser.add_argument("options", nargs="*", help="more options of the trainer, after --")
    a = parser.parse_args()
    floor, unexpected = math.log(a.ids), 0
    print(f"no causal model is below ln {a.ids} = {floor:.4f}\n{'attention':16} under it     dense", flush=True)
    for attention in a.attention:
        with tempfile.TemporaryDirectory() as folder:
            under, dense = train(a.trainer, attention, a.ids, a.seed, Path(folder), a.options)
        sees = under < floor - TOLERANCE
        unexpected += sees and "L" not in attention or not sees and set(attention) == {"L"}
        print(f"{attention:16} {under:8.4f}  {dense:8.4f}   {'sees the future' if sees else ''}", flush=True)
    return unexpected > 0


if __name__ == "__main__":
    sys.exit(main())
