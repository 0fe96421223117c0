"""Compiled programs that are kept on disk and found again by the next start."""

from __future__ import annotations

import os

import jax


def keep_compiled() -> None:
    """Tells JAX to keep compiled programs in JAX_COMPILATION_CACHE_DIR, by default ~/.cache/jaxchat/compiled.

    That includes programs for several devices with `ops.partition.partitioned` functions in them.
    """
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR", os.path.expanduser("~/.cache/jaxchat/compiled"))
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # a start has a dozen small programs too
    jax.config.update("jax_remove_custom_partitioning_ptr_from_cache_key", True)
