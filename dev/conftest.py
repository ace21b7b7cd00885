"""For every pytest file here: no test waits for ever, or depends on signals that whoever started pytest ignores."""
import glob
import os
import signal

import pytest

LIMIT_S = 600  # the slowest test takes about a minute on one core

# Under nohup, or behind `&` in a script, these are ignored, and so they would be in the programs that the tests start.
for number in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def command_lines():
    """Of all processes, read without ps, which a small system does not have."""
    found = []
    for path in glob.glob("/proc/[0-9]*/cmdline"):
        try:
            with open(path, "rb") as f:
                found.append(f.read().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:
            pass  # it has ended
    return found


@pytest.fixture(autouse=True)
def limit():
    """A test that takes longer fails, and what it started and left behind is killed."""
    def late(number, frame):
        raise TimeoutError(f"the test took more than {LIMIT_S} s")
    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(LIMIT_S)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
    with open(f"/proc/{os.getpid()}/task/{os.getpid()}/children") as f:
        for child in f.read().split():
            os.kill(int(child), signal.SIGKILL)
