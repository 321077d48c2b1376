"""A real SLURM on this machine alone, for the tests: slurmctld, a few slurmd and munged on 127.0.0.1, up in about a second.

In a test module (needs root; skips with the reason where it cannot run, and fails instead where COSSL_REQUIRE_SLURM is none, or dbd
for those with accounting too):

    import slurm_cluster

    pytestmark = pytest.mark.slurm
    slurm = slurm_cluster.slurm  # the fixture: one cluster of four nodes for the module

    def test_it(slurm: slurm_cluster.SlurmCluster) -> None:
        job = slurm.run("sbatch", "--parsable", "--wrap", "hostname").strip()
        slurm.wait_for(lambda: slurm.queue()[job] == "COMPLETED", 30, "the job's end")

Other sizes and settings: `with slurm_cluster.started(nodes=2, max_array_size=4) as slurm:`, or SlurmCluster with a folder of your own.
From a shell: `python tests/slurm_cluster.py DIR` starts one, prints the lines to export, and stops it on Ctrl-C or SIGTERM.

Tried with Slurm 22.05 (Debian 12). CPUs, memory and GPUs are claimed, not real: a task must not open the GPU it is given.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, TypeVar

import pytest
from slurm_config import ACCOUNTING, write_configuration

T = TypeVar("T")

INSTALL = "sudo apt-get install --no-install-recommends slurmctld slurmd slurm-client munge"
INSTALL_ACCOUNTING = "sudo apt-get install --no-install-recommends slurmdbd mariadb-server"
PACKAGED = ("slurmctld", "slurmd", "munged", "sbatch")
PACKAGED_ACCOUNTING = ("slurmdbd", "sacctmgr", "mariadbd", "mariadb", "mariadb-install-db")
DATABASE = """
create user slurm@'127.0.0.1' identified by 'slurm'; create user slurm@localhost identified by 'slurm'; create database slurm_acct_db;
grant all on slurm_acct_db.* to slurm@'127.0.0.1'; grant all on slurm_acct_db.* to slurm@localhost;
"""
SBIN = os.pathsep.join(["/usr/sbin", "/sbin"])
# A Unix socket's path has at most 107 bytes; the longest below the folder is that of a job's step: spool/n1/n1_<job>.<step>.
LONGEST_FOLDER = 70
SPACES = "unshare --uts --mount --pid --fork --kill-child --mount-proc --propagation private".split()
# The first process of a node's namespace. When slurmd ends, it ends, and with it whatever still runs on the node.
NODE_SCRIPT = """
hostname "$1" && mount --bind "$2/hosts" /etc/hosts && mount --bind "$2" /etc/slurm || exit 1
slurmd -D -N "$1" -f "$2/slurm.conf" & wait "$!"
"""


def which(command: str) -> str | None:
    """The path of a command, sought where a user's PATH may not look: the daemons are in /usr/sbin."""
    return shutil.which(command, path=os.environ.get("PATH", os.defpath) + os.pathsep + SBIN)


def why_not(accounting: str = "none") -> str | None:
    """Why no cluster can run here, with the remedy; None where it can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "a loopback SLURM needs root on Linux (namespaces and device nodes)"
    if absent := [command for command in PACKAGED if which(command) is None]:
        return f"no {', '.join(absent)} here: {INSTALL}"
    if accounting == "dbd" and (absent := [command for command in PACKAGED_ACCOUNTING if which(command) is None]):
        return f"no {', '.join(absent)} here: {INSTALL_ACCOUNTING}"
    if absent := [command for command in ("unshare", "setpriv") if which(command) is None]:
        return f"no {', '.join(absent)} here: install util-linux"
    trial = subprocess.run([*SPACES, "true"], capture_output=True, text=True)
    return f"root gets no namespaces here ({trial.stderr.strip()}): a container needs --privileged" if trial.returncode else None


NODE_KNOWS_S = 2.5
"""After so long a node knows that a step is over."""


class SlurmCluster:
    """Nodes n1, n2, ... of `cpus` CPUs and `gpus` GPUs each, all in the partitions main and high; a job in high preempts those in main.

    Everything is below `folder`, whose path has at most 70 characters. A node is one slurmd in namespaces of its own: its host name is n1,
    nodes find each other by name, and its end ends every process of its jobs. No file of the machine changes. Clusters run side by side.
    With `preempt_signal` a preempted job gets the signal it asked for (--signal) 5 s earlier; without, no more than SIGTERM.
    accounting="none": there is no slurmdbd, and `sacct` says so and exits 1; "dbd": slurmdbd and MariaDB, three seconds more.

    The trap: start() and boot() belong in the main thread. The daemons die with the *thread* that started them, so that none outlives a
    killed pytest.
    """

    def __init__(
        self,
        folder: Path,
        nodes: int = 4,
        cpus: int = 4,
        gpus: int = 2,
        accounting: str = "none",
        max_array_size: int = 10001,
        kill_wait_s: int = 5,
        preempt_signal: bool = True,
    ) -> None:
        self.folder = folder.absolute()
        if len(str(self.folder)) > LONGEST_FOLDER:
            raise ValueError(f"{self.folder} is too long for Unix sockets below it: at most {LONGEST_FOLDER} characters, as in /tmp/slurm")
        if accounting not in ACCOUNTING:
            raise ValueError(f"accounting={accounting!r} is not one of {', '.join(ACCOUNTING)}")
        self.nodes = [f"n{number}" for number in range(1, nodes + 1)]
        self.cpus, self.gpus, self.accounting = cpus, gpus, accounting
        signal_line = "SlurmctldParameters=preempt_send_user_signal" if preempt_signal else ""
        self.settings = {"max_array_size": max_array_size, "kill_wait_s": kill_wait_s, "preempt_signal": signal_line}
        self.env = {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": os.environ.get("PATH", os.defpath) + os.pathsep + SBIN}
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._lock: IO[str] | None = None

    def __enter__(self) -> SlurmCluster:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # ------------------------------------------------------------------ start and stop

    def start(self) -> None:
        """Return when every node is idle. RuntimeError with the ends of the logs, and nothing left running, if that does not happen."""
        if reason := why_not(self.accounting):
            raise RuntimeError(reason)
        self._claim_folder()
        atexit.register(self.stop)
        try:
            size = f"CPUs={self.cpus} RealMemory=4000"
            database_port = write_configuration(self.folder, self.nodes, size, self.gpus, self.accounting, **self.settings)
            self._start_munged()
            if self.accounting == "dbd":
                self._start_accounting(database_port)
            self._spawn("slurmctld", ["slurmctld", "-D", "-c", "-f", self.env["SLURM_CONF"]])
            for node in self.nodes:
                self._spawn_node(node)
            self.wait_for(lambda: all(self.node_state(node) == "idle" for node in self.nodes), 60, "idle nodes")
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End the processes that this object started, and with them every job; the folder stays. Twice does no harm."""
        for name in reversed(list(self.processes)):
            self._end(name)
        if self._lock:
            self._lock.close()
            self._lock = None
        atexit.unregister(self.stop)

    def _end(self, name: str) -> None:
        """Stop one of them. It has not been waited for, so its pid cannot have become another process's."""
        process = self.processes.pop(name)
        process.send_signal(signal.SIGKILL if name in self.nodes else signal.SIGTERM)
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _claim_folder(self) -> None:
        """Ours alone until stop(), and empty but for the lock."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o755)
        lock = (self.folder / "lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise RuntimeError(f"another cluster runs in {self.folder}: stop it or take another folder") from None
        self._lock = lock
        for name in ("state", "spool", "log", "run", "munge", "dev", "database"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
            (self.folder / name).mkdir()

    def _start_munged(self) -> None:
        munge = self.folder / "munge"
        (munge / "key").touch(0o600)
        (munge / "key").write_bytes(os.urandom(128))
        places = {"key-file": "key", "socket": "socket", "pid-file": "pid", "seed-file": "seed", "log-file": "log"}
        self._spawn("munged", ["munged", "--foreground", "--force", *(f"--{option}={munge / name}" for option, name in places.items())])
        self.wait_for((munge / "socket").exists, 20, "munged's socket")

    def _start_accounting(self, port: int) -> None:
        files, sock = self.folder / "database", self.folder / "run" / "database"
        new = ["--user=root", "--auth-root-authentication-method=normal", "--skip-test-db"]
        self.run("mariadb-install-db", "--no-defaults", f"--datadir={files}", *new)
        place = [f"--datadir={files}", f"--socket={sock}", f"--pid-file={sock}.pid", "--bind-address=127.0.0.1", f"--port={port}"]
        small = ["--innodb-buffer-pool-size=64M", "--innodb-log-file-size=16M", "--innodb-flush-log-at-trx-commit=0", "--skip-log-bin"]
        waits = ["--innodb-lock-wait-timeout=900"]  # slurmdbd complains of less
        self._spawn("mariadbd", ["mariadbd", "--no-defaults", "--user=root", *place, *small, *waits])
        client = ["mariadb", "--no-defaults", "--user=root", f"--socket={sock}", "--execute"]
        self.wait_for(lambda: self._succeeds(*client, "select 1"), 60, "answer of the database")
        self.run(*client, DATABASE)
        self._spawn("slurmdbd", ["slurmdbd", "-D"])
        self.wait_for(lambda: self._succeeds("sacctmgr", "--immediate", "add", "cluster", "loopback"), 60, "answer of slurmdbd")

    def _spawn(self, name: str, command: list[str]) -> None:
        """Start a daemon that is killed when this thread dies, with the signals' defaults (a shell's background job ignores some)."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "SBATCH", "SRUN"))}
        tied = ["setpriv", "--pdeathsig", "KILL", "env", "--default-signal", *command]
        with (self.folder / "log" / f"{name}.out").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                tied, env=kept | self.env, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def _spawn_node(self, node: str) -> None:
        shutil.rmtree(self.folder / "spool" / node, ignore_errors=True)  # a power cut leaves the sockets of its steps
        (self.folder / "spool" / node).mkdir()
        self._spawn(node, [*SPACES, "sh", "-c", NODE_SCRIPT, "sh", node, str(self.folder)])

    # ------------------------------------------------------------------ commands and questions

    def run(self, *command: str) -> str:
        """What a command of this cluster prints; CalledProcessError, its stderr shown, if it exits with anything but 0."""
        done = subprocess.run(command, env=os.environ | self.env, capture_output=True, text=True, timeout=120)
        if done.returncode:
            error = subprocess.CalledProcessError(done.returncode, command, done.stdout, done.stderr)
            raise RuntimeError(f"{error}\n{done.stdout}{done.stderr}") from error
        return done.stdout

    def _succeeds(self, *command: str) -> bool:
        return subprocess.run(command, env=os.environ | self.env, capture_output=True, timeout=60).returncode == 0

    def queue(self) -> dict[str, str]:
        """Job or array element ("7", "8_0") -> state ("RUNNING"), of every job since the start, the ended ones too."""
        listed = self.run("squeue", "--array", "--states=all", "--noheader", "--format=%i %T")
        return {job: state for job, state in (line.split() for line in listed.splitlines())}

    def node_state(self, node: str) -> str:
        """As sinfo has it: idle, mix, alloc, down, ...; with a star while the node does not answer. Empty while the controller does not."""
        command = ["sinfo", "-hN", "-p", "main", "-n", node, "-o", "%t"]
        return subprocess.run(command, env=os.environ | self.env, capture_output=True, text=True).stdout.strip()

    def wait_for(self, condition: Callable[[], T], timeout_s: float, what: str) -> T:
        """Ask until the answer is true; return it. After timeout_s or a daemon's death: RuntimeError with the queue and the logs' ends."""
        deadline = time.monotonic() + timeout_s
        while not (answer := condition()):
            dead = [name for name, process in self.processes.items() if process.poll() is not None]
            if dead or time.monotonic() > deadline:
                cause = f"{', '.join(dead)} died before the {what}" if dead else f"no {what} within {timeout_s} s"
                raise RuntimeError(f"{cause}\n{self.report()}")
            time.sleep(0.1)
        return answer

    def report(self) -> str:
        """Nodes, jobs and the ends of all logs, for a person who looks for a failure's cause."""
        commands = (["sinfo", "-N", "-l"], ["squeue", "--array", "--states=all", "--long"])
        parts = []
        for command in commands if "slurmctld" in self.processes else ():
            done = subprocess.run(command, env=os.environ | self.env, capture_output=True, text=True)
            parts.append(f"$ {' '.join(command)}\n{done.stdout}{done.stderr}")
        for log in sorted((self.folder / "log").iterdir()):
            parts.append(f"--- {log.name}\n" + "\n".join(log.read_text(errors="replace").splitlines()[-12:]))
        return "\n".join(parts)

    # ------------------------------------------------------------------ what happens to a cluster

    def crash(self, node: str) -> None:
        """Cut a node's power: every process on it is gone at once. Slurm notices after about 25 s, or by mark_down()."""
        self._end(node)

    def boot(self, node: str) -> None:
        """Switch a node on again after crash(), and wait until the controller hears of it."""
        if node in self.processes:
            raise ValueError(f"{node} runs already: crash({node!r}) first")
        self._spawn_node(node)
        self.wait_for(lambda: self.node_state(node) in ("idle", "mix", "alloc", "comp"), 60, f"answer of {node}")

    def stop_controller(self) -> None:
        """From now on squeue, sbatch and scontrol fail, each after some seconds; jobs that run go on."""
        self._end("slurmctld")

    def start_controller(self) -> None:
        """After stop_controller(): it knows the jobs of before."""
        self._spawn("slurmctld", ["slurmctld", "-D", "-f", self.env["SLURM_CONF"]])
        self.wait_for(lambda: self._succeeds("scontrol", "ping"), 60, "answer of the controller")

    def mark_down(self, node: str) -> None:
        """Tell the controller that a node is lost: its jobs are requeued now. One that lives comes back by itself."""
        self.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")

    def limit(self, job: str, minutes: int) -> None:
        """Give a job (or element, "8_0") another time limit, counted from its start. Slurm acts up to 30 s after it."""
        self.run("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes}")

    def boost(self, job: str, timeout_s: float = 60) -> None:
        """Let a requeued job (or element, "8_0") start now and not 120 s later, as Slurm has it. Wait for the requeue to happen first.

        Earlier, the new start would meet the old one's step: Slurm would hold the job and drain the node. Nor right after that step's
        process is gone: its node asks once a second whether it is, and refuses the new start until it knows.
        """
        seen = time.monotonic()  # when the job last was not waiting, or had a step

        def waits_alone() -> bool:
            nonlocal seen
            listed = self.run("squeue", "--array", "--noheader", f"--job={job}", "--format=%A %T %r").split()
            if listed[1:] != ["PENDING", "BeginTime"] or self._steps_alive(listed[0]):
                seen = time.monotonic()
            return time.monotonic() - seen > NODE_KNOWS_S

        self.wait_for(waits_alone, timeout_s, f"requeue of job {job}")
        self.run("scontrol", "update", f"JobId={job}", "StartTime=now")

    def _steps_alive(self, number: str) -> bool:
        """Whether the process of a step of this job is there yet, on any node: of a node DOWN the controller does not know."""
        titles = {path.parent: _read(path) for path in Path("/proc").glob("[0-9]*/cmdline")}
        steps = [place for place, title in titles.items() if title.startswith(f"slurmstepd: [{number}.")]
        return any(f"SLURM_CONF={self.env['SLURM_CONF']}" in _read(place / "environ").split("\0") for place in steps)


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:  # it has just ended
        return ""


@contextlib.contextmanager
def started(**settings: Any) -> Iterator[SlurmCluster]:
    """A running SlurmCluster(**settings) in a folder of its own below /tmp, which goes with it. Skips, or fails, where none can run."""
    accounting = settings.get("accounting", "none")
    if reason := why_not(accounting):
        required = os.environ.get("COSSL_REQUIRE_SLURM")
        if required and accounting in ("none", required):
            pytest.fail(f"COSSL_REQUIRE_SLURM={required}, and there is no SLURM: {reason}")
        pytest.skip(f"no SLURM: {reason}")
    with (
        tempfile.TemporaryDirectory(prefix="slurm-", dir="/tmp", ignore_cleanup_errors=True) as folder,
        SlurmCluster(Path(folder), **settings) as cluster,
    ):
        yield cluster


@pytest.fixture(scope="module")
def slurm() -> Iterator[SlurmCluster]:
    """Four nodes of four CPUs and two GPUs, one cluster for a test module."""
    with started() as cluster:
        yield cluster


def main() -> None:
    parser = argparse.ArgumentParser(description="Run a loopback SLURM cluster until Ctrl-C or SIGTERM.")
    parser.add_argument("folder", type=Path, help="for its whole state; a short path")
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--accounting", choices=list(ACCOUNTING), default="none", help="dbd: slurmdbd and MariaDB, for sacct")
    arguments = parser.parse_args()
    signals = {signal.SIGINT, signal.SIGTERM}
    with SlurmCluster(arguments.folder, nodes=arguments.nodes, accounting=arguments.accounting) as cluster:
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        print(f"export SLURM_CONF={cluster.env['SLURM_CONF']}", flush=True)
        signal.sigwait(signals)


if __name__ == "__main__":
    main()
