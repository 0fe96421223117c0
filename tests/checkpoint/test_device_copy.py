"""Copies of a state on its devices: their sharding, that they are copies, and when there is room for them."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from jaxchat.checkpoint import device_copy
from jaxchat.checkpoint.device_copy import DeviceCopies, copy_to_host
from jaxchat.config import MeshConfig
from jaxchat.devices.mesh import make_mesh

MESH = make_mesh(MeshConfig(fsdp=2, tensor=2))


def tree():
    """Of 64 + 128 + 4 bytes on each device, as they are sharded."""
    leaves = {
        "square": (jnp.arange(64, dtype=jnp.float32).reshape(8, 8), P("fsdp", "tensor")),
        "rows": (jnp.ones((16, 8), jnp.bfloat16), P("fsdp", None)),
        "step": (jnp.asarray(3, jnp.int32), P()),
    }
    return {name: jax.device_put(leaf, NamedSharding(MESH, spec)) for name, (leaf, spec) in leaves.items()}


BYTES = 64 + 128 + 4


def test_each_part_is_copied_to_the_host_once_even_if_several_devices_hold_it(monkeypatch):
    original, brought = tree(), []
    monkeypatch.setattr(device_copy, "np", SimpleNamespace(asarray=lambda part: brought.append(part.nbytes)))
    copy_to_host(original)
    assert sorted(brought) == [4, 64, 64, 64, 64, 128, 128]


@pytest.fixture
def memory(monkeypatch):
    """What each device reports about its memory; to be filled."""
    stats = {}
    monkeypatch.setattr(type(jax.devices()[0]), "memory_stats", lambda device: stats[device])
    return stats


def test_a_copy_has_buffers_of_its_own_and_the_shardings_of_the_tree():
    original = tree()
    copy = DeviceCopies().take(original)
    for name, leaf in original.items():
        assert copy[name].sharding == leaf.sharding
        np.testing.assert_array_equal(copy[name], leaf)
        here, there = ({s.data.unsafe_buffer_pointer() for s in x.addressable_shards} for x in (leaf, copy[name]))
        assert not here & there
    alone = {"x": jax.device_put(jnp.ones(3), SingleDeviceSharding(jax.devices()[2]))}
    assert DeviceCopies().take(alone)["x"].sharding == alone["x"].sharding


def test_a_prepared_copy_is_not_compiled_again():
    compiled = []

    def on_event(event, seconds, **_):
        if "backend_compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(on_event)
    original = {**tree(), "of no other test": jax.device_put(np.ones(5), NamedSharding(MESH, P()))}
    copies = DeviceCopies()
    compiled.clear()
    copies.prepare(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), original))
    assert len(compiled) == 1
    copies.take(original)
    assert len(compiled) == 1


def test_there_is_no_room_if_one_device_has_none(memory):
    for device in jax.devices():
        memory[device] = {"bytes_limit": 1000, "peak_bytes_in_use": 1000 - BYTES}
    assert DeviceCopies().has_room(tree())
    memory[jax.devices()[3]] = {"bytes_limit": 1000, "peak_bytes_in_use": 1000 - BYTES + 1}
    assert not DeviceCopies().has_room(tree())
    memory[jax.devices()[3]] = None
    assert DeviceCopies().has_room(tree())


def test_the_memory_of_a_copy_does_not_count_against_the_next(memory):
    copies = DeviceCopies()

    def peak(amount):
        for device in jax.devices():
            memory[device] = {"bytes_limit": 700 + BYTES + 100, "peak_bytes_in_use": amount}

    peak(700)
    assert copies.has_room(tree())
    peak(700 + 2 * BYTES)  # without a copy
    assert not copies.has_room(tree())
    peak(700)
    copies.take(tree())
    peak(700 + BYTES)  # while a step ran beside the copy
    assert copies.has_room(tree())
    copies.take(tree())
    peak(700 + BYTES + 1)
    assert not copies.has_room(tree())
