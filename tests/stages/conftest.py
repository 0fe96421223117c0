"""A small run of all stages, made once for this folder."""

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from tests.tiny import start


@pytest.fixture(scope="package")
def finished(tmp_path_factory):
    """A run of all stages; the programs it compiles are cached for later starts."""
    cache, patch = tmp_path_factory.mktemp("compiled"), pytest.MonkeyPatch()
    patch.setenv("JAX_COMPILATION_CACHE_DIR", str(cache))
    before = jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    compilation_cache.reset_cache()
    directory = tmp_path_factory.mktemp("runs") / "whole"
    code, out, err = start(directory)
    assert code == 0, err
    yield directory
    patch.undo()
    jax.config.update("jax_compilation_cache_dir", before[0])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", before[1])
    compilation_cache.reset_cache()
