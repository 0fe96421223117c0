"""Every test runs on the CPU as four virtual devices, so that sharded code is real, and with the annotated shapes and
types of `jaxchat` checked at each call."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

jax.config.update("jax_num_cpu_devices", 4)
install_import_hook("jaxchat", "beartype.beartype")
