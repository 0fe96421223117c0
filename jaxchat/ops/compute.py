"""How a forward pass is computed: one frozen value that travels from the command line to the operations."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from jaxchat.config import Experiment
from jaxchat.devices.gpu import multiplies_bf16
from jaxchat.errors import check
from jaxchat.ops import fp8

Remat = Literal["none", "mlp", "full"]


@dataclass(frozen=True)
class Compute:
    """How a forward pass is computed. None of it changes what is computed, apart from rounding.

    Attributes:
      dtype: of activations and matrix products; parameters stay fp32.
      mesh: the devices that share the rows of a batch; needed where parameters are split over them.
      remat: what the backward pass recomputes instead of keeping it: "none", "mlp" (norms and the MLP), or "full" (all
        of a block except its attention).
      fp8: whether the blocks' matrix products are computed in fp8 and the rest in bf16, which `dtype` must be.
    """

    dtype: DTypeLike = jnp.float32
    mesh: Mesh | None = None
    remat: Remat = "none"
    fp8: bool = False

    def __post_init__(self):
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))  # one type, one compiled program

    def with_remat(self, remat: Remat) -> Compute:
        return replace(self, remat=remat)


FP32 = Compute()  # the default: fp32, on one device, nothing recomputed


def compute_dtype(experiment: Experiment) -> DTypeLike:
    """The dtype of activations: bf16 where the device has it, fp32 elsewhere, unless the experiment sets one."""
    if experiment.precision in ("auto", "fp8"):
        return jnp.bfloat16 if multiplies_bf16() else jnp.float32
    return jnp.dtype(experiment.precision)


def for_training(experiment: Experiment, mesh: Mesh | None = None) -> Compute:
    """How `experiment` trains on this process's devices; nothing is recomputed.

    Raises:
      UserError: the experiment asks for fp8, and the device or the shape of the model does not allow it.
    """
    if experiment.precision == "fp8":
        check(
            fp8.supported(),
            "precision fp8 needs an NVIDIA GPU of the Hopper generation or later, not "
            f"{jax.devices()[0].device_kind}; --precision=auto computes in what the device has",
        )
        check_fp8_shape(experiment)
    return Compute(compute_dtype(experiment), mesh, fp8=experiment.precision == "fp8")


def check_fp8_shape(experiment: Experiment) -> None:
    """Raises `UserError` where the model has a shape that fp8 does not allow."""
    kv_width = experiment.model.kv_heads * experiment.model.head_dim
    check(
        kv_width % fp8.MULTIPLE == 0,
        f"precision fp8 needs keys whose width is a multiple of {fp8.MULTIPLE}, not {kv_width}; choose another "
        "--model.num-kv-heads, or --precision=auto",
    )
