"""Attention over whole rows on TPUs by splash attention, the flash attention that comes with JAX.

It skips the blocks of the T x T scores that the mask rules out, and holds no others for the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from jaxchat.devices.mesh import BATCH_SPEC, data_shards

LANES = 128  # of a TPU's vector registers: the size of a head must be a multiple, and so must a block
BLOCK = 512  # most queries, and most keys, at a time
INTERPRET = False  # set by tests, to run the kernels on a CPU


def available(mesh: Mesh | None) -> bool:
    """Whether the devices of `mesh`, by default those of this process, run the kernels."""
    return INTERPRET or (jax.default_backend() if mesh is None else mesh.devices.flat[0].platform) == "tpu"


def fits(length: int, rows: int, mesh: Mesh | None) -> bool:
    """Whether rows of `length` tokens consist of whole blocks, and divide among the devices of `mesh`.

    Without a mesh, which says how arrays are split, a kernel runs on one device only.
    """
    if mesh is None and jax.device_count() > 1 and not INTERPRET:
        return False
    return length % LANES == 0 and (mesh is None or rows % data_shards(mesh) == 0)


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    *,
    window: int | None = None,
    documents: Int[Array, "B T"] | None = None,
    mesh: Mesh | None = None,
    scale: float = 1.0,
    kept: str,
) -> Float[Array, "B T N H"]:
    """As `jaxchat.ops.attention.attend`, each device for its rows and, where `tensor` divides K, for its heads.

    What the backward pass needs of the kernel's results has the name `kept` for `jax.checkpoint`.
    """

    # Imported here: a quarter of a second that only a TPU pays for.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    def part(q, k, v, documents):
        kernel = _kernel(splash, q.shape[1], q.shape[2], window, kept)
        # The kernel does not divide the scores by √H, and its arrays are one row's, [N, T, H].
        rows = ((q * (scale * q.shape[-1] ** -0.5)).swapaxes(1, 2), k.swapaxes(1, 2), v.swapaxes(1, 2))
        segments = None if documents is None else splash.SegmentIds(documents, documents)
        return jax.vmap(kernel)(*rows, segments).swapaxes(1, 2)

    if mesh is None or mesh.size == 1:
        return part(q, k, v, documents)
    heads = "tensor" if k.shape[2] % mesh.shape["tensor"] == 0 else None
    split = PartitionSpec(*BATCH_SPEC, None, heads)
    return jax.shard_map(
        part,
        mesh=mesh,
        in_specs=(split, split, split, None if documents is None else BATCH_SPEC),
        out_specs=split,
        check_vma=False,  # the kernels do not say over which axes their results vary
    )(q, k, v, documents)


def _kernel(splash: Any, length: int, heads: int, window: int | None, kept: str) -> Callable:
    if window is None:
        mask = splash.CausalMask((length, length))
    else:
        mask = splash.LocalMask((length, length), (window, 0), 0)
    block = next(size for size in range(min(BLOCK, length), 0, -LANES) if length % size == 0)
    sizes = dict.fromkeys(("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq"), block)
    return splash.make_splash_mha(
        splash.MultiHeadMask([mask] * heads),
        block_sizes=splash.BlockSizes(**sizes),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=kept,
        interpret=INTERPRET,
    )
