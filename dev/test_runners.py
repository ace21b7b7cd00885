"""Proves that the runners of the tests hide nothing: dev/run_one counts and names what failed, was skipped or could not start;
dev/conftest.py ends a test that hangs, and heeds no signals that whoever started pytest ignores.

    python -m pytest dev/test_runners.py
"""
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

DEV = Path(__file__).resolve().parent


@pytest.mark.parametrize("program,row,shown", [
    ("echo 12 passed, 0 failed", (12, 0), ""),
    ("echo FAIL x: 1 not 2; echo 3 passed, 2 failed; exit 1", (3, 2), "FAIL x: 1 not 2"),
    ("echo 3 passed, 0 failed; exit 1", (3, 1), "3 passed, 0 failed"),
    ("echo FAILED t.py::a - why; echo ERROR t.py::b; echo 1 failed, 4 passed, 1 error in 2.00s; exit 1", (4, 2), "ERROR t.py::b"),
    ("echo 'SKIPPED [1] t.py:3: there is no MPI'; echo 4 passed, 1 skipped in 2.00s", (4, 1), "there is no MPI"),
    ("echo 2 errors in 0.10s; exit 2", (0, 2), "2 errors in"),
    ("echo no tests ran in 0.01s; exit 5", (0, 1), "no tests ran"),
    ("true", (0, 1), ""),
    ("echo cannot open libx.so >&2; exit 127", (0, 1), "cannot open libx.so"),
    ("kill -s SEGV $$", (0, 1), "exit status 139")])
def test_run_one_counts_and_shows(tmp_path, program, row, shown):
    (tmp_path / "dev").mkdir()
    shutil.copy(DEV / "run_one", tmp_path / "dev")
    (tmp_path / "program").write_text(program + "\n")
    done = subprocess.run(["sh", "-c", ". dev/run_one; run_one name sh program; finish_tests"], cwd=tmp_path, text=True, capture_output=True)
    lines = done.stdout.splitlines()
    assert lines[0].split()[:5] == ["name", str(row[0]), "passed", str(row[1]), "failed"], done.stdout
    assert lines[-1] == f"{row[0]} passed, {row[1]} failed" and (done.returncode == 0) == (row[1] == 0)
    assert shown in "\n".join(lines[1:-2]) and (len(lines) == 3) == (row[1] == 0), done.stdout


def test_a_test_that_hangs_fails_alone(tmp_path):
    """And what it started is killed; the next one runs. Signals that are ignored, as under nohup, are not in here."""
    (tmp_path / "conftest.py").write_text((DEV / "conftest.py").read_text().replace("LIMIT_S = 600", "LIMIT_S = 1"))
    (tmp_path / "test_x.py").write_text(
        "import os, signal, subprocess\n"
        "def test_hangs():\n    subprocess.Popen(['sleep', '4321'])\n    signal.pause()\n"
        "def test_follows():\n    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler\n"
        "    with open('/proc/self/status') as f:\n        ignored = next(int(x.split()[1], 16) for x in f if x.startswith('SigIgn'))\n"
        "    assert not ignored & 7\n")
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_x.py"], cwd=tmp_path, text=True,
                          stdout=subprocess.PIPE, timeout=60,
                          preexec_fn=lambda: [signal.signal(n, signal.SIG_IGN) for n in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)])
    assert "1 failed, 1 passed" in done.stdout and "the test took more than 1 s" in done.stdout, done.stdout
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            assert path.read_bytes() != b"sleep\x004321\x00"
        except OSError:
            pass  # it has ended
