"""Proves that several processes train what one does: on 1 to 4 and 8 ranks, data-parallel, context-parallel and both, the
losses of 20 steps are those of one rank to 1e-5; checkpoints go from any number of ranks to any other; a rank that dies
or hangs ends the job with its name and costs nothing; ranks that do not belong together say so.

    python -m pytest dev/test_mpi.py        (make test-mpi builds the programs first)

CPU backend, real mpirun, one thread a rank, more ranks than cores.
"""
import math
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from test_trainer import (CALLS, ENV, ROOT, Lab, calls_in_order, figures_agree, checkpoint, checkpoint_body, checkpoints, events, execute,
                          little_memory, model_bytes, preload, programs, step_events, write_shard, write_tokenizer)

T, STEPS, SWITCH = 128, 20, 11
BATCH = 12  # sequences of a step, which 1, 2, 3 and 4 data-parallel ranks can share
# Three layers: dense, Lighthouse, dense. Neither the parameters of a layer (12,704) nor all (50,464) divide by 3.
MODEL = dict(model="d6", depth=3, channels=32, heads=4, seq_len=T, levels=3, pool=2, topk=16, tile=8)
DENSE = dict(levels=None, pool=None, topk=None, tile=None)  # options that the dense program lacks
pytestmark = pytest.mark.skipif(not shutil.which("mpirun") or "-DUSE_MPI" not in (ROOT / "build/config.mk").read_text(),
                                reason="there is no MPI: apt-get install libopenmpi-dev openmpi-bin, then make")


def mpirun(ranks):
    return ["mpirun", "--oversubscribe", "-n", ranks]


class Data:
    def __init__(self, folder):
        generator = np.random.RandomState(3)

        def text(windows):  # something to learn: counting in steps that change
            steps = np.repeat(generator.choice([1, 3, 7], windows * T // 32), 32)
            return np.concatenate([[0], np.cumsum(steps) % 250])

        self.small = write_shard(folder / "train.bin", text(100))  # 20 steps take more than two epochs
        self.val = write_shard(folder / "val.bin", text(7))        # on 4 ranks the last batch leaves one without work
        write_tokenizer(folder / "tokenizer.bin", [bytes([i]) for i in range(256)] + [b"<|endoftext|>"], 256)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return Data(tmp_path_factory.mktemp("mpi_data"))


@pytest.fixture
def lab(programs, data, tmp_path):
    return Ranks(programs, data, tmp_path)


class Ranks(Lab):
    """Starts runs on several ranks in a test's own folder."""

    def command(self, out, ranks=1, **options):
        every = dict(MODEL, val_data=self.data.val, val_every=10, val_batches=1000, sample_every=10, sample_tokens=8,
                     steps=STEPS, switch_step=SWITCH, total_batch_size=BATCH * T, learning_rate=3e-3,
                     checkpoint_every=0)
        if options.get("program") == "dense":
            every.update(DENSE, switch_step=None)
        every.update(options)
        return (mpirun(ranks) if ranks > 1 else []) + super().command(out, **every)

    def continued(self, name, source, step, **options):
        """A run that resumes from one checkpoint of another."""
        folder = self.folder / name
        folder.mkdir()
        shutil.copy(checkpoint(source, step), folder)
        self.train(name, **options, resume=1)
        assert [e["step"] for e in events(folder, "resume")] == [step]
        return folder

    def ends(self, command, seconds, *words):
        """A job that must fail within so many seconds with a message that holds these words."""
        began = time.monotonic()
        result = execute(command)
        assert result.code != 0 and time.monotonic() - began < seconds, (result.code, time.monotonic() - began)
        for word in words:
            assert str(word) in result.err, f"{word!r} is not in {result.err!r}"


@pytest.fixture(scope="module")
def reference(programs, data, tmp_path_factory):
    """reference(**options): the folder of the run on one rank, made once for the module."""
    lab, made = Ranks(programs, data, tmp_path_factory.mktemp("one_rank")), {}

    def of(**options):
        key = str(sorted(options.items()))
        if key not in made:
            made[key] = lab.train(f"one_{len(made)}", batch_size=2, checkpoint_every=5, keep_last=0, **options)
        return made[key]
    return of


def same_losses(run, reference, since=0):
    """Step by step from step `since` on: the losses, gradient norms, validation losses and samples of two runs."""
    a, b = ({e["step"]: e for e in step_events(folder) if e["step"] > since} for folder in (run, reference))
    assert sorted(a) == sorted(b) == list(range(since + 1, STEPS + 1))
    for step in a:
        assert math.isclose(a[step]["loss"], b[step]["loss"], rel_tol=1e-5), (step, a[step]["loss"], b[step]["loss"])
        assert math.isclose(a[step]["norm"], b[step]["norm"], rel_tol=1e-3), (step, a[step]["norm"], b[step]["norm"])
        assert a[step]["phase"] == b[step]["phase"]
    assert len({e["loss"] for e in b.values()}) > (STEPS - since) / 2, "the losses must differ to prove anything"
    a, b = ({e["step"]: e for e in events(folder, "eval") if e["step"] > since} for folder in (run, reference))
    assert sorted(a) == sorted(b)
    for step in a:
        for loss in ("loss_dense", "loss_first", "positions_dense", "positions_first"):
            x, y = a[step][loss], b[step][loss]
            assert (x is None and y is None) or np.allclose(x, y, rtol=3e-5, atol=0), (step, loss, x, y)
    a, b = ({e["step"]: [list(c.values()) for c in e["copies"]] for e in events(folder, "copying") if e["step"] > since}
            for folder in (run, reference))
    assert sorted(a) == sorted(b) and a
    for step in a:
        assert np.allclose(a[step], b[step], rtol=1e-4, atol=1.1e-4), (step, a[step], b[step])
    a, b = ({e["step"]: e["text"] for e in events(f, "sample") if e["step"] > since} for f in (run, reference))
    assert a == b and a


# ---- 1. the same losses on any number of ranks

# Each with another micro-batch, so another number of micro-steps; all recompute levels under --cp. Of two tiles (tile
# 8) two ranks hold one each, and Lighthouse layers exchange slots; between four ranks they exchange tokens.
FOUR_TILES = dict(tile=4)
CASES = {
    "dp 2": dict(ranks=2, batch_size=2),
    "dp 3": dict(ranks=3, batch_size=1),
    "dp 4": dict(ranks=4, batch_size=3, recompute=4),
    "cp 2": dict(ranks=2, cp=2, batch_size=1, recompute=0),
    "cp 4": dict(ranks=4, cp=4, batch_size=2, recompute=1),
    "dp 2, cp 2": dict(ranks=4, cp=2, batch_size=3, recompute=2),
    "cp 4, slots": dict(ranks=4, cp=4, batch_size=2, recompute=2, **FOUR_TILES),
    "cp 4, slots, learned": dict(ranks=4, cp=4, batch_size=1, recompute=3, positions="learned", **FOUR_TILES),
    "dp 2, cp 2, two tiles a rank": dict(ranks=4, cp=2, batch_size=2, recompute=4, **FOUR_TILES),
    "cp 2, more slots than tokens": dict(ranks=2, cp=2, batch_size=2, recompute=2, topk=32),
    "dp 3, learned": dict(ranks=3, batch_size=2, positions="learned"),
    "cp 2, learned": dict(ranks=2, cp=2, batch_size=2, recompute=3, positions="learned"),
    "cp 4, learned": dict(ranks=4, cp=4, batch_size=1, recompute=4, positions="learned"),
    "dp 2, cp 2, learned": dict(ranks=4, cp=2, batch_size=1, recompute=0, positions="learned"),
    "dp 4, cp 2": dict(ranks=8, cp=2, batch_size=1, recompute=2),
    "dp 2, gradients of 10, 10 and 3 layers at once": dict(ranks=2, batch_size=6, depth=23, learning_rate=3e-4),
    "dp 2, windows": dict(ranks=2, batch_size=3, attention="W", window=48, recompute=3),
    "cp 2, windows": dict(ranks=2, cp=2, batch_size=3, attention="WWD", window=32),
    "cp 2, windows, learned": dict(ranks=2, cp=2, batch_size=2, attention="WWL", window=64, positions="learned", recompute=4),
    "cp 4, windows": dict(ranks=4, cp=4, batch_size=2, attention="DWL", window=16, recompute=2),
    "dp 2, causal": dict(ranks=2, batch_size=3, attention="WCC", window=32, recompute=4, **FOUR_TILES),
    "cp 2, causal": dict(ranks=2, cp=2, batch_size=2, attention="CLW", window=32, recompute=2, **FOUR_TILES),
    "cp 4, causal, learned": dict(ranks=4, cp=4, batch_size=2, attention="CDC", recompute=4, positions="learned"),
    "cp 4, windows over ranks": dict(ranks=4, cp=4, batch_size=2, attention="W", window="48,64:7", recompute=1),
    "cp 4, growing windows": dict(ranks=4, cp=4, batch_size=1, attention="WDW", window="16,48:4,128:8", recompute=3),
    "dp 2, cp 2, windows, learned": dict(ranks=4, cp=2, batch_size=1, attention="WDW", window=96, positions="learned"),
    "dp 2, dense": dict(ranks=2, batch_size=1, program="dense"),
    "cp 2, dense": dict(ranks=2, cp=2, batch_size=2, recompute=4, program="dense"),
}


@pytest.mark.parametrize("case", CASES)
def test_losses_are_those_of_one_rank(lab, reference, case):
    options = CASES[case]
    same = ("positions", "program", "depth", "topk", "tile", "learning_rate", "attention", "window")
    one = reference(**{name: options[name] for name in same if name in options})
    result = lab.run("run", **options)
    assert result.code == 0, result.err
    run = lab.folder / "run"
    same_losses(run, one)
    assert result.out.count(f"step {STEPS}/{STEPS} ") == 1, "only rank 0 prints"
    assert "\033" not in result.out, "mpirun gives its first process a terminal; its output in a file has plain lines"
    figures_agree(run, result.out, options["ranks"])
    config, = events(run, "config")
    assert config["processes"] == options["ranks"] and config["tokens_per_step"] == BATCH * T


@pytest.mark.parametrize("ranks,options,exchanged,uneven", [
    (2, {}, "slots", False), (4, {}, "tokens", True), (4, FOUR_TILES, "slots", False),
    (2, dict(topk=32), "tokens", False)])  # 32 entries expanded per level: 160 slots of 128 tokens
def test_what_a_lighthouse_layer_exchanges(lab, ranks, options, exchanged, uneven):
    """And why it is not slots, where tiles cannot be shared."""
    result = execute(lab.command("run", plan_ranks=ranks, cp=ranks, **options) + ["--dry-run"])
    assert f"exchanges {exchanged} between the {ranks} that share a sequence" in result.out, result.out
    assert ("cannot share the tiles" in result.out) == uneven


@pytest.mark.parametrize("options", [
    FOUR_TILES, dict(FOUR_TILES, fp8=1), dict(fp8=1), dict(attention="WWL", window="32,48:1"), dict(attention="W", window=32, fp8=1),
    dict(attention="CWL", window=32), dict(attention="CC", fp8=1)],
    ids=["slots", "slots, FP8", "tokens, FP8", "windows", "windows, FP8", "causal", "causal, FP8"])
def test_recompute_levels_repeat_their_bits(lab, options):
    """What is exchanged again in the backward pass is what was exchanged before."""
    options = dict(ranks=4, cp=4, steps=3, switch_step=2, batch_size=2, **options)
    models = [model_bytes(lab.train(f"level_{level}", recompute=level, **options)) for level in range(5)]
    assert all(model == models[0] for model in models)


def test_one_rank_under_mpirun_is_the_run_without(lab, reference):
    result = execute(mpirun(1) + lab.command("run", batch_size=2))
    assert result.code == 0, result.err
    assert model_bytes(lab.folder / "run") == model_bytes(reference())


def test_validation_of_few_batches(lab):
    """--val-batches counts the same sequences on any number of ranks, also where some have none."""
    losses = []
    for ranks, cp in [(1, 1), (2, 1), (4, 2), (4, 1)]:
        run = lab.train(f"ranks_{ranks}_{cp}", ranks=ranks, cp=cp, val_batches=3, steps=1, switch_step=1)
        losses.append([e[kind] for e in events(run, "eval") for kind in ("loss_dense", "loss_first")])
    assert len(losses[0]) == 4 and len(set(losses[0])) == 4
    assert all(np.allclose(x, losses[0], rtol=1e-5, atol=0) for x in losses[1:])


def test_ranks_repeat_their_bits(lab):
    """The same ranks give the same bits, also after a resume."""
    options = dict(ranks=4, cp=2, steps=8, switch_step=4, checkpoint_every=3, keep_last=0)
    first, second = (lab.train(name, **options) for name in ("first", "second"))
    resumed = lab.continued("resumed", first, 3, **options)
    assert model_bytes(first) == model_bytes(second) == model_bytes(resumed)
    assert checkpoint_body(checkpoint(first, 8)) == checkpoint_body(checkpoint(resumed, 8))


@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_ranks_take_the_same_recompute_levels(lab, positions):
    """Left to the program, the levels are what fits on every rank: with different ones their exchanges would not match.
    The model is the same as at one level in all layers. Where nothing fits on one rank, that one says so."""
    options = dict(ranks=2, cp=2, depth=4, steps=3, switch_step=2, positions=positions)
    runs = [lab.train(f"level_{level}", recompute=level, **options) for level in (2, 3)]
    free = sum(events(run, "memory")[0]["total_bytes"] for run in runs)  # between the two, as two ranks share it

    def run(free):  # on rank 1
        command = lab.command("run", **options)
        command[1:1] = [word for variable in little_memory(lab.folder, free) for word in ("-x", variable)]
        return execute(command)
    result = run(free / 8)
    assert result.code != 0 and result.err.count("this run takes") == result.err.count("rank 1: this run takes") == 1, result.err
    result = run(free)
    assert result.code == 0, result.err
    assert set(events(lab.folder / "run", "config")[0]["recompute_levels"]) == {2, 3}
    assert model_bytes(runs[0]) == model_bytes(runs[1]) == model_bytes(lab.folder / "run")


def test_a_bad_id_is_named_by_the_rank_that_reads_it(lab):
    """Each rank checks what it reads; whoever meets an id beyond the vocabulary names it, and the job ends."""
    tokens = np.arange(40 * T + 1) % 250
    tokens[3 * T + 5] = 300  # in the fourth sequence
    shard = write_shard(lab.folder / "bad.bin", tokens)
    for ranks, name in ((1, "error: "), (2, "rank 1: "), (4, "rank 3: ")):
        lab.ends(lab.command("run", ranks=ranks, train_data=shard, vocab_size=257, shuffle=0, steps=8, switch_step=1, batch_size=1, sample_every=0,
                             total_batch_size=4 * T, val_data=""), 30,
                 f"{name}{shard}: token {3 * T + 5} is id 300, but the vocabulary has 257 ids (0 to 256)")


@pytest.mark.parametrize("ranks", [3, 4])
def test_sums_are_in_the_order_of_the_ranks(lab, ranks):
    """Of numbers whose sum depends on the order, on the host and of pieces of tensors: the same everywhere."""
    result = execute([*mpirun(ranks), lab.programs["units"], "ranks"])
    assert result.code == 0 and result.out.count("\n8 passed, 0 failed") + result.out.startswith("8 passed") == ranks, result.out


def test_sums_of_more_numbers_than_are_exchanged_at_once(lab):
    """A layer of 640 channels has 4.9 million parameters; 4 million at once are exchanged and summed."""
    options = dict(program="dense", depth=1, channels=640, heads=10, steps=3, total_batch_size=2 * T, val_data="",
                   sample_every=0, learning_rate=1e-3)
    losses = [[(e["loss"], e["norm"]) for e in step_events(lab.train(f"of_{ranks}", ranks=ranks, **options))]
              for ranks in (1, 2)]
    assert np.allclose(*losses, rtol=1e-4), losses


# ---- 2. files

def test_checkpoints_go_from_any_number_of_ranks_to_any_other(lab, reference):
    """1 -> 4 -> 2 -> 3 -> 1 ranks, over the switch, in another mix of data and context parallel each time."""
    folder = reference()
    for step, name, options in [(5, "four", dict(ranks=4, cp=2)), (10, "two", dict(ranks=2, cp=2, batch_size=2)),
                                (15, "three", dict(ranks=3, batch_size=2)), (15, "one", dict(ranks=1, batch_size=3))]:
        folder = lab.continued(name, folder, step, checkpoint_every=5, keep_last=0, **options)
        same_losses(folder, reference(), since=step)
        if step == 10:  # its checkpoint of step 15, and its model, are as large as one rank's and hold its values
            for file in ("ckpt_00000015.bin", "model.bin"):
                a, b = ((f / file).read_bytes() for f in (folder, reference()))
                assert len(a) == len(b)
            a, b = (np.frombuffer(checkpoint_body(checkpoint(f, 15)), "<f4") for f in (folder, reference()))
            assert np.linalg.norm(a - b) < 1e-3 * np.linalg.norm(b)
        if name == "three":  # the chain goes on with what these ranks wrote
            assert checkpoints(folder) == [15, 20]


@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_the_final_model_is_the_same_file_whatever_the_ranks(lab, reference, positions):
    """From the same weights, new or loaded, each number of ranks writes the same bytes."""
    one = reference(**({} if positions == "rope" else {"positions": positions}))
    new, loaded = [], []
    for ranks, cp in [(1, 1), (3, 1), (4, 2)]:
        options = dict(positions=positions, ranks=ranks, cp=cp)
        new.append(model_bytes(lab.train(f"new_{ranks}", **options, steps=0, switch_step=0)))
        loaded.append(model_bytes(lab.continued(f"loaded_{ranks}", one, STEPS, **options)))
        weights = lab.train(f"weights_{ranks}", **options, model=checkpoint(one, STEPS), depth=None, channels=None, heads=None,
                            steps=1, learning_rate=0, switch_step=0)
        assert model_bytes(weights)[1024:] == loaded[-1][1024:], "where a checkpoint's weights end, its last chunk goes on"
    assert new[0] == new[1] == new[2] and new[0] != model_bytes(one)
    assert loaded[0] == loaded[1] == loaded[2] == model_bytes(one)


def test_a_damaged_checkpoint_is_passed_over_by_all_ranks(lab, reference):
    """One flipped byte, in what one of three ranks reads: all go on from the checkpoint before."""
    folder = lab.folder / "run"
    folder.mkdir()
    for step in (5, 10):
        shutil.copy(checkpoint(reference(), step), folder)
    damaged = bytearray(checkpoint(folder, 10).read_bytes())
    damaged[len(damaged) * 4 // 9] ^= 1
    checkpoint(folder, 10).write_bytes(damaged)
    result = lab.run("run", ranks=3, batch_size=2, resume=1)
    assert result.code == 0 and "ckpt_00000010.bin" in result.out + result.err, result.err
    assert [e["step"] for e in events(folder, "resume")] == [5]
    same_losses(folder, reference(), since=5)


def test_the_order_of_calls_of_several_ranks(lab, monkeypatch):
    """As of one rank; and nobody opens a file before it has its size, or reads it back before all have synced it."""
    preload(lab, CALLS, monkeypatch)
    monkeypatch.setitem(ENV, "CALLS", str(lab.folder / "calls"))
    lab.train("run", ranks=3, batch_size=1, steps=2, switch_step=1, checkpoint_every=1, keep_last=1)
    calls = [line.split() for line in (lab.folder / "calls").read_text().splitlines()]
    calls = [(int(rank), call, file) for rank, call, file in calls]
    for step in (1, 2):
        calls_in_order(lab, calls, checkpoint(Path(), step).name, 3, [checkpoint(Path(), 1).name] if step > 1 else [])
    calls_in_order(lab, calls, "model.bin", 3, [])


# What a rank has in its own cache is what it wrote: only another one sees what lies on the disk.
LYING_DISK = r'''
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
static int lies(int fd) {  // of rank 1, in that file
    char link[64], path[4096] = "";
    const char* rank = getenv("OMPI_COMM_WORLD_RANK");
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    int n = readlink(link, path, sizeof path - 1);
    return n >= 0 && strstr(path, getenv("LYING_FILE")) && rank && !strcmp(rank, "1");
}
static off_t lie = -1;  // one byte of the first write
ssize_t pwrite(int fd, const void* data, size_t bytes, off_t at) {
    ssize_t (*real)(int, const void*, size_t, off_t) = dlsym(RTLD_NEXT, "pwrite");
    if (!lies(fd) || lie >= 0) return real(fd, data, bytes, at);
    char* changed = malloc(bytes);
    memcpy(changed, data, bytes);
    changed[bytes / 2] ^= 1;
    lie = at + bytes / 2;
    ssize_t done = real(fd, changed, bytes, at);
    free(changed);
    return done;
}
ssize_t pread(int fd, void* data, size_t bytes, off_t at) {
    ssize_t n = ((ssize_t (*)(int, void*, size_t, off_t))dlsym(RTLD_NEXT, "pread"))(fd, data, bytes, at);
    if (lies(fd) && at <= lie && lie < at + n) ((char*)data)[lie - at] ^= 1;
    return n;
}
'''


@pytest.mark.parametrize("file", ["ckpt_00000002", "model"])
def test_what_reads_back_otherwise_gets_no_name(lab, monkeypatch, file):
    """A disk, or a shared file system, that keeps something else than was written: the run ends, the earlier file stays."""
    preload(lab, LYING_DISK, monkeypatch)
    monkeypatch.setitem(ENV, "LYING_FILE", file)
    lab.ends(lab.command("run", ranks=2, batch_size=2, steps=2, switch_step=1, checkpoint_every=1, keep_last=1), 30,
             f"{file}.bin.partial is damaged: wrong checksum", "though it was just written", "Earlier checkpoints are untouched")
    assert checkpoints(lab.folder / "run") == ([1] if file != "model" else [2]) and not (lab.folder / "run/model.bin").exists()


# ---- 3. ranks that die, hang or are stopped

class Job:
    """A running job: its output, and its ranks' process ids."""

    def __init__(self, command):
        self.process = subprocess.Popen([str(c) for c in command], env=ENV, stdout=subprocess.PIPE,
                                        stderr=subprocess.STDOUT, universal_newlines=True, errors="replace")
        self.output = ""

    def wait_for(self, what):
        """Until a line begins with this, or is of this step or a later one."""
        for line in self.process.stdout:
            self.output += line
            done = re.search(r"step +(\d+)/", line)
            if line.startswith(what) if isinstance(what, str) else done and int(done.group(1)) >= what:
                return
        raise AssertionError(f"the job ended before {what}: {self.output}")

    def pid_of(self, rank):
        started = f"/proc/{self.process.pid}/task/{self.process.pid}/children"
        for pid in Path(started).read_text().split():
            if f"OMPI_COMM_WORLD_RANK={rank}\0" in Path(f"/proc/{pid}/environ").read_text():
                return int(pid)
        raise AssertionError(f"mpirun has no rank {rank}")

    def end(self, seconds):
        """Its status and output, once all of it has ended, which must be within so many seconds."""
        began = time.monotonic()
        self.output += self.process.communicate(timeout=seconds + 30)[0]
        assert time.monotonic() - began < seconds, self.output
        return self.process.returncode, self.output


OTHER_LOGITS = r'''
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>
double exp(double x) {  // on rank 1 all chances are 0, so it draws the last id, the end of text; what is trained takes expf
    double (*real)(double) = dlsym(RTLD_NEXT, "exp");
    const char* rank = getenv("OMPI_COMM_WORLD_RANK");
    return rank && !strcmp(rank, "1") ? 0 : real(x);
}
'''


def test_one_rank_draws_the_samples(lab, monkeypatch):
    """Groups whose logits differ would draw other tokens and leave the loop at other times: rank 0's tokens are everybody's."""
    preload(lab, OTHER_LOGITS, monkeypatch)
    options = dict(batch_size=2, steps=2, switch_step=1, sample_every=1, sample_tokens=64, sample_top_k=0)
    folder = lab.train("run", ranks=2, **options, hang_timeout=20)
    plain = lab.train("plain", ranks=1, **options)
    assert [e["text"] for e in events(folder, "sample")] == [e["text"] for e in events(plain, "sample")]


def signal_rank(job, rank, number):
    """Sends a rank a signal; returns its process id."""
    pid = job.pid_of(rank)
    os.kill(pid, number)
    return pid


def test_a_killed_rank_ends_the_job_and_the_run_goes_on(lab, reference):
    """SIGKILL of one rank at a random moment, in either phase, while every step writes a checkpoint."""
    chance = random.Random(7)
    options = dict(ranks=4, cp=2, checkpoint_every=1, resume=1)
    for step in (chance.randrange(1, SWITCH - 3), SWITCH - 1, chance.randrange(SWITCH + 1, STEPS - 6)):
        job, rank = Job(lab.command("run", **options)), chance.randrange(4)
        job.wait_for(step)
        time.sleep(chance.uniform(0, 0.02))  # a step with its checkpoint takes about as long, and six more must follow
        signal_rank(job, rank, signal.SIGKILL)
        code, output = job.end(10)
        assert code != 0 and re.search(rf"rank {rank}\b", output), output
        assert checkpoints(lab.folder / "run")[-1] >= step - 1  # that of the step itself may not have been begun
    same_losses(lab.train("run", **options), reference())


@pytest.mark.parametrize("rank", [0, 2])
def test_a_hanging_rank_is_named(lab, rank):
    """SIGSTOP of one rank: the others wait for --hang-timeout and no longer, and say for whom."""
    job = Job(lab.command("run", ranks=3, batch_size=2, steps=2000, hang_timeout=5))
    job.wait_for(3)
    signal_rank(job, rank, signal.SIGSTOP)
    code, output = job.end(30)
    named = set(re.findall(r"no sign of (.*?) for the 5 s", output))
    assert code != 0 and len(named) == 1 and re.fullmatch(rf"rank {rank} \(pid \d+ on [^,]+\)", *named), output


def test_waiting_within_the_limit_is_no_hang(lab, reference):
    """A rank that stands still for less than --hang-timeout costs its time and nothing else."""
    job = Job(lab.command("run", ranks=2, cp=2, hang_timeout=30))
    job.wait_for(3)
    signal_rank(job, 1, signal.SIGSTOP)
    time.sleep(2)
    signal_rank(job, 1, signal.SIGCONT)
    code, output = job.end(60)
    assert code == 0, output
    same_losses(lab.folder / "run", reference())


def test_a_suspended_job_is_no_hang(lab, reference):
    """All ranks stopped, for longer than --hang-timeout, and woken: as a scheduler does it. None hung."""
    job = Job(lab.command("run", ranks=2, batch_size=2, hang_timeout=2, steps=2000))
    job.wait_for(3)
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for rank in (0, 1):
            signal_rank(job, rank, number)
        time.sleep(5)
    signal_rank(job, 0, signal.SIGUSR1)
    code, output = job.end(20)
    assert code != 0 and "stopped by signal at step" in output, output


SLOW_DISK = r'''
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
static void wait_on(const char* call) {  // rank 1's disk takes its time, once for each kind of call
    static char done[16];
    const char *slow = getenv("SLOW_CALL"), *rank = getenv("OMPI_COMM_WORLD_RANK");
    if (!slow || !rank || strcmp(slow, call) || strcmp(rank, "1") || !strcmp(done, call)) return;
    strcpy(done, call);
    sleep(8);
}
int fsync(int fd) {
    wait_on("fsync");
    return ((int (*)(int))dlsym(RTLD_NEXT, "fsync"))(fd);
}
ssize_t pread(int fd, void* buffer, size_t bytes, off_t at) {
    wait_on("pread");
    return ((ssize_t (*)(int, void*, size_t, off_t))dlsym(RTLD_NEXT, "pread"))(fd, buffer, bytes, at);
}
'''


def test_a_rank_that_does_not_start_is_no_endless_wait(lab):
    """MPI's own start waits inside the library: --hang-timeout holds there too, however it is written."""
    for option in ("--hang-timeout=3", "--hang-timeout 3"):
        job = together(lab, lab.command("run") + option.split(), ["sleep", 60])
        lab.ends(job, 20, "did not come to the start of MPI", "--hang-timeout")


@pytest.mark.parametrize("call", ["pread", "fsync"])
def test_a_slow_disk_is_no_hang(lab, reference, call):
    """One rank's disk takes four times --hang-timeout, at the start or amid a checkpoint: the others are told, and wait."""
    (lab.folder / "slow.c").write_text(SLOW_DISK)
    subprocess.run(["gcc", "-shared", "-fPIC", "slow.c", "-o", "slow.so", "-ldl"], cwd=lab.folder, check=True)
    command = lab.command("run", ranks=3, batch_size=2, hang_timeout=2)
    command[1:1] = ["-x", f"LD_PRELOAD={lab.folder / 'slow.so'}", "-x", f"SLOW_CALL={call}"]
    result = execute(command)
    assert result.code == 0, result.err
    assert re.search(r"note: rank [02]: rank 1 \(pid \d+ on .*\) has been waiting for its disk", result.err), result.err
    same_losses(lab.folder / "run", reference())


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_mpirun_leaves_a_checkpoint(lab, reference, how):
    """As a preempted job gets it: the ranks finish the step, write, leave; another number of ranks goes on."""
    job = Job(lab.command("run", ranks=4, cp=2))
    job.wait_for(5)
    job.process.send_signal(how)
    code, output = job.end(20)
    step, = checkpoints(lab.folder / "run")
    assert code != 0 and step >= 5, output
    lab.train("run", ranks=2, cp=2, batch_size=2, resume=1)
    same_losses(lab.folder / "run", reference())


def test_a_signal_to_one_rank_breaks_off_a_validation(lab):
    """All ranks leave a long validation at the same batch, with a checkpoint."""
    long = write_shard(lab.folder / "long.bin", np.arange(50000 * T + 1) % 250)
    job = Job(lab.command("run", ranks=3, batch_size=1, val_data=long, val_batches=50000, val_every=3, resume=1))
    job.wait_for("speed ")
    time.sleep(0.5)
    signal_rank(job, 1, signal.SIGUSR1)
    code, output = job.end(20)
    assert code != 0 and "stopped by signal at step 0;" in output, output
    assert checkpoints(lab.folder / "run") == [0] and not events(lab.folder / "run", "eval")


def test_a_stop_inside_a_step(lab):
    """A signal to one rank amid the micro-steps of a step: all leave it at the same one, save the step before, and a resume
    ends in the bits of a run that was left alone."""
    options = dict(ranks=2, cp=2, batch_size=2, total_batch_size=100 * T, steps=4, switch_step=2, val_data="", sample_every=0)
    whole = lab.train("whole", **options)
    step_s = min(e["ms"] for e in step_events(whole)) / 1e3
    for rank, begun in ((1, "speed "), (0, 1)):
        job = Job(lab.command("run", **options, resume=1))
        job.wait_for(begun)
        time.sleep(0.3 * step_s)
        done = max([0] + [e["step"] for e in step_events(lab.folder / "run")])  # the machine may be slower than before
        signal_rank(job, rank, signal.SIGUSR1)
        code, output = job.end(20)
        assert code != 0 and f"stopped by signal at step {done};" in output, output
        assert checkpoints(lab.folder / "run")[-1] == done
    lab.train("run", **options, resume=1)
    assert model_bytes(lab.folder / "run") == model_bytes(whole)
    assert checkpoint_body(checkpoint(lab.folder / "run", 4)) == checkpoint_body(checkpoint(whole, 4))


# ---- 4. ranks that do not belong together

def together(lab, *commands):
    """A job of one rank of each command. A shell chooses, since mpirun's own way, commands with ':' between, crashes in
    Open MPI 5.0.7, Debian 13's."""
    cases = " ".join(f"{i}) exec {shlex.join(map(str, command))};;" for i, command in enumerate(commands))
    return ["mpirun", "--oversubscribe", "-n", len(commands), "sh", "-c", f"case ${{OMPI_COMM_WORLD_RANK:-$PMI_RANK}} in {cases} esac"]


def test_ranks_with_other_options_are_named(lab):
    job = together(lab, *(lab.command("run", seed=seed) for seed in (5, 5, 6)))
    lab.ends(job, 20, "rank 2", "--seed", "5", "6")
    job = together(lab, lab.command("run"), lab.command("run", learning_rate=1e-3))
    lab.ends(job, 20, "rank 1", "--learning-rate", "0.001", "0.003")
    job = together(lab, lab.command("run"), lab.command("other"))
    lab.ends(job, 20, "rank 1", "--out-dir", lab.folder / "run", lab.folder / "other")
    assert not (lab.folder / "run").exists() and not (lab.folder / "other").exists()


def test_options_of_every_kind_are_compared(lab):
    """From the first of the table to the last, numbers, texts and switches: a rank with another value than rank 0 is refused."""
    rows = [row.split("\t") for row in execute([lab.programs["units"], "options"]).out.splitlines()]
    for name, _, kind, low, high, fallback in rows[::7] + rows[-2:] + [row for row in rows if row[0] == "dry-run"]:
        value = "other" if kind == "text" else high if float(fallback) != float(high) else low
        value = {"lr-schedule": "wsd", "positions": "learned"}.get(name, value)
        job = together(lab, lab.command("run"), lab.command("run") + [f"--{name}={value}"])
        lab.ends(job, 20, "rank 1", f"--{name} is", "on rank 0")
    assert len(rows) > 40 and not (lab.folder / "run").exists()


@pytest.mark.parametrize("different", ["train-data", "val-data", "model", "out-dir"])
def test_ranks_with_other_files_are_named(lab, reference, different):
    """Two hosts that do not share a file system: the same names, other contents. Refused before a step."""
    commands = []
    for host in ("a", "b"):
        folder = lab.folder / host
        folder.mkdir()
        for source, name in ((lab.data.small, "train-data"), (lab.data.val, "val-data"), (reference() / "model.bin", "model")):
            contents = bytearray(source.read_bytes())
            if name == different and host == "b":
                contents[1024:1032] = contents[1032:1040]
            (folder / name).write_bytes(contents)
        if different != "out-dir" or host == "a":
            (folder / "out").symlink_to(lab.folder)
        command = lab.command("run", batch_size=2, train_data="train-data", val_data="val-data", model="model", depth=None,
                              channels=None, heads=None, sample_every=0) + ["--out-dir", "out/run"]
        commands.append(["env", "-C", folder, *command])
    lab.ends(together(lab, *commands), 20, "error: rank 1", different if different != "out-dir" else "folder that all hosts share")
    assert not list(lab.folder.glob("run/*.bin"))


def test_ranks_of_another_program_are_named(lab):
    job = together(lab, lab.command("run"), lab.command("run", program="dense"))
    lab.ends(job, 20, "rank 1", "lighthouse", "dense")


def test_a_rank_that_fails_alone_ends_the_job(lab):
    lab.ends(together(lab, lab.command("run"), lab.command("run", heads=5)), 20, "error: ", "rank 1")


@pytest.mark.parametrize("ranks,options,words", [
    (3, dict(cp=3), ["--cp", 3, "heads", 4]), (4, dict(cp=4, heads=2), ["--cp", 4, "heads", 2]),
    (2, dict(cp=2, program="dense", seq_len=99, total_batch_size=99), ["--cp", 2, "seq-len", 99]),
    (3, dict(cp=2), ["--cp", 2, 3]), (1, dict(cp=2), ["--cp", 2, 1]),
    (3, dict(total_batch_size=T), ["--total-batch-size", T, 3 * T]),
    (4, dict(cp=2, total_batch_size=T), ["--total-batch-size", T, 2 * T])])
def test_numbers_of_ranks_that_do_not_go(lab, ranks, options, words):
    """Ranks that do not divide what they share: one message with the values, and nothing is written."""
    lab.ends(lab.command("run", ranks=ranks, **options), 20, "error: ", *words)
    assert not (lab.folder / "run").exists()


# ---- 5. logs and plans

def memory_of(output):
    """{part: GiB} as --dry-run prints the plan."""
    line, = (line for line in output.splitlines() if line.startswith("memory "))
    return {name: float(size) for name, size in re.findall(r" ([A-Za-z0-9 ]+) ([0-9.]+)(?:,|$)", line.split(":", 1)[1])}


def test_plan_for_ranks_that_are_not_there(lab):
    """--plan-ranks prints what so many ranks take each: the optimizer's state falls as 1/ranks, activations as 1/cp."""
    options = dict(MODEL, channels=512, depth=12, seq_len=4096, topk=256, tile=64, total_batch_size=0, recompute=0,
                   sample_every=0, val_data="")
    plans = {}
    for name, more in [("one", {}), ("planned", dict(plan_ranks=4, cp=2)), ("started", dict(ranks=4, cp=2))]:
        result = execute(lab.command("run", **dict(options, **more)) + ["--dry-run"])
        assert result.code == 0, result.err
        plans[name] = memory_of(result.out)
    assert plans["planned"] == plans["started"]
    one, four = plans["one"], plans["planned"]
    assert four["AdamW moments"] == pytest.approx(one["AdamW moments"] / 4, abs=0.02)
    assert four["activations"] < 0.65 * one["activations"]
    assert not (lab.folder / "run").exists()
