"""The configuration files of the tests' own SLURM (slurm_cluster.py): what its daemons read, all below one folder."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import stat
from pathlib import Path

# No client's outgoing connection is given a port below 32768, so a node that was cut off finds its own port free again.
PORTS = range(12000, 32000)

SLURM_CONF = """\
ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/socket
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
# No cgroups. proctrack/linuxproc would lose a task that ignores SIGTERM and whose parent is gone: it outlives its job.
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
# Without it a job that asks for no memory takes a whole node's.
DefMemPerCPU=100
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
SlurmctldDebug=debug
SlurmdDebug=debug
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,sched_min_interval=0,batch_sched_delay=0,bf_interval=2,bf_max_time=5
PriorityType=priority/basic
JobRequeue=1
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=10
InactiveLimit=0
KillWait={kill_wait_s}
OverTimeLimit=0
MinJobAge=3600
MessageTimeout=10
BatchStartTimeout=10
MaxArraySize={max_array_size}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{preempt_signal}
JobCompType=jobcomp/none
# Several slurmd on one host, which believe this file and not the machine.
SlurmdParameters=config_overrides
GresTypes=gpu
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=5
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""

# Towards slurmdbd the clients do not use AuthInfo: without AccountingStoragePass they look for the system's munge and wait for ever.
ACCOUNTING = {
    "none": "AccountingStorageType=accounting_storage/none\n",
    "dbd": """\
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={dbd_port}
AccountingStoragePass={folder}/munge/socket
AccountingStorageTRES=gres/gpu
""",
}

SLURMDBD_CONF = """\
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={dbd_port}
CommunicationParameters=NoInAddrAny
SlurmUser=root
LogFile={folder}/log/slurmdbd.log
PidFile={folder}/run/slurmdbd.pid
DebugLevel=info
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={database_port}
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm_acct_db
"""


def free_ports(count: int) -> list[int]:
    """Distinct ports of 127.0.0.1 that nobody listens on now."""
    with contextlib.ExitStack() as held:
        found: list[int] = []
        for port in random.SystemRandom().sample(PORTS, len(PORTS)):
            probe = held.enter_context(socket.socket())
            with contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", port))
                found.append(port)
            if len(found) == count:
                return found
    raise RuntimeError(f"no {count} free ports in {PORTS}")


def write_configuration(folder: Path, nodes: list[str], node_size: str, gpus: int, accounting: str, **settings: object) -> int:
    """slurm.conf, gres.conf, hosts and slurmdbd.conf, and the GPUs' device nodes; returns the port meant for the database.

    `settings` are SLURM_CONF's max_array_size and kill_wait_s, and its line preempt_signal, which may be empty.
    """
    port, dbd_port, database_port, *node_ports = free_ports(3 + len(nodes))
    host = socket.gethostname().split(".")[0]
    names = {"folder": folder, "host": host, "port": port, "dbd_port": dbd_port, "database_port": database_port}
    lines = (SLURM_CONF + ACCOUNTING[accounting]).format(**names, **settings).splitlines()
    size = node_size + (f" Gres=gpu:{gpus}" if gpus else "")
    for node, node_port in zip(nodes, node_ports, strict=True):
        lines.append(f"NodeName={node} NodeHostname={node} NodeAddr=127.0.0.1 Port={node_port} {size} State=UNKNOWN")
    (folder / "slurm.conf").write_text("\n".join(lines) + "\n")
    # Twins of /dev/null: for plain files Slurm schedules GPUs too, but does not set CUDA_VISIBLE_DEVICES.
    devices = [folder / "dev" / f"nvidia{index}" for index in range(gpus)]
    for device in devices:
        os.mknod(device, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    files = ",".join(str(device) for device in devices)
    (folder / "gres.conf").write_text("".join(f"NodeName={node} Name=gpu File={files}\n" for node in nodes if files))
    (folder / "hosts").write_text(Path("/etc/hosts").read_text() + "\n" + "".join(f"127.0.0.1 {node}\n" for node in nodes))
    (folder / "slurmdbd.conf").touch(0o600)  # slurmdbd refuses one that others can read
    (folder / "slurmdbd.conf").write_text(SLURMDBD_CONF.format(**names))
    return database_port
