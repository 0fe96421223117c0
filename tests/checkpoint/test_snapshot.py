"""Copies of a state on its devices: where they lie, that they are copies, and when there is room for them."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from jaxchat.checkpoint import snapshot
from jaxchat.checkpoint.snapshot import Snapshots, to_host
from jaxchat.config import MeshConfig
from jaxchat.devices.mesh import make_mesh

MESH = make_mesh(MeshConfig(fsdp=2, tensor=2))


def tree():
    """Of 64 + 128 + 4 bytes on each device, by how they are shared out."""
    leaves = {
        "square": (jnp.arange(64, dtype=jnp.float32).reshape(8, 8), P("fsdp", "tensor")),
        "rows": (jnp.ones((16, 8), jnp.bfloat16), P("fsdp", None)),
        "step": (jnp.asarray(3, jnp.int32), P()),
    }
    return {name: jax.device_put(leaf, NamedSharding(MESH, spec)) for name, (leaf, spec) in leaves.items()}


BYTES = 64 + 128 + 4


def test_each_part_comes_to_the_host_once_whatever_devices_have_it_too(monkeypatch):
    there, brought = tree(), []
    monkeypatch.setattr(snapshot, "np", SimpleNamespace(asarray=lambda part: brought.append(part.nbytes)))
    to_host(there)
    assert sorted(brought) == [4, 64, 64, 64, 64, 128, 128]


@pytest.fixture
def memory(monkeypatch):
    """What each device says of its memory; to be filled."""
    stats = {}
    monkeypatch.setattr(type(jax.devices()[0]), "memory_stats", lambda device: stats[device])
    return stats


def test_a_copy_is_of_its_own_buffers_and_lies_like_the_tree():
    original = tree()
    copy = Snapshots().take(original)
    for name, leaf in original.items():
        assert copy[name].sharding == leaf.sharding
        np.testing.assert_array_equal(copy[name], leaf)
        here, there = ({s.data.unsafe_buffer_pointer() for s in x.addressable_shards} for x in (leaf, copy[name]))
        assert not here & there
    alone = {"x": jax.device_put(jnp.ones(3), SingleDeviceSharding(jax.devices()[2]))}
    assert Snapshots().take(alone)["x"].sharding == alone["x"].sharding


def test_what_was_prepared_is_not_compiled_again():
    compiled = []

    def note(event, seconds, **_):
        if "backend_compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(note)
    original = {**tree(), "of no other test": jax.device_put(np.ones(5), NamedSharding(MESH, P()))}
    snapshots = Snapshots()
    compiled.clear()
    snapshots.prepare(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), original))
    assert len(compiled) == 1
    snapshots.take(original)
    assert len(compiled) == 1


def test_there_is_no_room_where_one_device_has_none(memory):
    for device in jax.devices():
        memory[device] = {"bytes_limit": 1000, "peak_bytes_in_use": 1000 - BYTES}
    assert Snapshots().has_room(tree())
    memory[jax.devices()[3]] = {"bytes_limit": 1000, "peak_bytes_in_use": 1000 - BYTES + 1}
    assert not Snapshots().has_room(tree())
    memory[jax.devices()[3]] = None
    assert Snapshots().has_room(tree())


def test_what_a_copy_has_taken_does_not_count_against_the_next(memory):
    snapshots = Snapshots()

    def peak(amount):
        for device in jax.devices():
            memory[device] = {"bytes_limit": 700 + BYTES + 100, "peak_bytes_in_use": amount}

    peak(700)
    assert snapshots.has_room(tree())
    peak(700 + 2 * BYTES)  # without a copy
    assert not snapshots.has_room(tree())
    peak(700)
    snapshots.take(tree())
    peak(700 + BYTES)  # while a step ran beside the copy
    assert snapshots.has_room(tree())
    snapshots.take(tree())
    peak(700 + BYTES + 1)
    assert not snapshots.has_room(tree())
