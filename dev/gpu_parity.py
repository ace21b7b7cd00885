#!/usr/bin/env python3
"""Proves on a machine with a GPU that training there equals training on the CPU, and that GPU runs resume.

usage: dev/gpu_parity.py        (make test-gpu calls it; standard library only; needs the four trainers in the repository root)

The same tiny model and data, 30 steps across the switch, on both backends: every training loss within 0.5% (bf16 rounds each
weight and activation to 2^-9, and under Lighthouse turns close calls of the selection round). The steps are small, with a warmup:
with larger ones (a learning rate of 3e-4) the gradient of a single batch may be six times as large as those before it, and about
there rounding alone moves the loss by 1% to 3%. Then, on the GPU: a resumed run equals one that was not interrupted, bit for bit
with --deterministic 1, to the noise of cuDNN's atomics (0.2% of the loss, as measured between two equal runs) without; every
recompute level gives the same bits; the memory plan is what the run took, to 3%. With --fp8 1, which rounds to 2^-4, the losses lie
within 1% of bf16's; it too resumes and recomputes to the same bits.
"""
import argparse
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
STEPS, SWITCH, T = 30, 20, 1024
PATTERNS = {"lighthouse": "DLLL", "windows": "WDLW", "causal": "DCWC"}  # the windows grow, and do not divide T
passed = failed = 0


def check(ok, name, figures):
    global passed, failed
    print(f"{'ok  ' if ok else 'FAIL'} {name}: {figures}", flush=True)
    passed, failed = passed + bool(ok), failed + (not ok)


def write_shard(path, tokens):
    with open(path, "wb") as f:
        f.write(struct.pack("<256i", 20240520, 1, len(tokens), *[0] * 253))
        f.write(struct.pack(f"<{len(tokens)}H", *tokens))


def no_arguments(doc):
    """--help prints the program's description; anything else on the command line is refused."""
    argparse.ArgumentParser(usage=argparse.SUPPRESS, description=doc,
                            formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()


def make_data(folder):
    """Bytes of Python sources: real text, so that the loss falls within the 30 steps."""
    text = b"".join(open(os.path.join(os.path.dirname(json.__file__), "..", name), "rb").read()
                    for name in ("argparse.py", "subprocess.py", "tarfile.py", "typing.py"))
    write_shard(os.path.join(folder, "train_0.bin"), [256] + list(text[:-16384]))
    write_shard(os.path.join(folder, "val_0.bin"), [256] + list(text[-16384:]))


def command_of(program, out, data, *options):
    return [os.path.join(ROOT, program), "--train-data", f"{data}/train_*.bin", "--val-data", f"{data}/val_*.bin",
            "--out-dir", out, "--model", "d6", "--depth", "4", "--seq-len", str(T), "--batch-size", "2",
            "--learning-rate", "1e-4", "--warmup-steps", "10", "--val-every", "10", "--val-batches", "2", "--steps", str(STEPS), *options]


def run(program, out, data, *options):
    command = command_of(program, out, data, *options)
    environment = dict(os.environ, OMP_NUM_THREADS="2") if program.endswith("_cpu") else os.environ
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"error: {' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return out


def events(out, kind):
    with open(os.path.join(out, "log.jsonl")) as f:
        return [e for e in map(json.loads, f) if e["event"] == kind]


def losses(out):
    by_step = {e["step"]: e["loss"] for e in events(out, "step")}
    return [by_step[s] for s in sorted(by_step)]


def worst_difference(a, b):
    assert len(a) == len(b) > 0
    return max(abs(x - y) / y for x, y in zip(a, b))


def model_bytes(out):
    return open(os.path.join(out, "model.bin"), "rb").read()


def at_once(f, of):
    """Results of f, several runs sharing the GPU: starting, on a core, takes most of a short run's time."""
    with ThreadPoolExecutor(max(4, (os.cpu_count() or 2) // 4)) as pool:
        return list(pool.map(f, of))


def main():
    work = tempfile.mkdtemp()
    data = work
    make_data(data)
    cases = []
    for attention in (*PATTERNS, "dense"):
        for positions in ("rope", "learned"):
            for head in (64, 128):
                options = ["--channels", "256", "--heads", str(256 // head), "--positions", positions]
                if attention != "dense":
                    options += ["--switch-step", str(SWITCH), "--attention", PATTERNS[attention], "--window", "192,384:10"]
                if attention == "causal":
                    options += ["--levels", "3", "--topk", "64", "--tile", "16"]  # four tiles
                cases.append((f"{attention} {positions} D {head}", f"train_gpt_{'dense' if attention == 'dense' else 'lighthouse'}", options))
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 2) // 2)) as pool:
        cpu = list(pool.map(lambda c: run(c[1] + "_cpu", os.path.join(work, "cpu " + c[0]), data, *c[2]), cases))
    gpu = at_once(lambda c: run(c[1], os.path.join(work, "gpu " + c[0]), data, *c[2]), cases)
    for (name, program, options), out, cpu_out in zip(cases, gpu, cpu):
        worst = worst_difference(losses(out), losses(cpu_out))
        a, b = [[e["loss_dense"] for e in events(o, "eval")] for o in (out, cpu_out)]
        fell = losses(cpu_out)[0] - losses(cpu_out)[-1]
        check(worst < 0.005 and worst_difference(a, b) < 0.005 and fell > 0.7, f"parity {name}",
              f"{STEPS} losses differ by at most {worst:.2%} from the CPU's, validation by {worst_difference(a, b):.2%}; "
              f"the loss fell by {fell:.2f}")

    options = cases[0][2]
    for deterministic, fp8 in (("1", "0"), ("0", "0"), ("1", "1")):
        o = options + ["--deterministic", deterministic, "--fp8", fp8]
        kind = f"deterministic {deterministic}, fp8 {fp8}"
        whole = run("train_gpt_lighthouse", f"{work}/{kind}", data, *o)

        def resumed(stop):
            out = f"{work}/{kind}, resumed at {stop}"
            run("train_gpt_lighthouse", out, data, *o, "--checkpoint-every", str(stop), "--keep-last", "0")
            for name in os.listdir(out):
                if name != f"ckpt_{stop:08d}.bin":
                    os.unlink(os.path.join(out, name))
            return run("train_gpt_lighthouse", out, data, *o, "--resume", "1")
        stops = (SWITCH - 5, SWITCH, SWITCH + 5)
        for stop, out in zip(stops, at_once(resumed, stops)):
            worst = worst_difference(losses(out), losses(whole)[stop:])
            same = model_bytes(out) == model_bytes(whole)
            check(same if deterministic == "1" else worst < 0.002, f"resume at step {stop}, {kind}",
                  f"losses differ by at most {worst:.4%}, the model is {'the same bits' if same else 'not the same bits'}")
            shutil.rmtree(out)
    for fp8 in ("0", "1"):
        whole = model_bytes(f"{work}/deterministic 1, fp8 {fp8}")
        for level, out in enumerate(at_once(lambda level: run(
                "train_gpt_lighthouse", f"{work}/recompute {level}, fp8 {fp8}", data, *options, "--deterministic", "1", "--fp8", fp8,
                "--recompute", str(level)), range(5))):
            check(model_bytes(out) == whole, f"recompute {level}, fp8 {fp8}", "the same bits as the automatic level")
    for (name, _, _), out in zip(cases, at_once(lambda c: run(c[1], f"{work}/fp8 {c[0]}", data, *c[2], "--fp8", "1"), cases)):
        wide = f"{work}/gpu {name}"
        worst = worst_difference(losses(out), losses(wide))
        worst_eval = worst_difference([e["loss_dense"] for e in events(out, "eval")], [e["loss_dense"] for e in events(wide, "eval")])
        check(0 < worst < 0.01 and worst_eval < 0.01, f"fp8 {name}",
              f"{STEPS} losses differ by at most {worst:.2%} from bf16's, validation by {worst_eval:.2%}")

    for fp8 in ("0", "1"):
        out = run("train_gpt_lighthouse", f"{work}/memory{fp8}", data, "--model", "d12", "--depth", "12", "--batch-size", "32", "--steps",
                  "2", "--warmup-steps", "0", "--switch-step", "1", "--checkpoint-every", "0", "--fp8", fp8)
        planned, taken = events(out, "memory")[0]["total_bytes"], events(out, "total")[0]["device_bytes"]
        check(abs(taken - planned) < 0.03 * planned, f"memory plan, fp8 {fp8}",
              f"{planned / 2**30:.2f} GiB planned, {taken / 2**30:.2f} GiB taken")
    shutil.rmtree(work)
    print(f"{passed} passed, {failed} failed")
    return failed > 0


if __name__ == "__main__":
    no_arguments(__doc__)
    sys.exit(main())
