"""Shows that dev/leak.py tells apart the attention that sees the future from those that do not, for every kind that the
trainer has, and that its exit status follows. A kind that is added to --attention is tested by its letter alone."""
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

import leak

ROOT = Path(__file__).resolve().parent.parent


def run(*arguments):
    return subprocess.run([sys.executable, str(ROOT / "dev/leak.py"), *arguments], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, universal_newlines=True, timeout=600)


@pytest.mark.parametrize("kind", leak.kinds())
def test_every_kind(kind):
    subprocess.run(["make", "train_gpt_lighthouse_cpu"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    done = run("--attention", kind)
    assert done.returncode == 0, done.stdout + done.stderr
    name, under, dense = done.stdout.splitlines()[-1].split()[:3]
    assert name == kind
    if kind == "L":  # it sees much here, and what it learned to see is lost under dense attention
        assert float(under) < math.log(4) - 0.03 and float(dense) > math.log(4) + 0.03
    else:
        assert abs(float(under) - math.log(4)) < leak.TOLERANCE


@pytest.mark.parametrize("kind,loss,code", [("W", 1.36, 1), ("W", 1.385, 0), ("L", 1.36, 0), ("L", 1.39, 1),
                                            ("DL", 1.39, 0)])
def test_exit_status(tmp_path, kind, loss, code):
    trainer = tmp_path / "trainer"
    trainer.write_text(f"""#!/usr/bin/env python3
import sys
from pathlib import Path
folder = Path([x.split("=")[1] for x in sys.argv if x.startswith("--out-dir")][0])
folder.mkdir()
(folder / "log.jsonl").write_text('{{"event":"eval","loss_dense":1.4,"loss_first":{loss}}}')
""")
    os.chmod(trainer, 0o755)
    done = run("--trainer", str(trainer), "--attention", kind)
    assert done.returncode == code, done.stdout + done.stderr


def test_failed_trainer(tmp_path):
    done = run("--attention", "X")
    assert done.returncode and "--attention" in done.stderr
