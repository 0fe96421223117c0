"""Finds out which of several processes this one is, from flags or from what a launcher has put into the environment."""

from __future__ import annotations

import glob
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

from jaxchat.errors import UserError, check

LOST = 76  # the exit code of a process that has lost another one
PORTS = range(61440, 65536)  # above those that Linux uses for outgoing connections


@dataclass(frozen=True)
class Cluster:
    """This process among `num_processes`; `local_devices` are the GPUs of this host that it uses, None for all."""

    coordinator: str
    num_processes: int
    process_id: int
    local_devices: tuple[int, ...] | None = None

    def __post_init__(self):
        count = self.num_processes
        check(count >= 1, f"the number of processes is {count}; it must be at least 1")
        check(
            0 <= self.process_id < count,
            f"the process id is {self.process_id}; with {count} processes it must be 0 to {count - 1}",
        )
        host, colon, port = self.coordinator.rpartition(":")
        check(
            bool(host and colon) and port.isdecimal() and 0 < int(port) < 1 << 16,
            f"the coordinator is {self.coordinator!r}; write the host of process 0 and a free port, as HOST:PORT",
        )


def find_cluster(
    environ: Mapping[str, str],
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    alone_if_unsure: bool = False,
) -> Cluster | None:
    """The cluster given by flags or by the environment; None for a single process.

    `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` may replace the flags. In a Kubernetes job the
    id is the pod's JOB_COMPLETION_INDEX. Open MPI takes precedence over Slurm, which may have started its `mpirun`.

    Args:
      alone_if_unsure: a process works alone, instead of being refused, in a Slurm job of several tasks without `srun`,
        and as a pod that does not know the others.

    Raises:
      UserError: something is missing or impossible.
    """
    coordinator = coordinator or environ.get("JAX_COORDINATOR_ADDRESS")
    num_processes = _number(environ, "JAX_NUM_PROCESSES") if num_processes is None else num_processes
    process_id = _number(environ, "JAX_PROCESS_ID") if process_id is None else process_id
    if num_processes == 1:
        return None
    if num_processes is None and process_id is None:
        if "OMPI_COMM_WORLD_SIZE" in environ:
            return _open_mpi(environ, coordinator)
        if "SLURM_JOB_ID" in environ:
            return _slurm(environ, coordinator, alone_if_unsure)
    index = _number(environ, "JOB_COMPLETION_INDEX")
    if num_processes is None and process_id is None and coordinator is None:
        check(
            not index or alone_if_unsure,
            f"this is pod {index} of a Kubernetes job, but the other pods are unknown: set JAX_NUM_PROCESSES and "
            "JAX_COORDINATOR_ADDRESS as deploy/jobset.yaml does",
        )
        return None
    process_id = index if process_id is None else process_id
    given = {"--coordinator": coordinator, "--num-processes": num_processes, "--process-id": process_id}
    missing = next((name for name, value in given.items() if value is None), None)
    if coordinator is None or num_processes is None or process_id is None:
        raise UserError(f"{missing} is missing; several processes need all of {', '.join(given)}")
    return Cluster(coordinator, num_processes, process_id)


def _number(environ: Mapping[str, str], name: str) -> int | None:
    value = environ.get(name)
    check(
        value is None or value.isdecimal(), f"the environment variable {name} is {value!r}; it must be a whole number"
    )
    return None if value is None else int(value)


def _numbers(environ: Mapping[str, str], launcher: str, *names: str) -> list[int]:
    missing = [name for name in names if name not in environ]
    check(not missing, f"{launcher} has not set {' and '.join(missing)}; use --num-processes=1 to work in one process")
    return [_number(environ, name) or 0 for name in names]


def _open_mpi(environ: Mapping[str, str], coordinator: str | None) -> Cluster | None:
    names = ("SIZE", "RANK", "LOCAL_SIZE", "LOCAL_RANK")
    size, rank, here, local = _numbers(environ, "Open MPI", *(f"OMPI_COMM_WORLD_{name}" for name in names))
    if size == 1:
        return None
    # The host of mpirun, where rank 0 runs too: `1962541056.0;tcp://192.0.2.2,10.0.0.2:59391`. Unset in version 5.
    uri = environ.get("OMPI_MCA_orte_hnp_uri", "")
    found = re.search(r"tcp://([^,:]+)", uri)
    host = "127.0.0.1" if here == size else found and found[1]
    check(
        bool(host or coordinator),
        "Open MPI does not tell on which host its first process runs; name the host and a free port with "
        "mpirun -x JAX_COORDINATOR_ADDRESS=HOST:PORT ...",
    )
    job = environ.get("PMIX_NAMESPACE", uri)
    return Cluster(coordinator or f"{host}:{_port(job)}", size, rank, _local_devices(environ, here, local))


def _slurm(environ: Mapping[str, str], coordinator: str | None, alone_if_unsure: bool) -> Cluster | None:
    tasks = _number(environ, "SLURM_NTASKS") or 1
    if "SLURM_STEP_NODELIST" not in environ:  # the batch script itself, or the shell of salloc
        check(
            tasks == 1 or alone_if_unsure,
            f"this Slurm job has {tasks} tasks, but the process was not started by srun; write srun before the "
            "command, or use --num-processes=1 to work in one process",
        )
        return None
    names = ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID")
    size, rank, local, node = _numbers(environ, "Slurm", *names)
    if size == 1:
        return None
    nodes = environ["SLURM_STEP_NODELIST"]  # such as gpu1, gpu[1-4,7] or gpu[001-004],other5
    first = re.match(r"([^,\[]+)(?:\[(\d+))?", nodes)
    if first is None:
        raise UserError(f"the environment variable SLURM_STEP_NODELIST is {nodes!r}; it must name a host")
    job = f"{environ['SLURM_JOB_ID']}.{environ.get('SLURM_STEP_ID', '')}"
    # 2(x3),1 means two tasks on each of three nodes, then one.
    counts = re.findall(r"(\d+)(?:\(x(\d+)\))?", environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    here = [int(count) for count, times in counts for _ in range(int(times or 1))][node : node + 1] or [1]
    bound = "SLURM_GPUS_PER_TASK" in environ or "SLURM_GPU_BIND" in environ
    devices = None if bound else _local_devices(environ, here[0], local)
    address = coordinator or f"{first[1]}{first[2] or ''}:{_port(job)}"
    return Cluster(address, size, rank, devices)


def _port(job: str) -> int:
    """A port that is the same for all processes of a job, and rarely the same for two jobs on one host."""
    return PORTS[zlib.crc32(job.encode()) % len(PORTS)]


def _local_devices(environ: Mapping[str, str], processes: int, local: int) -> tuple[int, ...] | None:
    """This process's share of the host's GPUs if each of several processes sees all of them; None for all it sees."""
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    count = len(glob.glob("/dev/nvidia[0-9]*")) if visible is None else len([v for v in visible.split(",") if v])
    if processes == 1 or count < processes or "JAX_LOCAL_DEVICE_IDS" in environ:
        return None
    share = count // processes
    return tuple(range(local * share, (local + 1) * share))
