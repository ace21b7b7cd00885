"""Proves scripts/bench: the arithmetic of its tables from recorded results, and its runs with the CPU trainers.

    python3 -m pytest dev/test_bench.py
"""
import importlib.machinery
import importlib.util
import json
import os
import shutil
import subprocess
import sys

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.dont_write_bytecode = True
loader = importlib.machinery.SourceFileLoader("bench", os.path.join(ROOT, "scripts", "bench"))
bench = importlib.util.module_from_spec(importlib.util.spec_from_loader("bench", loader))
loader.exec_module(bench)

SMALL = ["--depth", "2", "--channels", "32", "--heads", "2"]
TINY = ["--", *SMALL, "--seq-len", "256", "--batch-size", "1", "--vocab-size", "512"]


def usage(capsys, *args):
    with pytest.raises(SystemExit) as e:
        bench.main(list(args))
    assert e.value.code == 2
    return capsys.readouterr().err


def refused(*args):
    with pytest.raises(SystemExit) as e:
        bench.main([str(a) for a in args])
    assert isinstance(e.value.code, str), e.value.code
    return e.value.code


# ---- recorded results ---------------------------------------------------------------------------------------------

def shape_of(**changes):
    lighthouse = {"levels": 3, "pool": 4, "topk": 1536, "tile": 128, "slots": 18432}
    shape = dict({"layers": 30, "channels": 1024, "heads": 8, "vocab": 512, "padded_vocab": 512,
                  "parameters": 378000000, "positions": "rope", "B": 1, "T": 98304, "tokens": 98304, "fp8": 0,
                  "attention": "DD" + "L" * 26 + "DD", "windows": [], "lighthouse": lighthouse}, **changes)
    return dict({"recompute": [0] * shape["layers"]}, **shape)


def row(table, name, **fields):
    return dict({"table": table, "row": name, "date": "2026-11-24", "command": f"scripts/bench {table}",
                 "card": "A CARD, driver 1.2"}, **fields)


def recorded():
    """Round numbers, so that every figure of a table can be checked by hand."""
    floors = {"first": {"floor_ms": 800.0, "core_ms": 700.0, "loop_ms": 750.0, "other_ms": 100.0},
              "dense": {"floor_ms": 3900.0, "core_ms": 3800.0, "loop_ms": 3850.0, "other_ms": 100.0}}
    times = {"H": 8, "D": 128, "pool": 4, "copy_GBps": 4000.0}
    out = [row("attention", "a", times=dict(times, T=98304, levels=3, topk=1536, S=18432, around_ms=0.7,
                                            around_bytes=2e9, slots_ms=4.5, ms=[5.1, 5.2, 5.5], dense_ms=122.2)),
           row("attention", "b", times=dict(times, T=524288, levels=3, topk=8192, S=98304, around_ms=4.5,
                                            around_bytes=12e9, slots_ms=122.0, ms=[126.0, 130.0, 131.0],
                                            dense_ms=3380.0)),
           row("step", "lh30", shape=shape_of(), floor=floors,
               ms={"first": [990.0, 1000.0, 1010.0], "dense": [4000.0]}),
           row("dense", "d12, B 64, T 1,024", shape=shape_of(B=64, T=1024, tokens=65536, lighthouse=None),
               floor={"dense": {"floor_ms": 100.0, "core_ms": 80.0, "loop_ms": 90.0, "other_ms": 20.0}},
               ms={"dense": [109.0, 110.0, 120.0]}),
           row("context", "d12", T=1900544, unit=65536, wanted=1048576, memory="memory      130 GiB of 139 GiB free",
               proofs=[{"T": 1900544, "ms": {"first": 20000.0}, "dense_wanted": False},
                       {"T": 1048576, "ms": {"first": 7400.0, "dense": 162000.0}, "dense_wanted": True}]),
           row("outside", "ncu", ms={"attention": 550.0, "products": 300.0, "other": 150.0}),
           row("startup", "d12, T 1,024", starts=[{"s": 4.5, "first_ms": 300.0, "ms": [110.0, 111.0]},
                                                  {"s": 12.0, "first_ms": 310.0, "ms": [112.0]}])]
    for i, T in enumerate((8192, 65536, 131072, 1048576)):
        ms = {"first": [0.001 * T * (3 + T * 1e-6)]}
        if T < 1048576:
            ms["dense"] = [0.001 * T * (3 + T * 28e-6)]
        out.append(row("cost", f"T {T}", ms=ms, shape=shape_of(
            B=1, T=T, tokens=T, lighthouse={"levels": 3, "pool": 4, "slots": 3 * T // 16})))
    return out


def tables():
    return bench.latest(recorded())


def cells(text, start):
    line = next(line for line in text.split("\n") if line.startswith(f"| {start} "))
    return [c.strip() for c in line.strip("|").split("|")]


def test_whole_run():
    assert bench.whole_run(1000, 4000, 10000, 6000) == pytest.approx(64 / 34)
    assert bench.whole_run(1000, 4000, 16000, 0) == 4
    assert bench.whole_run(1000, 4000, 0, 16000) == 1
    text = bench.shown("step", tables())
    assert cells(text, "10,000 + 6,000") == ["10,000 + 6,000", "9.44", "17.78", "**1.88** (at least 1.88)"]
    assert cells(text, "15,000 + 1,000") == ["15,000 + 1,000", "5.28", "17.78", "3.37"]
    assert "takes **4.00** (at least 4.00) times" in text


def test_step_table():
    text = bench.shown("step", tables())
    assert text.startswith("`scripts/bench step` — A CARD, driver 1.2, 2026-11-24\n")
    assert cells(text, "first") == ["first", "**98.3** (at least 95.0)", "990.0 / 1,000.0 / 1,010.0",
                                    "800.0 = 700.0 + 100.0", "1.25", "750.0"]
    assert cells(text, "dense")[1] == "**24.6** (at least 23.7)"


def test_attention_table():
    text = bench.shown("attention", tables())
    first, second = cells(text, "98,304"), cells(text, "524,288")
    assert first[1:] == ["**5.20** (at most 5.40)", "5.10 to 5.50", "122.2", "**23.5** (at least 23.0)", "4.50",
                         "**0.70** (at most 0.85)", "0.50", "**1.40** (at most 1.40)", "1.04"]
    assert second[4] == "26.0 (at least 27.0)" and second[8] == "1.50 (at most 1.40)"  # missed: not bold


def test_dense_context_outside_and_startup_tables():
    assert cells(bench.shown("dense", tables()), "d12, B 64, T 1,024")[1:] == [
        "**595.8** (at least 588.0)", "560", "109.0 / 110.0 / 120.0", "100.0 = 80.0 + 20.0", "1.10", "90.0"]
    context = cells(bench.shown("context", tables()), "d12")
    assert context[1] == "**1,900,544** (at least 1,048,576)"
    assert context[3] == ("at 1,900,544: first 20.0 s, dense left out: too long; "
                          "at 1,048,576: first 7.4 s, dense 162.0 s")
    outside = bench.shown("outside", tables())
    assert "| 1,000.0 | 750.0 | 25.0% (at most 12.0%) |" in outside  # from the step and its roofline
    assert "| 1,000.0 | 850.0 | 15.0% (at most 12.0%) |" in outside  # from ncu
    startup = bench.shown("startup", tables())
    assert "| **4.50** (at most 10.00) | 300 |" in startup and "| 12.00 (at most 10.00) | 310 |" in startup


def test_cost_table_and_line():
    text = bench.shown("cost", tables())
    assert cells(text, "131,072")[3:7] == ["0.1875", "3.131", "6.670", "2.13"]
    assert cells(text, "1,048,576")[4:7] == ["4.049", "left out: too long", "-"]
    assert "Lighthouse 3.00 + 0.00100 T, dense 3.00 + 0.02800 T. The ratio of the slopes is 28.0; (T/S)^2 is 28.4" \
        in text


def test_cost_figure(tmp_path):
    pytest.importorskip("matplotlib")
    bench.draw_cost(tables()["cost"], tmp_path / "cost.png")
    assert (tmp_path / "cost.png").read_bytes()[:4] == b"\x89PNG"


def test_the_last_measurement_counts():
    old = row("step", "lh30", shape=shape_of(), floor={}, ms={"first": [2000.0], "dense": [4000.0]})
    assert bench.latest([old, *recorded()])["step"] == tables()["step"]
    assert len(bench.latest(recorded())["cost"]) == 4


def test_bytes_of_a_step():
    """Kernel by kernel for one layer, in rows of C elements; the difference of two depths leaves the rest out."""
    def layer(phase, recompute=0, **changes):
        changes.setdefault("attention", "LLL")
        a, b = (bench.other_bytes(shape_of(layers=n, recompute=[0, 0, recompute][:n], **changes), phase)
                for n in (3, 2))
        return (a - b) / (98304 * 1024 * 2)

    ln, gelu, gelu_back, ln_back, rope = 2, 4 + 4, 4 + 4 + 4, 4, 2 + 2
    dense = 2 * ln + gelu + 2 + gelu_back + 2 * ln_back + (3 + 1 + 4 + 1) + 2 * rope
    assert layer("dense") == pytest.approx(dense)
    assert layer("dense", positions="learned") == pytest.approx(dense - 2 * rope)
    assert layer("dense", recompute=1) == pytest.approx(dense + gelu)
    assert layer("dense", recompute=3) == pytest.approx(dense + gelu + 2 * ln + rope + 1)
    S, entries = 18432 / 98304, (1 + 1 / 4 + 1 / 16) * 8 * 4 / 2048  # in rows
    gather, scatter, scores = 3 + 3 * S, 1 + S, 2
    lighthouse = dense - 2 * rope + scores + 9 * entries + 2 * gather + 2 * scatter
    assert layer("first", attention="WWW") == layer("dense")  # what moves round a window layer's attention
    assert layer("first") == pytest.approx(lighthouse)
    assert layer("first", recompute=2) == pytest.approx(lighthouse + gelu + 2 * ln + gather + scatter)
    more = bench.other_bytes(shape_of(parameters=10 ** 9), "dense") - bench.other_bytes(shape_of(parameters=0), "dense")
    assert more == 38e9  # gradients to zero and their norm; AdamW reads four, writes three and the bf16 weights
    one, two = (bench.other_bytes(shape_of(tokens=n * 98304, parameters=0), "dense") for n in (1, 2))
    assert two == 2 * one  # two micro-steps


def test_longest_sequence_by_bisection():
    for limit in (0, 1, 5, 63, 64):
        asked = []

        def fit(T):
            asked.append(T)
            return T <= limit * 1000

        assert bench.longest(fit, 1000, 64000) == limit * 1000
        assert len(asked) <= 7 and len(set(asked)) == len(asked)


def test_option_takes_the_last_value():
    assert bench.option(["--seq-len", "5", "--model", "d12"], "seq-len", 1) == "5"
    assert bench.option(["--seq-len", "5", "--seq-len=7"], "seq-len", 1) == "7"
    assert bench.option(["--seq-lens", "5"], "seq-len", 1) == 1


def test_kernels_by_kind():
    names = [("encoder_forward_kernel(x)", 7e9), ("encoder_forward_kernel(x)", 1e6), ("void gelu_kernel<1>(x)", 2e6),
             ("nvjet_sm90_tst_256x128", 4e6), ("void cublasLt::splitKreduce_kernel<32>", 8e6),
             ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop", 16e6), ("void cudnn::convert_dq_to_16bits<1>", 32e6)]
    lines = ["==PROF== connected", '"ID","Kernel Name","gpu__time_duration.sum"', '"","","ns"',
             *(f'"{i}","{name}","{ns:.0f}"' for i, (name, ns) in enumerate(names))]
    assert bench.kernel_kinds(lines) == {"attention": 48.0, "products": 12.0, "other": 3.0}
    with pytest.raises(bench.BenchError, match="no training step"):
        bench.kernel_kinds(["==ERROR== ERR_NVGPUCTRPERM"])


# ---- the page -----------------------------------------------------------------------------------------------------

def test_page(tmp_path, capsys):
    results, text = tmp_path / "results.jsonl", tmp_path / "page.md"
    results.write_text("".join(json.dumps(r) + "\n" for r in recorded() if r["table"] != "context"))
    shutil.copy(os.path.join(ROOT, "dev", "BENCHMARKS.md"), text)
    before = text.read_text()
    bench.main(["page", str(results), "--into", str(text)])
    once = text.read_text()
    bench.main(["page", str(results), "--into", str(text)])
    assert text.read_text() == once != before
    tables_in = [once.split(f"<!-- bench {t} -->")[1].split(f"<!-- end {t} -->")[0].strip() for t in bench.TABLES]
    measured = bench.latest(bench.read_results(results))
    for table, inside in zip(bench.TABLES, tables_in):
        if table not in measured and table != "outside":  # not measured: as it was
            assert inside == before.split(f"<!-- bench {table} -->")[1].split(f"<!-- end {table} -->")[0].strip()
        else:
            assert inside == bench.shown(table, measured)
    bench.main(["page", str(results)])
    shown = [bench.shown(t, measured) for t in bench.TABLES if t in measured or t == "outside"]
    assert capsys.readouterr().out.strip() == "\n\n".join(shown)
    text.write_text(once.replace("<!-- end cost -->", ""))
    assert "has not one" in refused("page", results, "--into", text)


def test_page_refuses(tmp_path):
    assert "No such file" in refused("page", tmp_path / "none.jsonl")
    (tmp_path / "bad.jsonl").write_text("{\n")
    assert "no JSON" in refused("page", tmp_path / "bad.jsonl")
    whole = json.dumps(recorded()[0]) + "\n"
    for line in ('{"a": 1}', "[1]", json.dumps(dict(recorded()[0], row=1))):
        (tmp_path / "bad.jsonl").write_text(whole + line + "\n")
        assert "bad.jsonl: line 2 is no row of results, an object with the texts table, row, date, command, card: " \
            + line[:9] in refused("page", tmp_path / "bad.jsonl")
    scaling = os.path.join(ROOT, "dev", "logs", "h200", "scaling.jsonl")
    message = "line 1 is a row of scripts/bench_scaling, not of scripts/bench"
    assert message in refused("page", scaling)
    assert message in refused("cost", "--results", scaling, "--out", tmp_path)  # before it measures
    (tmp_path / "good.jsonl").write_text(whole)
    assert refused("page", tmp_path / "good.jsonl", "--into", "/nope/x.md") == \
        "bench: --into /nope/x.md: No such file or directory"


def test_patterns():
    floor = {"first": None}
    rows = [{"row": row[0], "shape": {"tokens": 98304}, "ms": {"first": [ms, ms + 1, ms + 2]}, "floor": floor}
            for row, ms in zip(bench.PATTERN_ROWS, range(600, 740, 10))]
    lines = bench.show_patterns(rows).splitlines()[2:]
    assert [line.split(" | ")[0].strip("| ") for line in lines] == [row[0] for row in bench.PATTERN_ROWS]
    two = next(line for line in lines if line.startswith("| W with two dense layers |"))
    assert two.split(" | ")[1:3] == ["**661** (at most 720)", "148.7"]
    assert next(line for line in lines if line.startswith("| L |")).split(" | ")[1] == "621.0"


# ---- options ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("args,message", [
    (["speed"], "invalid choice"), (["page"], "page wants a results file"), (["step", "x.jsonl"], "goes with page"),
    (["step", "--into", "x"], "--into goes with page"), (["step", "--steps", "0"], "it must be at least 1"),
    (["context", "--unit", "8192", "--top", "4096"], "--top is 4096; it must be at least 8192"),
    (["attention", "--backend", "cpu"], "attention needs a GPU"),
    (["context", "--rows", "lh30", "x"], "--rows x: it is in no row's name; context has 'd12', 'lh30'"),
    (["dense", "--rows", "x"], "dense has 'd12, B 64, T 1,024', "), (["startup", "--rows", "x"], "startup has 'd12, "),
    (["step", "--rows", "lh30"], "--rows does not apply to step"), (["all", "--rows", "d12"], "does not apply to all"),
    (["page", "x", "--rows", "d12"], "--rows does not apply to page"),
    (["step", "--", "--out-dir", "x"], "chosen by --out")])
def test_usage(capsys, args, message):
    assert message in usage(capsys, *args)


def test_help_and_scaling(monkeypatch):
    text = subprocess.run([os.path.join(ROOT, "scripts", "bench"), "--help"], capture_output=True, text=True).stdout
    assert all(f"scripts/bench {t} " in text for t in (*bench.TABLES, "page", "all", "scaling"))
    called = []
    monkeypatch.setattr(os, "execv", lambda path, argv: called.append((path, argv)) or sys.exit(0))
    with pytest.raises(SystemExit):
        bench.main(["scaling", "--steps", "3", "--", "--model", "d12"])
    assert called == [(os.path.join(ROOT, "scripts", "bench_scaling"),
                       ["bench_scaling", "--steps", "3", "--", "--model", "d12"])]


# ---- runs with the CPU trainers -----------------------------------------------------------------------------------

def results_of(out):
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def test_step_runs(tmp_path, capsys):
    bench.main(["step", "--backend", "cpu", "--steps", "3", "--warmup", "2", "--out", str(tmp_path), *TINY])
    r, = results_of(tmp_path)
    assert {p: len(x) for p, x in r["ms"].items()} == {"first": 3, "dense": 1}
    assert r["shape"]["T"] == r["shape"]["tokens"] == 256 and r["shape"]["layers"] == 2
    with open(tmp_path / "run" / "log.jsonl") as f:
        steps = [e for e in map(json.loads, f.read().splitlines()) if e["event"] == "step"]
    assert [e["ms"] for e in steps[2:5]] == r["ms"]["first"] and steps[7]["ms"] == r["ms"]["dense"][0]
    assert not [name for name in os.listdir(tmp_path / "run") if name.endswith(".bin")]  # stopped: no checkpoint
    light, dense = (sorted(r["ms"][p])[len(r["ms"][p]) // 2] for p in ("first", "dense"))
    shown = capsys.readouterr().out
    assert f"| first | {bench.verdict(256 / light, 95, '{:.1f}')} |" in shown
    assert f"takes {bench.verdict(dense / light, 4, '{:.2f}')} times" in shown
    assert r["command"] in shown and r["command"].endswith("--vocab-size 512") and r["card"] in shown


def test_dense_and_startup_run(tmp_path, capsys):
    run = ["--backend", "cpu", "--out", str(tmp_path)]
    bench.main(["dense", *run, "--steps", "1", "--warmup", "0", "--rows", "d24, B 32", *TINY])
    bench.main(["startup", *run, "--rows", "lh30", "--repeats", "2", *TINY])
    dense, startup = results_of(tmp_path)
    assert dense["row"] == "d24, B 32, T 1,024" and "train_gpt_dense_cpu" in dense["trainer"]
    assert len(dense["ms"]["dense"]) == 1
    assert len(startup["starts"]) == 2
    for start in startup["starts"]:
        assert 0 < start["first_ms"] / 1e3 < start["s"] < 60 and len(start["ms"]) == 2
    assert capsys.readouterr().out.count("| lh30, T 98,304, both phases |") == 2


def test_cost_runs(tmp_path, capsys):
    arguments = ["--doublings", "2", "--cost-tokens", "8192", "--steps", "1", "--max-seconds", "0"]
    bench.main(["cost", "--backend", "cpu", "--out", str(tmp_path), *arguments, *TINY])  # TINY's length, not 8,192
    first, second = results_of(tmp_path)
    assert set(first["ms"]) == {"first", "dense"} and set(second["ms"]) == {"first"}
    assert "left out: too long" in capsys.readouterr().out
    assert "--attention L" in first["trainer"] and second["shape"]["attention"] == "LL"


def test_context_runs(tmp_path, capsys, monkeypatch):
    fits = bench.fits
    monkeypatch.setattr(bench, "fits", lambda command: fits(command) if int(bench.option(command, "seq-len", 0)) <= 1024
                        else (False, "error: too few"))
    monkeypatch.setattr(bench, "CONTEXT_ROWS", (("d6", 512, 512, SMALL),))
    bench.main(["context", "--backend", "cpu", "--unit", "256", "--top", "4096", "--out", str(tmp_path)])
    r, = results_of(tmp_path)
    assert r["T"] == 1024 and r["memory"].startswith("memory ")
    assert [p["T"] for p in r["proofs"]] == [1024] and set(r["proofs"][0]["ms"]) == {"first", "dense"}
    assert "| d6 | **1,024** (at least 512) | 256 | at 1,024: first " in capsys.readouterr().out


def test_a_failing_trainer_is_named(tmp_path, monkeypatch):
    message = refused("step", "--backend", "cpu", "--out", tmp_path, "--", "--model", "d6", "--heads", "7")
    assert "ended after 0 of" in message and "not divisible by --heads 7" in message
    monkeypatch.setattr(bench, "ROOT", str(tmp_path))
    assert "build it with make" in refused("step", "--backend", "cpu", "--out", tmp_path)
