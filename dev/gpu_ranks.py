#!/usr/bin/env python3
"""Proves on a machine with several GPUs that ranks which share the work train as one does.

usage: dev/gpu_ranks.py         (make test-gpu calls it where there are two GPUs or more; needs mpirun and train_gpt_lighthouse)

The same tiny model and global batch, 30 steps across the switch, on one GPU and on 2, 4 and 8 (as many as there are), data
parallel, context parallel with either kind of exchange in Lighthouse layers, and both: training losses and validation within 0.5% of one GPU's (bf16 rounds each weight and
activation to 2^-9; another order of sums turns close calls of the selection). Checkpoints resume on other numbers of GPUs. One rank under mpirun gives the
bits of the run without. Then what must not go wrong: two ranks on one GPU are refused; a killed rank ends the job, a stopped one is named.
"""
import glob
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import gpu_parity
from gpu_parity import ROOT, STEPS, SWITCH, T, at_once, check, command_of, events, losses, model_bytes, worst_difference

PROGRAM = "train_gpt_lighthouse"
GEOMETRY = ["--attention", "DLLL", "--switch-step", str(SWITCH), "--channels", "256", "--heads", "4", "--total-batch-size", str(4 * T)]
TILES = ["--topk", "64", "--tile", "16"]  # four tiles, which ranks can share; left alone, these lengths have one
CAUSAL = ["--attention", "DCWC", "--window", "192", "--levels", "3", *TILES]
# Gradients of 10, 10 and 3 layers are summed at once, and weights gathered. Dense: through 23 Lighthouse layers rounding alone moves the
# losses by up to 0.9% (one GPU with another batch size), which would hide a wrong sum; dense they differ by 0.04%.
DEEP = ["--depth", "23", "--switch-step", "0"]


def gpus():
    if not shutil.which("nvidia-smi"):
        raise SystemExit("error: nvidia-smi is not there: dev/gpu_ranks.py wants a machine with several NVIDIA GPUs")
    return int(subprocess.check_output([os.path.join(ROOT, "scripts", "gpus")]))


os.environ.update(OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1")  # as root is in a container


def mpirun(ranks):
    return ["mpirun", "--bind-to", "none", "-n", str(ranks)]


def command(work, out, ranks, *options):
    return [*(mpirun(ranks) if ranks else []), *command_of(PROGRAM, out, work, "--val-batches", "100", *GEOMETRY, *options)]


def run(work, out, ranks, *options):
    done = subprocess.run(command(work, out, ranks, *options), capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise SystemExit(f"error: {out}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return out


def pids(out):
    """The processes that train into a directory."""
    found = []
    for path in glob.glob("/proc/[0-9]*"):
        try:
            with open(f"{path}/cmdline") as line, open(f"{path}/comm") as name:
                if f"out-dir {out} " in line.read().replace("\0", " ") and "train_gpt" in name.read():
                    found.append(int(os.path.basename(path)))
        except OSError:
            pass  # it has ended
    return found


def compare(name, out, reference, since=0):
    worst = worst_difference(losses(out), losses(reference)[since:])
    a, b = ([e["loss_dense"] for e in events(o, "eval") if e["step"] > since] for o in (out, reference))
    check(worst < 0.005 and worst_difference(a, b) < 0.005, name,
          f"{STEPS - since} losses differ by at most {worst:.2%} from one GPU's, validation by {worst_difference(a, b):.2%}")


def main():
    most = gpus()
    work = tempfile.mkdtemp()
    gpu_parity.make_data(work)
    cases = {"one": [], "tiles": TILES, "learned": ["--positions", "learned"], "deep": DEEP, "causal": CAUSAL}
    at_once(lambda name: run(work, f"{work}/{name}", 0, "--batch-size", "2", "--checkpoint-every", "15", "--keep-last", "0", *cases[name]), cases)
    one = f"{work}/one"
    alone = run(work, f"{work}/alone", 1, "--batch-size", "2")
    check(model_bytes(alone) == model_bytes(one), "one rank under mpirun", "the bits of the run without")
    cases = [case for case in (
            ("dp 2", 2, "one", ["--batch-size", "1"]),
            ("dp 2, 23 layers", 2, "deep", ["--batch-size", "1", *DEEP]),
            ("cp 2", 2, "one", ["--batch-size", "2", "--cp", "2"]),
            ("cp 2, tiles", 2, "tiles", ["--batch-size", "2", "--cp", "2", *TILES]),
            ("cp 2, causal", 2, "causal", ["--batch-size", "2", "--cp", "2", *CAUSAL]),
            ("cp 2, learned, recompute 4", 2, "learned", ["--batch-size", "4", "--cp", "2", "--positions", "learned", "--recompute", "4"]),
            ("dp 4", 4, "one", ["--batch-size", "1"]),
            ("cp 4, tiles", 4, "tiles", ["--batch-size", "2", "--cp", "4", *TILES]),
            ("dp 2, cp 2", 4, "one", ["--batch-size", "1", "--cp", "2"]),
            ("dp 4, cp 2", 8, "one", ["--batch-size", "1", "--cp", "2"])) if case[1] <= most]
    for case, out in zip(cases, at_once(lambda c: run(work, f"{work}/{c[0]}", c[1], *c[3]), cases)):
        compare(case[0], out, f"{work}/{case[2]}")
    cases = [case for case in (("1 -> dp 2", 2, []), ("1 -> cp 2", 2, ["--cp", "2"]), ("1 -> dp 2, cp 2", 4, ["--cp", "2"])) if case[1] <= most]

    def resumed(case):
        os.makedirs(f"{work}/{case[0]}")
        shutil.copy(f"{one}/ckpt_00000015.bin", f"{work}/{case[0]}")
        return run(work, f"{work}/{case[0]}", case[1], "--batch-size", "1", "--resume", "1", *case[2])
    for case, out in zip(cases, at_once(resumed, cases)):
        compare(f"resume, {case[0]}", out, one, 15)

    refused = subprocess.run(command(work, f"{work}/refused", 2, "--batch-size", "1"), capture_output=True, text=True, timeout=60,
                             env=dict(os.environ, CUDA_VISIBLE_DEVICES="0"))
    check(refused.returncode != 0 and "share 1 GPU" in refused.stderr, "two ranks on one GPU", "refused with a message")
    for name, how, limit in (("killed", signal.SIGKILL, 30), ("stopped", signal.SIGSTOP, 40)):
        out = f"{work}/{name}"
        job = subprocess.Popen(command(work, out, 2, "--batch-size", "1", "--steps", "1000000", "--switch-step", "1000000", "--hang-timeout", "6",
                                       "--checkpoint-every", "0", "--val-every", "0"), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        began = time.monotonic()
        while time.monotonic() - began < 60 and not (os.path.exists(f"{out}/log.jsonl") and len(events(out, "step")) > 20):
            time.sleep(0.2)
        victims, began = pids(out), time.monotonic()
        if len(victims) == 2:
            os.kill(victims[1], how)
        try:
            error = job.communicate(timeout=limit)[1]
        except subprocess.TimeoutExpired:
            error = "the job goes on"
            for pid in (*victims, job.pid):
                os.kill(pid, signal.SIGKILL)
        named = f"pid {victims[1]} " in error if how == signal.SIGSTOP and len(victims) == 2 else "signal 9" in error
        check(len(victims) == 2 and job.returncode and named, f"a {name} rank",
              f"ended the job after {time.monotonic() - began:.1f} s, by name" if named else error[-300:])
    shutil.rmtree(work)
    print(f"{gpu_parity.passed} passed, {gpu_parity.failed} failed")
    return gpu_parity.failed > 0


if __name__ == "__main__":
    gpu_parity.no_arguments(__doc__)
    sys.exit(main())
