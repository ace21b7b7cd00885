"""Proves that scripts/export_log hands TensorBoard and W&B what a log holds, once, and follows a log that grows.

    python3 -m pytest dev/test_export_log.py

Both are the real packages; what they wrote is read back with TensorBoard's own reader, and out of W&B's files.
"""
import glob
import importlib.machinery
import importlib.util
import json
import os
import subprocess
import sys
import time

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SCRIPT = os.path.join(ROOT, "scripts", "export_log")


def config(start="2026-01-01T00:00:00Z"):
    return {"event": "config", "program": "lighthouse", "version": 2, "time": start, "options": {"steps": "6"}}


def step(n, loss, wall=None):
    return {"event": "step", "step": n, "loss": loss, "lr": 1e-3, "phase": "dense", "skipped": False,
            "wall_s": n if wall is None else wall}


def evaluation(n, loss):
    return {"event": "eval", "step": n, "loss_dense": loss, "loss_first": None, "positions_dense": [3.0, 2.0, None, 1.5],
            "wall_s": n}


COPYING = {"event": "copying", "step": 3, "copies": [{"distance": 1024, "text_loss": 0.5}, {"distance": 4096,
                                                                                            "text_loss": 0.7}]}
SAMPLE = {"event": "sample", "step": 3, "text": "a < b"}


def write(path, events, mode="w"):
    path.parent.mkdir(exist_ok=True, parents=True)
    with open(path, mode) as f:
        f.write("".join(e if isinstance(e, str) else json.dumps(e) + "\n" for e in events))


def export(*args, cwd):
    return subprocess.run([sys.executable, SCRIPT, *map(str, args)], capture_output=True, text=True, cwd=cwd,
                          timeout=120)


def curves(folder):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    seen = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    seen.Reload()
    return seen


def values(seen, tag):
    assert tag in seen.Tags()["scalars"], tag
    return [(s.step, round(s.value, 5)) for s in seen.Scalars(tag)]


def test_tensorboard_gets_every_number_at_its_time(tmp_path):
    log = tmp_path / "run" / "log.jsonl"
    write(log, [config(), evaluation(0, 5.0)] + [step(n, 5 - n / 10) for n in range(1, 4)] +
          [evaluation(3, 4.5), COPYING, SAMPLE, {"event": "total", "steps": 3}])
    for _ in range(2):  # the second call replaces what the first wrote
        done = export(tmp_path / "run", "--tensorboard", tmp_path / "tb", cwd=tmp_path)
        assert done.returncode == 0 and done.stdout == f"{log}: up to step 3\n", done.stderr
    seen = curves(tmp_path / "tb" / "run")
    assert values(seen, "step/loss") == [(1, 4.9), (2, 4.8), (3, 4.7)]
    assert values(seen, "eval/loss_dense") == [(0, 5.0), (3, 4.5)]
    assert [values(seen, f"eval/positions_dense/from_{n}")[0][1] for n in (1, 2, 8)] == [3.0, 2.0, 1.5]
    assert values(seen, "copying/copies/4096/text_loss") == [(3, 0.7)]
    assert "eval/loss_first" not in seen.Tags()["scalars"] and "step/phase" not in seen.Tags()["scalars"]
    assert set(seen.Tags()["tensors"]) == {"config", "sample"}
    assert seen.Tensors("sample")[0].tensor_proto.string_val[0] == b"a < b"
    assert [s.wall_time - 1767225600 for s in seen.Scalars("step/loss")] == [1.0, 2.0, 3.0]  # the first has wall_s 0


@pytest.mark.parametrize("back", [[{"event": "resume", "step": 2}, config(), step(3, 1.0), step(4, 1.1)],
                                  [step(3, 1.0), step(4, 1.1)]])
def test_what_a_resumed_run_left_is_not_shown(tmp_path, back):
    log = tmp_path / "run" / "log.jsonl"
    write(log, [config()] + [step(n, 5.0) for n in range(1, 7)] + [evaluation(6, 9.0)] + back)
    assert export(log, "--tensorboard", tmp_path / "tb", cwd=tmp_path).returncode == 0
    seen = curves(tmp_path / "tb" / "run")
    assert values(seen, "step/loss") == [(1, 5.0), (2, 5.0), (3, 1.0), (4, 1.1)]
    assert "eval/loss_dense" not in seen.Tags()["scalars"]


def script_as_a_module(monkeypatch):
    loader = importlib.machinery.SourceFileLoader("export_log", SCRIPT)
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("export_log", loader))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    loader.exec_module(module)
    return module


def test_a_log_may_begin_anew(tmp_path, monkeypatch):
    """Cut and written again in the same file, or in another of its name: a new run's events are read from the first on."""
    path, log = tmp_path / "run" / "log.jsonl", None
    for n, anew in ((3, False), (2, False), (1, True)):
        if anew:
            path.unlink()
        write(path, [step(i, 1.0) for i in range(n)])
        log = log or script_as_a_module(monkeypatch).Log(str(path))
        assert [e["step"] for e in log.events()] == list(range(n)) and log.events() == []


@pytest.mark.parametrize("step_of_resume,backs", [(2, []), (1, [1])])
def test_a_resumed_run_goes_on_at_its_own_time(monkeypatch, step_of_resume, backs):
    """Its wall_s counts what ran before, but its time is that of its config line. Nothing is taken back unless it went back."""
    module, taken_back, times = script_as_a_module(monkeypatch), [], {}

    class Sink:
        def add(self, when, step, values=(), text=None):
            times[step] = when - 1767225600

        def back(self, step):
            taken_back.append(step)

        def flush(self):
            pass

    log = [config(), step(1, 5.0, 1), step(2, 4.0, 3), config("2026-01-02T00:00:00Z"),
           {"event": "resume", "step": step_of_resume}, step(step_of_resume + 1, 3.0, 100), step(step_of_resume + 2, 2.0, 102)]
    module.send(log, Sink(), module.Clock(), -1)
    day = 24 * 3600
    assert taken_back == backs
    assert (times[step_of_resume + 1], times[step_of_resume + 2]) == (day, day + 2) and times[1] == 0


def wait_for(condition):
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it did not come within 30 s")


def test_it_follows_a_run(tmp_path):
    """Half a line is waited for, a resume while it follows takes back what was shown, the end of the run ends it."""
    log = tmp_path / "run" / "log.jsonl"
    write(log, [config(), step(1, 5.0), json.dumps(step(2, 4.0))[:20]])
    process = subprocess.Popen([sys.executable, SCRIPT, tmp_path / "run", "--tensorboard", tmp_path / "tb", "--follow"],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        def shown():
            if os.path.isdir(tmp_path / "tb" / "run"):
                seen = curves(tmp_path / "tb" / "run")
                return "step/loss" in seen.Tags()["scalars"] and values(seen, "step/loss")

        wait_for(lambda: shown() == [(1, 5.0)])
        write(log, [json.dumps(step(2, 4.0))[20:] + "\n", step(3, 3.0)], "a")
        wait_for(lambda: shown() == [(1, 5.0), (2, 4.0), (3, 3.0)])
        write(log, ['{"cut', "\n", {"event": "resume", "step": 1}, config(), step(2, 8.0)], "a")
        wait_for(lambda: shown() == [(1, 5.0), (2, 8.0)])
        write(log, [{"event": "total", "steps": 2}], "a")
        out, err = process.communicate(timeout=30)
        assert process.returncode == 0 and out == f"{log}: up to step 2; 1 lines are no events and are left out\n", err
    finally:
        process.kill()


def test_wandb_offline(tmp_path):
    pytest.importorskip("wandb")
    losses = 4.2587890625, 7.5126953125  # which stand nowhere else in the files
    for name, loss in zip("ab", losses):
        write(tmp_path / name / "log.jsonl", [config(), step(1, loss), evaluation(1, 3.5), SAMPLE])
    done = subprocess.run([sys.executable, SCRIPT, "a", "b", "--wandb", "project"], capture_output=True, text=True,
                          cwd=tmp_path, timeout=120, env={**os.environ, "WANDB_DIR": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    files = [open(f, "rb").read() for f in sorted(glob.glob(str(tmp_path / "wandb" / "offline-run-*" / "*.wandb")))]
    assert len(files) == 2
    a, b = (str(loss).encode() for loss in losses)
    for loss, other in ((a, b), (b, a)):
        own = [f for f in files if loss in f]
        assert len(own) == 1 and other not in own[0] and b"step/loss" in own[0] and b"eval/loss_dense" in own[0]


@pytest.mark.parametrize("args,code,message", [
    (["none", "--tensorboard", "x"], 1, "export_log: none: No such file"),
    (["run"], 2, "name one of --tensorboard DIR and --wandb PROJECT"),
    (["run", "--wandb", "a/b"], 2, "--wandb a/b: the name of a project has none of"),
    (["run", "run", "--tensorboard", "x"], 1, "two runs have the same name, run")])
def test_usage(tmp_path, args, code, message):
    write(tmp_path / "run" / "log.jsonl", [config()])
    done = export(*args, cwd=tmp_path)
    assert done.returncode == code and message in done.stderr and "Traceback" not in done.stderr
