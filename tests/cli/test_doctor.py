"""`jaxchat doctor` and the short form at each start: set-ups that are broken, a line each, with what mends it."""

import contextlib
import io
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import httpx
import jax
import jax.numpy as jnp
import pytest

from jaxchat.analysis import doctor
from jaxchat.cli.main import main
from jaxchat.config import Experiment
from jaxchat.data.hub import reach
from jaxchat.devices import gpu as device
from jaxchat.devices import host, problems
from jaxchat.devices.host import Gpu, Nvidia, Packages, available_memory, find_nvidia, may_have_nvidia
from jaxchat.devices.machine import find_devices
from jaxchat.devices.problems import full_disk, little_memory, taken_memory, unused_gpu, without_bf16
from jaxchat.ops import triton
from jaxchat.ops.compute import compute_dtype
from tests.data.hub_server import HubServer
from tests.tiny import ROOT, refusal, start

FIELDS = "name,driver_version,memory.total,memory.used,compute_cap"
NOT_LOADED = (
    "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Make sure that the latest NVIDIA "
    "driver is installed and running."
)


class Machine:
    """A host with one NVIDIA GPU, of which the kernel and nvidia-smi tell as on a real one."""

    def __init__(self, root, monkeypatch):
        self.root, self.patch = root, monkeypatch
        self.programs = root / "bin"
        for folder in ("bin", "pci/0000:01:00.0", "dev", "packages"):
            (root / folder).mkdir(parents=True)
        (root / "pci/0000:01:00.0/vendor").write_text("0x10de\n")
        (root / "pci/0000:01:00.0/class").write_text("0x030000\n")
        (root / "os-release").write_text('ID=linuxmint\nID_LIKE="ubuntu debian"\n')
        monkeypatch.setattr(host, "PCI", root / "pci")
        monkeypatch.setattr(host, "DEVICES", root / "dev")
        monkeypatch.setattr(problems, "DEVICES", root / "dev")
        monkeypatch.setattr(problems, "OS_RELEASE", root / "os-release")
        monkeypatch.setattr(problems, "CONTAINER", (root / "dockerenv",))
        monkeypatch.setattr(host, "WSL", str(root / "none"))
        monkeypatch.setenv("PATH", str(self.programs), prepend=os.pathsep)
        for name in ("JAX_PLATFORMS", "CUDA_VISIBLE_DEVICES", "LD_LIBRARY_PATH"):
            monkeypatch.delenv(name, raising=False)

    def smi(self, script):
        """Puts an nvidia-smi on the PATH."""
        program = self.programs / "nvidia-smi"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)

    def lists(self, line):
        self.smi(f"""test "$1" = "--query-gpu={FIELDS}" && echo '{line}'""")

    def installs(self, package, version):
        """Installs a package as far as its metadata goes."""
        folder = self.root / f"packages/{package.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
        self.patch.syspath_prepend(str(self.root / "packages"))

    def problem(self, complaint=""):
        found = unused_gpu(find_nvidia(), host.find_packages(), os.environ, complaint)
        return None if found is None else str(found)


@pytest.fixture
def machine(tmp_path, monkeypatch):
    return Machine(tmp_path, monkeypatch)


def doctor_says(*arguments):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["doctor", *map(str, arguments)])
    assert err.getvalue() == ""
    return code, out.getvalue().splitlines()


class TestBrokenSetUps:
    def test_no_driver(self, machine):
        remedy = "sudo ubuntu-drivers install && sudo reboot"
        assert machine.problem() == (f"this machine has an NVIDIA GPU, and no driver for it; install one: {remedy}")
        machine.smi(f'echo "{NOT_LOADED}" >&2; exit 9')
        assert machine.problem().startswith("the NVIDIA driver is installed and not loaded, so the GPU is not used; ")
        machine.smi('echo "Failed to initialize NVML: Driver/library version mismatch"; exit 18')
        assert machine.problem().endswith("; sudo reboot")
        (machine.root / "dockerenv").touch()
        machine.smi('echo "No devices were found"; exit 6')
        assert machine.problem().endswith("start it with: docker run --gpus all")

    def test_nvidia_smi_on_a_machine_without_a_gpu(self, machine):
        (machine.root / "pci/0000:01:00.0/vendor").write_text("0x8086\n")
        machine.smi(f'echo "{NOT_LOADED}"; exit 9')
        assert may_have_nvidia() and machine.problem() is None
        machine.smi("exec sleep 60")
        machine.patch.setattr(host, "PATIENCE", 0.2)
        assert machine.problem() is None

    @pytest.mark.parametrize("driver, plugin, fits", [("550.54.14", "13", "12"), ("470.256.02", "12", None)])
    def test_old_driver(self, machine, driver, plugin, fits):
        machine.lists(f"NVIDIA GeForce RTX 3060, {driver}, 12288, 1, 8.6")
        machine.installs(f"jax-cuda{plugin}-plugin", jax.__version__)
        line = machine.problem()
        assert f"the driver of the NVIDIA GeForce RTX 3060, {driver}, is older than" in line
        assert "sudo ubuntu-drivers install" in line and "\n" not in line
        assert (f"'jax[cuda{fits}]=={jax.__version__}'" in line) == (fits is not None)

    def test_no_bf16(self, machine, monkeypatch):
        t4 = SimpleNamespace(device_kind="Tesla T4", platform="gpu", compute_capability="7.5")
        t4.client = SimpleNamespace(platform_version="PJRT C API\ncuda 13000")
        monkeypatch.setattr(jax, "devices", lambda *_: [t4])
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        found = doctor.problems_at_start(Experiment(), "runs/none")
        assert [str(problem).partition(":")[0] for problem in found] == ["the Tesla T4 has no bf16"]
        assert "L4 or A100" in found[0].remedy
        assert compute_dtype(Experiment()) == jnp.float32  # and the kernels for bf16 are not chosen
        t4.compute_capability = "8.0"
        assert compute_dtype(Experiment()) == jnp.bfloat16 and device.multiplies_bf16()
        assert without_bf16("TPU v4", 0.0) is None
        assert "leave --precision out" in str(without_bf16("Tesla T4", 7.5, "bfloat16"))

    def test_full_disk(self, tmp_path):
        assert full_disk(tmp_path / "not" / "there", "--run-dir", 1000) is None
        line = str(full_disk(tmp_path / "not there", "--run-dir", 1 << 60))
        assert f"{tmp_path} has " in line and "choose another disk with --run-dir" in line
        assert not list(tmp_path.iterdir())

    def test_full_tmpfs(self, tmp_path):
        code = f"""
from pathlib import Path
from jaxchat.devices.problems import full_disk
folder = Path({str(tmp_path)!r})
print(full_disk(folder / "run", "--run-dir", 1000))
(folder / "file").write_bytes(bytes((1 << 20) - (16 << 10)))
print(full_disk(folder / "run", "--run-dir", 1000))
"""
        script = f'mount -t tmpfs -o size=1m none {tmp_path} && exec {sys.executable} -c "$1"'
        done = subprocess.run(
            ["unshare", "-rm", "sh", "-c", script, "sh", code], cwd=ROOT, capture_output=True, text=True
        )
        if done.returncode and "Traceback" not in done.stderr:
            pytest.skip(f"no file system can be mounted here: {done.stderr}")
        empty, full = done.stdout.splitlines()
        assert empty == "None"
        assert full.startswith(f"{tmp_path} takes no more (No space left on device); free some space")

    def test_no_network(self):
        """In a process of its own, since this one's client of the hub is offline."""
        code = "from jaxchat.data.hub.reach import Question; print(Question(10).answer().problem)"
        server = HubServer()
        with server:
            cases = {
                "nothing wrong": ({"HF_ENDPOINT": server.url}, "None"),
                "proxy": ({"HTTPS_PROXY": "http://127.0.0.1:9"}, "cannot be reached through HTTPS_PROXY ("),
                "mirror": ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "correct or unset HF_ENDPOINT; text of your own"),
                "offline": ({"HF_HUB_OFFLINE": "1"}, "(HF_HUB_OFFLINE is set); unset HF_HUB_OFFLINE; text of your own"),
            }
            clean = {k: v for k, v in os.environ.items() if "proxy" not in k.lower() and not k.startswith("HF_")}
            running = {
                name: subprocess.Popen(
                    [sys.executable, "-c", code], cwd=ROOT, env=clean | env, stdout=subprocess.PIPE, text=True
                )
                for name, (env, _) in cases.items()
            }
            said = {name: process.communicate()[0].splitlines() for name, process in running.items()}
        for name, (_, expected) in cases.items():
            assert len(said[name]) == 1 and expected in said[name][0], (name, said[name])

    def test_jax_for_cpus_beside_a_gpu(self, machine):
        for line, fits in {
            "NVIDIA GeForce RTX 4070, 580.65.06, 12282, 300, 8.9": 13,
            "NVIDIA GeForce RTX 4070, 550.54.14, 12282, 300, 8.9": 12,
            "Tesla V100-SXM2-16GB, 580.65.06, 16384, 300, 7.0": 12,
            "NVIDIA GB10, 580.65.06, [N/A], [N/A], 12.1": 13,
        }.items():
            machine.lists(line)
            name = line.partition(",")[0]
            said = machine.problem()
            assert said.startswith(f"JAX is installed for CPUs only, so the {name} is not used; ")
            assert said.endswith(f"pip install 'jax[cuda{fits}]=={jax.__version__}'") or "uv pip install" in said


def no_driver(machine):
    return "no driver for it; install one: sudo ubuntu-drivers install"


def old_driver(machine):
    machine.lists("NVIDIA GeForce RTX 3060, 550.54.14, 12288, 1, 8.6")
    machine.installs("jax-cuda13-plugin", jax.__version__)
    return "550.54.14, is older than 580, which JAX for CUDA 13 needs, so the GPU is not used; update it (sudo ubuntu"


def no_bf16(machine):
    t4 = SimpleNamespace(device_kind="Tesla T4", platform="gpu")
    machine.patch.setattr(doctor, "find_devices", lambda: ([t4], []))
    machine.patch.setattr(doctor, "capability", lambda: 7.5)
    return (
        "the Tesla T4 has no bf16: all is computed in fp32, without kernels, several times slower; for bf16 take a GPU"
    )


def no_space(machine):
    machine.patch.setattr(
        problems, "free_space", lambda folder: 1000 if folder.is_relative_to(machine.root) else 1 << 40
    )
    machine.patch.setenv("JAX_PLATFORMS", "cpu")
    return "has 0.0 MB free, and needs about"


def no_network(machine):
    machine.patch.setattr(doctor, "is_offline_mode", lambda: False)
    machine.patch.setattr(reach, "is_offline_mode", lambda: False)
    machine.patch.setattr(reach, "get_session", lambda: httpx.Client(trust_env=False))
    machine.patch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    for name in [name for name in os.environ if "proxy" in name.lower()]:
        machine.patch.delenv(name)
    machine.patch.setattr(doctor, "_must_download", lambda experiment: True)
    machine.patch.setenv("JAX_PLATFORMS", "cpu")
    return "Connection refused); check the network, or set HTTPS_PROXY if it needs a proxy; "


def jax_for_cpus(machine):
    machine.lists("NVIDIA GeForce RTX 4070, 580.65.06, 12282, 300, 8.9")
    return f"so the NVIDIA GeForce RTX 4070 is not used; {problems.install_command(f'jax[cuda13]=={jax.__version__}')}"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("finished") / "run"
    assert start(directory, "--stages=tokenizer")[0] == 0
    return directory


@pytest.mark.parametrize("breaks", [no_driver, old_driver, no_bf16, no_space, no_network, jax_for_cpus])
def test_a_broken_set_up_is_one_line_with_its_remedy(breaks, machine, finished):
    """In `jaxchat doctor`, and the same line at a start."""
    run = machine.root / "run"
    shutil.copytree(finished, run)
    words = breaks(machine)
    code, out, err = start(run, "--stages=tokenizer")
    assert code == 0, err
    (warned,) = [line.removeprefix("warning").strip() for line in out.splitlines() if line.startswith("warning")]
    assert words in warned and "Traceback" not in err
    code, lines = doctor_says(f"--run-dir={run}", "--data=/tmp")
    found = [line[10:] for line in lines if line.startswith(("problem", "slow"))]
    assert code == 2 and sum(words in line for line in found) == 1, found
    assert warned in found or breaks is no_space  # a start knows how much space its run needs


def test_plugins_that_do_not_fit(machine):
    machine.lists("Tesla V100-SXM2-16GB, 580.65.06, 16384, 300, 7.0")
    machine.installs("jax-cuda13-plugin", "0.0.1")
    assert machine.problem().startswith("CUDA 13 no longer supports the Tesla V100-SXM2-16GB; take JAX for CUDA 12: ")
    machine.lists("NVIDIA L4, 580.65.06, 23034, 300, 8.9")
    assert f"plugin is version 0.0.1 and jaxlib {jax.lib.__version__}" in machine.problem()


def test_what_jax_says_is_passed_on(machine):
    packages = Packages("0.10.2", "0.10.2", {13: "0.10.2"})
    nvidia = Nvidia(True, (Gpu("NVIDIA L4", "580.65.06", 23 << 30, 0, 8.9),))
    line = str(unused_gpu(nvidia, packages, {"LD_LIBRARY_PATH": "/usr/local/cuda/lib64"}, "Unable to load cuDNN."))
    assert "JAX cannot use the NVIDIA L4 (Unable to load cuDNN.); unset LD_LIBRARY_PATH" in line


def test_drivers_that_do_not_know_compute_capability(machine):
    machine.smi(
        """case "$1" in *compute_cap*) echo 'Field "compute_cap" is not a valid field to query.'; exit 2;; esac
echo 'Tesla P100-PCIE-16GB, 450.80.02, 16280, 0'"""
    )
    assert find_nvidia() == Nvidia(True, (Gpu("Tesla P100-PCIE-16GB", "450.80.02", 16280 << 20, 0),))


def test_memory_held_by_others():
    held = Gpu("NVIDIA L4", "580.65.06", 24 << 30, 18 << 30, 8.9)
    line = str(taken_memory(Nvidia(True, (held,))))
    assert "other programs hold 18.0 of 24.0 GiB of GPU 0" in line and "XLA_PYTHON_CLIENT_MEM_FRACTION=0.24" in line
    assert taken_memory(Nvidia(True, (Gpu("NVIDIA GB10", "580"),))) is None


def test_memory_within_a_container(tmp_path, monkeypatch):
    (tmp_path / "meminfo").write_text("MemTotal:       25165824 kB\nMemAvailable:   20971520 kB\n")
    for name, text in {"max": "2147483648", "current": "2013265920", "stat": "anon 5\ninactive_file 1048576\n"}.items():
        (tmp_path / f"memory.{name}").write_text(text)
    monkeypatch.setattr(host, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(host, "CGROUP", tmp_path)
    assert available_memory() == 2147483648 - 2013265920 + 1048576
    assert "only 129 MiB of memory are available" in str(little_memory(available_memory()))
    (tmp_path / "memory.max").write_text("max")
    assert available_memory() == 20 << 30 and little_memory(20 << 30) is None


def test_each_start_says_what_is_wrong(machine, tmp_path):
    """A line where JAX leaves a GPU out, none where all is well or the user wants it so."""
    machine.lists("NVIDIA GeForce RTX 4070, 580.65.06, 12282, 300, 8.9")
    code, out, err = start(tmp_path / "run", "--stages=tokenizer")
    assert code == 0, err
    warnings = [line for line in out.splitlines() if line.startswith("warning")]
    assert len(warnings) == 1 and "JAX is installed for CPUs only" in warnings[0]
    machine.patch.setenv("JAX_PLATFORMS", "cpu")
    code, out, err = start(tmp_path / "run", "--stages=tokenizer")
    assert code == 0 and "warning" not in out + err


def test_space_for_checkpoints(tmp_path, monkeypatch):
    assert doctor.space_needed(Experiment(), str(tmp_path)) > doctor.space_needed(
        Experiment(stages=("tokenizer", "pretrain", "report")), str(tmp_path)
    )
    monkeypatch.setattr(doctor, "space_needed", lambda *_: 1 << 60)
    code, out, _ = start(tmp_path / "run", "--stages=tokenizer")
    assert code == 0 and "has " in out.partition("warning")[2].partition("\n")[0]


def test_doctor(machine, tmp_path):
    machine.lists("NVIDIA GeForce RTX 4070, 580.65.06, 12282, 300, 8.9")
    code, lines = doctor_says(f"--run-dir={tmp_path / 'runs'}", f"--data={tmp_path}")
    assert code == 2
    subjects = [line.split()[0] for line in lines]
    assert subjects[:4] == ["devices", "versions", "driver", "precision"]
    assert {"kernels", "speed", "memory", "disk", "time"} <= set(subjects)
    problems = [line for line in lines if line.startswith("problem")]
    assert len(problems) == 2  # the tests are offline
    assert "JAX is installed for CPUs only" in problems[0] and "HF_HUB_OFFLINE" in problems[1]
    machine.patch.setenv("JAX_PLATFORMS", "cpu")
    _, lines = doctor_says(f"--run-dir={tmp_path / 'runs'}", f"--data={tmp_path}")
    assert any("JAX_PLATFORMS=cpu keeps JAX from the GPU; unset JAX_PLATFORMS" in line for line in lines)
    assert not (tmp_path / "runs").exists()


def test_platform_that_is_not_there(tmp_path):
    """JAX would raise an AssertionError without a word."""
    program = [sys.executable, "launch.py", "--experiment=quickstart", f"--run-dir={tmp_path / 'run'}"]
    env = os.environ | {"JAX_PLATFORMS": "rocm"}
    done = subprocess.run(program, cwd=ROOT, env=env, capture_output=True, text=True)
    assert "JAX_PLATFORMS=rocm asks for devices that are not here" in refusal(done)
    assert not list(tmp_path.iterdir())


def test_devices_and_what_jax_said():
    devices, complaints = find_devices()
    assert devices == jax.devices() and complaints == []


def test_kernels_are_tried(monkeypatch):
    monkeypatch.setattr(triton, "INTERPRET", True)  # on a CPU
    trials = dict(doctor._trials(jnp.float32))
    assert {name: doctor._failure(trial) for name, trial in trials.items()} == {"relu_squared": None, "attention": None}
    relu, _ = trials["relu_squared"]()
    assert doctor._failure(lambda: (relu + 1, relu)) == "its result is wrong"
    assert "reshape" in (doctor._failure(lambda: (relu.reshape(3), relu)) or "")
