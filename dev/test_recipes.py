"""Proves the recipes for many GPUs: what each hands to mpirun or srun, that the trainer takes those options, and that a
preempted Slurm job requeues itself. The launchers are stand-ins that write down how they were called.

    python -m pytest dev/test_recipes.py        (make builds the CPU trainer first)
"""
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ["run_lh30_98k", "run_mpi_98k", "run_multinode_98k", "slurm_98k.sbatch"]
LAUNCHER = r'''#!/bin/sh
printf '%s\n' "$@" > "$CALLS/$(basename "$0")"
env | grep "^NCCL_" > "$CALLS/variables"
[ -z "$START" ] || {
    while [ "$1" != "$TRAINER" ]; do shift; done
    exec "$@"
}
exit "${STATUS:-0}"
'''


class Recipes:
    def __init__(self, folder):
        self.folder, self.calls, self.data = folder, folder / "calls", folder / "data"
        self.calls.mkdir()
        self.data.mkdir()
        (self.data / "manifest.json").write_text("{}")
        for name in ("mpirun", "srun", "scontrol", "nvidia-smi"):
            (folder / name).write_text(LAUNCHER)
            (folder / name).chmod(0o755)

    def run(self, name, *options, cwd=None, **environment):
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("NCCL_", "SLURM_", "LD_LIBRARY_PATH"))}
        env = dict(clean, PATH=f"{self.folder}:{os.environ['PATH']}", CALLS=self.calls, DATA=self.data,
                   SLURM_SUBMIT_DIR=ROOT, SLURM_JOB_ID="77", **environment)
        return subprocess.run([("bash" if str(name).endswith("sbatch") else "sh"), ROOT / "scripts" / name, *options],
                              env={k: str(v) for k, v in env.items()}, capture_output=True, text=True, timeout=60,
                              cwd=cwd)

    def called(self, launcher):
        """The words that it was started with, and those of the trainer; the variables that it saw."""
        words, variables = ((self.calls / name).read_text().splitlines() for name in (launcher, "variables"))
        at = words.index("./train_gpt_lighthouse") if "./train_gpt_lighthouse" in words else len(words)
        return " ".join(words[:at]), words[at + 1:], variables


@pytest.fixture
def recipes(tmp_path):
    return Recipes(tmp_path)


def last(options, name):
    """The value that the trainer takes: of an option given twice, the later."""
    return [b for a, b in zip(options, options[1:]) if a == name][-1]


@pytest.mark.parametrize("name", RECIPES)
def test_syntax(name):
    path = ROOT / "scripts" / name
    assert subprocess.run(["bash" if name.endswith("sbatch") else "sh", "-n", path]).returncode == 0
    assert os.access(path, os.X_OK) or name.endswith("sbatch")


def test_one_host(recipes):
    assert recipes.run("run_mpi_98k", "--steps", "9", NPROC=4, CP=2).returncode == 0
    launch, options, _ = recipes.called("mpirun")
    assert launch == "-n 4 --bind-to none"
    assert options[:2] == ["--train-data", f"{recipes.data}/train_*.bin"], "a glob is not for the shell"
    assert {n: last(options, n) for n in ("--model", "--seq-len", "--cp", "--steps", "--switch-step", "--out-dir")} == {
        "--model": "lh30", "--seq-len": "98304", "--cp": "2", "--steps": "9", "--switch-step": "10000",
        "--out-dir": "runs/mpi_98k"}


def test_one_host_takes_all_gpus(recipes):
    (recipes.folder / "nvidia-smi").write_text("#!/bin/sh\nprintf 'GPU 0: A\\nGPU 1: A\\n'\n")
    assert recipes.run("run_mpi_98k", OUT="elsewhere").returncode == 0
    launch, options, _ = recipes.called("mpirun")
    assert launch.startswith("-n 2 ") and last(options, "--cp") == "1" and last(options, "--out-dir") == "elsewhere"
    (recipes.folder / "nvidia-smi").write_text("#!/bin/sh\nexit 1\n")
    refused = recipes.run("run_mpi_98k")
    assert refused.returncode == 1 and "NPROC" in refused.stderr


def test_several_hosts(recipes):
    hosts = recipes.folder / "hosts"
    hosts.write_text("# two kinds\nnode1 slots=8\nnode2 slots=4 max_slots=4\n\nnode3\n")
    assert recipes.run("run_multinode_98k", HOSTFILE=hosts, IFNAME="eth1", CP=4, NCCL_NVLS_ENABLE=0,
                       LD_LIBRARY_PATH="/opt/lib").returncode == 0
    launch, options, variables = recipes.called("mpirun")
    assert launch == (f"-n 13 --hostfile {hosts} --map-by slot --bind-to none --mca btl ^openib "
                      "--mca btl_tcp_if_include eth1 --mca oob_tcp_if_include eth1 -x LD_LIBRARY_PATH "
                      "-x NCCL_NVLS_ENABLE -x NCCL_SOCKET_IFNAME")
    assert sorted(variables) == ["NCCL_NVLS_ENABLE=0", "NCCL_SOCKET_IFNAME=eth1"] and last(options, "--cp") == "4"
    assert recipes.run("run_multinode_98k", HOSTFILE=hosts).returncode == 0
    assert recipes.called("mpirun")[0].endswith("--mca btl ^openib")
    assert recipes.run("run_multinode_98k", HOSTFILE="hosts", cwd=recipes.folder).returncode == 0
    assert f"--hostfile {hosts} " in recipes.called("mpirun")[0], "a relative name is that of the caller's folder"
    refused = recipes.run("run_multinode_98k")
    assert refused.returncode == 1 and "HOSTFILE" in refused.stderr


@pytest.mark.parametrize("holds,prepares", [([], True), (["manifest.json"], False), (["train_000000.bin"], False),
                                            (["train_000000.bin", "progress.json"], True), (["val_0.bin"], True)])
def test_shards_of_ones_own_are_left_alone(recipes, tmp_path, holds, prepares):
    """The preparation is a stand-in, in a copy of the scripts: where it is called, the run ends with its status."""
    (recipes.data / "manifest.json").unlink()
    for name in holds:
        (recipes.data / name).touch()
    copy = tmp_path / "copy"
    shutil.copytree(ROOT / "scripts", copy / "scripts")
    (copy / "data").mkdir()
    (copy / "data" / "prepare.py").write_text("raise SystemExit(9)")
    done = recipes.run(copy / "scripts" / "run_lh30_98k", LAUNCH="true")
    assert done.returncode == (9 if prepares else 0), done.stderr


def test_slurm(recipes):
    done = recipes.run("slurm_98k.sbatch", "--val-every", "100", CP=8)
    assert done.returncode == 0, done.stderr
    launch, options, _ = recipes.called("srun")
    assert launch == "--mpi=pmix --distribution=block --kill-on-bad-exit=1"
    assert last(options, "--resume") == "1" and last(options, "--cp") == "8" and last(options, "--val-every") == "100"
    assert not (recipes.calls / "scontrol").exists()


@pytest.mark.parametrize("status,again", [(143, True), (1, False), (137, False)])
def test_slurm_requeues_what_sigterm_stopped(recipes, status, again):
    """128 + SIGTERM is the trainer's status after its checkpoint; an error or a killed rank is not tried again."""
    done = recipes.run("slurm_98k.sbatch", STATUS=status)
    assert done.returncode == status
    assert (recipes.calls / "scontrol").exists() == again
    if again:
        assert recipes.called("scontrol")[0] == "requeue 77"


def test_slurm_lines():
    """sbatch reads its options down to the first command."""
    text = (ROOT / "scripts" / "slurm_98k.sbatch").read_text()
    head, rest = text.split("trap ", 1)
    assert "#SBATCH --signal=TERM@120" in head and "#SBATCH --requeue" in head and "#SBATCH" not in rest


@pytest.mark.parametrize("name", ["run_mpi_98k", "slurm_98k.sbatch"])
def test_the_trainer_takes_the_options(recipes, name):
    """The CPU trainer plans the run for eight ranks, at a size that fits here."""
    from test_trainer import write_shard
    for part in ("train_0.bin", "val_0.bin"):
        write_shard(recipes.data / part, range(4097))
    done = recipes.run(name, "--dry-run", "--plan-ranks", "8", "--depth", "6", "--channels", "64", "--seq-len", "4096",
                       NPROC=8, CP=4, START="yes", TRAINER="./train_gpt_lighthouse_cpu", OMP_NUM_THREADS=1)
    assert done.returncode == 0, done.stderr
    assert "16000 steps" in done.stdout and "attention   steps 0 to 9999" in done.stdout
