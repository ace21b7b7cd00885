"""Proves the recipes for many GPUs: what each hands to mpirun or srun, that the trainer takes those options, and that a
preempted Slurm job requeues itself and a cancelled one does not. The launchers are stand-ins that write down how they
were called; the last tests run a Slurm of one node from Debian's packages, where they can be had.

    python -m pytest dev/test_recipes.py        (make builds the CPU trainer first)
"""
import os
import re
import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ["run_lh30_98k", "run_mpi_98k", "run_multinode_98k", "slurm_98k.sbatch"]
LAUNCHER = r'''#!/bin/sh
[ "$1" != show ] || { echo "JobId=77 JobName=lh30_98k"; echo "   JobState=${STATE:-RUNNING} Reason=None"; exit 0; }
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
        (self.data / "train_000000.bin").touch()
        for name in ("mpirun", "srun", "scontrol", "nvidia-smi"):
            (folder / name).write_text(LAUNCHER)
            (folder / name).chmod(0o755)

    def run(self, name, *options, cwd=None, **environment):
        others = ("NCCL_", "SLURM_", "LD_LIBRARY_PATH", "CUDA_")
        clean = {k: v for k, v in os.environ.items() if not k.startswith(others)}
        env = dict(clean, PATH=f"{self.folder}:{os.environ['PATH']}", CALLS=self.calls, SLURM_SUBMIT_DIR=ROOT,
                   SLURM_JOB_ID="77", **{"DATA": self.data, **environment})
        return subprocess.run([("bash" if str(name).endswith("sbatch") else "sh"), ROOT / "scripts" / name, *options],
                              env={k: str(v) for k, v in env.items()}, capture_output=True, text=True, timeout=60,
                              cwd=cwd)

    def called(self, launcher):
        """The words that it was started with, and those of the trainer; the variables that it saw."""
        words, variables = ((self.calls / name).read_text().splitlines() for name in (launcher, "variables"))
        at = next((i for i, w in enumerate(words) if w.endswith("/train_gpt_lighthouse")), len(words))
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
        "--out-dir": f"{ROOT}/runs/mpi_98k"}


def test_one_host_takes_all_gpus(recipes):
    (recipes.folder / "nvidia-smi").write_text("#!/bin/sh\nprintf 'GPU 0: A\\nGPU 1: A\\n'\n")
    assert recipes.run("run_mpi_98k", OUT="elsewhere").returncode == 0
    launch, options, _ = recipes.called("mpirun")
    assert launch.startswith("-n 2 ") and last(options, "--cp") == "1"
    assert last(options, "--out-dir") == f"{os.getcwd()}/elsewhere"
    assert recipes.run("run_mpi_98k", CUDA_VISIBLE_DEVICES="1").returncode == 0
    assert recipes.called("mpirun")[0].startswith("-n 1 ")
    for none in ("", "-1"):
        refused = recipes.run("run_mpi_98k", CUDA_VISIBLE_DEVICES=none)
        assert refused.returncode == 1 and "NPROC" in refused.stderr
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


@pytest.mark.parametrize("name", ["run_lh30_98k", "run_mpi_98k", "run_multinode_98k"])
def test_relative_paths_are_the_callers(recipes, name):
    """DATA and OUT are not looked for beside the scripts, where the kernel's sources would be taken instead."""
    (recipes.folder / "hosts").write_text("node1 slots=2\n")
    more = {"LAUNCH": "mpirun"} if name == "run_lh30_98k" else {}
    done = recipes.run(name, cwd=recipes.folder, DATA="data", OUT="my run", HOSTFILE="hosts", NPROC=2, **more)
    assert done.returncode == 0, done.stderr
    options = recipes.called("mpirun")[1]
    assert [last(options, n) for n in ("--train-data", "--val-data", "--out-dir")] == [
        f"{recipes.data}/train_*.bin", f"{recipes.data}/val_*.bin", f"{recipes.folder}/my run"]
    assert last(options, "--out-dir") != recipes.folder / "runs"


@pytest.mark.parametrize("holds,prepares", [([], True), (["manifest.json"], False), (["val_0.bin"], True),
                                            (["train_000000.bin", "progress.json"], True)])
def test_what_is_prepared(recipes, tmp_path, holds, prepares):
    """The kernel's sources, where no DATA is named: until they are complete. The preparation is a stand-in, in a copy
    of the scripts: where it is called, the run ends with its status."""
    copy = tmp_path / "copy"
    shutil.copytree(ROOT / "scripts", copy / "scripts")
    default = copy / "data" / "linux_gpt2_all"
    default.mkdir(parents=True)
    (copy / "data" / "prepare.py").write_text("raise SystemExit(9)")
    for name in holds:
        (default / name).touch()
    done = recipes.run(copy / "scripts" / "run_lh30_98k", LAUNCH="true", DATA="", TRAINER="true")
    assert done.returncode == (9 if prepares else 0), done.stderr
    done = recipes.run(copy / "scripts" / "run_lh30_98k", DATA="")  # without the program nothing is downloaded either
    assert done.returncode == (1 if prepares else 127) and f"{copy}/train_gpt_lighthouse" in done.stderr
    for name in holds:  # the same in a folder that is named: nothing is prepared there
        (recipes.data / name).touch()
    (recipes.data / "train_000000.bin").unlink()
    done = recipes.run(copy / "scripts" / "run_lh30_98k", LAUNCH="true")
    assert done.returncode == 1 and f"DATA={recipes.data} holds no train_*.bin" in done.stderr


def test_slurm(recipes):
    done = recipes.run("slurm_98k.sbatch", "--val-every", "100", CP=8)
    assert done.returncode == 0, done.stderr
    launch, options, _ = recipes.called("srun")
    assert launch == "--mpi=pmix --distribution=block --kill-on-bad-exit=1"
    assert last(options, "--resume") == "1" and last(options, "--cp") == "8" and last(options, "--val-every") == "100"
    assert not (recipes.calls / "scontrol").exists()


@pytest.mark.parametrize("status,state,again", [(143, "RUNNING", True), (143, "COMPLETING", False), (143, "", False),
                                                (1, "RUNNING", False), (137, "RUNNING", False)])
def test_slurm_requeues_what_sigterm_stopped(recipes, status, state, again):
    """128 + SIGTERM is the trainer's status after its checkpoint; an error or a killed rank is not tried again, and
    what was cancelled is not either."""
    done = recipes.run("slurm_98k.sbatch", STATUS=status, STATE=state or "UNKNOWN")
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
    for part in ("train_000000.bin", "val_000000.bin"):
        write_shard(recipes.data / part, range(4097))
    done = recipes.run(name, "--dry-run", "--plan-ranks", "8", "--depth", "6", "--channels", "64", "--seq-len", "4096",
                       NPROC=8, CP=4, START="yes", TRAINER="./train_gpt_lighthouse_cpu", OMP_NUM_THREADS=1)
    assert done.returncode == 0, done.stderr
    assert "16000 steps" in done.stdout and "attention   steps 0 to 9999" in done.stdout


# ---- a Slurm of one node

SLURM_PACKAGES = ["liblua5.1-0", "libmunge2", "munge", "slurm-wlm-basic-plugins", "slurm-client", "slurmctld", "slurmd"]
SLURM_CONF = """ClusterName=test
SlurmctldHost={host}(127.0.0.1)
AuthType=auth/none
CredType=cred/none
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/ctld.pid
SlurmdPidFile={folder}/d.pid
SlurmctldPort={port}
SlurmdPort={next_port}
PluginDir={plugins}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
ReturnToService=2
KillWait=10
PropagateResourceLimits=NONE
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=1000 State=UNKNOWN
SchedulerType=sched/backfill
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=low Nodes={host} Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=high Nodes={host} MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


def free_ports():
    with socket.socket() as a, socket.socket() as b:
        a.bind(("127.0.0.1", 0))
        b.bind(("127.0.0.1", 0))
        return a.getsockname()[1], b.getsockname()[1]


class Slurm:
    def __init__(self, folder, root):
        for name in ("state", "spool"):
            (folder / name).mkdir()
        library = next((root / "usr" / "lib").glob("*/slurm-wlm"))
        self.folder, host, (port, next_port) = folder, socket.gethostname().split(".")[0], free_ports()
        (folder / "slurm.conf").write_text(SLURM_CONF.format(host=host, folder=folder, plugins=library, port=port,
                                                             next_port=next_port))
        self.env = dict(os.environ, SLURM_CONF=f"{folder}/slurm.conf", LD_LIBRARY_PATH=f"{library}:{library.parent}",
                        PATH=f"{root}/usr/bin:{root}/usr/sbin:{os.environ['PATH']}", MPI="none",
                        OMP_NUM_THREADS="1", TRAINER="./train_gpt_lighthouse_cpu", DATA=f"{folder}/data")
        if int(re.search(r"(\d+)\.", self.ask("sinfo", "-V")).group(1)) >= 23:  # from there on it needs no cgroups,
            (folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n")     # which a container may not have
        self.daemons, self.log = [], open(folder / "daemons.log", "wb")
        for command in (["slurmctld", "-D", "-c"], ["slurmd", "-D", "-N", host, "-d", root / "usr/sbin/slurmstepd"]):
            self.daemons.append(subprocess.Popen([shutil.which(command[0], path=self.env["PATH"]), *command[1:]],
                                                 env=self.env, stdout=self.log, stderr=self.log))
        self.until(lambda: "idle" in self.ask("sinfo", "-h", "-o", "%t"), "the node is idle")

    def ask(self, *command):
        done = subprocess.run(command, env=self.env, cwd=ROOT, capture_output=True, text=True)
        self.said = done.stderr.strip()
        return done.stdout.strip()

    def until(self, holds, what, seconds=60):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if any(daemon.poll() is not None for daemon in self.daemons):  # its clients would wait for it
                pytest.fail(f"Slurm has ended: {(self.folder / 'daemons.log').read_text()[-1000:]}")
            if holds():
                return
            time.sleep(0.25)
        pytest.fail(f"Slurm: not within {seconds} s: {what}; {self.ask('squeue')}")

    def submit(self, name, *options):
        """The recipe with a tiny model, once it trains; its job and its log."""
        log = self.folder / (name + ".log")
        self.env["OUT"] = str(self.folder / name)
        job = self.ask("sbatch", "--parsable", "--ntasks-per-node=1", "--cpus-per-task=1", "--gpus-per-node=0", "-o",
                       log, *options, "scripts/slurm_98k.sbatch", "--model", "d6", "--depth", "2", "--channels", "32",
                       "--heads", "2", "--seq-len", "256", "--steps", "400000", "--switch-step", "200000",
                       "--warmup-steps", "10", "--val-data", "", "--checkpoint-every", "0")
        assert job.isdigit(), f"sbatch: {self.said}; {(self.folder / 'daemons.log').read_text()[-1000:]}"
        self.until(lambda: log.exists() and re.search("step +5/", log.read_text(errors="replace")), "the job trains")
        return job, log

    def state(self, job):
        return self.ask("squeue", "-h", "-j", job, "-o", "%T")

    def end(self):
        self.ask("scancel", "-u", "root")  # else a job would outlive the daemons
        try:
            self.until(lambda: self.ask("squeue", "-h") == "", "no job is left")
        finally:
            for daemon in self.daemons:
                daemon.terminate()
                daemon.wait(30)
            self.log.close()


@pytest.fixture(scope="module")
def slurm_root(tmp_path_factory):
    """The packages, unpacked without being installed."""
    if os.geteuid() or not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
        pytest.skip("a Slurm of one's own needs root and Debian's packages")
    root, packages = tmp_path_factory.mktemp("root"), tmp_path_factory.mktemp("deb")
    got = subprocess.run(["apt-get", "-q", "download", *SLURM_PACKAGES], cwd=packages, capture_output=True, text=True)
    if got.returncode:
        pytest.skip("Debian's packages of Slurm cannot be had: " + got.stderr.strip()[-200:])
    for package in packages.iterdir():
        subprocess.run(["dpkg-deb", "-x", package, root], check=True)
    for program in (root / "usr" / "sbin").glob("*-wlm"):  # Debian 13's daemons start under their own names only
        program.with_name(program.name[:-len("-wlm")]).symlink_to(program.name)
    return root


@pytest.fixture
def slurm(tmp_path, slurm_root):
    from test_trainer import write_shard
    (tmp_path / "data").mkdir()
    write_shard(tmp_path / "data" / "train_000000.bin", [i * i % 251 for i in range(100000)])
    running = Slurm(tmp_path, slurm_root)
    yield running
    running.end()


def test_a_cancelled_job_ends(slurm):
    job, log = slurm.submit("cancelled")
    slurm.ask("scancel", job)
    slurm.until(lambda: "stopped by SIGTERM" in log.read_text(errors="replace"), "the job has stopped")
    assert "not requeued, since the job is " in log.read_text(errors="replace")
    slurm.until(lambda: slurm.state(job) == "", "the queue is empty")
    assert list((slurm.folder / "cancelled").glob("ckpt_*.bin")), "with a checkpoint"


def test_a_job_at_its_time_limit_goes_back(slurm):
    job, log = slurm.submit("limit", "--time=2", "--signal=TERM@110")
    slurm.until(lambda: "stopped by SIGTERM: requeued" in log.read_text(errors="replace"), "the job is requeued", 90)
    slurm.until(lambda: slurm.state(job) == "PENDING", "the job waits")
    slurm.ask("scancel", job)
    slurm.until(lambda: slurm.state(job) == "", "the queue is empty")


def test_a_preempted_job_goes_back(slurm):
    job, log = slurm.submit("preempted")
    other = slurm.ask("sbatch", "--parsable", "-p", "high", "-n", "2", "-o", "/dev/null", "--wrap", "sleep 1")
    slurm.until(lambda: "stopped by SIGTERM: requeued" in log.read_text(errors="replace"), "the job is requeued")
    slurm.until(lambda: slurm.state(job) == "PENDING" and slurm.state(other) == "", "the other job had its turn")
    slurm.ask("scancel", job)
    slurm.until(lambda: slurm.state(job) == "", "the queue is empty")
