"""Proves the tools for many GPUs: the arithmetic of scripts/scaling_model.py against what the trainer really sends and
takes, scripts/bench_scaling's tables and its runs on the CPU backend, and scripts/predict_scaling.

    python -m pytest dev/test_scaling.py        (make builds the programs first)
"""
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from test_trainer import little_memory, write_shard

ROOT = Path(__file__).resolve().parent.parent
sys.dont_write_bytecode = True
sys.path.insert(0, str(ROOT / "scripts"))
import scaling_model  # noqa: E402
from conftest import command_lines  # noqa: E402

scaling, predict = scaling_model.script("bench_scaling"), scaling_model.script("predict_scaling")
SMALL = ["--depth", "3", "--channels", "64", "--heads", "4", "--vocab-size", "300", "--levels", "3", "--pool", "2",
         "--topk", "32", "--tile", "8"]
needs_mpi = pytest.mark.skipif(not shutil.which("mpirun"),
                               reason="there is no MPI: apt-get install openmpi-bin libopenmpi-dev")


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"):
        monkeypatch.setenv(name, "1")


# ---- the arithmetic against the trainer ---------------------------------------------------------------------------

COUNTER = r'''// Counts the bytes that a rank sends, between MPI and the program.
#include <mpi.h>
#include <stdio.h>
static long long sent;
int MPI_Isend(const void* p, int n, MPI_Datatype type, int to, int tag, MPI_Comm comm, MPI_Request* request) {
    int size;
    MPI_Type_size(type, &size);
    sent += (long long)n * size;
    return PMPI_Isend(p, n, type, to, tag, comm, request);
}
int MPI_Finalize(void) {
    fprintf(stderr, "sent %lld bytes\n", sent);
    return PMPI_Finalize();
}
'''


@pytest.fixture(scope="module")
def counter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("counter")
    (folder / "counter.c").write_text(COUNTER)
    subprocess.run(["mpicc", "-shared", "-fPIC", "counter.c", "-o", "counter.so"], cwd=folder, check=True)
    return folder / "counter.so"


def run_ranks(folder, ranks, *options, preload=None):
    """A run of a small model. Returns its events and the bytes that each rank sent."""
    shutil.rmtree(folder, ignore_errors=True)
    tokens = folder.parent / "tokens.bin"
    if not tokens.exists():
        write_shard(tokens, [i * 7 % 251 for i in range(30000)])
    command = ["mpirun", "--oversubscribe", "-n", ranks, *(["-x", f"LD_PRELOAD={preload}"] if preload else []),
               ROOT / "train_gpt_lighthouse_cpu", "--train-data", tokens, "--val-data", "", "--out-dir", folder,
               "--seq-len", 256, *SMALL, *options]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {e["event"]: e for e in events}, [int(n) for n in re.findall(r"sent (\d+) bytes", done.stderr)]


def shape_of(config):
    o = config["options"]
    return dict(config["model"], B=o["batch-size"], T=o["seq-len"], tokens=config["tokens_per_step"],
                recompute=config["recompute_levels"], attention=config["attention"], windows=config["windows"],
                lighthouse=config["lighthouse"])


@needs_mpi
@pytest.mark.parametrize("ranks,cp,level,positions,attention,tiles,window,depth", [
    (3, 1, 0, "rope", "DLD", 4, 64, 3), (2, 2, 0, "learned", "DDD", 4, 64, 3), (4, 2, 2, "rope", "DLD", 4, 64, 3),
    (2, 2, 4, "rope", "DLD", 4, 64, 3), (4, 4, 0, "rope", "DLD", 4, 64, 3), (4, 4, 3, "rope", "DLD", 2, 64, 3),
    (4, 4, 3, "rope", "DDD", 4, 64, 3), (2, 1, 0, "rope", "LLD", 4, 64, 23), (4, 4, 0, "rope", "WWD", 4, 64, 3),
    (4, 4, 3, "rope", "WWL", 4, 48, 3), (4, 2, 2, "learned", "WWW", 4, 128, 3)])
def test_bytes_that_the_trainer_sends(tmp_path, counter, ranks, cp, level, positions, attention, tiles, window, depth):
    """Two steps more send twice the bytes of a step, in two micro-steps of two sequences on every rank. Where cp ranks
    divide the tiles, Lighthouse layers exchange slots, and the last rank of a group shifts less than the others; where
    windows lie whole on the ranks, window layers exchange nothing."""
    phase = "dense" if set(attention) == {"D"} else "first"
    totals = []
    for steps in (1, 3):
        events, sent = run_ranks(
            tmp_path / "run", ranks, "--cp", cp, "--batch-size", 2, "--total-batch-size", 256 * 2 * 2 * ranks // cp,
            "--steps", steps, "--switch-step", steps if phase == "first" else 0, "--recompute", level,
            "--positions", positions, "--tile", 32 // tiles, "--depth", depth, "--checkpoint-every", 0,
            "--attention", attention, "--window", window, preload=counter)
        assert len(sent) == ranks
        totals.append(sum(sent))
    calls = scaling_model.collectives(shape_of(events["config"]), phase, ranks, cp, element=4)
    shifts = any(c["call"] == "shift" for c in calls)
    assert shifts == ("L" in attention and cp > 1 and tiles % cp == 0)
    assert shifts or len(set(sent)) == 1, "all ranks send alike"
    assert (totals[1] - totals[0]) / 2 == ranks * sum(scaling_model.sent(c) * c["calls"] for c in calls)
    parts = {"the embeddings": 1, **{3: {"3 layers": 1}, 23: {"10 layers": 2, "3 layers": 1}}[depth]}
    for call, what in (("reduce_scatter", "fp32 gradients of "), ("all_gather", "weights of ")):
        assert {c["what"]: c["calls"] for c in calls if c["call"] == call} == {what + p: n for p, n in parts.items()}


@needs_mpi
@pytest.mark.parametrize("ranks,cp,level,attention,switch", [
    (1, 1, 1, "DLD", 1), (4, 2, 0, "DLD", 1), (4, 2, 1, "DLD", 1), (2, 2, 2, "DLD", 1), (3, 1, 3, "DLD", 1),
    (4, 2, 4, "DLD", 1), (2, 2, 0, "WWL", 2), (2, 2, 2, "WWW", 2), (2, 2, 4, "WWW", 2), (1, 1, 3, "WWW", 2)])
def test_memory_that_the_trainer_takes(tmp_path, ranks, cp, level, attention, switch):
    """In both phases, or in the first alone, whose windows lie whole on the ranks up to step 1 and from then on do not."""
    events, _ = run_ranks(tmp_path / "run", ranks, "--cp", cp, "--batch-size", 2, "--recompute", level, "--steps", 2,
                          "--switch-step", switch, "--attention", attention, *(["--window", "64,96:1"] * (switch == 2)))
    shape = shape_of(events["config"])
    parts = scaling_model.memory(shape, ranks, cp, element=4)
    if switch == 2:
        parts["activations"] = max(scaling_model.activations(shape, "first", cp, 4, window) for window in (64, 96))
    assert set(parts) == set(events["memory"]["parts"]) - {"tokens"}
    for name, size in parts.items():
        # Buffers begin at whole 256 bytes, which the arithmetic leaves out.
        assert size == pytest.approx(events["memory"]["parts"][name], rel=0.005), name


@needs_mpi
@pytest.mark.parametrize("cp", [1, 2])
def test_memory_and_bytes_of_mixed_levels(tmp_path, monkeypatch, counter, cp):
    """Where the first layers have recompute level 2 and the others 3: what fits into memory between that of the two."""
    options = ("--cp", cp, "--depth", 5, "--switch-step", 1, "--checkpoint-every", 0, "--attention", "windows")
    taken = [run_ranks(tmp_path / "run", 2, *options, "--steps", 2, "--recompute", level)[0]["memory"]["total_bytes"]
             for level in (2, 3)]
    preload, line = (variable.partition("=")[2] for variable in little_memory(tmp_path, sum(taken)))  # for both ranks
    monkeypatch.setenv("LITTLE_MEMORY", line)
    runs = [run_ranks(tmp_path / "run", 2, *options, "--steps", steps, preload=f"{counter}:{preload}") for steps in (2, 4)]
    events, (less, more) = runs[0][0], (sum(sent) for _, sent in runs)
    shape = shape_of(events["config"])
    assert set(shape["recompute"]) == {2, 3}
    with pytest.raises(ValueError, match="C, is not in this arithmetic"):
        scaling_model.memory(dict(shape, attention="WCWWD"), 2, cp, element=4)
    for name, size in scaling_model.memory(shape, 2, cp, element=4).items():
        assert size == pytest.approx(events["memory"]["parts"][name], rel=0.005), name
    calls = scaling_model.collectives(shape, "dense", 2, cp, element=4)
    assert (more - less) / 2 == 2 * sum(scaling_model.sent(c) * c["calls"] for c in calls)


def test_memory_of_the_measured_runs():
    """As the plans in dev/RESULTS.md's logs have it, in GiB."""
    lighthouse = {"levels": 3, "pool": 4, "slots": 18432}
    shape = {"layers": 30, "channels": 1024, "heads": 8, "padded_vocab": 512, "positions": "rope", "B": 1, "T": 98304,
             "tokens": 98304, "recompute": [0] * 30, "attention": "DD" + "L" * 26 + "DD", "windows": [],
             "lighthouse": lighthouse}
    million = dict(shape, layers=12, channels=768, heads=12, padded_vocab=50304, T=1 << 20, recompute=[3] * 12,
                   lighthouse=dict(lighthouse, slots=3 * (1 << 20) // 16), attention="L" * 12)
    short = dict(million, B=64, T=1024, recompute=[0] * 12, attention="D" * 12, lighthouse=None)
    for run, activations, workspace in ((shape, 95.49, 0.38), (million, 70.25, 3.05), (short, 19.29, 0.19)):
        parts = scaling_model.memory(run, 1, 1)
        assert parts["activations"] / scaling_model.GIB == pytest.approx(activations, abs=0.01)
        assert parts["attention workspace"] / scaling_model.GIB == pytest.approx(workspace, abs=0.01)


# ---- the tables from recorded results -----------------------------------------------------------------------------

def row(table, name, ranks, **fields):
    return {"table": table, "row": f"{name}, {ranks} ranks", "date": "2026-11-25", "card": "A CARD",
            "command": f"scripts/bench_scaling {table}", "name": name, "ranks": ranks, **fields}


def recorded():
    """Round numbers, so that every figure of a table can be checked by hand."""
    gradients = {"call": "reduce_scatter", "what": "fp32 gradients of 10 layers", "bytes": 40_000_000, "calls": 30,
                 "ranks": 4, "ms": 0.1, "sent_GBps": 300.0}
    exchange = {"call": "all_to_all", "what": "qkv and its gradient", "bytes": 80_000_000, "calls": 60, "ranks": 4,
                "ms": 0.4, "sent_GBps": 150.0}
    links = {"reduce_scatter": 400.0, "all_gather": 390.0, "all_to_all": 300.0}
    lh30, d12 = "lh30, T 98,304", "d12, T 1,048,576"
    return [
        row("weak", lh30, 4, shape={"tokens": 400000}, ms={"first": [1250.0, 1250.0, 1300.0], "dense": [4000.0]},
            links=links, collectives={"first": [gradients], "dense": [gradients]}),
        row("weak", lh30, 1, shape={"tokens": 100000}, ms={"first": [1000.0], "dense": [4000.0]}, links={},
            collectives={}),
        row("strong", d12, 1, refused="this run takes 200 GiB"),
        row("strong", d12, 2, shape={"tokens": 1000000}, ms={"first": [4000.0]}, links={}, collectives={}),
        row("strong", d12, 4, shape={"tokens": 1000000}, ms={"first": [2500.0]}, links=links,
            collectives={"first": [exchange]}),
        row("context", "d12", 4, T=4194304, unit=262144, memory="130 GiB of 139 GiB free", ms={"first": 20000.0}),
        row("context", "lh30", 4, refused="too large")]


def cells(text, *start):
    begin = "| " + " | ".join(start) + " |"
    line = next(line for line in text.split("\n") if line.startswith(begin))
    return [c.strip() for c in line.strip("|").split("|")][len(start):]


def test_tables():
    tables = scaling.bench.latest(recorded())
    weak, strong, context = (scaling.shown(t, tables) for t in scaling.TABLES)
    assert weak.startswith("`scripts/bench_scaling weak` — A CARD, 2026-11-25\n")
    assert cells(weak, "lh30, T 98,304", "1", "first") == ["1,000.0 / 1,000.0 / 1,000.0", "100.0", "100.0%", "-"]
    assert cells(weak, "lh30, T 98,304", "4", "first") == [
        "1,250.0 / 1,250.0 / 1,300.0", "320.0", "80.0%", "250.0"]
    assert cells(weak, "lh30, T 98,304", "4", "dense")[2:] == ["100.0%", "0.0"]
    assert cells(weak, "lh30, T 98,304", "4", "reduce_scatter: fp32 gradients of 10 layers") == [
        "40.00", "30", "0.100", "300.0", "400.0", "75%", "0.90", "3.0"]
    assert weak.count("reduce_scatter") == 1, "both phases have the same"
    assert cells(strong, "d12, T 1,048,576", "1")[-1] == "this run takes 200 GiB"
    assert cells(strong, "d12, T 1,048,576", "2", "first")[1:] == ["250.0", "100.0%", "-"]  # linear from here on
    assert cells(strong, "d12, T 1,048,576", "4", "first")[1:] == ["400.0", "80.0%", "500.0"]
    assert cells(strong, "d12, T 1,048,576", "4", "dense")[-1] == "left out: too long"
    assert cells(strong, "d12, T 1,048,576", "4", "all_to_all: qkv and its gradient")[-2:] == ["3.60", "24.0"]
    assert cells(context, "d12", "4") == ["4,194,304", "262,144", "20.0 s", "130 GiB of 139 GiB free"]
    assert cells(context, "lh30", "4")[-1] == "too large"


def test_page(tmp_path, capsys):
    results, page = tmp_path / "results.jsonl", tmp_path / "page.md"
    results.write_text("".join(json.dumps(r) + "\n" for r in recorded()))
    shutil.copy(ROOT / "dev" / "SCALING.md", page)
    scaling.main(["page", str(results), "--into", str(page)])
    assert all(scaling.shown(t, scaling.bench.latest(recorded())) in page.read_text() for t in scaling.TABLES)
    scaling.main(["page", str(results)])
    assert capsys.readouterr().out.count("A CARD") == 3


@pytest.mark.parametrize("args,message", [
    (["fast"], "invalid choice"), (["page"], "page wants a results file"), (["weak", "x.jsonl"], "goes with page"),
    (["strong", "--rows", "lh30", "x"], "--rows x: it is in no row's name; strong has 'lh30, T 98,304', 'lh30, tile 64, T"),
    (["--rows", "x"], "all has 'lh30, T 98,304', 'd12, B 64, T 1,024', 'lh30, tile 64, T 98,304', 'lh30, T 524,288', 'd12, T 1,048,576', 'd12'"),
    (["page", "x", "--rows", "d12"], "--rows does not apply to page"),
    (["--ranks", "0"], "at least 1"), (["--steps", "0"], "--steps is 0"),
    (["weak", "--", "--out-dir", "x"], "chosen by --out")])
def test_usage(capsys, args, message):
    with pytest.raises(SystemExit) as e:
        scaling.main(args)
    assert e.value.code == 2 and message in capsys.readouterr().err


def test_results_refused(tmp_path):
    def refused(program, *args):
        with pytest.raises(SystemExit) as e:
            program.main([str(a) for a in args])
        return e.value.code

    bench_rows = ROOT / "dev" / "logs" / "h200" / "bench.jsonl"
    message = "line 1 is a row of scripts/bench, not of scripts/bench_scaling"
    assert message in refused(scaling, "page", bench_rows)
    assert message in refused(scaling, "--backend", "cpu", "--out", tmp_path, "--results", bench_rows)
    bad, good = tmp_path / "bad.jsonl", tmp_path / "good.jsonl"
    good.write_text(json.dumps(recorded()[0]) + "\n")
    for line in ('{"a": 1}', "[1]"):
        bad.write_text(line + "\n")
        for refusal in (refused(scaling, "page", bad), refused(predict, "--results", bad)):
            assert "bad.jsonl: line 1 is no row of results, an object with the texts table, " in refusal
            assert refusal.endswith(f": {line}")
    for program, args in ((scaling, ["page", good]), (predict, [])):
        assert refused(program, *args, "--into", "/nope/x.md").endswith(
            ": --into /nope/x.md: No such file or directory")


def test_tables_without_the_rows_wanted_are_left_out(tmp_path, monkeypatch, capsys):
    for table in scaling.TABLES:
        monkeypatch.setattr(scaling, f"run_{table}", lambda args: None)
    scaling.main(["--backend", "cpu", "--out", str(tmp_path), "--rows", "B 64"])
    assert capsys.readouterr().out.strip() == "weak: nothing was measured"


def test_more_gpus_than_there_are(monkeypatch):
    monkeypatch.setattr(scaling, "gpus", lambda: 2)
    with pytest.raises(SystemExit) as e:
        scaling.main(["weak", "--ranks", "1", "4"])
    assert "shows 2 GPU(s)" in e.value.code


# ---- runs on the CPU backend --------------------------------------------------------------------------------------

def results_of(out):
    return {(r["table"], r["row"]): r for r in map(json.loads, (out / "results.jsonl").read_text().splitlines())}


@needs_mpi
def test_weak_and_strong_run(tmp_path, capfd):
    common = ["--backend", "cpu", "--steps", "2", "--warmup", "1", "--link-bytes", "100000", "--out", str(tmp_path),
              "--rows", "lh30, T 98", "--", *SMALL, "--seq-len", "512"]
    scaling.main(["weak", "--ranks", "1", "2", *common])
    scaling.main(["strong", "--ranks", "2", *common])
    found = results_of(tmp_path)
    assert set(found) == {("weak", "lh30, T 98,304, 1 ranks"), ("weak", "lh30, T 98,304, 2 ranks"),
                          ("strong", "lh30, T 98,304, 2 ranks")}
    weak, strong = found["weak", "lh30, T 98,304, 2 ranks"], found["strong", "lh30, T 98,304, 2 ranks"]
    assert weak["shape"]["tokens"] == 1024 and strong["shape"]["tokens"] == 512 and "--cp 2" in strong["trainer"]
    assert {p: len(ms) for p, ms in strong["ms"].items()} == {"first": 2, "dense": 1}
    for r, calls in ((weak, {"reduce_scatter", "all_gather"}),
                     (strong, {"reduce_scatter", "all_gather", "all_to_all", "shift"})):
        assert set(r["links"]) == {c["call"] for c in r["collectives"]["first"]} == calls
        assert all(c["ms"] > 0 and c["sent_GBps"] == pytest.approx(scaling_model.sent(c) / c["ms"] / 1e6, rel=0.2)
                   for c in r["collectives"]["dense"])
    shown = capfd.readouterr().out
    assert "| lh30, T 98,304 | 2 | dense |" in shown and "all_to_all: qkv and its gradient" in shown
    assert not [line for line in command_lines() if str(tmp_path) in line], "the ranks of a measured job end with it"


@needs_mpi
def test_context_runs(tmp_path, capfd, monkeypatch):
    planned = scaling.planned

    def short(args, vocab, options, cp):  # as if no more than 1,024 tokens fitted on a rank
        return planned(args, vocab, options, cp) if int(options[-1]) <= 1024 * cp else (False, "error: too few")

    monkeypatch.setattr(scaling, "planned", short)
    scaling.main(["context", "--backend", "cpu", "--ranks", "1", "2", "--rows", "d12", "--unit", "512", "--top",
                  "4096", "--out", str(tmp_path), "--", "--depth", "2", "--channels", "32", "--heads", "2",
                  "--vocab-size", "300"])
    found = results_of(tmp_path)
    assert [found["context", f"d12, {n} ranks"]["T"] for n in (1, 2)] == [1024, 2048]
    assert all("first" in r["ms"] and "recompute level" in r["memory"] for r in found.values())
    assert "| d12 | 2 | 2,048 | 1,024 |" in capfd.readouterr().out


def test_nccl_takes_memory_too(tmp_path, monkeypatch, capsys):
    """Where a planned run is refused when it starts, the context table goes down, the strong one says so."""
    most = 3000

    def run_steps(command, wanted, seconds=0):
        if int(scaling.bench.option(command, "seq-len", 0)) > most:
            raise scaling.bench.BenchError("the trainer ended: error: rank 0: this run takes 9 GiB, 1 GiB too few: no")
        return {"device": "A CARD"}, [("first", 5000.0)], 1.0

    monkeypatch.setattr(scaling.bench, "run_steps", run_steps)
    arguments = ["--backend", "cpu", "--ranks", "2", "--rows", "lh30", "--out", str(tmp_path)]
    small = ["--", "--depth", "2", "--channels", "32", "--heads", "2", "--vocab-size", "300"]
    scaling.main(["context", *arguments, "--unit", "512", "--top", "4096", *small])
    scaling.main(["strong", *arguments, *small, "--seq-len", "4096"])
    assert "| lh30 | 2 | 2,048 | 1,024 | 5.0 s |" in capsys.readouterr().out
    found = results_of(tmp_path)["strong", "lh30, T 98,304, 2 ranks"]
    assert found["refused"] == "rank 0: this run takes 9 GiB, 1 GiB too few: no"
    most = 1000
    with pytest.raises(SystemExit) as e:
        scaling.main(["context", *arguments, "--unit", "512", "--top", "2048", *small])
    assert "no run does" in e.value.code


@needs_mpi
def test_a_failing_run_is_named(tmp_path):
    with pytest.raises(SystemExit) as e:
        scaling.main(["weak", "--backend", "cpu", "--ranks", "2", "--out", str(tmp_path), "--", *SMALL, "--heads", "5"])
    assert "--channels 64 is not divisible by --heads 5" in e.value.code


@needs_mpi
@pytest.mark.parametrize("args,message", [
    (["x=1"], "no measurement"), (["all_gather=0"], "no measurement"), (["all_to_all=100"], "in groups"),
    (["cp=3", "all_gather=10"], "must divide")])
def test_collectives_refuse(args, message):
    scaling.bench.built("build/bench_nccl_cpu")
    done = subprocess.run(["mpirun", "--oversubscribe", "-n", "2", ROOT / "build/bench_nccl_cpu", *args],
                          capture_output=True, text=True)
    assert done.returncode and message in done.stderr


# ---- predictions --------------------------------------------------------------------------------------------------

def links(**changes):
    class Links:
        ring, node, all_to_all, hop_us, node_hop_us, all_to_all_us, gib = 340, 340, 300, 3, 12, 20, 136
    for name, value in changes.items():
        setattr(Links, name, value)
    return Links


def test_one_gpu_is_as_measured():
    """The model of one GPU's step gives back the two steps that it was made of, but for the head of more token ids."""
    head = 6 * (predict.VOCAB - 512) * 1024 * 98304 / predict.HEAD_FLOPS * 1e3
    for phase, ms in predict.STEP_MS.items():
        assert predict.compute_ms(predict.shape_of(98304, 1, 1, 0), phase) == pytest.approx(ms + head)
    assert predict.sdpa_ms(524288) == pytest.approx(3685) and predict.sdpa_ms(1 << 20) == pytest.approx(4 * 3685)


def test_links_without_cost_scale_perfectly():
    free = links(ring=1e12, node=1e12, all_to_all=1e12, hop_us=0, node_hop_us=0, all_to_all_us=0)
    one = predict.compute_ms(predict.shape_of(98304, 1, 1, 0), "first")
    for gpus, cp in ((8, 1), (512, 8)):
        p = predict.predict(98304, gpus, cp, "first", free)
        assert p["step"] == pytest.approx(one / cp) and p["rate"] == pytest.approx(gpus * 98304 / one * 1e3)


def test_the_page_holds_the_tables(tmp_path):
    """dev/SCALING.md is what scripts/predict_scaling writes."""
    page = tmp_path / "page.md"
    shutil.copy(ROOT / "dev" / "SCALING.md", page)
    predict.main(["--into", str(page)])
    assert page.read_text() == (ROOT / "dev" / "SCALING.md").read_text()


def test_the_steps_by_hand():
    """The figures that the page works out in words."""
    text = " ".join((ROOT / "dev" / "SCALING.md").read_text().split())
    p = predict.predict(98304, 8, 1, "first", links())
    assert f"= {p['step']:,.1f} ms, 8 x 98,304" in text and f"= {round(p['rate'], -3):,.0f} tok/s" in text
    p = predict.predict(1 << 20, 8, 8, "first", links())
    assert f"over 8 GPUs {p['compute'] / 1e3:.1f} s" in text and f"{p['exchange']:.0f} ms in all" in text
    dense = 4 * predict.sdpa_ms(1 << 20) / 8
    sparse = 4 * (predict.sdpa_ms(predict.slots(1 << 20)) + predict.AROUND_MS * (1 << 20) / 98304) / 8
    slots, layer = predict.slots(1 << 20), predict.sdpa_ms(predict.slots(1 << 20))
    assert f"{layer / slots ** 2 * 1e8:.2f}e-8 ms x {slots:,}^2 = {layer:.0f} ms" in text
    assert f"are {dense / 1e3:.1f} of those" in text
    assert f"it would be {(p['compute'] - dense + sparse) / 1e3:.1f}." in text
    p, finer = (predict.predict(98304, 8, 8, "first", links(), tile) for tile in (128, 64))
    assert (f"{finer['exchange']:.1f} ms instead of {p['exchange']:.1f}, a step of {finer['step']:.1f} ms, "
            f"{finer['compute'] / finer['step']:.0%} instead of {p['compute'] / p['step']:.0%}.") in text
    sizes = (98304, 8, 1), (98304, 8, 8), (1 << 20, 8, 8), (1 << 22, 8, 8)
    alone, eight, million, four = (predict.levels_of(predict.fitting(*size, 76)[0]) for size in sizes)
    assert (f"(`--gib 76`) 98,304 tokens fit at level {alone}, and at level {eight} with cp 8; 1,048,576 on eight at "
            f"{million}; 4,194,304 at {four}.") in text


def test_the_levels_that_fit():
    """The least level that fits in all layers, then one less in as many as fit: one layer more would not."""
    def taken(recompute):
        shape = predict.shape_of(98304, 1, 1, recompute)
        return shape["recompute"], sum(scaling_model.memory(shape, 1, 1).values()) / scaling_model.GIB

    for recompute in (120, 99, 75, 45, 0):
        levels, gib = taken(recompute)
        shape, found, fits = predict.fitting(98304, 1, 1, gib + 0.001)
        assert fits and shape["recompute"] == levels and found == gib and sum(levels) == recompute
    levels, gib = taken(120)
    assert predict.levels_of(predict.fitting(98304, 1, 1, gib + 0.001)[0]) == "4"
    assert predict.levels_of(predict.shape_of(98304, 1, 1, 61)) == "2 in 29 layers, 3 in 1"
    assert not predict.fitting(98304, 1, 1, gib - 0.001)[2]


def test_measured_values_take_the_place(tmp_path, monkeypatch):
    monkeypatch.setattr(predict, "STEP_MS", dict(predict.STEP_MS))
    results = tmp_path / "results.jsonl"
    step = {"table": "step", "row": "lh30", "date": "2026-11-25", "command": "scripts/bench step", "card": "A CARD",
            "ms": {"lighthouse": [900.0, 910.0, 930.0], "dense": []}}
    results.write_text("".join(json.dumps(r) + "\n" for r in [*recorded(), step]))
    found = links()
    predict.take_measured(found, [str(results)])
    assert predict.STEP_MS == {"first": 910.0, "dense": 4119.0}
    assert (found.ring, found.all_to_all) == (390.0, 300.0)
