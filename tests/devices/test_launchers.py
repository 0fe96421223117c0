"""Which process this is, from the environments that launchers set, and from flags."""

import pytest

from jaxchat.devices import launchers
from jaxchat.devices.launchers import PORTS, Cluster, find_cluster
from jaxchat.errors import UserError

# As Slurm 22.05 and Open MPI 4.1 set them; variables that are not read are left out.
SLURM = {
    "SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_STEP_NODELIST": "gpu[07-08]", "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1", "SLURM_NODEID": "1",
}  # fmt: skip
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0", "PMIX_NAMESPACE": "1962541057",
    "OMPI_MCA_orte_hnp_uri": "1962541056.0;tcp://192.0.2.2,10.0.0.2:59391",
}  # fmt: skip
POD = {
    "JOB_COMPLETION_INDEX": "1",
    "JAX_NUM_PROCESSES": "2",
    "JAX_COORDINATOR_ADDRESS": "jaxchat-train-0-0.jaxchat:61440",
}


@pytest.fixture(autouse=True)
def no_gpus(monkeypatch):
    monkeypatch.setattr(launchers.glob, "glob", lambda pattern: [])


def split(found):
    host, port = found.coordinator.rsplit(":", 1)
    return host, int(port)


def test_a_single_process():
    assert find_cluster({}) is None
    assert find_cluster({"JOB_COMPLETION_INDEX": "0"}) is None  # a job of one pod
    for environ in (SLURM, OPEN_MPI, POD):
        assert find_cluster(environ, num_processes=1) is None


def test_flags():
    assert find_cluster({}, "host:1234", 2, 0) == Cluster("host:1234", 2, 0)
    environ = {"JAX_COORDINATOR_ADDRESS": "[::1]:1234", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
    assert find_cluster(environ) == Cluster("[::1]:1234", 2, 1)
    assert find_cluster(environ, "host:5", process_id=0) == Cluster("host:5", 2, 0)
    assert find_cluster(SLURM, "host:1234", 2, 0) == Cluster("host:1234", 2, 0)


@pytest.mark.parametrize(
    "flags, says",
    [
        (("host:1234", 2, None), "--process-id is missing"),
        (("host:1234", None, 1), "--num-processes is missing"),
        ((None, 2, 1), "--coordinator is missing"),
        (("host:1234", 2, 2), "the process id is 2; with 2 processes it must be 0 to 1"),
        (("host:1234", 0, 0), "the number of processes is 0"),
        (("host", 2, 0), "write the host of process 0 and a free port, as HOST:PORT"),
        (("host:99999", 2, 0), "as HOST:PORT"),
        ((":1234", 2, 0), "as HOST:PORT"),
    ],
)
def test_impossible_flags_are_refused(flags, says):
    with pytest.raises(UserError, match=says):
        find_cluster({}, *flags)


def test_slurm():
    found = find_cluster(SLURM)
    assert (found.num_processes, found.process_id, found.local_devices) == (4, 3, None)
    host, port = split(found)
    assert host == "gpu07" and port in PORTS
    others = [find_cluster({**SLURM, "SLURM_PROCID": str(i), "SLURM_NODEID": str(i // 2)}) for i in range(4)]
    assert {other.coordinator for other in others} == {found.coordinator}
    assert find_cluster({**SLURM, "SLURM_JOB_ID": "4712"}).coordinator != found.coordinator
    assert find_cluster(SLURM, "other:1").coordinator == "other:1"
    assert find_cluster({**SLURM, "SLURM_STEP_NUM_TASKS": "1"}) is None


@pytest.mark.parametrize("nodes, first", [("a", "a"), ("a,b[1-2]", "a"), ("n[1-4,7]", "n1"), ("n[001,5],m", "n001")])
def test_slurms_first_node(nodes, first):
    assert split(find_cluster({**SLURM, "SLURM_STEP_NODELIST": nodes}))[0] == first


def test_within_a_slurm_job_without_srun():
    job = {"SLURM_JOB_ID": "4711", "SLURM_NTASKS": "4"}
    with pytest.raises(UserError, match="was not started by srun; write srun before the command"):
        find_cluster(job)
    assert find_cluster({**job, "SLURM_NTASKS": "1"}) is None
    assert find_cluster(job, alone_if_unsure=True) is None
    assert find_cluster(SLURM, alone_if_unsure=True) == find_cluster(SLURM)
    with pytest.raises(UserError, match="Slurm has not set SLURM_LOCALID; use --num-processes=1"):
        find_cluster({name: value for name, value in SLURM.items() if name != "SLURM_LOCALID"})


def test_open_mpi():
    found = find_cluster(OPEN_MPI)
    assert (found.num_processes, found.process_id, found.local_devices) == (4, 2, None)
    host, port = split(found)
    assert host == "192.0.2.2" and port in PORTS
    assert find_cluster({**OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "1"}) is None
    # On one host it does not matter where mpirun runs; on several, version 5 needs to be told.
    five = {name: value for name, value in OPEN_MPI.items() if name != "OMPI_MCA_orte_hnp_uri"}
    assert split(find_cluster({**five, "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}))[0] == "127.0.0.1"
    with pytest.raises(UserError, match="mpirun -x JAX_COORDINATOR_ADDRESS=HOST:PORT"):
        find_cluster(five)
    assert find_cluster({**five, "JAX_COORDINATOR_ADDRESS": "host:1234"}).coordinator == "host:1234"
    # mpirun within a Slurm job takes precedence.
    assert find_cluster({**SLURM, **OPEN_MPI}) == found


def test_kubernetes():
    assert find_cluster(POD) == Cluster("jaxchat-train-0-0.jaxchat:61440", 2, 1)
    with pytest.raises(UserError, match="pod 1 of a Kubernetes job, .* set JAX_NUM_PROCESSES"):
        find_cluster({"JOB_COMPLETION_INDEX": "1"})
    assert find_cluster({"JOB_COMPLETION_INDEX": "1"}, alone_if_unsure=True) is None
    with pytest.raises(UserError, match="the environment variable JAX_NUM_PROCESSES is 'two'"):
        find_cluster({**POD, "JAX_NUM_PROCESSES": "two"})


@pytest.mark.parametrize(
    "visible, share",
    [({}, (4, 5, 6, 7)), ({"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, (2, 3)), ({"CUDA_VISIBLE_DEVICES": "5"}, None),
     ({"SLURM_GPUS_PER_TASK": "4"}, None), ({"JAX_LOCAL_DEVICE_IDS": "0"}, None)],
)  # fmt: skip
def test_the_gpus_of_a_host_are_shared_out(monkeypatch, visible, share):
    monkeypatch.setattr(launchers.glob, "glob", lambda pattern: [f"/dev/nvidia{i}" for i in range(8)])
    assert find_cluster({**SLURM, **visible}).local_devices == share
