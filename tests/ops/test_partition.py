"""Programs with kernels in them that are kept between runs."""

import os
import subprocess
import sys

import pytest

from tests.tiny import ROOT

PROGRAM = """
import sys
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from jaxchat.config import MeshConfig
from jaxchat.devices.mesh import make_mesh
from jaxchat.devices.compile_cache import keep_compiled
from jaxchat.ops import norm, partition, triton

triton.INTERPRET = True
norm.NORM_EPS = float(sys.argv[1])
partition.CODE += sys.argv[2]
keep_compiled()
hits, compiled = [], []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event) if event.endswith("cache_hits") else None)
jax.monitoring.register_event_duration_secs_listener(
    lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else None
)
mesh = make_mesh(MeshConfig(), jax.devices())
x = jax.device_put(jnp.full((4, 8, 64), 3.0), NamedSharding(mesh, P("data")))
hits.clear(), compiled.clear()
y = jax.jit(lambda x: norm.norm_branch(x)[1])(x)
made = len(compiled) - len(hits)
print(made, float(y[0, 0, 0]))
"""


@pytest.mark.parametrize("devices", [1, 4])
def test_another_process_finds_a_program_unless_a_kernel_in_it_has_changed(tmp_path, devices):
    def run(epsilon, code=""):
        env = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
        env["JAX_COMPILATION_CACHE_DIR"] = str(tmp_path)
        command = [sys.executable, "-c", PROGRAM, str(epsilon), code]
        result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        compiled, value = result.stdout.split()
        return int(compiled), float(value)

    assert run(0.0) == (1, pytest.approx(1.0))
    assert run(0.0) == (0, pytest.approx(1.0))
    assert run(27.0) == (1, pytest.approx(0.5))  # 3 / sqrt(9 + 27)
    # What splits the arrays can change without the kernel, where there are several devices.
    assert run(0.0, "changed") == (devices > 1, pytest.approx(1.0))
