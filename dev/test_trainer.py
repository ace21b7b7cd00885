"""Proves that whole runs of the trainer on the CPU backend do what the README promises: a killed run resumes to the same
bits, damaged files are named and refused, every option is checked, and schedules, logs, model files and samples are right.
Several processes: test_mpi.py.

    python -m pytest dev/test_trainer.py        (make builds the programs first)

The models are tiny and the data is made here, in llm.c's shard format. Everything runs on one thread.
"""
import fcntl
import json
import math
import os
import random
import re
import resource
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
import model_file
ENV = dict(os.environ, OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", OMPI_ALLOW_RUN_AS_ROOT="1",
           OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1")
FIRST_PHASE_OPTIONS = {"attention", "window", "levels", "pool", "topk", "tile", "switch-step"}
T = 64
# 16 coarsest entries in 2 tiles; 48 slots for 64 tokens. The three layers are dense, Lighthouse, dense.
GEOMETRY = dict(levels=3, pool=2, topk=8, tile=4)
TINY = dict(model="d6", depth=3, channels=16, heads=2, seq_len=T, val_data="")


# ---- running the programs

class Result:
    def __init__(self, done):
        self.code, self.out, self.err = done.returncode, done.stdout, done.stderr


def arguments(options):
    return [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]


def execute(command, **how):
    return Result(subprocess.run([str(c) for c in command], env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                 universal_newlines=True, errors="replace", timeout=120, **how))


class Programs(dict):
    """The programs, built by make when first asked for and copied aside, so that a later build does not exchange them."""
    names = dict(lighthouse="train_gpt_lighthouse_cpu", dense="train_gpt_dense_cpu", units="build/test_units")

    def __init__(self, folder):
        self.folder = folder

    def __missing__(self, key):
        with open(ROOT / "dev" / "run_one") as lock:  # pytest's processes build one after the other
            fcntl.flock(lock, fcntl.LOCK_EX)
            subprocess.run(["make", self.names[key]], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        self[key] = shutil.copy(ROOT / self.names[key], self.folder)
        return self[key]


@pytest.fixture(scope="session")
def programs(tmp_path_factory):
    return Programs(tmp_path_factory.mktemp("programs"))


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return Data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def lab(programs, data, tmp_path):
    return Lab(programs, data, tmp_path)


class Lab:
    """Starts runs of a tiny model in a test's own folder."""

    def __init__(self, programs, data, folder):
        self.programs, self.data, self.folder = programs, data, folder

    def command(self, out, program="lighthouse", **options):
        every = dict(TINY, train_data=self.data.small)
        if program == "lighthouse":
            every.update(GEOMETRY, attention="paper")
        every.update(out_dir=self.folder / out, **options)
        return [self.programs[program]] + arguments({k: v for k, v in every.items() if v is not None})

    def run(self, out, **options):
        return execute(self.command(out, **options))

    def train(self, out, **options):
        """A run that must succeed. Returns its folder."""
        result = self.run(out, **options)
        assert result.code == 0, result.err + result.out
        return self.folder / out

    def refused(self, *words, **options):
        """A dry run that must fail with one message that holds these words."""
        out = options.pop("out", "refused")
        return self.fails(execute(self.command(out, **options) + ["--dry-run"]), *words)

    def fails(self, result, *words):
        assert result.code not in (0, -signal.SIGSEGV, -signal.SIGABRT), (result.code, result.out, result.err)
        assert result.err.startswith("error: ") and len(result.err.splitlines()) == 1, result.err
        for word in words:
            assert str(word) in result.err, f"{word!r} is not in {result.err!r}"
        return result


def preload(lab, source, monkeypatch):
    """Lets the programs find this C code's functions before the system's."""
    (lab.folder / "preload.c").write_text(source)
    subprocess.run(["gcc", "-shared", "-fPIC", "preload.c", "-o", "preload.so", "-ldl"], cwd=lab.folder, check=True)
    monkeypatch.setitem(ENV, "LD_PRELOAD", str(lab.folder / "preload.so"))


LITTLE_MEMORY = r'''
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
FILE* fopen(const char* path, const char* mode) {  // rank 1, or a process alone, finds as much memory free as is said
    FILE* (*real)(const char*, const char*) = dlsym(RTLD_NEXT, "fopen");
    const char *rank = getenv("OMPI_COMM_WORLD_RANK"), *line = getenv("LITTLE_MEMORY");
    if (strcmp(path, "/proc/meminfo") || !line || (rank && strcmp(rank, "1"))) return real(path, mode);
    return fmemopen((void*)line, strlen(line), "r");
}
'''


def little_memory(folder, free):
    """The environment, as NAME=value, that lets a program find so many bytes free."""
    library = folder / "little.so"
    if not library.exists():
        (folder / "little.c").write_text(LITTLE_MEMORY)
        subprocess.run(["gcc", "-shared", "-fPIC", "little.c", "-o", library, "-ldl"], cwd=folder, check=True)
    return [f"LD_PRELOAD={library}", f"LITTLE_MEMORY=MemAvailable: {int(free) // 1024} kB"]


# ---- files

def write_shard(path, tokens, width=2, **header):
    words = [20240520, 1, len(tokens)] if width == 2 else [20240801, 7, len(tokens)]
    for name, value in header.items():
        words[["magic", "version", "count"].index(name)] = value
    path.write_bytes(struct.pack("<256i", *words, *[0] * 253) + np.asarray(tokens, "<u2" if width == 2 else "<u4").tobytes())
    return path


class Data:
    def __init__(self, folder):
        self.folder = folder
        generator = np.random.RandomState(5)

        def text(windows):  # structure to learn: counting in one of a few steps
            start, step = generator.randint(0, 256, windows + 1), generator.choice([1, 3, 7], windows + 1)
            tokens = np.concatenate([(a + b * np.arange(T)) % 200 for a, b in zip(start, step)])[:windows * T + 1]
            return np.where(generator.rand(len(tokens)) < 0.1, 256, tokens)

        self.tokens = text(7)
        self.small = write_shard(folder / "small.bin", self.tokens)      # 7 windows
        self.large = write_shard(folder / "large.bin", text(300))
        self.val = write_shard(folder / "val.bin", text(4))
        outlier = generator.randint(0, 16, 260 * T + 1)                 # easily learnt: a loss of log(16), hardly varying
        outlier[250 * T + 1:251 * T + 1] = generator.randint(200, 256, T)       # but window 250 is like nothing before
        self.outlier = write_shard(folder / "outlier.bin", outlier)
        pieces = [bytes([i]) for i in range(256)] + [b"<|endoftext|>"]
        self.tokenizer = write_tokenizer(folder / "tokenizer.bin", pieces, 256)


def write_tokenizer(path, pieces, end_of_text):
    header = struct.pack("<256i", 20240328, 2, len(pieces), end_of_text, *[0] * 252)
    path.write_bytes(header + b"".join(bytes([len(p)]) + p for p in pieces))
    return path


def model_bytes(folder):
    return (folder / "model.bin").read_bytes()


class ModelFile:
    """A model file taken apart by the format's description, not by the trainer's code."""

    def __init__(self, data):
        h = struct.unpack("<256i", data[:1024])
        self.version, self.max_T, self.V, self.L, self.H, self.C, self.Vp, self.step = h[1], *h[2:8], h[9]
        self.theta = struct.unpack("<f", data[32:36])[0]
        assert h[0] == 20240326
        C, L = self.C, self.L
        shapes = dict(wte=(self.Vp, C), wpe=(self.max_T, C), ln1w=(L, C), ln1b=(L, C), qkvw=(L, 3 * C, C), qkvb=(L, 3 * C),
                      attprojw=(L, C, C), attprojb=(L, C), ln2w=(L, C), ln2b=(L, C), fcw=(L, 4 * C, C), fcb=(L, 4 * C),
                      fcprojw=(L, C, 4 * C), fcprojb=(L, C), lnfw=(C,), lnfb=(C,))
        if self.version > 100:
            del shapes["wpe"]
        body, at = np.frombuffer(data, "<f4", offset=1024), 0
        for name, shape in shapes.items():
            setattr(self, name, body[at:at + math.prod(shape)].reshape(shape))
            at += math.prod(shape)
        assert at == len(body), "the file's size is that of its tensors"


def checkpoint_body(path):
    """Weights and both moments of a checkpoint: everything that the run computes from."""
    assert path.exists(), path
    data = path.read_bytes()
    return data[struct.unpack("<q", data[2048:2056])[0]:]


def checkpoints(folder):
    return sorted(int(p.name[5:-4]) for p in folder.glob("ckpt_*.bin"))


def checkpoint(folder, step):
    return folder / f"ckpt_{step:08d}.bin"


def main_log(folder):
    """{step: (loss, lr, norm)} as llm.c's readers see main.log; of a step that occurs twice, the later line."""
    steps = {}
    for line in (folder / "main.log").read_text().splitlines():
        fields = dict(field.split(":") for field in line.split())
        if "trl" in fields:
            steps[int(fields["s"])] = fields["trl"], fields["lr"], fields["norm"]
    return steps


def events(folder, kind=None):
    lines = []
    assert (folder / "log.jsonl").exists(), f"no run in {folder}"
    for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            pytest.fail(f"{folder}/log.jsonl has a line that is no JSON: {line!r}")
    return [e for e in lines if kind in (None, e["event"])]


def step_events(folder):
    return [{e["step"]: e for e in events(folder, "step")}[i] for i in sorted({e["step"] for e in events(folder, "step")})]


# ---- 1. train -> kill -> resume equals train

CASES = {
    "rope": dict(),                                                              # 12 steps in epochs of 7 windows
    "learned": dict(positions="learned", shuffle=0, total_batch_size=3 * T),    # accumulation across the epochs' ends
    "batch": dict(batch_size=2, total_batch_size=4 * T, recompute=4, attention="L"),
    "wide": dict(seq_len=2 * T, recompute=2, lr_schedule="wsd", warmup_steps=3),
    "windows": dict(attention="WDL", window="16,24:3,48:6", batch_size=2, total_batch_size=4 * T, recompute=3),
    "windows, learned": dict(attention="W", window=24, positions="learned", batch_size=3, recompute=1),
    "causal": dict(attention="WCL", window=24, batch_size=2, total_batch_size=4 * T, recompute=4),
    "dense": dict(program="dense", batch_size=3, shuffle=0),
    "fp8, windows": dict(fp8=1, attention="WWD", window="40,16:2", recompute=4),
    "fp8": dict(fp8=1, recompute=1, total_batch_size=2 * T),
}
STEPS, SWITCH = 12, 7


def plan(lab, case, **more):
    options = dict(steps=STEPS, val_data=lab.data.val, val_every=5, val_batches=2, learning_rate=1e-2, **CASES[case])
    if options.get("program") != "dense":
        options["switch_step"] = SWITCH
    return dict(options, **more)


@pytest.mark.parametrize("case", CASES)
def test_resume_from_every_step(lab, case):
    """A resume from any step, before, at and after the switch, inside an epoch and across, ends in the same bits."""
    options = plan(lab, case)
    whole = lab.train("whole", **options, checkpoint_every=0)
    every = lab.train("every", **options, checkpoint_every=1, keep_last=0)
    assert checkpoints(whole) == [STEPS] and checkpoints(every) == list(range(1, STEPS + 1))
    assert model_bytes(every) == model_bytes(whole) and main_log(every) == main_log(whole)
    assert len({loss for loss, _, _ in main_log(whole).values()}) > STEPS / 2, "the losses must differ for this to prove anything"
    final = checkpoint_body(checkpoint(whole, STEPS))
    for k in range(1, STEPS):
        resumed = lab.folder / f"from_{k}"
        resumed.mkdir()
        shutil.copy(checkpoint(every, k), resumed)
        lab.train(resumed.name, **options, checkpoint_every=0, resume=1)
        assert model_bytes(resumed) == model_bytes(whole), k
        assert checkpoint_body(checkpoint(resumed, STEPS)) == final, k
        assert main_log(resumed) == {s: v for s, v in main_log(whole).items() if s >= k}, k
        assert events(resumed, "eval")[-1]["loss_dense"] == events(whole, "eval")[-1]["loss_dense"], k
        assert [e["step"] for e in events(resumed, "resume")] == [k]
        expected = [SWITCH] if case != "dense" and k <= SWITCH else []
        assert [e["step"] for e in events(resumed, "switch")] == expected, k


def kill_at(command, step, how, delay):
    """Starts a run and sends the signal a moment after its line of that step, or of its first if it began later; at step 0
    after the set-up. Returns the exit code and the output."""
    process = subprocess.Popen([str(c) for c in command], env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               universal_newlines=True)
    lines = []
    for line in process.stdout:
        lines.append(line)
        done = re.search(r"step +(\d+)/", line)
        if (done and int(done.group(1)) >= step) or (step == 0 and line.startswith("speed ")):
            time.sleep(delay)
            process.send_signal(how)
            break
    lines.append(process.stdout.read())
    return process.wait(timeout=60), "".join(lines)


LONG = 40  # steps of a run that is killed; the switch comes at step 25
SLOW = dict(depth=4, channels=32, batch_size=12, total_batch_size=0)  # steps that are longer than a signal takes


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGKILL])
@pytest.mark.parametrize("case", ["rope", "learned", "dense"])
def test_killed_runs_go_on_to_the_same_end(lab, case, how):
    """A run killed again and again, in both phases, ends in the bits of one that was left alone."""
    options = plan(lab, case, steps=LONG, checkpoint_every=2 if how == signal.SIGKILL else 0, **SLOW)
    if case != "dense":
        options["switch_step"] = 25
    whole = lab.train("whole", **options)
    rng = random.Random(f"{case}{how}")
    interrupted = []
    for step in sorted(rng.sample(range(1, 24), 2) + [24, 25] + rng.sample(range(26, 37), 2)):
        code, output = kill_at(lab.command("killed", **options, resume=1), step, how, rng.uniform(0, 0.008))
        left = checkpoints(lab.folder / "killed")
        if how == signal.SIGKILL:
            assert code == -how
        else:
            assert code == 128 + how, output
            reached = int(re.search(r"stopped by signal at step (\d+)", output).group(1))
            assert left[-1] == reached >= step
        interrupted.append(left[-1] if left else 0)
    assert len(interrupted) == 6 and interrupted == sorted(interrupted)
    killed = lab.train("killed", **options, resume=1)
    assert model_bytes(killed) == model_bytes(whole)
    assert main_log(killed) == main_log(whole)
    assert checkpoint_body(checkpoint(killed, LONG)) == checkpoint_body(checkpoint(whole, LONG))


def started(lab, **options):
    """A run whose set-up is done, with standard output to be read."""
    process = subprocess.Popen([str(c) for c in lab.command("run", **options)], env=ENV, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, universal_newlines=True)
    while not process.stdout.readline().startswith("speed "):
        assert process.poll() is None
    return process


def test_a_second_signal(lab):
    """At once it counts as the first, since timeout(1) sends each to the process and to its group. Later, while a long
    micro-step leaves the first unanswered, it ends the process."""
    for pause in [0.005] * 5 + [1.3]:
        shutil.rmtree(lab.folder / "run", ignore_errors=True)
        large = dict(channels=64, batch_size=3000, total_batch_size=0) if pause > 1 else SLOW
        process = started(lab, steps=10 ** 6, checkpoint_every=0, **large)
        while pause < 1 and " 3/" not in process.stdout.readline():
            assert process.poll() is None
        time.sleep(0.5 * (pause > 1))
        for wait in (pause, 0):
            process.send_signal(signal.SIGTERM)
            time.sleep(wait)
        process.communicate(timeout=60)
        assert process.returncode == (128 + signal.SIGTERM if pause < 1 else -signal.SIGTERM)
        assert len(checkpoints(lab.folder / "run")) == (pause < 1)


SLOW_FSYNC = r'''
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <unistd.h>
int fsync(int fd) {
    for (int left = atoi(getenv("FSYNC_SECONDS")); left > 0;) left = sleep(left);
    return ((int (*)(int))dlsym(RTLD_NEXT, "fsync"))(fd);
}
'''


def test_a_second_signal_leaves_a_checkpoint_whole(lab, monkeypatch):
    """Signals that come while a file is written do not end the process: what was begun becomes whole."""
    preload(lab, SLOW_FSYNC, monkeypatch)
    monkeypatch.setitem(ENV, "FSYNC_SECONDS", "2")
    process = started(lab, steps=10 ** 6, checkpoint_every=0)
    process.send_signal(signal.SIGTERM)
    for _ in range(2):
        time.sleep(1.2)
        process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + signal.SIGTERM, output
    step = int(re.search(r"stopped by signal at step (\d+);", output).group(1))
    assert checkpoints(lab.folder / "run") == [step]


def test_a_stop_inside_a_step(lab):
    """A signal is heeded between micro-steps; the step that was broken off leaves no trace in what is trained."""
    options = dict(total_batch_size=2000 * T, learning_rate=1e-2, warmup_steps=0, checkpoint_every=2)
    whole = lab.train("whole", **options, steps=3, lr_schedule="constant")
    step_s = events(whole, "step")[1]["ms"] / 1e3
    reached = []
    for share in (0.3, 1.5, 0.6):
        process = started(lab, **options, steps=3, lr_schedule="constant", resume=1)
        time.sleep(share * step_s)
        process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        output = process.communicate(timeout=60)[0]
        assert process.returncode == 128 + signal.SIGTERM and time.monotonic() - began < max(0.35 * step_s, 0.3), output
        reached.append(int(re.search(r"stopped by signal at step (\d+);", output).group(1)))
        assert checkpoints(lab.folder / "run")[-1] == reached[-1]
    assert reached == sorted(reached) and reached[0] == 0 and reached[-1] < 3
    run = lab.train("run", **options, steps=3, lr_schedule="constant", resume=1)
    assert model_bytes(run) == model_bytes(whole) and main_log(run) == main_log(whole)
    assert checkpoint_body(checkpoint(run, 3)) == checkpoint_body(checkpoint(whole, 3))


@pytest.mark.parametrize("stops", [False, True])
def test_a_reader_that_leaves_ends_no_run(lab, stops):
    """Standard output closed amid the run, as by a tee that Ctrl-C ends first: the run goes on, and stops with its checkpoint."""
    process = started(lab, steps=10 ** 6 if stops else 200, checkpoint_every=0)
    process.stdout.close()
    time.sleep(0.3)
    if stops:
        process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == (128 + signal.SIGTERM if stops else 0)
    assert len(checkpoints(lab.folder / "run")) == 1 and (lab.folder / "run/model.bin").exists() != stops


@pytest.mark.parametrize("step", [0, 3, 6])
def test_a_signal_breaks_off_a_validation(lab, step):
    """A run stopped in a long validation, the first, one at the switch or the last, leaves at that very step, with one
    checkpoint of it, and goes on to the same end."""
    sequences = 40000  # seconds
    long = write_shard(lab.folder / "long.bin", np.arange(sequences * T + 1) % 200)
    options = dict(steps=6, switch_step=3, val_every=3, val_data=long, learning_rate=1e-2)
    whole = lab.train("whole", **options, val_batches=1, checkpoint_every=2, keep_last=0)
    folder = lab.folder / "run"
    if step > 0:
        folder.mkdir()
        shutil.copy(checkpoint(whole, 2 if step == 3 else 4), folder)
    command = lab.command("run", **options, val_batches=sequences, checkpoint_every=0, resume=1)
    code, output = kill_at(command, step, signal.SIGTERM, 0.3)
    assert code == 128 + signal.SIGTERM and f"stopped by signal at step {step};" in output, output
    assert checkpoints(folder)[-1] == step and output.count(f"ckpt_{step:08d}.bin") == 1, output
    assert not events(folder, "eval") and not (folder / "model.bin").exists()
    lab.train("run", **options, val_batches=1, checkpoint_every=0, resume=1)
    assert model_bytes(folder) == model_bytes(whole) and checkpoint_body(checkpoint(folder, 6)) == checkpoint_body(checkpoint(whole, 6))
    assert [e["loss_dense"] for e in events(folder, "eval")] == [e["loss_dense"] for e in events(whole, "eval") if e["step"] >= step]


def test_two_threads_repeat_their_bits(lab, monkeypatch):
    """On two threads a run and its resume give the same bits each time, and one thread's losses to rounding."""
    options = plan(lab, "rope", checkpoint_every=5, keep_last=0)
    single = lab.train("single", **options)
    monkeypatch.setitem(ENV, "OMP_NUM_THREADS", "2")
    monkeypatch.setitem(ENV, "OMP_WAIT_POLICY", "passive")  # threads that spin would disturb other tests
    runs = [lab.train(name, **options) for name in ("a", "b")]
    runs.append(lab.folder / "resumed")
    runs[2].mkdir()
    shutil.copy(checkpoint(runs[0], 5), runs[2])
    lab.train("resumed", **options, resume=1)
    assert model_bytes(runs[0]) == model_bytes(runs[1]) == model_bytes(runs[2])
    losses = [[float(v[0]) for _, v in sorted(main_log(f).items())] for f in (single, runs[0])]
    assert np.allclose(*losses, rtol=1e-4)


@pytest.mark.parametrize("fp8", [0, 1])
@pytest.mark.parametrize("positions", ["rope", "learned"])
@pytest.mark.parametrize("attention", ["paper", "WDWL", "CLWC", "dense"])
def test_recompute_levels_are_bit_equal(lab, attention, positions, fp8):
    """What is recomputed in the backward pass is what was computed: the trained model is the same at every level, and where
    the memory lies between that of two levels, so that the first layers have the lower one and the others the higher."""
    options = dict(positions=positions, steps=6, batch_size=2, depth=4, learning_rate=1e-2, fp8=fp8)
    options.update(dict(program="dense") if attention == "dense" else dict(attention=attention, window="24,40:2"))
    runs = [lab.train(f"level_{level}", **options, recompute=level) for level in range(5)]
    model, taken = model_bytes(runs[0]), [events(run, "memory")[0]["total_bytes"] for run in runs]
    assert model != model_bytes(lab.train("untrained", **dict(options, steps=0)))
    assert all(model_bytes(run) == model for run in runs)
    for level in range(1, 5):
        free = (3 * taken[level - 1] + taken[level]) / 4
        result = execute(["env", *little_memory(lab.folder, free), *lab.command(f"mixed_{level}", **options)])
        assert result.code == 0, result.err
        config, memory = (events(lab.folder / f"mixed_{level}", event)[0] for event in ("config", "memory"))
        levels = config["recompute_levels"]
        lower = levels.count(level - 1)
        assert levels == [level - 1] * lower + [level] * (4 - lower) and 0 < lower < 4 and config["options"]["recompute"] == level
        assert f"recompute level {level - 1} in {lower} layer{'s' * (lower > 1)}, {level} in {4 - lower}:" in result.out, result.out
        assert taken[level] < memory["total_bytes"] <= free
        assert model_bytes(lab.folder / f"mixed_{level}") == model


def test_fp8_keeps_inputs_as_columns_only(lab):
    """A Lighthouse layer keeps what its products read at a byte an element: LayerNorm's and attention's results not besides."""
    def layer(level, fp8):  # bytes
        options = dict(attention="L", steps=1, switch_step=1, recompute=level, fp8=fp8)
        three, four = (events(lab.train(f"{level} {fp8} {n}", depth=n, **options), "memory")[0]["parts"] for n in (3, 4))
        return four["activations"] - three["activations"]
    wide, fp8, elements = layer(1, 0), layer(1, 1), T * 16
    assert wide - fp8 == 3 * (4 - 1) * elements
    assert layer(0, 1) - fp8 == 4 * elements  # GELU's result


@pytest.mark.parametrize("program", ["lighthouse", "dense"])
def test_fp8_trains_like_fp32(lab, program):
    """With FP8 operands the losses lie within 0.2% of those without and are not the same; evaluations are made without FP8."""
    options = dict(program=program, steps=30, batch_size=4, learning_rate=3e-3, val_data=lab.data.val, val_every=10, val_batches=2)
    wide, fp8 = lab.train("wide", **options), lab.train("fp8", **options, fp8=1)
    a, b = ([e["loss"] for e in step_events(folder)] for folder in (wide, fp8))
    assert max(abs(x / y - 1) for x, y in zip(a, b)) < 0.002 and a != b and a[-1] < a[0] - 0.3
    a, b = ([e["loss_dense"] for e in events(folder, "eval")] for folder in (wide, fp8))
    assert a[0] == b[0] and max(abs(x / y - 1) for x, y in zip(a, b)) < 0.002
    parts = events(fp8, "memory")[0]["parts"]
    assert parts["FP8 operands"] == 2 * 4 * T * 4 * 16 and parts["FP8 weights"] == 2 * 3 * 12 * 16 * 16 + 3 * 3 * 4 * 16
    assert not any("FP8" in part for part in events(wide, "memory")[0]["parts"])
    finished = lab.train("fp8", **dict(options, steps=31), fp8=0, resume=1)  # the state of a run does not depend on it
    assert len(step_events(finished)) == 31


def test_resume_of_nothing_is_a_new_run_that_says_so(lab):
    """--resume 1 in an empty folder starts from the beginning, and says that it found nothing to resume."""
    result = lab.run("run", steps=2, resume=1)
    assert result.code == 0 and "no checkpoint in" in result.out
    assert model_bytes(lab.folder / "run") == model_bytes(lab.train("plain", steps=2))


def test_resume_of_a_finished_run_trains_no_more(lab):
    """--resume 1 on a finished run writes the same model and no further step."""
    folder = lab.train("run", steps=4)
    model, log = model_bytes(folder), main_log(folder)
    (folder / "model.bin").unlink()
    lab.train("run", steps=4, resume=1)
    assert model_bytes(folder) == model and main_log(folder) == log and len(events(folder, "step")) == 4
    lab.train("run", steps=6, resume=1)  # and it may be made longer
    assert sorted(main_log(folder)) == list(range(6))
    lab.fails(lab.run("run", steps=5, resume=1), "ckpt_00000006.bin", "6", "5")


def test_a_resume_that_moves_the_switch_says_so(lab):
    """A run made longer that goes back to Lighthouse gets a note; one that resumes past its switch switches at once, with the
    line, the event, both validations where the first phase is planned for, and new detectors."""
    finished = lab.train("run", steps=8, switch_step="0.5")
    copies = [shutil.copytree(finished, lab.folder / name) for name in ("kept", "back")]
    note = "note: this run was dense already at step 8; with --steps 20 its switch is at step 10: --switch-step 4 keeps it dense"
    result = lab.run("kept", steps=20, switch_step=4, resume=1)
    assert result.code == 0 and "note: this run" not in result.out and len(events(copies[0], "switch")) == 1
    result = lab.run("back", steps=20, switch_step="0.5", resume=1)
    assert result.code == 0 and note in result.out, result.out
    assert [e["step"] for e in events(copies[1], "switch")] == [4, 10]
    options = dict(steps=8, val_data=lab.data.val, val_every=0, val_batches=1)
    sparse = lab.train("sparse", **options, switch_step="1.0", checkpoint_every=6, keep_last=0)
    (lab.folder / "before").mkdir()
    shutil.copy(checkpoint(sparse, 6), lab.folder / "before")
    assert "note: this run" not in lab.run("before", **options, switch_step="1.0", resume=1).out
    for switch, planned in ((3, True), (0, False)):
        folder = lab.folder / f"late_{switch}"
        folder.mkdir()
        shutil.copy(checkpoint(sparse, 6), folder)
        result = lab.run(folder.name, **options, switch_step=switch, resume=1)
        assert result.code == 0 and result.out.count("step 6 | the switch: dense") == 1, result.out
        assert [e["step"] for e in events(folder, "switch")] == [6]
        assert [(e["step"], e["loss_first"] is not None) for e in events(folder, "eval")] == [(6, planned), (8, False)]
        state = checkpoint(folder, 8).read_bytes()[4096:]  # step, sequences, updates, two times, of two phases: steps, times; values
        for detector in (STATE["loss_seen"], STATE["norm_seen"]):
            assert struct.unpack("<q", state[detector:detector + 8]) == (2,), "losses and norms seen since the switch"


# ---- 2. checkpoints

@pytest.fixture(scope="session")
def saved(programs, data, tmp_path_factory):
    """A small run with the checkpoints of steps 2 and 4, the end, and what it ends in."""
    lab = Lab(programs, data, tmp_path_factory.mktemp("saved"))
    folder = lab.train("run", depth=1, steps=4, checkpoint_every=2, attention="L")
    return folder


def resumed_from(lab, saved, name, damage, steps=(2, 4), **options):
    """Copies these checkpoints of the saved run, damages the newest, resumes. Returns the folder and the result."""
    folder = lab.folder / name
    folder.mkdir()
    for step in steps:
        shutil.copy(checkpoint(saved, step), folder)
    damage(checkpoint(folder, steps[-1]))
    options = dict(dict(depth=1, steps=4, attention="L", resume=1), **options)
    return folder, lab.run(name, **options)


def falls_back(lab, saved, name, damage):
    folder, result = resumed_from(lab, saved, name, damage)
    assert result.code == 0, (name, result.err)
    assert re.search(r"warning: .*ckpt_00000004\.bin\b.*trying the one before", result.out), (name, result.out)
    assert [e["step"] for e in events(folder, "resume")] == [2], name
    assert model_bytes(folder) == model_bytes(saved), name
    shutil.rmtree(folder)


def test_a_cut_checkpoint_is_refused(lab, saved):
    """Cut at any byte, the newest checkpoint is named and the one before is used."""
    size = checkpoint(saved, 4).stat().st_size
    offset = struct.unpack("<q", checkpoint(saved, 4).read_bytes()[2048:2056])[0]
    rng = random.Random(1)
    cuts = {0, 1, 4, 1023, 1024, 2048, 4095, 4096, 4097, 5000, offset - 1, offset, offset + 1, offset + 4, size - 4096, size - 4, size - 1}
    cuts |= {rng.randrange(size) for _ in range(15)}
    for cut in sorted(cuts):
        falls_back(lab, saved, f"cut_{cut}", lambda path: os.truncate(path, cut))
    falls_back(lab, saved, "surplus", lambda path: path.write_bytes(path.read_bytes() + b"\0"))


def test_a_flipped_byte_in_a_checkpoint_is_noticed(lab, saved):
    """A change of one byte in any part of the newest checkpoint is noticed: header, state, checksums, weights, moments."""
    data = checkpoint(saved, 4).read_bytes()
    offset, state_bytes, chunks = (struct.unpack("<q", data[at:at + 8])[0] for at in (2048, 2072, 2080))
    third = (len(data) - offset) // 3
    front = 4096 + state_bytes + 8 * chunks  # what follows up to the weights is padding
    parts = [(0, 8), (8, 1024), (1024, 1064), (1064, 2048), (2048, 2096), (2096, 4088), (4088, 4096), (4096, 4096 + state_bytes),
             (front - 8 * chunks, front), (offset, offset + third), (offset + third, offset + 2 * third), (offset + 2 * third, len(data))]
    rng = random.Random(2)
    for first, end in parts:
        for at in {first, end - 1, rng.randrange(first, end), rng.randrange(first, end)}:
            def flip(path):
                changed = bytearray(data)
                changed[at] ^= 1 << rng.randrange(8)
                path.write_bytes(changed)
            falls_back(lab, saved, f"flip_{at}", flip)


UNREADABLE = r'''
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
ssize_t pread(int fd, void* buffer, size_t bytes, off_t at) {  // the checkpoint of step 4 cannot be read past a byte
    ssize_t (*real)(int, void*, size_t, off_t) = dlsym(RTLD_NEXT, "pread");
    char link[64], path[4096] = "";
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    int n = readlink(link, path, sizeof path - 1);
    if (n > 0 && strstr(path, "ckpt_00000004.bin") && at + (off_t)bytes > atol(getenv("UNREADABLE_FROM")))
        return errno = EIO, -1;
    return real(fd, buffer, bytes, at);
}
'''


def test_an_unreadable_checkpoint_ends_the_run(lab, saved, monkeypatch):
    """A disk that fails is no damage of the file: the run ends with its name and the reason, and nothing is renamed."""
    whole = checkpoint(saved, 4).read_bytes()
    offset = struct.unpack("<q", whole[2048:2056])[0]
    preload(lab, UNREADABLE, monkeypatch)
    for byte in (0, 4096, offset, offset + 100000, len(whole) - 1):
        monkeypatch.setitem(ENV, "UNREADABLE_FROM", str(byte))
        folder, result = resumed_from(lab, saved, f"from_{byte}", lambda path: None)
        lab.fails(result, "ckpt_00000004.bin", "Input/output error")
        assert checkpoints(folder) == [2, 4] and not list(folder.glob("*.unusable"))


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_what_is_no_file_is_refused(lab, saved, kind):
    """A folder or a pipe under a checkpoint's, model's, tokenizer's or shard's name is named, and not waited for."""
    make = dict(folder=os.mkdir, pipe=os.mkfifo)[kind]
    folder, result = resumed_from(lab, saved, "run", lambda path: (path.unlink(), make(path)))
    lab.fails(result, "ckpt_00000004.bin", "no regular file")
    assert checkpoints(folder) == [2, 4]
    path = lab.folder / "other.bin"
    make(path)
    for options in (from_file(path), dict(train_data=path), dict(val_data=path), dict(tokenizer=path, sample_every=1)):
        lab.refused(path, "no regular file", **options)


def crafted(data, state=(), **words):
    """A checkpoint with other numbers in it and every checksum right again."""
    data = bytearray(data)
    for name, value in words.items():
        at, kind = dict(version=(4, "i"), T=(1032, "i"), layers=(1040, "i"), channels=(1048, "i"), weights_offset=(2048, "q"),
                        parameters=(2056, "q"), file_bytes=(2064, "q"), state_bytes=(2072, "q"), chunks=(2080, "q"))[name]
        struct.pack_into("<" + kind, data, at, value)
    for at, value in state:
        struct.pack_into("<q" if isinstance(value, int) else "<d", data, 4096 + at, value)
    state_bytes, chunks = struct.unpack("<qq", data[2072:2088])
    front = data[4096:4096 + state_bytes + 8 * chunks] if 0 < state_bytes + 8 * chunks < len(data) else b""
    struct.pack_into("<Q", data, 2088, model_file.checksum(bytes(front[:len(front) // 8 * 8])))
    struct.pack_into("<Q", data, 4088, model_file.checksum(bytes(data[:4088])))
    return bytes(data)


STATE = dict(step=0, sequences=8, updates=16, train_s=24, lighthouse_steps=40, dense_steps=48, loss_seen=72 + 1024,
             norm_seen=72 + 1032 + 1024, seq_len=72 + 2 * 1032, total_batch=80 + 2 * 1032, not_finite=120 + 2 * 1032)


def test_a_crafted_checkpoint_is_refused(lab, saved):
    """Right checksums make no sense of impossible numbers: each is named as damage, and the checkpoint before is used."""
    data = checkpoint(saved, 4).read_bytes()
    assert crafted(data) == data, "the checksums are the program's"
    size = len(data)
    for name, value in [("chunks", 0), ("chunks", -1), ("chunks", 2 ** 60), ("chunks", 2), ("state_bytes", 0), ("state_bytes", -8),
                        ("state_bytes", 2 ** 62), ("parameters", 0), ("parameters", -1), ("parameters", 2 ** 62), ("weights_offset", 0),
                        ("weights_offset", -4096), ("weights_offset", size), ("T", 2 ** 31 - 1), ("layers", 2), ("channels", 2 ** 31 - 1),
                        ("version", 2), ("version", 4)]:
        falls_back(lab, saved, f"{name}_{value}", lambda path: path.write_bytes(crafted(data, **{name: value})))
    for name, value in [("step", -4), ("step", 5), ("step", 2 ** 62), ("sequences", -1), ("sequences", 2 ** 62), ("updates", -1),
                        ("updates", 5), ("train_s", math.nan), ("train_s", -1.0), ("lighthouse_steps", -1), ("lighthouse_steps", 1), ("dense_steps", 9),
                        ("loss_seen", -3), ("norm_seen", -2 ** 62), ("seq_len", 0), ("seq_len", -T), ("total_batch", 0),
                        ("total_batch", 2 ** 62), ("not_finite", -1), ("not_finite", 10)]:
        changed = crafted(data, state=[(STATE[name], value)])
        falls_back(lab, saved, f"{name}_{value}", lambda path: path.write_bytes(changed))
    for name in (3, 9):
        folder, result = resumed_from(lab, saved, f"name_{name}", lambda path: path.rename(checkpoint(path.parent, name)))
        assert result.code == 0 and f"ckpt_{name:08d}.bin holds step 4; trying the one before" in result.out
        assert [e["step"] for e in events(folder, "resume")] == [2]


STOPPED_AT_ITS_START = r'''
#define _GNU_SOURCE
#include <dlfcn.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
FILE* fopen(const char* path, const char* mode) {
    FILE* (*real)(const char*, const char*) = dlsym(RTLD_NEXT, "fopen");
    if (strstr(path, "main.log")) raise(SIGTERM);
    return real(path, mode);
}
'''


def test_a_resumed_run_does_not_write_its_checkpoint_again(lab, saved, monkeypatch):
    """Stopped before its first step, it leaves the checkpoint that it began from as it is."""
    folder = shutil.copytree(saved, lab.folder / "run")
    (folder / "log.jsonl").unlink()
    before = checkpoint(folder, 4).stat().st_ino
    preload(lab, STOPPED_AT_ITS_START, monkeypatch)
    result = lab.run("run", depth=1, attention="L", steps=8, resume=1)
    assert result.code == 128 + signal.SIGTERM and "stopped by signal at step 4;" in result.out, result.err
    assert checkpoint(folder, 4).stat().st_ino == before and not events(folder, "checkpoint")


UNLISTABLE = r'''
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
struct dirent* readdir(DIR* d) { return errno = EIO, (struct dirent*)0; }
'''


def test_a_folder_that_cannot_be_listed_is_not_empty(lab, saved, monkeypatch):
    """An error of readdir ends the run: taken for an empty folder, a new run would write over the earlier one's checkpoints."""
    folder = shutil.copytree(saved, lab.folder / "run")
    (folder / "model.bin").unlink()
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    preload(lab, UNLISTABLE, monkeypatch)
    for resume in (0, 1):
        lab.fails(lab.run("run", depth=1, steps=4, attention="L", resume=resume), "cannot list", folder, "Input/output error")
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_what_a_killed_run_did_not_remove_goes_at_the_next_start(lab, saved):
    """Killed between the last checkpoint's name and the removal of the older one: --keep-last holds after the resume."""
    folder, result = resumed_from(lab, saved, "run", lambda path: (path.parent / "ckpt_00000009.bin.partial").write_bytes(b"torn"),
                                  keep_last=1)
    assert result.code == 0 and sorted(p.name for p in folder.glob("ckpt*")) == ["ckpt_00000004.bin"]


def test_no_whole_checkpoint_is_an_error(lab, saved):
    """All checkpoints damaged, or one foreign file under a checkpoint's name: an error, and the files stay as they are."""
    folder, result = resumed_from(lab, saved, "only", lambda path: os.truncate(path, 100), steps=(4,))
    assert result.code != 0 and "none of the 1 checkpoints is whole" in result.err
    assert checkpoint(folder, 4).stat().st_size == 100
    folder, result = resumed_from(lab, saved, "foreign", lambda path: path.write_bytes(os.urandom(50000)))
    assert result.code == 0 and re.search(r"ckpt_00000004.bin is no model file or checkpoint", result.out)
    folder, result = resumed_from(lab, saved, "both", lambda path: [p.write_bytes(b"") for p in path.parent.iterdir()])
    assert result.code != 0 and "none of the 2 checkpoints is whole" in result.err


def test_other_files_in_the_folder_are_left_alone(lab, saved):
    """Leftovers of killed writes and names that only resemble a checkpoint's are neither read nor removed."""
    def litter(path):
        for name in ["ckpt_00000009.bin.partial", "ckpt_00000009.bin.bak", "ckpt_.bin", "ckpt_00000009", "ckpt_9.bin", "ckpt_-0000009.bin",
                     "xckpt_00000009.bin", "model.bin.partial"]:
            (path.parent / name).write_bytes(b"rubbish")
    folder, result = resumed_from(lab, saved, "run", litter)
    assert result.code == 0 and "warning" not in result.out
    assert [e["step"] for e in events(folder, "resume")] == [4]
    assert (folder / "ckpt_00000009.bin.bak").read_bytes() == b"rubbish" and model_bytes(folder) == model_bytes(saved)


def test_pruning_never_removes_the_newest_whole_checkpoint(lab, saved):
    """A damaged checkpoint of a later step does not count as one of the --keep-last newest."""
    folder = lab.folder / "run"
    folder.mkdir()
    shutil.copy(checkpoint(saved, 2), folder)
    checkpoint(folder, 99).write_bytes(b"torn")
    options = dict(depth=1, attention="L", steps=6, resume=1, checkpoint_every=1, keep_last=1)
    lab.train("run", **options)
    assert 6 in checkpoints(folder), checkpoints(folder)
    lab.train("run", **options)
    assert [e["step"] for e in events(folder, "resume")] == [2, 6]
    assert checkpoints(folder) == [6] and (folder / "ckpt_00000099.bin.unusable").read_bytes() == b"torn"


def test_a_damaged_checkpoint_does_not_push_out_a_whole_one(lab, saved):
    """Of an earlier step than those that follow, too."""
    folder, result = resumed_from(lab, saved, "run", lambda path: os.truncate(path, 100), steps=(2, 4))
    shutil.move(folder / "ckpt_00000004.bin.unusable", checkpoint(folder, 3))  # as if step 3's were damaged
    checkpoint(folder, 4).unlink()
    lab.train("run", depth=1, attention="L", steps=6, resume=1, checkpoint_every=4, keep_last=3)
    assert checkpoints(folder) == [2, 4, 6]


CALLS = r'''
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#define REAL(name, type) ((type)dlsym(RTLD_NEXT, name))
static void note(const char* call, const char* path) {  // one line a call, of files in the run's folder
    char line[4200];
    const char *rank = getenv("OMPI_COMM_WORLD_RANK"), *name = strstr(path, "/run/");
    if (!name && (strlen(path) < 4 || strcmp(path + strlen(path) - 4, "/run"))) return;
    int log = REAL("open", int (*)(const char*, int, ...))(getenv("CALLS"), O_WRONLY | O_APPEND | O_CREAT, 0666);
    int n = snprintf(line, sizeof line, "%s %s %s\n", rank ? rank : "0", call, name ? name + 5 : ".");
    if (write(log, line, n) < 0) abort();
    close(log);
}
static const char* path_of(int fd) {
    static __thread char path[4096];
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    int n = readlink(link, path, sizeof path - 1);
    path[n > 0 ? n : 0] = 0;
    return path;
}
int open(const char* path, int flags, ...) {
    va_list more;
    va_start(more, flags);
    int mode = va_arg(more, int);
    if (strstr(path, ".partial")) note((flags & O_ACCMODE) == O_RDONLY ? "read" : (flags & O_ACCMODE) == O_WRONLY ? "open" : "open+", path);
    return REAL("open", int (*)(const char*, int, ...))(path, flags, mode);
}
int ftruncate(int fd, off_t size) { note("size", path_of(fd)); return REAL("ftruncate", int (*)(int, off_t))(fd, size); }
ssize_t pwrite(int fd, const void* data, size_t bytes, off_t at) {
    note("write", path_of(fd));
    return REAL("pwrite", ssize_t (*)(int, const void*, size_t, off_t))(fd, data, bytes, at);
}
int fsync(int fd) { note("sync", path_of(fd)); return REAL("fsync", int (*)(int))(fd); }
int unlink(const char* path) { note("remove", path); return REAL("unlink", int (*)(const char*))(path); }
int rename(const char* from, const char* to) {
    note("rename", from);
    return REAL("rename", int (*)(const char*, const char*))(from, to);
}
'''


def calls_in_order(lab, calls, name, ranks, removed):
    """What these ranks did for one file: sized before another rank opens it, never opened to read and write, every part
    written and synced before any rank reads it back, read back by all before it gets its name, its name on the disk before
    an older file goes."""
    partial = f"{name}.partial"
    def at(call, file=partial, rank=None):
        return [i for i, (r, c, f) in enumerate(calls) if c == call and f == file and rank in (None, r)]
    assert not at("open+") and len(at("size")) == 1 and len(at("rename")) == 1
    opened, renamed = at("open"), at("rename")[0]
    assert len(opened) == ranks and opened[0] < at("size")[0] < ([*opened[1:], 10 ** 9])[0]
    for rank in range(ranks):
        assert at("write", rank=rank) and at("sync", rank=rank) and max(at("write", rank=rank)) < min(at("sync", rank=rank))
        assert at("read", rank=rank), "every rank reads back what another wrote"
    assert max(at("sync")) < min(at("read")) and max(at("read")) < renamed
    folder = [i for i in at("sync", ".") if i > renamed]
    assert folder, "the folder is synced behind the rename"
    for file in removed:
        assert at("remove", file) and at("remove", file)[0] > folder[0]


def test_the_order_of_calls(lab, monkeypatch):
    """What keeps a run through a crash at any moment is the order of its calls: they are recorded, and looked at."""
    preload(lab, CALLS, monkeypatch)
    monkeypatch.setitem(ENV, "CALLS", str(lab.folder / "calls"))
    lab.train("run", steps=3, depth=1, attention="L", checkpoint_every=1, keep_last=1)
    calls = [line.split() for line in (lab.folder / "calls").read_text().splitlines()]
    calls = [(int(rank), call, file) for rank, call, file in calls]
    for step in (1, 2, 3):
        calls_in_order(lab, calls, checkpoint(Path(), step).name, 1, [checkpoint(Path(), step - 1).name] if step > 1 else [])
    calls_in_order(lab, calls, "model.bin", 1, [])


@pytest.mark.parametrize("last, every, expected", [(1, 0, [12]), (3, 0, [10, 11, 12]), (0, 0, list(range(1, 13))),
                                                   (2, 5, [5, 10, 11, 12]), (1, 4, [4, 8, 12]), (100, 0, list(range(1, 13)))])
def test_keep_last_and_keep_every(lab, last, every, expected):
    """Exactly the checkpoints stay that --keep-last and --keep-every name."""
    folder = lab.train("run", steps=12, depth=1, attention="L", checkpoint_every=1, keep_last=last, keep_every=every)
    assert checkpoints(folder) == expected
    assert not list(folder.glob("*.partial"))


def test_checkpoint_every(lab):
    """Checkpoints come every n steps and at the end; 0: at the end only."""
    assert checkpoints(lab.train("five", steps=12, checkpoint_every=5, keep_last=0)) == [5, 10, 12]
    assert checkpoints(lab.train("none", steps=12, checkpoint_every=0, keep_last=0)) == [12]


def test_a_full_disk_costs_no_checkpoint(lab, saved):
    """A checkpoint that cannot be written ends the run with a message; the earlier one is whole and resumes to the same
    end. With a limit on the size of files and, where one can be mounted, on a full tmpfs."""
    options = dict(depth=1, attention="L", steps=4, checkpoint_every=2, keep_last=0)
    size = checkpoint(saved, 4).stat().st_size
    folder = lab.folder / "limited"
    folder.mkdir()
    shutil.copy(checkpoint(saved, 2), folder)
    for limit in (8192, size // 2, size - 1):
        result = execute(lab.command("limited", **options, resume=1),
                         preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
        lab.fails(result, "ckpt_00000004.bin.partial", "File too large", "Earlier checkpoints are untouched")
        assert checkpoints(folder) == [2] and not list(folder.glob("*.partial")) and not (folder / "model.bin").exists()
    lab.train("limited", **options, resume=1)
    assert model_bytes(folder) == model_bytes(saved) and main_log(folder).keys() == {2, 3}

    disk = lab.folder / "disk"
    disk.mkdir()
    blocks = (size + 4095) // 4096
    mount = ["mount", "-t", "tmpfs", "-o", f"size={4096 * (2 * blocks - 4)}", "tmpfs", str(disk)]
    if os.geteuid() == 0 and subprocess.run(mount, stderr=subprocess.DEVNULL).returncode == 0:
        try:
            (lab.folder / "unknown.c").write_text("int statvfs(const char* path, void* disk) { return -1; }")
            subprocess.run(["gcc", "-shared", "-fPIC", "unknown.c", "-o", "unknown.so"], cwd=lab.folder, check=True)
            result = execute(["env", f"LD_PRELOAD={lab.folder / 'unknown.so'}", *lab.command("disk/run", **options)])
            lab.fails(result, "No space left on device", "Earlier checkpoints are untouched")
            assert checkpoints(disk / "run") == [2] and not list((disk / "run").glob("*.partial"))
            lab.fails(lab.run("disk/run", **options, resume=1), "GiB free; a checkpoint takes")
            lab.fails(lab.run("disk/other", **options), "GiB free; a checkpoint takes")
            subprocess.run(["mount", "-o", "remount,size=16m", str(disk)], check=True)
            lab.train("disk/run", **options, resume=1)
            assert model_bytes(disk / "run") == model_bytes(saved)
            used, model = (int(subprocess.run(["du", "-s", "--block-size=1", p], stdout=subprocess.PIPE).stdout.split()[0])
                           for p in (disk, disk / "run/model.bin"))
            subprocess.run(["mount", "-o", f"remount,size={used + model + 32768}", str(disk)], check=True)
            lab.train("disk/run", **options, resume=1)  # a finished run writes only its model
        finally:
            subprocess.run(["umount", str(disk)], check=True)


def test_an_earlier_run_is_not_overwritten(lab, saved):
    """Without --resume 1 a folder that holds checkpoints is refused, as is one that holds but their model; nothing in it changes."""
    folder = lab.folder / "run"
    shutil.copytree(saved, folder)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    lab.fails(lab.run("run", depth=1, steps=4), "2 checkpoint(s) of an earlier run", "--resume 1", "--out-dir")
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    for step in (2, 4):
        os.remove(checkpoint(folder, step))
    for resume in (0, 1):
        lab.fails(lab.run("run", depth=1, steps=4, resume=resume), folder / "model.bin", "of an earlier run", "--out-dir")
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {n: b for n, b in before.items() if not n.startswith("ckpt_")}


@pytest.mark.parametrize("how,said", [("cut", "shard.bin ends at byte"), ("overwritten", "is id 65535, but the vocabulary has 257 ids")])
def test_a_shard_changed_during_the_run(lab, how, said):
    """The run ends with a message, not by a signal, and reads nothing beyond the embeddings."""
    shard = lab.folder / "shard.bin"
    shutil.copy(lab.data.small, shard)
    options = dict(train_data=shard, steps=10 ** 6, checkpoint_every=0, val_every=0)
    run = subprocess.Popen([str(c) for c in lab.command("run", **options)], env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                           universal_newlines=True)
    while "step 1/" not in " ".join(run.stdout.readline().split()):
        assert run.poll() is None
    if how == "cut":
        os.truncate(shard, 0)
    else:
        with open(shard, "r+b") as f:
            f.seek(1024)
            f.write(b"\xff" * (shard.stat().st_size - 1024))
    _, err = run.communicate(timeout=60)
    assert run.returncode == 1 and said in err, err


def test_two_runs_in_one_folder_are_refused(lab):
    """While a run writes to its folder another is refused, with and without --resume 1; a dry run is not; then it is free."""
    first = subprocess.Popen([str(c) for c in lab.command("run", steps=10 ** 6, checkpoint_every=0)], env=ENV, stdout=subprocess.PIPE,
                             universal_newlines=True)
    try:
        while "step 1/" not in " ".join(first.stdout.readline().split()):
            assert first.poll() is None
        for resume in (0, 1):
            lab.fails(lab.run("run", steps=4, resume=resume), f"another run is writing to {lab.folder / 'run'}", "--out-dir")
        assert execute(lab.command("run", steps=4) + ["--dry-run"]).code == 0
    finally:
        first.kill()
        first.communicate()
    lab.train("run", steps=4)


def test_resume_refuses_what_would_change_the_batches(lab, saved):
    """Another length, batch, data, seed, order or model: refused, with the thing named. A new learning rate is allowed."""
    def attempt(name, *words, **options):
        _, result = resumed_from(lab, saved, name, lambda path: None, **options)
        lab.fails(result, *words)
        assert not (lab.folder / name / "model.bin").exists()
    attempt("seq_len", "64", "32", seq_len=T // 2, topk=4)
    attempt("learned", "rope", "learned", positions="learned")
    attempt("batch", "total-batch-size", "64", "128", batch_size=2)
    attempt("accumulation", "total-batch-size", "64", "192", total_batch_size=3 * T)
    attempt("seed", "seed", "1337", "7", seed=7)
    attempt("shuffle", "shuffle", "1", "0", shuffle=0)
    attempt("data", "data", "7", "300", train_data=lab.data.large)
    attempt("depth", "another model", "layers 1", "layers 2", depth=2)
    attempt("heads", "another model", "heads 2", "heads 4", heads=4)
    attempt("channels", "another model", "channels 16", "channels 32", channels=32)
    attempt("vocabulary", "another model", "V 257", "V 300", vocab_size=300)
    attempt("theta", "another model", "theta", rope_theta=10000)
    folder, result = resumed_from(lab, saved, "rate", lambda path: None, steps=(2,), learning_rate=1e-2)
    assert result.code == 0 and model_bytes(folder) != model_bytes(saved)
    expected = 1e-2 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 2 / 4)))
    assert math.isclose(events(folder, "step")[0]["lr"], expected, rel_tol=1e-8)


def test_resume_notices_other_data_of_the_same_size(lab, saved):
    """The training data is known by more than the number of its windows."""
    other = write_shard(lab.folder / "other.bin", lab.data.tokens[::-1])
    _, result = resumed_from(lab, saved, "run", lambda path: None, steps=(2,), train_data=other)
    lab.fails(result, "data")


# ---- 3. the loader

def test_damaged_shards_are_refused(lab):
    """Each kind of bad shard gets a message with the file's name, and never a run."""
    tokens = lab.data.tokens
    def bad(name, *words, **header):
        path = write_shard(lab.folder / f"{name}.bin", tokens, **header)
        lab.refused(f"{name}.bin", *words, train_data=path)
        lab.refused(f"{name}.bin", *words, val_data=path)
    bad("magic", "no token shard", "magic 5", magic=5)
    bad("version", "no token shard", "version 2", version=2)
    bad("count", str(len(tokens) + 1), "cut or damaged", count=len(tokens) + 1)
    bad("surplus", str(len(tokens) - 1), "cut or damaged", count=len(tokens) - 1)
    bad("negative", "cut or damaged", count=-1)
    whole = lab.data.small.read_bytes()
    for size in [0, 1, 1023, 1024, 1025, len(whole) - 2, len(whole) - 1, len(whole) + 1]:
        path = lab.folder / f"size_{size}.bin"
        path.write_bytes((whole + b"\0")[:size])
        lab.refused(f"size_{size}.bin", str(size), train_data=path)
        lab.refused(f"size_{size}.bin", str(size), val_data=path)
    lab.refused("no file matches", "nowhere_*.bin", train_data=lab.folder / "nowhere_*.bin")
    lab.refused("no file matches", "nowhere_*.bin", val_data=lab.folder / "nowhere_*.bin")
    lab.refused(lab.folder, train_data=lab.folder)  # a folder
    short = write_shard(lab.folder / "short.bin", tokens[:T])
    lab.refused("short.bin", "64 tokens", "65", train_data=short)
    lab.refused("short.bin", "64 tokens", "65", val_data=short)
    write_shard(lab.folder / "short.bin", tokens[:T + 1])
    assert execute(lab.command("out", train_data=short) + ["--dry-run"]).code == 0


def test_token_ids_out_of_range_are_refused(lab):
    """A token id beyond the vocabulary ends the run when it is read, with its file, place and value, in either data and for a
    model file."""
    tokens = lab.data.tokens.copy()
    tokens[100] = 300
    path = write_shard(lab.folder / "range.bin", tokens)
    words = ["range.bin", "token 100", "300", "257"]
    lab.fails(lab.run("run", steps=1, val_data=path), *words)
    lab.fails(lab.run("run", steps=7, train_data=path, vocab_size=257), *words)
    model = lab.train("start", steps=0) / "model.bin"
    lab.fails(lab.run("run", steps=7, train_data=path, model=model, depth=None, channels=None, heads=None), *words)
    wide = write_shard(lab.folder / "wide.bin", np.where(np.arange(len(tokens)) == 7, 2 ** 31 + 5, tokens), width=4)
    lab.fails(lab.run("run", steps=1, val_data=wide), "wide.bin", "token 7", str(2 ** 31 + 5))
    lab.fails(lab.run("run", steps=7, train_data=wide, vocab_size=300), "wide.bin", "token 7", str(2 ** 31 + 5), "--vocab-size")
    lab.fails(lab.run("run", steps=7, vocab_size=256), "small.bin", "is id 256, but the vocabulary has 256 ids (0 to 255)")  # just beyond
    write_shard(lab.folder / "ranga.bin", lab.data.tokens)
    lab.fails(lab.run("run", steps=14, train_data=lab.folder / "rang?.bin", vocab_size=257), *words)  # in the second of two shards


def test_a_start_takes_no_longer_for_more_data(lab):
    """160 GiB of tokens, in sparse files that the disk need not hold: a run over them starts at once, and takes a step."""
    (lab.folder / "large").mkdir()
    for i in range(20):
        with open(lab.folder / "large" / f"train_{i:06d}.bin", "wb") as f:
            f.write(struct.pack("<3i", 20240801, 7, 2 ** 31 - 1))
            f.truncate(1024 + 4 * (2 ** 31 - 1))
    began = time.monotonic()
    lab.train("run", steps=1, train_data=lab.folder / "large" / "train_*.bin", val_data="")
    assert time.monotonic() - began < 15


def test_vocabulary_follows_the_data(lab):
    """The tokenizer.bin beside the data says how many ids there are; without one bytes give 257 and larger ids GPT-2's
    50257. --vocab-size overrides it. They are padded to a multiple of 128."""
    def padded(**options):
        result = execute(lab.command("out", **options) + ["--dry-run"])
        assert result.code == 0, result.err
        return tuple(int(x) for x in re.search(r"(\d+) tokens \(padded (\d+)\)", result.out).groups())
    assert padded() == (257, 384)
    assert padded(vocab_size=384) == (384, 384) and padded(vocab_size=385) == (385, 512)
    tokens = lab.data.tokens.copy()
    (lab.folder / "alone").mkdir()
    for tokens[3] in (50256, 257):
        assert padded(train_data=write_shard(lab.folder / "alone" / "gpt2.bin", tokens), val_data="") == (50257, 50304)
    tokens[3] = 256
    bare = write_shard(lab.folder / "alone" / "bytes.bin", tokens)
    assert padded(train_data=bare, val_data="") == (257, 384)
    write_tokenizer(lab.folder / "alone" / "tokenizer.bin", [b"x"] * 1000, 0)
    assert padded(train_data=bare, val_data="") == (1000, 1024)


def test_data_of_another_tokenizer(lab):
    """The tokenizer.bin beside the data is compared: with a model file's vocabulary, and with that of the other data."""
    folders = {}
    for name, pieces in (("a", [b"%d" % i for i in range(257)]), ("b", [b"%x" % i for i in range(257)]),
                         ("large", [b"x"] * 2000)):
        (lab.folder / name).mkdir()
        folders[name] = write_shard(lab.folder / name / "train_0.bin", lab.data.tokens)
        write_tokenizer(lab.folder / name / "tokenizer.bin", pieces, 256)
    same = dict(train_data=folders["a"], steps=1)
    lab.refused("--val-data", "another tokenizer", val_data=folders["b"], **same)
    lab.refused("different tokenizers cannot be mixed", "b/tokenizer.bin", val_data="",
                train_data=lab.folder / "[ab]" / "train_*.bin")
    model = lab.train("large_model", train_data=folders["large"], val_data="", steps=1) / "model.bin"
    start = dict(model=model, depth=None, channels=None, heads=None, val_data="")
    lab.refused("vocabulary of 2000 ids", "a/tokenizer.bin has 257 tokens", train_data=folders["a"], **start)
    lab.refused("vocabulary of 2000 ids", "has 257 tokens", train_data=folders["large"], tokenizer=lab.data.tokenizer,
                sample_every=1, **start)
    write_tokenizer(lab.folder / "a" / "tokenizer.bin", [b"%d" % i for i in range(977)], 0)  # padded by up to 1023
    lab.train("padded", train_data=folders["a"], steps=1, **start)
    for count in (976, 2001):
        write_tokenizer(lab.folder / "a" / "tokenizer.bin", [b"%d" % i for i in range(count)], 0)
        lab.refused("vocabulary of 2000 ids", f"a/tokenizer.bin has {count} tokens", train_data=folders["a"], **start)


def test_an_unfinished_data_set_is_refused(lab):
    (lab.folder / "part").mkdir()
    path = write_shard(lab.folder / "part" / "train_000000.bin", lab.data.tokens)
    (lab.folder / "part" / "progress.json").write_text("{}")
    lab.refused("part of a data set", "progress.json", "prepare.py", train_data=path, val_data="")
    lab.refused("part of a data set", "progress.json", "prepare.py", val_data=path)
    (lab.folder / "part" / "manifest.json").write_text("{}")  # it was killed after its last word
    lab.train("finished", train_data=path, val_data="", steps=1)


def test_a_shard_that_the_manifest_names_is_missed(lab):
    folder = lab.folder / "set"
    folder.mkdir()
    for name in ("train_000000.bin", "val_000000.bin"):
        write_shard(folder / name, lab.data.tokens)
    names = ["train_000000.bin", "train_000001.bin", "val_000000.bin"]
    (folder / "manifest.json").write_text(json.dumps({"shards": [{"name": name, "tokens": 1} for name in names]}, indent=1))
    lab.refused("train_000001.bin is not there", "manifest.json", train_data=folder / "train_*.bin", val_data="")
    lab.train("others", train_data=folder / "train_000000.bin", val_data=folder / "val_*.bin", steps=1)


def test_brackets_in_paths(lab):
    """A pattern that is an existing file is that file, and a folder that exists is that folder, whatever their names; the
    rest is a pattern."""
    for folder in ("corpus [v1]", "c*", "corpus v", "back\\slash"):
        (lab.folder / folder).mkdir()
        for name in ("train_0.bin", "train_[1].bin", "train_1.bin")[:2 if folder == "corpus v" else 3]:
            write_shard(lab.folder / folder / name, lab.data.tokens)
    def shards(pattern):
        result = execute(lab.command("out", train_data=lab.folder / pattern, val_data="") + ["--dry-run"])
        return int(re.search(r": (\d+) shard", result.out).group(1)) if result.code == 0 else result.err
    assert shards("corpus [v1]/train_*.bin") == 3 and shards("corpus [v1]/train_[1].bin") == 1
    assert shards("c*/train_[0-9].bin") == 2 and shards("corpus [v1]/train_[01].bin") == 2
    assert shards("back\\slash/train_0.bin") == 1 and shards("[cx]orpus*/train_0.bin") == 2
    assert shards("corpus [v2]/train_0.bin") == 1 and "no file matches" in shards("corpus [x2]/train_0.bin")


def test_unused_tokens_are_said(lab):
    """A window ends with its shard: with short shards most tokens are in none."""
    (lab.folder / "short").mkdir()
    for i in range(5):
        write_shard(lab.folder / "short" / ("train_%d.bin" % i), np.resize(lab.data.tokens, T + 1 if i == 4 else T - 4))
    def said(pattern):
        result = execute(lab.command("out", train_data=lab.folder / pattern, val_data="", steps=3) + ["--dry-run"])
        assert result.code == 0, result.err
        return re.search(r"(\d+) of (\d+) tokens in none", result.out).groups(), "note: " in result.out, \
            re.search(r"([\d.]+) epochs", result.out).group(1)
    # an epoch is of sequences: one of T tokens, seven
    assert said("short/train_*.bin") == ((str(4 * (T - 4)), str(4 * (T - 4) + T + 1)), True, "3.00")
    assert said(lab.data.small) == (("0", str(len(lab.data.tokens))), False, "0.43")
    for left, note in ((20, False), (30, True)):  # of 469 and of 479 tokens: from a twentieth on
        rest = write_shard(lab.folder / "short" / f"rest_{left}.bin", np.resize(lab.data.tokens, 7 * T + 1 + left))
        assert said(rest) == ((str(left), str(7 * T + 1 + left)), note, "0.43")


def test_wide_shards_and_several_shards(lab):
    """32-bit shards give the losses of 16-bit ones, and shards named by a glob are read in the order of their names."""
    tokens = lab.data.tokens
    narrow = lab.train("narrow", steps=8)
    wide = lab.train("wide", steps=8, train_data=write_shard(lab.folder / "w.bin", tokens, width=4))
    assert main_log(wide) == main_log(narrow) and model_bytes(wide) == model_bytes(narrow)
    # the same 7 windows in three shards, the last shard written first, one of them wide, with tokens left over
    write_shard(lab.folder / "part_2.bin", tokens[5 * T:])
    write_shard(lab.folder / "part_0.bin", tokens[:2 * T + 9])
    write_shard(lab.folder / "part_1.bin", tokens[2 * T:5 * T + 1], width=4)
    for shuffle in (0, 1):
        one = lab.train(f"one_{shuffle}", steps=16, shuffle=shuffle)
        three = lab.train(f"three_{shuffle}", steps=16, shuffle=shuffle, train_data=lab.folder / "part_*.bin")
        assert main_log(three) == main_log(one) and model_bytes(three) == model_bytes(one)
    assert main_log(lab.folder / "one_0") != main_log(lab.folder / "one_1")


def test_units(lab):
    """The permutation, the windows, the detector, words, JSON strings, checksum: the checks of dev/test_units.cu."""
    result = execute([lab.programs["units"]])
    assert result.code == 0 and re.search(r"[1-9]\d* passed, 0 failed", result.out), result.out


# ---- 4. options

# Name, llm.c's letter or -, kind, default, bounds: not the program's own table, so that none of them changes unnoticed.
OPTIONS = """
train-data i text data/pystdlib_bytes/train_*.bin | val-data j text data/pystdlib_bytes/val_*.bin | shuffle - int 1 0 1
seed - int 1337 0 4294967295 | out-dir o text runs/lighthouse | checkpoint-every n int 1000 0 1e12 | keep-last nk int 2 0 1e6
keep-every nm int 0 0 1e12 | resume y int 0 0 1 | model e text d12 | depth - int 0 0 1024 | channels - int 0 0 65536
heads - int 0 0 1024 | vocab-size - int 0 0 16777216 | positions - text rope | rope-theta - real 500000 1 1e12 | fp8 - int 0 0 1
batch-size b int 1 1 65536 | seq-len t int 32768 1 1073741824 | total-batch-size d int 0 0 1e12 | steps x int -1 -1 1e12
learning-rate l real 3e-4 0 10 | lr-schedule k text cosine | warmup-steps u int -1 -1 1e12 | final-lr-frac q real 0.1 0 1
decay-frac - real 0.2 0 1 | weight-decay c real 0.1 0 10 | beta1 - real 0.9 0 0.999999 | beta2 - real 0.95 0 0.999999
adam-eps - real 1e-8 1e-30 1 | grad-clip - real 1.0 0 1e9 | skip-loss-z sl real 0 0 1e9 | skip-grad-z sg real 0 0 1e9
attention - text mixed | window - text 1024 | levels - int 0 0 8 | pool - int 4 2 64 | topk - int 0 0 1e9 | tile - int 0 0 4096
switch-step - text 0.875 | val-every v int 250 0 1e12 | copy-every - int 0 0 1e12 | val-batches m int 20 1 1e9
sample-every s int 0 0 1e12 | sample-tokens g int 64 1 65536 | sample-top-k - int 50 0 16777216 | prompt - text | tokenizer - text
temperature - real 1.0 0.01 100 | recompute r int -1 -1 4 | deterministic - int 0 0 1 | dry-run - int 0 0 1
plan-ranks - int 0 0 1048576 | plan-memory - real 0 0 1e6 | cp - int 1 1 1024 | hang-timeout - int 600 0 1e6
"""


def option_rows():
    rows = []
    for words in (row.split() for row in OPTIONS.replace("\n", " | ").split(" | ") if row):
        name, letter, kind, fallback, low, high = words + [""] * (4 - len(words)) + ["0"] * (6 - max(len(words), 4))
        rows.append(dict(name=name, letter=letter.strip("-"), type=kind, min=float(low), max=float(high), fallback=fallback))
    return rows


@pytest.fixture(scope="session")
def table():
    return option_rows()


def test_defaults_and_bounds(lab, table):
    """The program's options are those above, with those defaults and bounds; a bound itself is taken."""
    keys = ["name", "letter", "type", "min", "max", "fallback"]
    own = [dict(zip(keys, row.split("\t"))) for row in execute([lab.programs["units"], "options"]).out.splitlines()]
    assert [dict(row, min=float(row["min"]), max=float(row["max"])) for row in own] == table
    for option in table:
        for bound in ("min", "max") if option["type"] in ("int", "real") else ():
            result = execute([lab.programs["lighthouse"], f"--{option['name']}={option[bound]:.17g}", "--help"])
            assert result.code == 0, result.err


@pytest.mark.parametrize("program", ["lighthouse", "dense"])
def test_every_option_is_checked(lab, table, program):
    """Of every option: both bounds, text for a number, no value. Of the dense program: no Lighthouse options at all."""
    base = lab.command("out", program=program) + ["--dry-run"]
    for option in table:
        name = option["name"]
        def bad(words, *more):
            result = execute(base + list(more))
            lab.fails(result, *words)
        if program == "dense" and name in FIRST_PHASE_OPTIONS:
            bad(["unknown option --" + name], f"--{name}=4")
            continue
        if option["type"] != "int" or option["max"] != 1:
            bad([f"--{name} needs a value"], f"--{name}")
        if option["type"] == "text":
            continue
        low, high = option["min"] - 1, option["max"] + max(1, abs(option["max"]))
        number = "a number" if option["type"] == "real" else "a whole number"
        bad([f"--{name} is", "it must be"], f"--{name}={low:.17g}")
        bad([f"--{name} is", "it must be"], f"--{name}={high:.17g}")
        for text in ["", "x", "1x", "nan", "inf", "1e999", "--dry-run", "1 2"]:
            bad([f'--{name} is "{text}"', "it must be a number"], f"--{name}={text}")
        if option["type"] == "int":
            bad([f"--{name} is 1.5", number], f"--{name}", "1.5")


def test_unknown_options_are_refused(lab):
    """Misspelt, empty, doubled dashes, words without dashes, letters that do not exist: each is named."""
    for text in ["--step", "--stepss", "--", "---steps", "-", "-zz", "--=3", "--steps_", "--train_data=x", "-b=3", "--Steps=3"]:
        lab.fails(execute(lab.command("out") + [text]), f"unknown option {text}", "--help")
    lab.fails(execute(lab.command("out") + ["steps=3"]), '"steps=3" is no option')
    lab.fails(execute(lab.command("out") + ["--prompt", "--dry-run"]), "--prompt needs a value")
    lab.refused("--lr-schedule", "cosin", "wsd", lr_schedule="cosin")
    lab.refused("--positions", "alibi", "rope or learned", positions="alibi")
    lab.refused("--model", "d7", "lh30", model="d7")


def test_validation_data_goes_with_the_training_data(lab):
    """--train-data alone is refused: the default validation data is another text. What is validated on is printed."""
    for option in ([f"--train-data={lab.data.small}"], ["-i", lab.data.small]):
        lab.fails(execute([lab.programs["lighthouse"], *option, "--dry-run"]), "--train-data is given and --val-data is not",
                  "--val-data ''")
    for val, words in [("", "; no validation\n"), (lab.data.val, f"; validation on {lab.data.val}\n")]:
        result = execute(lab.command("out", val_data=val) + ["--dry-run"])
        assert re.search("^data .*" + re.escape(words), result.out, re.M), result.out


@pytest.mark.parametrize("program", ["lighthouse", "dense"])
def test_help_lists_every_option(lab, table, program):
    """--help and -h list every option with its letter, default and bounds, and nothing that the program refuses."""
    result = execute([lab.programs[program], "--help"])
    assert result.code == 0 and execute([lab.programs[program], "-h"]).out == result.out
    for option in table:
        name = option["name"] + (f", -{option['letter']}" if option["letter"] else "")
        listed = re.search(rf"^  --{name} .*$", result.out, re.M)
        assert bool(listed) == (program == "lighthouse" or option["name"] not in FIRST_PHASE_OPTIONS), name
        if listed and option["fallback"] and not option["fallback"].startswith("runs"):
            bounds = f"; {option['min']:.12g} to {option['max']:.12g}" if option["type"] != "text" else ""
            assert f"({option['fallback']}{bounds})" in listed.group(), listed.group()
    assert result.out.count("\n  --") == len(table) - (len(FIRST_PHASE_OPTIONS) if program == "dense" else 0)


def test_a_switch_alone_is_on(lab, table):
    """Every option of 0 and 1 may stand without a value, before another option or a letter, and means 1."""
    switches = [option["name"] for option in table if option["type"] == "int" and option["max"] == 1]
    assert set(switches) == {"shuffle", "resume", "fp8", "deterministic", "dry-run"}
    command = lab.command("out", steps=1, shuffle=0)
    result = execute(command + [*(f"--{name}" for name in switches), "-y", "--dry-run", "0"])
    assert result.code == 0, result.err
    configured = events(lab.folder / "out", "config")[0]["options"]
    assert {str(configured[name]) for name in switches if name != "dry-run"} == {"1"} and configured["dry-run"] == 0
    lab.fails(execute(command + ["--deterministic", "yes", "--dry-run"]), '--deterministic is "yes"', "a number")


def test_every_way_to_write_an_option_is_the_same(lab, table):
    """`--name value`, `--name=value` and llm.c's letter give the same configuration."""
    values = dict(train_data=lab.data.small, val_data=lab.data.val, out_dir=lab.folder / "out", checkpoint_every=3, keep_last=5,
                  keep_every=7, resume=0, model="d6", batch_size=2, seq_len=T, total_batch_size=4 * T, steps=0, learning_rate=1e-3,
                  lr_schedule="linear", warmup_steps=0, final_lr_frac=0.5, weight_decay=0.25, skip_loss_z=6, skip_grad_z=7,
                  val_every=9, val_batches=3, sample_every=0, sample_tokens=11, recompute=3)
    letters = {o["name"]: o["letter"] for o in table if o["letter"]}
    assert set(letters) == {n.replace("_", "-") for n in values}
    rest = arguments(dict(GEOMETRY, depth=1, channels=16, heads=2))
    configurations = []
    for write in [lambda n, v: [f"--{n}", v], lambda n, v: [f"--{n}={v}"], lambda n, v: [f"-{letters[n]}", v]]:
        shutil.rmtree(lab.folder / "out", ignore_errors=True)
        command = [lab.programs["lighthouse"]] + rest
        for name, value in values.items():
            command += write(name.replace("_", "-"), str(value))
        result = execute(command)
        assert result.code == 0, result.err
        configurations.append(events(lab.folder / "out", "config")[0]["options"])
    assert configurations[0] == configurations[1] == configurations[2]
    for name, value in values.items():
        assert str(configurations[0][name.replace("_", "-")]) == str(value), name


def test_llmc_command_lines_stay_as_they_are(lab):
    """The options of llm.c's published 124M command, at a size for a test: what has no counterpart is named and changes nothing."""
    data = ["-i", lab.data.small, "-j", lab.data.val, "-o", lab.folder / "llmc"]
    its = "-e d6 -b 2 -t 64 -d 256 -r 1 -z 1 -c 0.1 -l 0.0006 -q 0.0 -u 7 -n 5 -v 2 -s 0 -h 1 -w 1 -ge 1 -f 1 -a 0 -x 8".split()
    result = execute([lab.programs["dense"], *data, *its, "--dry-run"])
    assert result.code == 0, result.err
    for letter, value, words in (("z", 1, "ZeRO stage 1"), ("h", 1, "lm_eval"), ("w", 1, "always kept"), ("ge", 1, "fused"),
                                 ("f", 1, "bf16")):
        assert re.search(f"^note: llm.c's -{letter} {value} changes nothing: .*{words}", result.out, re.M), letter
    assert "-a 0" not in result.out
    for letter, value, words in (("z", "2", "ZeRO stage 1"), ("h", "2", "lm_eval"), ("h", "12", "lm_eval"), ("w", "0", "always kept"),
                                 ("a", "1", "a shard of one batch"), ("pn", "8", "mpirun"), ("pi", "mpi", "mpirun"),
                                 ("ge", "0 1", "fused"), ("z", "", "ZeRO")):
        lab.fails(execute([lab.programs["dense"], f"-{letter}", value]),
                  f"llm.c's -{letter} {value} has no counterpart", words)


@pytest.mark.parametrize("program", ["lighthouse", "dense"])
def test_plan_memory_plans_for_a_gpu_that_is_not_here(lab, program):
    """In bf16 with fp32 masters and attention's sums; the recompute level is what fits; a run itself does not take it."""
    options = dict(depth=12, channels=512, heads=8, seq_len=16 * T, steps=1, train_data=lab.data.large, val_data="",
                   program=program)

    def plan(memory):
        return execute(lab.command("planned", plan_memory=memory, **options) + ["--dry-run"])

    def parts(out):
        line = re.search("^memory .*: (parameters .*)$", out, re.M).group(1)
        return {name: float(size) for name, size in re.findall(r"([a-zA-Z0-9 ]+?) ([0-9.]+)(?:, |$)", line)}

    large, here = plan(100).out, execute(lab.command("planned", **options) + ["--dry-run"]).out
    assert re.search("^memory .* of 100.00 GiB free, recompute level 0:", large, re.M)
    one, other = parts(large), parts(here)
    assert abs(2 * one["parameters"] - other["parameters"]) < 0.011 and "fp32 masters" not in other
    assert one["fp32 masters"] == other["parameters"] and one["AdamW moments"] == other["AdamW moments"]
    rows = options["seq_len"] * 512
    assert abs(one["attention workspace"] - 4 * (rows + rows / 64) / 2**30) < 0.006 and "attention workspace" not in other
    total = float(re.search("^memory +([0-9.]+) GiB", large, re.M).group(1))
    less = plan(total + 0.125 - 0.01).out  # of the memory given 0.125 are kept free
    level = re.search("^memory .* recompute level ([0-9])", less, re.M).group(1)
    assert int(level) <= 1 and not re.search("^memory .* recompute level 0:", less, re.M)
    lab.fails(plan(0.25), "0.12 GiB are free for it")
    lab.fails(lab.run("planned", plan_memory=24), "--plan-memory is 24", "--dry-run")
    assert not os.path.exists(lab.folder / "planned")


def test_the_last_of_repeated_options_counts(lab):
    """An option given twice has its last value, so that a script's options can be overridden at its end."""
    result = execute(lab.command("out") + ["--steps=3", "-x", "5", "--dry-run"])
    assert "run         5 steps" in result.out


def test_a_run_that_is_never_dense_plans_no_dense_step(lab):
    """With --switch-step 1.0 a dense training pass, the larger one at recompute level 3, takes no memory; evaluations are dense."""
    options = dict(depth=12, attention="L", seq_len=8 * T, recompute=3, steps=4, train_data=lab.data.large,
                   val_data=lab.data.large, val_every=2, val_batches=2)
    runs = [lab.train(f"until_{switch}", switch_step=switch, **options) for switch in ("1.0", "3", "4")]
    never, later, also_never = (events(run, "memory")[0]["parts"] for run in runs)
    assert never["activations"] < later["activations"] and never == also_never
    assert model_bytes(runs[0]) == model_bytes(runs[2])
    evaluations = [events(run, "eval") for run in runs]
    assert [e["loss_dense"] for e in evaluations[0]][:2] == [e["loss_dense"] for e in evaluations[1]][:2]
    assert evaluations[0][-1]["step"] == 4 and evaluations[0][-1]["loss_dense"] and evaluations[0][-1]["loss_first"]


def test_a_plan_for_more_processes(lab):
    """--plan-ranks shows each process's memory: an N-th of the moments, all of the parameters; it starts and writes nothing."""
    def planned(ranks):
        result = execute(lab.command("planned", depth=24, channels=512, steps=1, plan_ranks=ranks) + ["--dry-run"])
        assert result.code == 0 and f"{max(ranks, 1)} process(es)" in result.out, result.err
        return [float(re.search(rf"{part} ([\d.]+)", result.out).group(1)) for part in ("parameters", "AdamW moments")]
    one, eight = planned(0), planned(8)
    assert planned(1) == one and eight[0] == one[0] > 0 and abs(eight[1] - one[1] / 8) <= 0.01 < one[1]
    assert not (lab.folder / "planned").exists()
    lab.refused("--cp is 2; it must divide the number of processes, 3", cp=2, plan_ranks=3)
    lab.fails(lab.run("planned", plan_ranks=2), "--plan-ranks is 2", "--dry-run")


def test_dry_run_writes_nothing(lab):
    """--dry-run prints the plan and leaves no file and no folder, and touches no earlier run."""
    result = execute(lab.command("dry/run", steps=100) + ["--dry-run"])
    assert result.code == 0 and "memory" in result.out and "48 slots: 56.25%" in result.out
    assert not (lab.folder / "dry").exists()
    folder = lab.train("run", steps=1)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert execute(lab.command("run", steps=100) + ["--dry-run"]).code == 0
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_switch_step(lab):
    """The switch as a share, as a step, never, and at once; and what it may not be."""
    def switched(value, steps=8):
        name = f"s{value}_{steps}"
        folder = lab.train(name, steps=steps, switch_step=value, depth=1, attention="L")
        phases = [e["phase"] for e in step_events(folder)]
        n = phases.count("first")
        assert phases == ["first"] * n + ["dense"] * (steps - n)
        config = events(folder, "config")[0]
        assert config["switch_step"] == n and (config["lighthouse"] is None) == (n == 0)
        assert [e["step"] for e in events(folder, "switch")] == ([n] if 0 < n < steps else [])
        assert events(folder, "total")[0]["phases"]["first"]["steps"] == n
        return n
    assert switched("0") == 0 and switched("0.0") == 0
    assert switched("0.625") == 5 and switched("0.5") == 4 and switched("0.99") == 8
    assert switched("1") == 1 and switched("7") == 7 and switched("8") == 8 and switched("1.0") == 8
    assert switched("0.625", steps=0) == 0 and switched("0.625", steps=1) == 1
    for value in ["9", "-1", "1.5", "-0.5", "5e-1", "x", "", "nan", "inf", "3x", "1e9"]:
        lab.refused("--switch-step", f'"{value}"', steps=8, switch_step=value)


def test_attention(lab):
    """Which attention each layer has, by letters and by name, and what no model has."""
    def notes_of(value, **options):
        return re.findall("note: (.*)", execute(lab.command("x", attention=value, **options) + ["--dry-run"]).out)

    def pattern(value, depth, **options):
        options = dict(dict(steps=1, switch_step="1.0", depth=depth, attention=value), **options)
        folder = lab.train(f"a{value}_{depth}_{len(options)}_{options.get('seq_len')}", **options)
        config = events(folder, "config")[0]
        assert (config["lighthouse"] is None) == (not set("LC") & set(config["attention"]))
        assert config["windows"] == ([[options.get("seq_len", T), 0]] if "W" in config["attention"] else [])  # no window is longer than a sequence
        assert config["switch_step"] == (0 if set(config["attention"]) == {"D"} else 1)
        return config["attention"]
    assert pattern("L", 3) == "LLL" and pattern("DW", 5) == "DWDWD" and pattern("WLD", 3) == "WLD" and pattern("W", 2) == "WW"
    assert pattern("WWWC", 5) == "WWWCW" and pattern("CL", 2) == "CL"
    assert pattern("paper", 1) == "L" and pattern("paper", 2) == "LL" and pattern("paper", 3) == "DLD"
    assert pattern("paper", 11) == "D" + 9 * "L" + "D" and pattern("paper", 12) == "DD" + 8 * "L" + "DD"
    assert pattern("windows", 1) == "D" and pattern("windows", 3) == "WWD" and pattern("windows", 7) == "WWWWWWD"
    assert pattern(None, 8) == "WWWCWWWD" and pattern("windows", 8) == "WWWWWWWD" and pattern("windows", 17) == 2 * "WWWWWWWD" + "W"
    fits = dict(levels=None, pool=None, topk=None, tile=None)
    assert pattern("mixed", 8, **fits) == "WWWCWWWD" and pattern("mixed", 6, **fits) == "WWCWWD"
    assert pattern("mixed", 4, **fits) == "WCWD" and pattern("mixed", 3, **fits) == "WWD"
    assert pattern("mixed", 12, **fits) == "WWWCWWWDWWWC" and pattern("mixed", 8) == "WWWCWWWD"  # this test's own geometry
    assert pattern("mixed", 8, **dict(fits, seq_len=T - 2)) == "WWWWWWWD"  # no selection fits: a note, no refusal
    assert notes_of("mixed", depth=8, **dict(fits, seq_len=T - 2)) == [
        f"no selection of Causal Lighthouse fits seq-len {T - 2}: windows in its place"]
    assert notes_of("mixed", depth=8, **fits) == [] and notes_of("windows", depth=8, **fits) == []
    lab.refused(f"T = {T - 2} is not divisible by", attention="mixed", depth=8, **dict(fits, seq_len=T - 2, topk=16))
    assert pattern("D", 3) == "DDD"  # a dense run, and it says so
    assert "dense throughout" in execute(lab.command("x", attention="DDD") + ["--dry-run"]).out
    assert "no step is dense in every layer" in execute(lab.command("x", switch_step="1.0") + ["--dry-run"]).out
    assert execute(lab.command("out", pool=3, attention="W") + ["--dry-run"]).code == 0  # no rule of Lighthouse's for windows
    notes = lambda **options: re.findall("note: (--.*)", execute(lab.command("x", **options) + ["--dry-run"]).out)
    assert notes(attention="windows", tile=None, levels=None, window=16) == [
        f"--{name} is given, and no layer of --attention windows has it" for name in ("pool", "topk")]
    assert notes(window=16) == ["--window is given, and no layer of --attention paper has it"] and notes() == []
    for value in ["", "l", "DLX", "LLLL", "D,L", "0,1", "none", "Paper", "D L"]:
        lab.refused(f'--attention is "{value}"; it must be mixed, windows, paper, or 1 to 3 letters D (dense), W (window), L (Lighthouse), C (Causal Lighthouse)',
                    attention=value)


def test_a_growing_window_is_taken_at_its_step(lab):
    """Of weights that stay, each step's loss is that of a run of its window alone; a validation is under the last step's window."""
    options = dict(attention="W", steps=6, switch_step="1.0", learning_rate=0, val_data=lab.data.val, val_every=1)
    runs = [lab.train(f"run_{i}", **options, window=w) for i, w in enumerate(("4", "64", "4,64:3"))]
    small, large, grown = ([e["loss"] for e in step_events(run)] for run in runs)
    assert grown == small[:3] + large[3:] and all(a != b for a, b in zip(small, large))
    small, large, grown = ([e["loss_first"] for e in events(run, "eval")] for run in runs)
    assert grown == small[:4] + large[4:] and small[0] != large[0] and len(grown) == 7


def test_windows(lab):
    """Windows that grow, by step and by share, and what --window may not be."""
    def windows(value, steps=8, switch=6):
        folder = lab.train(f"w{value.replace(':', '_')}", steps=steps, switch_step=switch, depth=1, attention="W", window=value)
        return events(folder, "config")[0]["windows"]
    assert windows("16") == [[16, 0]] and windows("1024") == [[T, 0]] and windows("16:0") == [[16, 0]]
    assert windows("16,32:3") == [[16, 0], [32, 3]] and windows("16:0.0,32:0.25,64:5") == [[16, 0], [32, 2], [64, 5]]
    assert windows("32,8:1") == [[32, 0], [8, 1]]  # they may shrink
    out = execute(lab.command("shown", steps=8, switch_step=6, attention="W", window="16,32:3") + ["--dry-run"]).out
    assert re.findall(r"windows of (\d+) tokens from step (\d+) on: ([\d.]+)%", out) == [("16", "0", "25.00"), ("32", "3", "50.00")]
    for value in ["", "x", "0", "-8", "16x", "16:", "16;32:2", "8,8:1,8:2,8:3,8:4,8:5,8:6,8:7,8:8", "1.5", "16,:3"]:
        lab.refused("--window", f'"{value}"', steps=40, switch_step=38, attention="W", window=value)
    for value in ["16,32:9", "16,32:1.5", "16,32:-1", "16,32:2.5.5", "16,32:x"]:
        lab.refused(f'--window is "{value}"; a step must be from 0 to the run\'s 8', steps=8, attention="W", window=value)
    for value, at in [("16:2", 2), ("16,32", 0), ("16,32:3,48:3", 3), ("16,32:3,48:2", 2), ("16,32:6", 6), ("16,32:1.0", 8)]:
        lab.refused(f'--window is "{value}"', "the first window is taken from step 0 on", "below the switch at 6",
                    f"from step {at}", steps=8, switch_step=6, attention="W", window=value)


def test_lighthouse_rules(lab):
    """Each rule of the geometry is refused with its own message and with values that pass."""
    lab.refused("pool is 3", "power of 2", pool=3)
    lab.refused("pool is 6", "power of 2", pool=6)
    lab.refused("tile is 5", "even", tile=5)
    lab.refused("tile is 6", "twice pool (4)", pool=4, tile=6, topk=6)
    lab.refused("topk is 10", "multiple of tile (4)", "try 8", topk=10)
    lab.refused("topk is 2", "try 4", topk=2)
    for topk in (2, 5):
        lab.refused(f"topk is {topk}; it must be even and at least twice pool (2)", topk=topk, tile=None)
    result = lab.refused(f"topk/tile = {64 ** 7}", levels=8, pool=64, topk=128, tile=128)
    assert "nearest" not in result.err, result.err
    lab.refused("levels is 1; it must be 2 to 8", levels=1)
    lab.refused("levels", levels=9)
    long = lab.data.folder / "large.bin"
    lab.refused("T = 100", "= 8", "96 and 104", seq_len=100, train_data=long)
    lab.refused("T = 100", "= 16", "the nearest length is 128", seq_len=100, topk=32, tile=8, train_data=long)
    lab.refused("16 coarsest entries, fewer than topk = 32: lower topk to at most 16,", seq_len=64, topk=32, tile=8,
                train_data=long)
    lab.refused("16 coarsest entries, fewer than topk = 32: lower topk and tile to at most 16,", seq_len=64, topk=32,
                tile=None, train_data=long)
    assert "[" not in lab.refused("--levels is 9; it must be 0 to 8. Lighthouse, L and C: levels of the pyramid", levels=9).err
    # what the messages propose is accepted
    for options in [dict(topk=8), dict(seq_len=96), dict(seq_len=104), dict(topk=16, tile=8),
                    dict(topk=16, tile=None)]:
        assert execute(lab.command("out", **dict(dict(train_data=long), **options)) + ["--dry-run"]).code == 0, options
    # no message where Lighthouse is not used
    assert execute(lab.command("out", pool=3, switch_step="0") + ["--dry-run"]).code == 0


def test_default_geometry_fits_every_usual_length(lab):
    """topk and tile left to the program give valid settings, a tenth of the attention or less from 2048 tokens on."""
    generator = np.random.RandomState(0)
    path = write_shard(lab.folder / "long.bin", generator.randint(0, 256, 2 ** 17 + 1))
    for length in [128, 256, 1000 * 16, 512, 1024, 2048, 3072, 4096, 8192, 16384, 32768, 98304, 131072]:
        options = dict(train_data=path, seq_len=length, topk=None, tile=None, pool=None, levels=None)
        result = execute(lab.command("out", **options) + ["--dry-run"])
        assert result.code == 0, (length, result.err)
        share = float(re.search(r"slots: ([\d.]+)%", result.out).group(1))
        assert share <= (100 if length < 2048 else 10), (length, share)
        if length == 98304:
            assert "levels 3, pool 4, topk 1536, tile 128 (12 tiles)" in result.out and "18432 slots" in result.out
        result = execute(lab.command("out", attention="WWC", **options) + ["--dry-run"])  # tiles of about 4096 tokens
        assert result.code == 0, (length, result.err)
        tiles, slots, share = re.search(r"Causal Lighthouse: .*\((\d+) tiles\), (\d+) slots: ([\d.]+)%", result.out).groups()
        assert length < 4096 or length % 4096 or int(tiles) == length // 4096 and int(slots) == int(tiles) * 208, result.out
        assert f"levels {4 if length >= 512 else 3 if length >= 128 else 2}, pool 4" in result.out and float(share) <= (
            100 if length <= 8192 else 40 if length < 32768 else 20 if length < 98304 else 10), (length, share)
    # a tile is at least twice the pool
    assert "pool 16, topk 128, tile 32 (4 tiles)" in execute(lab.command(
        "out", train_data=path, seq_len=32768, attention="C", topk=None, tile=None, pool=16, levels=2) + ["--dry-run"]).out


def test_sizes_that_do_not_go_together(lab):
    """Batch, heads, warmup and length are checked against each other before anything is written."""
    lab.refused("--total-batch-size is 100", "multiple of", "= 64", "try 128", total_batch_size=100)
    lab.refused("--total-batch-size is 192", "= 128", "try 256", batch_size=2, total_batch_size=3 * T)
    lab.refused("--total-batch-size is 129", "= 128", "try 256", total_batch_size=129, batch_size=2)
    lab.refused("--channels 16", "--heads 3", heads=3)
    lab.refused("even", heads=16)  # one channel a head cannot be rotated
    lab.refused("--warmup-steps is 11", "10", steps=10, warmup_steps=11)
    lab.refused("seq-len + 1 = 4097", seq_len=4096)
    lab.refused("--fp8 1", "1 x 40 / 1", "multiple of 16", fp8=1, seq_len=40, switch_step=0)
    lab.refused("GiB", "too few", channels=65536, heads=2, depth=1024)


def test_a_run_of_no_steps_says_so(lab):
    """--steps -1 is one epoch; where that is less than one step it is an error, not an untrained model."""
    result = execute(lab.command("out", steps=-1) + ["--dry-run"])
    assert "run         7 steps" in result.out
    assert "run         2 steps" in execute(lab.command("out", steps=-1, total_batch_size=3 * T) + ["--dry-run"]).out
    lab.refused("epoch", steps=-1, total_batch_size=10 * T)


def test_out_dir(lab):
    """Folders are made, a slash at the end is fine, a file in the way or no name is an error."""
    lab.train("a/b/c", steps=0)
    result = execute(lab.command("x", steps=0) + [f"--out-dir={lab.folder}/d/e/"])
    assert result.code == 0 and (lab.folder / "d/e/model.bin").exists()
    (lab.folder / "file").write_text("x")
    lab.fails(lab.run("file", steps=0), "file")
    lab.fails(lab.run("file/below", steps=0), "file")
    lab.fails(execute(lab.command("x", steps=0) + ["--out-dir="]), "--out-dir")


# ---- 5. schedules, outliers, clipping

def expected_rate(schedule, step, steps, peak, fraction, warmup, decay):
    """Learning rate of step 0, 1, ... written from the help text."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / (steps - warmup)
    decay = min(decay, steps - warmup)
    if schedule == "cosine":
        return peak * (fraction + (1 - fraction) * (1 + math.cos(math.pi * done)) / 2)
    if schedule == "linear":
        return peak * (1 + (fraction - 1) * done)
    if schedule == "wsd" and decay and step >= steps - decay:
        return peak * (fraction + (1 - fraction) * (1 - math.sqrt((step - (steps - decay)) / decay)))
    return peak


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
@pytest.mark.parametrize("warmup", [-1, 0, 10, 40, 50])
def test_learning_rates(lab, schedule, warmup):
    """The logged learning rates are the formulas', for no warmup, 2%, some, into the decay and nothing but warmup."""
    folder = lab.train("run", program="dense", depth=1, seq_len=16, steps=50, lr_schedule=schedule, warmup_steps=warmup,
                       learning_rate=3e-3, final_lr_frac=0.2, decay_frac=0.3)
    rates = [e["lr"] for e in step_events(folder)]
    warmup = 1 if warmup == -1 else warmup
    for step, rate in enumerate(rates):
        assert math.isclose(rate, expected_rate(schedule, step, 50, 3e-3, 0.2, warmup, 15), rel_tol=1e-8), step
        assert abs(float(main_log(folder)[step][1]) - rate) < 1e-8


def test_decay_frac_bounds(lab):
    """wsd without a decay stays at its peak; with a share of 1 it decays over all steps after the warmup."""
    for fraction, decay in [(0, 0), (1, 20)]:
        folder = lab.train(f"f{fraction}", program="dense", depth=1, seq_len=16, steps=20, lr_schedule="wsd", warmup_steps=4,
                           decay_frac=fraction, learning_rate=1e-3)
        for step, e in enumerate(step_events(folder)):
            assert math.isclose(e["lr"], expected_rate("wsd", step, 20, 1e-3, 0.1, 4, decay), rel_tol=1e-8), step


def test_a_diverged_run_ends(lab):
    """With outliers skipped, steps that are never finite again end the run, and no checkpoint is of one of them."""
    result = lab.run("run", steps=100, learning_rate=10, weight_decay=10, lr_schedule="constant", warmup_steps=0,
                     skip_grad_z=3, grad_clip=0, checkpoint_every=2)
    assert result.code != 0 and re.search(r"step \d+: .* in any of 10 steps: .*a lower --learning-rate", result.err), result.err
    skipped = [e["step"] for e in step_events(lab.folder / "run") if e["skipped"]]
    assert len(skipped) == 9 and skipped == list(range(skipped[0], skipped[0] + 9))
    assert len(checkpoints(lab.folder / "run")) == 2 and checkpoints(lab.folder / "run")[-1] < skipped[0]


def test_steps_that_are_not_finite_push_out_no_checkpoint(lab):
    """A run that ends, or stops, while no step is finite writes its state beside the good one; a resume goes on counting."""
    options = dict(learning_rate=10, weight_decay=10, lr_schedule="constant", warmup_steps=0, skip_grad_z=3, grad_clip=0, keep_last=1)
    assert lab.run("all", steps=100, checkpoint_every=2, **options).code != 0
    first = [e["step"] for e in step_events(lab.folder / "all") if e["skipped"]][0]
    good = (first - 1) // 2 * 2
    run = lab.train("run", steps=first + 3, checkpoint_every=2, **options)
    assert checkpoints(run) == [good, first + 3]
    result = lab.run("run", steps=100, checkpoint_every=2, resume=1, **options)
    assert result.code != 0 and re.search(rf"step {first + 9}: .* in any of 10 steps: .* of step {first - 1} or before", result.err), result.err
    assert checkpoints(run) == [good, first + 3]


def test_a_finite_step_ends_the_count(lab, saved):
    """After three steps that were not finite, one that is: checkpoints are written and pruned again, and nothing is left of the
    count."""
    folder = lab.folder / "run"
    folder.mkdir()
    checkpoint(folder, 4).write_bytes(crafted(checkpoint(saved, 4).read_bytes(), state=[(STATE["not_finite"], 3)]))
    lab.train("run", depth=1, attention="L", steps=7, checkpoint_every=1, keep_last=2, resume=1)
    assert [e["step"] for e in events(folder, "checkpoint")] == [5, 6, 7] and checkpoints(folder) == [6, 7]
    assert struct.unpack_from("<q", checkpoint(folder, 7).read_bytes(), 4096 + STATE["not_finite"]) == (0,)


def test_closed_standard_streams(lab):
    """No log takes the place of a closed standard output or error."""
    command = shlex.join(str(c) for c in lab.command("run", steps=3))
    assert subprocess.run(["sh", "-c", command + " <&- >&- 2>&-"], env=ENV).returncode == 0
    assert len(step_events(lab.folder / "run")) == 3 and len(main_log(lab.folder / "run")) == 3
    command = shlex.join(str(c) for c in lab.command("broken", **broken_model(lab)))
    assert subprocess.run(["sh", "-c", command + " <&- >&- 2>&-"], env=ENV).returncode == 1
    for name in ("main.log", "log.jsonl"):
        assert "error" not in (lab.folder / "broken" / name).read_text()


def sections(path):
    """A checkpoint's weights and moments, in double precision."""
    return np.frombuffer(checkpoint_body(path), "<f4").astype(float).reshape(3, -1)


def by_hand(before, after, lr, update, norm, beta1=0.9, beta2=0.999, eps=1e-8, clip=0):
    """That one step leads from one checkpoint's sections to another's, by AdamW's equations without decay; the gradient is
    what the first moment's change tells, and its norm is what the log says."""
    (w0, m0, v0), (w1, m1, v1) = before, after
    g = (m1 - beta1 * m0) / (1 - beta1)
    scale = clip / norm if 0 < clip < norm else 1
    assert math.isclose(np.linalg.norm(g), norm * scale, rel_tol=1e-4)
    assert np.allclose(v1, beta2 * v0 + (1 - beta2) * g ** 2, rtol=1e-3, atol=1e-6 * v1.max())
    moved = -lr * (m1 / (1 - beta1 ** update)) / (np.sqrt(v1 / (1 - beta2 ** update)) + eps)
    assert np.linalg.norm(w1 - w0 - moved) < 1e-3 * np.linalg.norm(moved) > 0


@pytest.mark.parametrize("clip", [0, 0.05])
def test_steps_by_hand(lab, clip):
    """Three steps from checkpoint to checkpoint, worked out from AdamW's equations with two different betas, and with clipping."""
    folder = lab.train("run", steps=4, batch_size=2, total_batch_size=6 * T, learning_rate=1e-2, weight_decay=0, beta2=0.999, adam_eps=1e-6,
                       lr_schedule="linear", warmup_steps=0, grad_clip=clip, checkpoint_every=1, keep_last=0)
    for step, e in enumerate(step_events(folder)[1:], 2):
        assert e["lr"] == pytest.approx(1e-2 * (1 - 0.9 * (step - 1) / 4))
        by_hand(sections(checkpoint(folder, step - 1)), sections(checkpoint(folder, step)), e["lr"], step, e["norm"], eps=1e-6, clip=clip)


OUTLIER = dict(depth=1, steps=260, shuffle=0, attention="L", learning_rate=1e-2, lr_schedule="constant", warmup_steps=0)


@pytest.mark.parametrize("option", ["skip_loss_z", "skip_grad_z"])
def test_an_outlier_is_skipped(lab, option):
    """The one anomalous window, and no other, is passed over: no update, the moments too; resuming changes nothing."""
    z = {option: 6}
    options = dict(OUTLIER, train_data=lab.data.outlier, program="dense", attention=None)
    folder = lab.train("skipping", **options, **z, checkpoint_every=1, keep_last=12)
    steps = step_events(folder)
    assert steps[250]["skipped"], steps[248:252]
    assert [e["step"] for e in steps if e["skipped"]] == [251]
    bodies = [checkpoint_body(checkpoint(folder, step)) for step in (250, 251, 252)]
    assert bodies[0] == bodies[1] != bodies[2]
    done = struct.unpack("<3q", checkpoint(folder, 260).read_bytes()[4096:4120])  # the state begins with these three
    assert done == (260, 260, 259), "a skipped step moves on in the data, but is no update for AdamW's bias correction"
    heedless = lab.train("heedless", **options)
    assert not any(e["skipped"] for e in step_events(heedless)) and model_bytes(heedless) != model_bytes(folder)
    resumed = lab.folder / "resumed"  # the detector's window is part of the state
    resumed.mkdir()
    shutil.copy(checkpoint(folder, 249), resumed)
    lab.train("resumed", **options, **z, resume=1)
    assert model_bytes(resumed) == model_bytes(folder)
    assert [e["step"] for e in events(resumed, "step") if e["skipped"]] == [251]


def test_updates_are_counted_and_not_steps(lab):
    """After a skipped step the bias correction is that of the updates made: a beta of 0.999 shows it in the update's size."""
    options = dict(OUTLIER, steps=252, train_data=lab.data.outlier, program="dense", attention=None, beta2=0.999, weight_decay=0,
                   grad_clip=0)
    folder = lab.train("run", **options, skip_loss_z=6, checkpoint_every=1, keep_last=2)
    steps = step_events(folder)
    assert [e["step"] for e in steps if e["skipped"]] == [251]
    by_hand(*(sections(checkpoint(folder, step)) for step in (251, 252)), steps[251]["lr"], 251, steps[251]["norm"])


def test_an_unusually_low_loss_is_no_outlier(lab):
    """A window far easier than those before, after 128 of them, is trained on like any other."""
    tokens = np.where(np.random.RandomState(1).rand(160 * T + 1) < 0.5, 0, np.random.RandomState(2).randint(1, 64, 160 * T + 1))
    tokens[140 * T + 1:141 * T + 1] = 0
    path = write_shard(lab.folder / "easy.bin", tokens)
    options = dict(OUTLIER, steps=150, train_data=path, program="dense", attention=None)
    folder = lab.train("run", **options, skip_loss_z=6, skip_grad_z=100)
    losses = [e["loss"] for e in step_events(folder)]
    mean, deviation = np.mean(losses[12:140]), np.std(losses[12:140])
    assert (losses[140] - mean) / deviation < -6 and not any(e["skipped"] for e in step_events(folder)), losses[140]


def test_an_unusually_low_norm_is_no_outlier(lab):
    """Of windows of one token, at rates of 0, the norm stays; one of many tokens has a lower one, and is no outlier. The other
    way round it is one, but not behind the switch, where the norm's detector has begun anew."""
    tokens = np.zeros(150 * T + 1, int)
    tokens[140 * T + 1:141 * T + 1] = np.arange(T)
    options = dict(OUTLIER, steps=150, train_data=write_shard(lab.folder / "same.bin", tokens), program="dense", attention=None)
    steps = step_events(lab.train("run", **dict(options, learning_rate=0), skip_grad_z=6))
    assert steps[140]["norm"] < 0.9 * steps[139]["norm"] and not any(e["skipped"] for e in steps)
    options.update(learning_rate=0, skip_grad_z=6, train_data=write_shard(lab.folder / "many.bin", np.where(
        np.arange(150 * T + 1) // T == 140, 0, np.arange(150 * T + 1) % T)))
    assert [e["step"] for e in step_events(lab.train("dense", **options)) if e["skipped"]] == [141]
    options.update(program="lighthouse", attention="L")
    assert [e["step"] for e in step_events(lab.train("first", **options, switch_step=145)) if e["skipped"]] == [141]
    assert not any(e["skipped"] for e in step_events(lab.train("switched", **options, switch_step=135)))


def test_the_detector_starts_anew_at_the_switch(lab):
    """The jump of the loss at the switch is no outlier: for 128 steps after it none is called one, also after a resume."""
    options = dict(OUTLIER, train_data=lab.data.outlier, skip_loss_z=6)
    early = lab.train("early", **options, switch_step=10)
    assert [e["step"] for e in step_events(early) if e["skipped"]] == [251]
    late = lab.train("late", **options, switch_step=240, checkpoint_every=240, keep_last=0)
    assert not any(e["skipped"] for e in step_events(late))
    resumed = lab.folder / "resumed"
    resumed.mkdir()
    shutil.copy(checkpoint(late, 240), resumed)
    lab.train("resumed", **options, switch_step=240, resume=1)
    assert model_bytes(resumed) == model_bytes(late)


def test_gradient_clipping(lab):
    """The reported norm is that before clipping; clipping above it changes nothing, below it the update."""
    options = dict(steps=1, learning_rate=1e-2, warmup_steps=0, adam_eps=1e-2)  # a large epsilon makes Adam feel the scale
    off, high, low = (lab.train(name, **options, grad_clip=clip) for name, clip in [("off", 0), ("high", 1e6), ("low", 0.01)])
    norms = {main_log(folder)[0][2] for folder in (off, high, low)}
    assert len(norms) == 1 and float(norms.pop()) > 0.1
    assert model_bytes(off) == model_bytes(high) != model_bytes(low)
    start = ModelFile(model_bytes(lab.train("start", steps=0)))
    moved = [np.abs(ModelFile(model_bytes(folder)).qkvw - start.qkvw).mean() for folder in (off, low)]
    assert moved[1] < moved[0] / 5


def test_weight_decay_falls_on_the_matrices(lab):
    """One step with decay differs from one without by lr * decay * weight in the matrices, and in nothing else."""
    start = ModelFile(model_bytes(lab.train("start", steps=0, positions="learned")))
    options = dict(steps=1, learning_rate=0.01, warmup_steps=0, positions="learned")
    without, decayed = (ModelFile(model_bytes(lab.train(f"d{d}", **options, weight_decay=d))) for d in (0, 1))
    for name in ["wte", "wpe", "qkvw", "attprojw", "fcw", "fcprojw"]:
        difference = getattr(without, name) - getattr(decayed, name)
        assert np.allclose(difference, 0.01 * getattr(start, name), atol=1e-7, rtol=1e-3), name
    for name in ["ln1w", "ln1b", "qkvb", "attprojb", "ln2w", "ln2b", "fcb", "fcprojb", "lnfw", "lnfb"]:
        assert (getattr(without, name) == getattr(decayed, name)).all(), name


@pytest.mark.parametrize("program", ["lighthouse", "dense"])
def test_accumulation_is_a_larger_batch(lab, program):
    """Six sequences a step as 1, 2, 3 or 6 micro-steps train alike, to rounding: the same sequences, each counted once."""
    options = dict(program=program, steps=8, total_batch_size=6 * T, learning_rate=1e-2, train_data=lab.data.large)
    curves = []
    for batch in (6, 3, 2, 1):
        log = main_log(lab.train(f"batch_{batch}", **options, batch_size=batch))
        curves.append([[float(loss), float(norm)] for loss, _, norm in log.values()])
    for curve in curves[1:]:
        assert np.allclose(curve, curves[0], rtol=2e-4), np.array(curve) - curves[0]
    assert len({loss for loss, _ in curves[0]}) == 8


def broken_model(lab, value=math.nan):
    data = bytearray(model_bytes(lab.train("start", steps=0)))
    data[-4:] = struct.pack("<f", value)  # the last bias
    data[40:48] = bytes(8)  # no checksum
    path = lab.folder / "broken.bin"
    path.write_bytes(data)
    return dict(model=path, depth=None, channels=None, heads=None)


def test_a_loss_that_is_not_finite_ends_the_run(lab):
    """NaN in the loss: the run stops with the step and the values, no checkpoint is written, the exit code is not zero."""
    start = broken_model(lab)
    result = lab.run("run", steps=4, checkpoint_every=1, **start)
    lab.fails(result, "step 1", "nan", "--learning-rate")
    assert not checkpoints(lab.folder / "run") and not (lab.folder / "run/model.bin").exists()
    for option in ("skip_grad_z", "skip_loss_z"):  # asked to, it passes over such steps
        folder = lab.train(option, steps=4, **{option: 5}, **start)
        assert all(e["skipped"] and e["loss"] is None for e in step_events(folder))
        assert model_bytes(folder)[1024:] == start["model"].read_bytes()[1024:]


# ---- 6. logs

FIELDS = {
    "config": {"program", "version", "time", "options", "model", "attention", "windows", "lighthouse", "recompute_levels", "steps",
               "switch_step", "tokens_per_step", "device", "backend", "measured_flops"},
    "memory": {"total_bytes", "parts"},
    "resume": {"step", "file"},
    "step": {"step", "loss", "lr", "norm", "ms", "tokens_per_second", "mfu", "phase", "tokens", "train_s", "wall_s", "skipped"},
    "eval": {"step", "loss_dense", "loss_first", "tokens", "train_s", "wall_s", "positions_dense", "positions_first"},
    "copying": {"step", "tokens", "sequences", "copies"},
    "switch": {"step", "train_s"},
    "sample": {"step", "text"},
    "checkpoint": {"step", "file", "bytes", "seconds"},
    "total": {"steps", "tokens", "train_s", "wall_s", "phases", "final_val_loss"},
}


def test_logs(lab, table):
    """log.jsonl has every event with its fields and sums that agree; main.log reads as llm.c's."""
    options = dict(steps=10, switch_step=6, batch_size=2, total_batch_size=4 * T, val_data=lab.data.val, val_every=4, checkpoint_every=3,
                   sample_every=5, sample_tokens=8, tokenizer=lab.data.tokenizer)
    folder = lab.train("run", **options)
    log = events(folder)
    assert [e["event"] for e in log[:2]] == ["config", "memory"] and log[-1]["event"] == "total"
    for e in log:
        assert FIELDS[e["event"]] <= set(e), e
    config, memory, total = log[0], log[1], log[-1]
    assert set(config["options"]) == {o["name"] for o in table}
    assert config["program"] == "lighthouse" and config["backend"] == "cpu" and config["tokens_per_step"] == 4 * T
    assert config["lighthouse"] == dict(GEOMETRY, slots=48, leaves=32) and config["attention"] == "DLD" and config["switch_step"] == 6 and config["steps"] == 10
    model = config["model"]
    assert (model["layers"], model["channels"], model["heads"], model["vocab"], model["padded_vocab"]) == (3, 16, 2, 257, 384)
    assert model["positions"] == "rope" and model["rope_theta"] == 500000
    assert model["parameters"] == (len(model_bytes(folder)) - 1024) // 4
    parts, weights = memory["parts"], 4 * model["parameters"]
    assert memory["total_bytes"] == sum(parts.values()) and weights <= parts["parameters"] < 2 * weights  # tensors are aligned
    assert parts.get("gradients") == parts["parameters"] and parts["AdamW moments"] == 2 * parts["parameters"]
    assert parts["rotary table"] == 1025 * 8 * 4 and parts["tokens"] == 2 * 2 * T * 4 + 16  # heads of 8; batches of 2

    steps = events(folder, "step")
    assert [e["step"] for e in steps] == list(range(1, 11)) and [e["tokens"] for e in steps] == [4 * T * i for i in range(1, 11)]
    assert [e["phase"] for e in steps] == ["first"] * 6 + ["dense"] * 4
    assert all(e["mfu"] > 0 and not e["skipped"] for e in steps)
    for e in steps:
        assert math.isclose(e["tokens_per_second"], 4 * T / e["ms"] * 1e3, rel_tol=0.02)
    assert abs(steps[-1]["train_s"] - sum(e["ms"] for e in steps) / 1e3) < 0.01
    assert all(a["wall_s"] <= b["wall_s"] and a["train_s"] <= b["train_s"] <= b["wall_s"] for a, b in zip(steps, steps[1:]))

    assert [(e["step"], e["loss_first"] is None) for e in events(folder, "eval")] == \
        [(0, False), (4, False), (6, False), (8, True), (10, True)]
    assert [e["step"] for e in events(folder, "switch")] == [6] and [e["step"] for e in events(folder, "sample")] == [5, 10]
    assert [e["step"] for e in events(folder, "checkpoint")] == [3, 6, 9, 10]
    for e in events(folder, "checkpoint")[-2:]:
        assert Path(e["file"]).stat().st_size == e["bytes"]

    assert total["steps"] == 10 and total["tokens"] == 40 * T and total["final_val_loss"] == events(folder, "eval")[-1]["loss_dense"]
    for phase, count in [("first", 6), ("dense", 4)]:
        p = total["phases"][phase]
        assert p["steps"] == count and p["tokens"] == count * 4 * T
        assert abs(p["seconds"] - sum(e["ms"] for e in steps if e["phase"] == phase) / 1e3) < 0.01
        assert abs(p["tokens"] / p["tokens_per_second"] - p["seconds"]) < 0.001
    assert abs(total["train_s"] - total["phases"]["first"]["seconds"] - total["phases"]["dense"]["seconds"]) < 0.01

    for e in events(folder, "eval"):  # the mean over the positions, 1 + 1, 2, 4, ... 32 tokens of them, is the loss
        for kind in ("dense", "first") if e["loss_first"] is not None else ("dense",):
            assert math.isclose(np.average(e[f"positions_{kind}"], weights=[2, 2, 4, 8, 16, 32]), e[f"loss_{kind}"], rel_tol=1e-6)
        assert (e["positions_first"] is None) == (e["loss_first"] is None)
    copying = events(folder, "copying")
    assert [e["step"] for e in copying] == [6, 10] and all(c["distance"] == 48 for e in copying for c in e["copies"])

    train, val, copies = {}, {}, {}
    for line in (folder / "main.log").read_text().splitlines():  # as llm.c's own readers split it
        words = [word.split(":") for word in line.split(" ")]
        assert all(len(word) == 2 for word in words) and words[0][0] == "s", line
        kind = words[1][0]
        {"trl": train, "tel": val, "copy48": copies}[kind][int(words[0][1])] = float(words[1][1])
        assert [w[0] for w in words[:4]] in (["s", "trl", "lr", "norm"], ["s", "tel"], ["s", "tel", "ftel"], ["s", "copy48", "rcopy48"])
    assert sorted(train) == list(range(10)) and sorted(val) == [0, 4, 6, 8, 10]
    for e in steps:
        assert abs(train[e["step"] - 1] - e["loss"]) < 1e-6
    for e in events(folder, "eval"):
        assert abs(val[e["step"]] - e["loss_dense"]) < 1e-6
    assert all(abs(copies[e["step"]] - e["copies"][0]["text_loss"]) < 1e-4 for e in copying) and len(copies) == 2


def clock(text):
    """Seconds of h:mm:ss."""
    hours, minutes, seconds = (int(x) for x in text.split(":"))
    return 3600 * hours + 60 * minutes + seconds


def figures_agree(folder, out, processes=1):
    """The figures of a run's steps against each other and against the sizes: times, MFU, what is left, on screen and in logs."""
    config, steps = events(folder, "config")[0], events(folder, "step")
    tokens, model, T_ = config["tokens_per_step"], config["model"], config["options"]["seq-len"]
    C, L, walls = model["channels"], model["layers"], []
    for before, e in zip(steps, steps[1:]):
        letters = config["attention"] if e["phase"] == "first" else "D" * L
        squares = {"D": T_ * T_, "L": (config["lighthouse"] or {"slots": 0})["slots"] ** 2}
        if "C" in letters:  # a token sees its tile's tokens, and of each earlier tile its leaves
            lh = config["lighthouse"]
            tiles = lh["topk"] // lh["tile"]
            squares["C"] = tiles * (T_ // tiles) ** 2 + 2 * sum(T_ // tiles * i * lh["leaves"] // tiles for i in range(tiles))
        if "W" in letters:
            w = [w for w, first in config["windows"] if first < e["step"]][-1]
            squares["W"] = T_ // w * w * w + (T_ % w) ** 2
        flops = 6 * tokens * (model["padded_vocab"] * C + 12 * L * C * C) + 6 * C * tokens / T_ * sum(squares[x] for x in letters)
        assert e["mfu"] == pytest.approx(flops / (e["ms"] / 1e3) / config["measured_flops"] / processes, rel=0.01, abs=1e-4)
        assert e["train_s"] - before["train_s"] == pytest.approx(e["ms"] / 1e3, abs=1e-5) and 0 <= e["host_ahead_ms"] <= e["ms"]
        for x in events(folder, "eval"):  # what comes between two steps is not in their time
            assert x["step"] != before["step"] or e["ms"] / 1e3 < e["wall_s"] - x["wall_s"] + 1e-3
        for x in events(folder, "checkpoint"):
            assert x["step"] != before["step"] or e["ms"] / 1e3 < e["wall_s"] - before["wall_s"] - x["seconds"] + 2e-3
        if not any(x["step"] == before["step"] for x in events(folder, "eval") + events(folder, "sample") + events(folder, "checkpoint")):
            walls.append((e["wall_s"] - before["wall_s"]) / (e["ms"] / 1e3))
    assert np.median(walls) == pytest.approx(1, abs=0.3), "a step's ms are its wall-clock"
    lines = re.findall(r"^step +(\d+)/\d+ \| loss ([\d.]+) \| norm ([\d.]+) \| lr (\S+) \| ([\d.]+) ms \| (\d+) tok/s \| mfu ([\d.]+)% \| (\w+) "
                       r"\| ETA ([\d:]+)", out, re.M)
    logged = re.findall(r"^s:(\d+) trl:([\d.]+) lr:([\d.]+) norm:([\d.]+) ms:([\d.]+) tps:(\d+) ph:(\w+)$", (folder / "main.log").read_text(), re.M)
    assert len(lines) == len(logged) == len(steps)
    for line, log, e in zip(lines, logged, steps):
        assert int(line[0]) == int(log[0]) + 1 == e["step"] and line[7] == log[6] == e["phase"] and line[5] == log[5]
        for shown, figure, digits in [(line[1], "loss", 4), (line[2], "norm", 4), (log[1], "loss", 6), (log[2], "lr", 8), (log[3], "norm", 6),
                                      (line[4], "ms", 1), (log[4], "ms", 2), (line[5], "tokens_per_second", 0)]:
            assert float(shown) == pytest.approx(e[figure], abs=0.51 * 10 ** -digits), (figure, shown, e[figure])
        assert float(line[6]) == pytest.approx(100 * e["mfu"], abs=0.06)
    return lines


def test_figures(lab):
    """Times, MFU and the time that is left follow from the sizes and from each other; a resume goes on counting; of two validation
    losses each has its name on the screen."""
    options = dict(steps=8, switch_step=5, checkpoint_every=4, keep_last=0, val_data=lab.data.val, val_every=4, **SLOW)
    result = lab.run("run", **options)
    folder = lab.folder / "run"
    figures_agree(folder, result.out)
    evaluations = events(folder, "eval")
    assert [e["tokens"] for e in evaluations] == [e["step"] * 12 * T for e in evaluations] and len(evaluations) == 4
    shown = re.findall(r"^step (\d+) \| validation loss ([\d.]+)(?: under dense attention, ([\d.]+) under \w+)?", result.out, re.M)
    assert len(shown) == len(evaluations)
    for (step, dense, first), e in zip(shown, evaluations):
        assert int(step) == e["step"] and float(dense) == pytest.approx(e["loss_dense"], abs=6e-5)
        assert float(first or 0) == pytest.approx(e["loss_first"] or 0, abs=6e-5)
    for line, e in zip(re.findall(r"^s:(\d+) tel:([\d.]+)(?: ftel:([\d.]+))?", (folder / "main.log").read_text(), re.M), evaluations):
        assert float(line[1]) == pytest.approx(e["loss_dense"], abs=1e-6)
        assert float(line[2] or 0) == pytest.approx(e["loss_first"] or 0, abs=1e-6)
    assert any(e["loss_first"] and abs(e["loss_first"] - e["loss_dense"]) > 1e-4 for e in evaluations), "two that differ"

    resumed = lab.folder / "resumed"
    resumed.mkdir()
    shutil.copy(checkpoint(folder, 4), resumed)
    lab.train("resumed", **options, resume=1)
    saved, went_on = step_events(folder)[3], step_events(resumed)[0]
    assert went_on["train_s"] == pytest.approx(saved["train_s"] + went_on["ms"] / 1e3, abs=1e-4)
    assert saved["wall_s"] < went_on["wall_s"] < saved["wall_s"] + 30
    total = events(resumed, "total")[0]
    assert total["phases"]["first"]["steps"] == 5 and total["train_s"] == pytest.approx(step_events(resumed)[-1]["train_s"], abs=1e-4)


@pytest.mark.parametrize("switch", ["0", "0.5"])
def test_time_left(lab, switch):
    """Steps left at the pace so far; a phase not yet seen at the same rate of operations."""
    half = 5 * 10 ** 4  # of the steps: so many that the time is long, and less than a day on a slow machine
    code, out = kill_at(lab.command("run", steps=2 * half, switch_step=switch, **SLOW), 12, signal.SIGTERM, 0)
    folder = lab.folder / "run"
    lines, steps, config = figures_agree(folder, out), events(folder, "step"), events(folder, "config")[0]
    model, slots = config["model"], 48
    C, matrices = model["channels"], model["padded_vocab"] * model["channels"] + 12 * 4 * model["channels"] ** 2
    dense = matrices + C * 4 * T
    lighthouse = matrices + C * (2 * T + 2 * slots * slots / T)  # of four layers the first and the last are dense
    for line, e in list(zip(lines, steps))[2:]:
        pace = e["train_s"] / e["step"]
        left = pace * (2 * half - e["step"]) if switch == "0" else pace * (half - e["step"]) + pace * dense / lighthouse * half
        assert clock(line[8]) == pytest.approx(left, rel=0.01, abs=2)


def test_dense_program_logs(lab):
    """The baseline's log says that it is dense, and has no Lighthouse loss."""
    folder = lab.train("run", program="dense", steps=3, val_data=lab.data.val)
    config = events(folder, "config")[0]
    assert config["program"] == "dense" and config["lighthouse"] is None and config["attention"] == "DDD" and config["switch_step"] == 0
    assert not FIRST_PHASE_OPTIONS & set(config["options"])
    assert all(e["loss_first"] is None for e in events(folder, "eval")) and not events(folder, "switch")
    assert {e["phase"] for e in events(folder, "step")} == {"dense"}
    same = lab.train("same", steps=3, switch_step=0, val_data=lab.data.val)
    assert model_bytes(folder) == model_bytes(same), "the baseline is the same program without Lighthouse"


def test_a_resumed_run_appends_to_its_logs(lab):
    """A resume adds to both logs, keeps the counted seconds, and repairs nothing but a torn last line."""
    options = dict(steps=8, checkpoint_every=4, val_data=lab.data.val)
    folder = lab.train("run", **dict(options, steps=8))
    first, main = (folder / "log.jsonl").read_text(), (folder / "main.log").read_text()
    checkpoint(folder, 8).unlink()
    seconds = [e for e in events(folder, "step") if e["step"] == 4][0]["train_s"]
    lab.train("run", **options, resume=1)
    assert (folder / "log.jsonl").read_text().startswith(first) and (folder / "main.log").read_text().startswith(main)
    kinds = [e["event"] for e in events(folder)]
    assert kinds.count("config") == 2 and kinds.count("total") == 2 and kinds.count("resume") == 1
    again = [e for e in events(folder, "step") if e["step"] == 5]
    assert len(again) == 2 and again[0]["loss"] == again[1]["loss"] and again[1]["train_s"] > seconds
    assert sum(events(folder, "total")[-1]["phases"][p]["steps"] for p in ("first", "dense")) == 8


def test_a_torn_line_spoils_no_other(lab):
    """A log line that a full disk or a crash cut off stays alone: what a resume appends begins on a new line."""
    folder = lab.train("run", steps=4)
    for name in ("log.jsonl", "main.log"):
        with open(folder / name, "a") as f:
            f.write('{"event":"st' if name == "log.jsonl" else "s:3 tr")
    lab.train("run", steps=6, resume=1)
    lines = (folder / "log.jsonl").read_text().splitlines()
    torn = [i for i, line in enumerate(lines) if not line.endswith("}")]
    assert [lines[i] for i in torn] == ['{"event":"st']
    assert "s:3 tr" in (folder / "main.log").read_text().splitlines()


def test_numbers_do_not_depend_on_the_evaluation(lab):
    """Validating, sampling and saving more or less often does not touch the training."""
    plain = lab.train("plain", steps=8, checkpoint_every=0)
    busy = lab.train("busy", steps=8, checkpoint_every=1, val_data=lab.data.val, val_every=1, sample_every=1, sample_tokens=4,
                     tokenizer=lab.data.tokenizer)
    assert main_log(plain) == main_log(busy) and model_bytes(plain) == model_bytes(busy)


def test_validation_loss(lab):
    """The validation loss is that of the first windows of the validation data, whatever the batch size."""
    model = lab.train("start", steps=12, learning_rate=1e-2) / "model.bin"
    start = dict(model=model, depth=None, channels=None, heads=None, steps=0, val_data=lab.data.val, switch_step=0)
    def loss(batch, batches):
        folder = lab.train(f"b{batch}_{batches}", **start, batch_size=batch, val_batches=batches)
        return events(folder, "eval")[-1]["loss_dense"]
    def training_loss(windows):
        tokens = np.frombuffer(lab.data.val.read_bytes(), "<u2", offset=1024)[:windows * T + 1]
        path = write_shard(lab.folder / f"w{windows}.bin", tokens)
        folder = lab.train(f"t{windows}", **dict(start, steps=1, val_data="", train_data=path, batch_size=windows, shuffle=0))
        return events(folder, "step")[0]["loss"]
    assert math.isclose(loss(1, 2), training_loss(2), rel_tol=1e-6)
    assert math.isclose(loss(1, 4), training_loss(4), rel_tol=1e-6)
    assert math.isclose(loss(2, 2), loss(1, 4), rel_tol=1e-6) and math.isclose(loss(3, 2), loss(1, 4), rel_tol=1e-6)
    assert loss(1, 100) == loss(1, 4), "no window counts twice"


# ---- 7. model files

@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_initial_weights(lab, positions):
    """The file is llm.c's, tensor by tensor, and holds GPT-2's initialization: 0.02, residual projections 0.02/sqrt(2L)."""
    folder = lab.train("run", steps=0, positions=positions, depth=4, channels=64, heads=4)
    m = ModelFile(model_bytes(folder))
    assert (m.version, m.max_T, m.V, m.L, m.H, m.C, m.Vp, m.step) == (103 if positions == "rope" else 3, T, 257, 4, 4, 64, 384, 0)
    if positions == "rope":
        assert m.theta == 500000
    matrices = dict(wte=0.02, qkvw=0.02, fcw=0.02, attprojw=0.02 / math.sqrt(8), fcprojw=0.02 / math.sqrt(8))
    if positions == "learned":
        matrices["wpe"] = 0.02
    for name, deviation in matrices.items():
        w = getattr(m, name)
        n = w.size
        assert abs(w.mean()) < 5 * deviation / math.sqrt(n), name
        assert abs(w.std() / deviation - 1) < 5 / math.sqrt(2 * n), name
        assert len(np.unique(w)) > 0.99 * n, name
        assert abs(((w / deviation) ** 4).mean() / 3 - 1) < 0.2, "a normal distribution"
    for name in ["ln1w", "ln2w", "lnfw"]:
        assert (getattr(m, name) == 1).all(), name
    for name in ["ln1b", "qkvb", "attprojb", "ln2b", "fcb", "fcprojb", "lnfb"]:
        assert (getattr(m, name) == 0).all(), name
    assert abs(np.corrcoef(m.qkvw[0].ravel(), m.qkvw[1].ravel())[0, 1]) < 0.05, "no two layers start alike"
    assert model_bytes(lab.train("again", steps=0, positions=positions, depth=4, channels=64, heads=4)) == model_bytes(folder)
    other = lab.train("other", steps=0, positions=positions, depth=4, channels=64, heads=4, seed=7)
    assert model_bytes(other) != model_bytes(folder)


def from_file(path, **options):
    """A run that begins with these weights and, left alone, ends with them."""
    return dict(dict(model=path, depth=None, channels=None, heads=None, steps=1, learning_rate=0), **options)


@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_a_run_starts_from_a_file(lab, positions):
    """A model file, its bf16 form and a checkpoint give back exactly their weights; training moves all but the padding."""
    trained = lab.train("trained", steps=6, positions=positions, learning_rate=1e-2, weight_decay=0)
    whole = model_bytes(trained)
    for source in ["model.bin", "ckpt_00000006.bin"]:
        again = lab.train("from_" + source, **from_file(trained / source))
        assert model_bytes(again)[1024:] == whole[1024:], source
    body = np.frombuffer(whole, "<u4", offset=1024)
    header = bytearray(whole[:1024])
    header[4:8] = struct.pack("<i", 105 if positions == "rope" else 5)
    (lab.folder / "bf16.bin").write_bytes(bytes(header) + (body >> 16).astype("<u2").tobytes())
    widened = lab.train("from_bf16", **from_file(lab.folder / "bf16.bin"))
    assert (np.frombuffer(model_bytes(widened), "<u4", offset=1024) == body >> 16 << 16).all()
    assert ModelFile(model_bytes(widened)).version == (103 if positions == "rope" else 3)
    m, start = ModelFile(whole), ModelFile(model_bytes(lab.train("start", steps=0, positions=positions)))
    assert m.step == 6
    for name in ["qkvw", "qkvb", "attprojw", "attprojb", "fcw", "fcb", "fcprojw", "fcprojb", "ln1w", "ln1b", "ln2w", "ln2b"]:
        for layer in range(3):
            assert (getattr(m, name)[layer] != getattr(start, name)[layer]).any(), (name, layer)
    assert (m.wte[:257] != start.wte[:257]).any() and (m.wte[257:] == start.wte[257:]).all()


def test_options_with_a_model_file(lab):
    """What the file fixes cannot be given; longer than its learned positions is refused, shorter is not, RoPE takes any."""
    learned = lab.train("learned", steps=0, positions="learned") / "model.bin"
    rope = lab.train("rope", steps=0) / "model.bin"
    for name, value in [("depth", 3), ("channels", 16), ("heads", 2), ("vocab_size", 257)]:
        lab.refused("--" + name.replace("_", "-"), "model.bin", **from_file(learned, **{name: value}))
    lab.refused("--positions is rope", "learned positions", **from_file(learned, positions="rope"))
    lab.refused("--positions is learned", "rope positions", **from_file(rope, positions="learned"))
    lab.refused("--seq-len is 128", "up to 64", **from_file(learned, seq_len=2 * T))
    lab.refused("--resume 1 with --steps 0", "--model", **from_file(learned, steps=0, resume=1, val_data=lab.data.val))
    for val_data, kinds in ((lab.data.val, {"eval", "copying", "sample"}), (None, {"sample"})):  # a sample alone needs no data
        folder = lab.train(f"samples_{len(kinds)}", **from_file(rope, steps=0, val_data=val_data, sample_every=1))
        assert {e["event"] for e in events(folder)} - {"config", "memory", "total"} == kinds
    shorter = lab.train("shorter", **from_file(learned, seq_len=T // 2, topk=4, steps=2, learning_rate=1e-3))
    assert ModelFile(model_bytes(shorter)).max_T == T
    longer = lab.train("longer", **from_file(rope, seq_len=2 * T, rope_theta=1e6))
    assert ModelFile(model_bytes(longer)).max_T == 2 * T and ModelFile(model_bytes(longer)).theta == 1e6
    assert model_bytes(longer)[1024:] == rope.read_bytes()[1024:]
    kept = lab.train("kept", **from_file(longer / "model.bin", seq_len=2 * T))
    assert ModelFile(model_bytes(kept)).theta == 1e6, "a base that is not given is the file's"


def test_a_long_table_of_positions_at_a_short_length(lab):
    """A model of 2048 learned positions trained at 16 tokens moves like the same model cut to 16 positions."""
    generator = np.random.RandomState(3)
    long_data = write_shard(lab.folder / "long.bin", generator.randint(0, 256, 2049))
    base = dict(depth=1, channels=128, heads=2, program="dense")
    long = lab.train("long", steps=0, positions="learned", seq_len=2048, train_data=long_data, **base) / "model.bin"
    data = long.read_bytes()
    wte = 384 * 128 * 4
    header = bytearray(data[:1024])
    header[8:12] = struct.pack("<i", 16)
    header[40:48] = bytes(8)  # no checksum
    body = data[1024:1024 + wte + 16 * 512] + data[1024 + wte + 2048 * 512:]
    (lab.folder / "short.bin").write_bytes(bytes(header) + body)
    options = dict(steps=5, seq_len=16, program="dense", learning_rate=1e-2, grad_clip=0, weight_decay=0)
    a = lab.train("a", **from_file(long, **options))
    b = lab.train("b", **from_file(lab.folder / "short.bin", **options))
    losses = [[float(loss) for loss, _, _ in main_log(folder).values()] for folder in (a, b)]
    assert np.allclose(*losses, rtol=1e-5), losses


def test_damaged_model_files_are_refused(lab):
    """Cut, too long, foreign, of an unknown version, or with impossible sizes: named and refused."""
    path = lab.folder / "bad.bin"
    whole = model_bytes(lab.train("start", steps=0))
    def bad(data, *words):
        path.write_bytes(data)
        lab.refused("bad.bin", *words, **from_file(path))
    for size in [0, 1, 1023, 1024, 1025, len(whole) // 2, len(whole) - 4, len(whole) - 1]:
        bad(whole[:size], str(size))
    bad(whole + b"\0", str(len(whole) + 1))
    def header(**words):
        h = list(struct.unpack("<256i", whole[:1024]))
        for name, value in words.items():
            h[["magic", "version", "T", "V", "L", "H", "C", "Vp"].index(name)] = value
        return struct.pack("<256i", *h) + whole[1024:]
    bad(header(magic=7), "no model file", "magic 7")
    bad(header(version=4), "no model file", "version 4")
    bad(header(version=104), "version 104")
    for theta in (math.nan, math.inf, 0, -1, 0.5):
        bad(whole[:32] + struct.pack("<f", theta) + whole[36:], "rotary positions", "a base of 1 to 1e12")
    bad(header(H=16), "heads of 1 channels", "an even head size")
    bad(header(version=3), "bytes")  # the wrong kind of positions: the size is another
    for name, value in [("T", 0), ("V", 0), ("V", 385), ("L", 0), ("L", -1), ("L", 2000), ("H", 0), ("H", 3), ("C", 0), ("C", -16), ("Vp", 0)]:
        bad(header(**{name: value}), "impossible sizes")
    for name, value in [("T", 2 ** 30 + 1), ("V", 2 ** 24 + 1), ("Vp", 2 ** 31 - 1), ("C", 65538)]:
        bad(header(**{name: value}), "impossible sizes")
    bad(header(C=65536, H=1, L=1024, T=2 ** 30, V=2 ** 24, Vp=2 ** 25), "bytes")
    path.write_bytes(whole[:-100] + b"x" + whole[-99:])
    lab.fails(lab.run("flipped", **from_file(path)), "bad.bin is damaged: wrong checksum of the weights")
    path.write_bytes(whole[:40] + bytes(8) + whole[48:-100] + b"x" + whole[-99:])  # llm.c writes no checksum
    lab.train("unsigned", **from_file(path))
    lab.refused("neither a readable file", "nothing.bin", **from_file(lab.folder / "nothing.bin"))
    lab.fails(execute(lab.command("x", **from_file(lab.folder)) + ["--dry-run"]))  # a folder


def test_a_damaged_checkpoint_is_no_start(lab, saved):
    """--model with a checkpoint whose weights were changed or cut off is refused: its checksums are there to be used."""
    data = bytearray(checkpoint(saved, 4).read_bytes())
    offset = struct.unpack("<q", data[2048:2056])[0]
    path = lab.folder / "ckpt.bin"
    path.write_bytes(data[:len(data) - 8])
    lab.fails(lab.run("cut", **from_file(path)), "ckpt.bin")
    data[offset + 1000] ^= 64
    path.write_bytes(data)
    lab.fails(lab.run("flipped", **from_file(path)), "ckpt.bin", "checksum")


def test_parameter_counts(lab):
    """d12 with learned positions is llm.c's 124,475,904 parameters, padding included."""
    path = write_shard(lab.folder / "data.bin", np.arange(1025) % 256)
    command = [lab.programs["dense"]] + arguments(dict(model="d12", positions="learned", seq_len=1024, vocab_size=50257, val_data="",
                                                        train_data=path)) + ["--dry-run"]
    result = execute(command)
    assert result.code == 0 and " 124475904 parameters" in result.out, result.out + result.err
    assert "12 layers, 768 channels, 12 heads of 64, 50257 tokens (padded 50304)" in result.out


# ---- 8. samples and tokenizers

def test_samples(lab):
    """A sample begins with the prompt, also with quotes, line ends and non-ASCII text, and is the same for the same seed."""
    prompt = 'Grüße, "é\\€😀"\n\tdef'
    options = dict(steps=4, sample_every=2, sample_tokens=20, tokenizer=lab.data.tokenizer, prompt=prompt, learning_rate=1e-2)
    texts = [[e["text"] for e in events(lab.train(name, **options), "sample")] for name in ("a", "b")]
    assert texts[0] == texts[1] and len(texts[0]) == 2
    for text in texts[0]:
        assert text.startswith(prompt)
    assert len(set(texts[0])) == 2, "another step, another draw"
    greedy = [[e["text"] for e in events(lab.train(f"k{k}", **dict(options, sample_top_k=1, temperature=k)), "sample")] for k in (1, 2)]
    assert greedy[0] == greedy[1], "the likeliest token alone does not depend on the temperature"
    # the end of text before the prompt takes a place of its own: with it these 64 tokens lie in a sequence of 128
    letters = write_tokenizer(lab.folder / "letters.bin", [b"x"] * 256 + [b"<|endoftext|>"], 256)
    folder = lab.train("long", steps=1, seq_len=2 * T, sample_every=1, prompt="xx", sample_tokens=62, sample_top_k=1,
                       tokenizer=letters)
    assert events(folder, "sample")[-1]["text"] == "x" * 64


def test_samples_of_a_trained_model(lab):
    """A model that has learnt to count goes on counting: the tokens that are fed back and read are the right ones."""
    path = write_shard(lab.folder / "count.bin", np.arange(40 * T + 1) % 26 + 97)
    options = dict(train_data=path, steps=150, depth=2, channels=32, learning_rate=1e-2, warmup_steps=5, attention="L")
    model = lab.train("run", **options, sample_every=150, sample_tokens=12, tokenizer=lab.data.tokenizer, prompt="abcdefghijk",
                      sample_top_k=1)
    assert float(main_log(model)[149][0]) < 0.1
    assert events(model, "sample")[-1]["text"] == "abcdefghijklmnopqrstuvw"


def test_a_sample_does_not_steer_the_terminal(lab):
    """On the screen control bytes are question marks, but for line ends and tabs; log.jsonl has them as they are."""
    steering = write_tokenizer(lab.folder / "steering.bin", [b"\x1b\x7f\t\n."] * 256 + [b"<|endoftext|>"], 256)
    result = lab.run("run", steps=1, sample_every=1, sample_tokens=6, tokenizer=steering)
    assert result.code == 0 and "sample: ??\t\n." in result.out and "\x1b" not in result.out, result.out
    assert events(lab.folder / "run", "sample")[-1]["text"].startswith("\x1b\x7f\t\n.")
    assert "final validation loss none;" in result.out


def test_a_sample_may_hold_the_byte_zero(lab):
    """Byte 0 is a token like any other: it ends no text, neither the sample's nor what follows it."""
    silent = write_tokenizer(lab.folder / "zero.bin", [b"\0x"] * 256 + [b"<|endoftext|>"], 256)
    folder = lab.train("run", steps=8, sample_every=1, sample_tokens=6, tokenizer=silent)
    texts = [e["text"] for e in events(folder, "sample")]
    assert max(map(len, texts)) == 12 and all(text == "\ufffdx" * (len(text) // 2) for text in texts)


def test_a_prompt_that_does_not_fit_is_refused(lab):
    """A prompt as long as the window leaves no room for a new token: an error, not a silent cut."""
    for length in (T, T - 1):  # the end of text comes before it
        lab.refused("--prompt", prompt="x" * length, sample_every=1, tokenizer=lab.data.tokenizer)
    folder = lab.train("fits", prompt="x" * (T - 2), sample_every=1, steps=1, sample_top_k=1, tokenizer=lab.data.tokenizer)
    assert events(folder, "sample")[0]["text"].startswith("x" * (T - 2))


def test_tokenizer_files(lab):
    """The tokenizer is found beside the data; a missing, cut, foreign or too large one is named and refused."""
    folder = lab.train("beside", steps=2, sample_every=2, sample_tokens=4)  # tokenizer.bin lies beside small.bin
    assert len(events(folder, "sample")) == 1
    whole = lab.data.tokenizer.read_bytes()
    path = lab.folder / "t.bin"
    lab.refused("t.bin", "--tokenizer", tokenizer=path, sample_every=1)
    assert execute(lab.command("x", tokenizer=path) + ["--dry-run"]).code == 0  # not needed, not read
    for size in [0, 8, 1023, 1024, 1025, 1300, len(whole) - 1]:
        path.write_bytes(whole[:size])
        lab.refused("t.bin", tokenizer=path, sample_every=1)
    for word, value in [(0, 1), (1, 1), (2, 0), (2, 300), (2, -1), (3, -1), (3, 257)]:
        changed = bytearray(whole)
        changed[4 * word:4 * word + 4] = struct.pack("<i", value)
        path.write_bytes(changed)
        lab.refused("t.bin", tokenizer=path, sample_every=1)


MERGES = ["th", "he", "the", " the", " t", "in", "t'", "h1", "\n\n", "\nt", "'s", "é", "xx", "xxx", "xxxx", " xx"]


def encoded(lab, lines, pieces):
    path = write_tokenizer(lab.folder / "bpe.bin", pieces, len(pieces) - 1)
    escaped = "\n".join(line.replace("\\", "\\\\").replace("\n", "\\n").replace("\t", "\\t") for line in lines)
    done = subprocess.run([lab.programs["units"], "encode", path], input=escaped + "\n", stdout=subprocess.PIPE, check=True,
                          universal_newlines=True, env=ENV, encoding="utf-8")
    return [[int(x) for x in line.split()] for line in done.stdout.splitlines()]


def test_bpe_by_hand(lab):
    """GPT-2's encoding: words first, then the pair of the lowest rank, again and again."""
    pieces = [bytes([i]) for i in range(256)] + [m.encode() for m in MERGES] + [b"<|endoftext|>"]
    rank = {m: 256 + i for i, m in enumerate(MERGES)}
    cases = {
        "the": [rank["the"]],                              # th first, then the
        " the": [rank[" the"]],                            # th is ranked below " t"
        " to": [rank[" t"], ord("o")],
        "she": [ord("s"), rank["he"]],
        "thin": [rank["th"], rank["in"]],
        "it's": [ord("i"), ord("t"), rank["'s"]],          # a contraction is a word: t' never meets
        "a  the": [ord("a"), ord(" "), rank[" the"]],      # the last blank belongs to the word
        "th1": [rank["th"], ord("1")],                     # letters and digits are apart
        "\n\nthe": [10, 10, rank["the"]],                  # the last line end is a word of its own
        "a\n\n": [ord("a"), rank["\n\n"]],
        "é": [rank["é"]],
        "xxxxx": [rank["xx"], rank["xxx"]],                # xx xx x: xxx is ranked below xxxx
        " xxx": [ord(" "), rank["xxx"]],                   # xx is ranked below " xx"
        "<|endoftext|>": list(b"<|endoftext|>"),           # text is never taken for the special token
    }
    assert encoded(lab, cases, pieces) == list(cases.values())


def test_bpe_against_the_pattern(lab):
    """Random ASCII text is cut into words as GPT-2's regular expression does it, and merged as its loop does."""
    pattern = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+", re.A)
    pieces = [bytes([i]) for i in range(256)] + [m.encode() for m in MERGES] + [b"<|endoftext|>"]
    ranks = {p: i for i, p in enumerate(pieces[:-1])}

    def reference(text):
        ids = []
        for word in pattern.findall(text):
            parts = [bytes([b]) for b in word.encode()]
            while len(parts) > 1:
                pairs = [(ranks.get(a + b, 1 << 30), i) for i, (a, b) in enumerate(zip(parts, parts[1:]))]
                best, i = min(pairs)
                if best == 1 << 30:
                    break
                parts[i:i + 2] = [parts[i] + parts[i + 1]]
            ids += [ranks[p] for p in parts]
        return ids

    rng = random.Random(4)
    lines = ["".join(rng.choice("thex 1'sn\n\t!  reinvdml") for _ in range(rng.randrange(1, 40))) for _ in range(400)]
    assert encoded(lab, lines, pieces) == [reference(line) for line in lines]


def test_json_strings(lab):
    """Any bytes become a valid JSON string; what is no UTF-8 becomes U+FFFD, byte by byte."""
    rng = random.Random(5)
    samples = ["", "plain", "é€😀\"\\\n\x7f"] + ["".join(rng.choice("aé€😀\x80\U0010ffff\"") for _ in range(50)) for _ in range(5)]
    samples = [s.encode() for s in samples] + [bytes(rng.randrange(1, 256) for _ in range(300)) for _ in range(10)]
    samples += [s[:n] for s in ["é€😀".encode()] for n in range(1, 9)]
    for sample in samples:
        done = subprocess.run([lab.programs["units"], "json"], input=sample, stdout=subprocess.PIPE, check=True, env=ENV)
        expected, rest = "", sample
        while rest:
            try:
                expected += rest.decode()
                break
            except UnicodeDecodeError as e:
                expected += rest[:e.start].decode() + "\ufffd" * (e.end - e.start)
                rest = rest[e.end:]
        assert json.loads(done.stdout.decode()) == expected, sample
