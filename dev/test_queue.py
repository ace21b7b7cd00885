"""Proves that dev/evidence/queue makes the runs of a list within its limit, goes on with them in the next call, and writes
down of each what its log says. The trainer is a stand-in that takes as long as it is told."""
import importlib.machinery
import importlib.util
import json
import os
import sys
import time
import types

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
FASTER = 20  # the queue's clock: 20 of its seconds are one

# Its loss is the step, but 1,000 more in steps 2 and 3 of a new run, behind which it takes its time; at SIGTERM it writes a
# checkpoint, as the trainer does.
STAND_IN = """
import glob, json, os, signal, sys, time
seconds, steps = float(sys.argv[1]), int(sys.argv[2])
out = sys.argv[sys.argv.index("--out-dir") + 1]
assert sys.argv[sys.argv.index("--resume") + 1] == "1"
def stop(number, frame):
    open(out + "/ckpt_00000003.bin", "w").close()
    sys.exit(128 + number)
signal.signal(signal.SIGTERM, stop)
resumed = glob.glob(out + "/ckpt_*")
with open(out + "/log.jsonl", "a") as log:
    def say(event, **fields):
        print(json.dumps(dict(event=event, **fields)), file=log, flush=True)
    say("config", device=os.environ["CUDA_VISIBLE_DEVICES"], attention="WD", steps=steps, switch_step=2,
        time="2026-01-01T00:00:00Z", windows=[[16, 0]], lighthouse=None)
    for step in range(2 if resumed else 1, 4):
        say("step", step=step, loss=float(step + 1000 * (not resumed and step > 1)))
    time.sleep(0 if resumed else seconds)
    for step in range(4, steps + 1):
        say("step", step=step, loss=float(step))
    say("eval", step=2, loss_dense=2.5, loss_first=1.5, train_s=1.0)
    say("eval", step=steps, loss_dense=1.25, loss_first=None, train_s=2.0)
    say("copying", step=steps, copies=[dict(distance=64, text_loss=3.0, random_loss=4.0)])
    say("total", steps=steps, phases=dict(first=dict(steps=2, seconds=1.0), dense=dict(steps=0, seconds=0.0)))
open(out + "/model.bin", "w").close()
sys.exit(int(sys.argv[3]) if sys.argv[3:4] and sys.argv[3].isdigit() else 0)
"""


@pytest.fixture
def queue(tmp_path, monkeypatch):
    """queue(jobs, *options): calls it with a list of (name, estimate, seconds, steps); {name: result} of its file."""
    loader = importlib.machinery.SourceFileLoader("queue_of_runs", os.path.join(ROOT, "dev/evidence/queue"))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("queue_of_runs", loader))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    loader.exec_module(module)
    module.time = types.SimpleNamespace(time=lambda: FASTER * time.time(), sleep=lambda s: time.sleep(s / FASTER))
    (tmp_path / "stand_in.py").write_text(STAND_IN)

    def call(jobs, *options):
        lines = [f"{name} | {estimate} | {sys.executable} {tmp_path}/stand_in.py {seconds} {steps}  # a comment"
                 for name, estimate, seconds, steps in jobs]
        (tmp_path / "jobs.txt").write_text("\n".join(["# all runs", "", *lines]) + "\n")
        monkeypatch.setattr(sys, "argv", ["queue", str(tmp_path / "jobs.txt"), "--work", str(tmp_path / "work"),
                                          *map(str, options)])
        module.main()
        return {r["name"]: r for r in map(json.loads, open(tmp_path / "work/results.jsonl"))}
    return call


def test_what_is_written_down(queue, tmp_path, capsys):
    result = queue([("a", 5, 0, 250), ("b", 5, 0, 4)], "--limit", 500, "--gpus", "0,1")
    assert sorted(result) == ["a", "b"]
    a = result["a"]
    # Steps 1 to 100, 101 to 200, 201 to 250; two of the first stand at 1,000 more.
    assert a["train"] == [[100, 70.5], [200, 150.5], [300, 225.5]] and result["b"]["train"] == [[100, 502.5]]
    assert (a["attention"], a["windows"], a["steps"], a["switch_step"]) == ("WD", [[16, 0]], 250, 2)
    assert [e["loss_dense"] for e in a["evals"]] == [2.5, 1.25] and a["total"]["steps"] == 250
    assert {result[name]["device"] for name in result} == {"0", "1"}, "each GPU takes one"
    assert sorted(p.name for p in (tmp_path / "work/a").iterdir()) == ["done", "log.jsonl", "screen.txt"]
    rows = capsys.readouterr().out.splitlines()
    assert rows[0] == (f"{'a':20s} 1.2500 3.00 | 4.00 | at the switch 1.5000, dense 2.5000 | first 500.0 ms | 2 s")
    # A run that has ended is not made again; what another file has results of is left out, if the run came to its end.
    log = (tmp_path / "work/a/log.jsonl").read_bytes()
    assert queue([("a", 5, 0, 250)], "--limit", 500, "--gpus", "0") == {"a": a}
    assert (tmp_path / "work/a/log.jsonl").read_bytes() == log
    (tmp_path / "before.jsonl").write_text(json.dumps(a) + "\n" + json.dumps(dict(a, name="d", total=None)) + "\n")
    assert list(queue([("a", 5, 0, 250), ("c", 5, 0, 4), ("d", 5, 0, 4)], "--limit", 500, "--gpus", "0", "--skip",
                      tmp_path / "before.jsonl")) == ["c", "d"]


def test_the_limit_and_the_next_call(queue, tmp_path):
    """A run at the limit is stopped, none is begun in the last 25 s, and the next call resumes it. A step that it makes
    again counts as it was last."""
    jobs = [("long", 60, 9, 4), ("behind", 5, 0, 4)]
    result = queue(jobs, "--limit", 60, "--gpus", "0")
    assert list(result) == ["long"] and result["long"]["total"] is None and result["long"]["train"] == [[100, 668.66667]]
    assert (tmp_path / "work/long/ckpt_00000003.bin").exists() and not (tmp_path / "work/long/done").exists()
    result = queue(jobs, "--limit", 500, "--gpus", "0")
    assert result["long"]["train"] == [[100, 2.5]] and result["long"]["total"] and result["behind"]["total"]
    assert sorted(p.name for p in (tmp_path / "work/long").iterdir()) == ["done", "log.jsonl", "screen.txt"]


def test_nothing_is_begun_in_the_last_seconds(queue):
    """What would be stopped within 25 s is left to the next call."""
    assert list(queue([("slow", 60, 3, 4), ("behind", 5, 0, 4)], "--limit", 80, "--gpus", "0")) == ["slow"]


def test_final_begins_nothing_that_would_not_end(queue):
    """The second would end in time if the first had not run before it; the third still does."""
    result = queue([("first", 20, 1, 4), ("second", 195, 0, 4), ("third", 20, 0, 4)], "--limit", 200, "--gpus", "0",
                   "--final")
    assert list(result) == ["first", "third"]


def test_a_run_that_fails_is_named(queue, capsys):
    queue([("bad", 5, 0, "4 3"), ("good", 5, 0, 4)], "--limit", 500, "--gpus", "0")
    assert capsys.readouterr().out.startswith("bad: status 3: ")
