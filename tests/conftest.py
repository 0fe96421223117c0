"""Every test runs on the CPU as four virtual devices, so that sharded code is real, and with the shapes and types of
all functions on arrays checked at each call."""

import os
import signal

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"  # the tests of downloads have a server of their own
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"  # asks Google itself about a bucket, whatever the server

import jax  # noqa: E402
import pytest  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

import tests.typechecker  # noqa: E402, F401  (the hook finds it by its name)

# A shell without job control starts background commands deaf to Ctrl-C, and their children with them: the tests that
# press it would wait in vain.
signal.signal(signal.SIGINT, signal.default_int_handler)

jax.config.update("jax_num_cpu_devices", 4)
if os.environ["JAX_PLATFORMS"] != "cpu":  # tests/model runs on a GPU too, whose products of fp32 are else not of fp32
    jax.config.update("jax_default_matmul_precision", "highest")
ON_ARRAYS = ("ops", "model", "optim", "train", "infer", "eval")
install_import_hook([f"jaxchat.{package}" for package in ON_ARRAYS], "tests.typechecker.check")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run of one process of four devices that the others are compared with."""
    from tests.tiny import start  # imports jaxchat, after the hook is there

    patch = pytest.MonkeyPatch()
    patch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("compiled")))
    directory = tmp_path_factory.mktemp("runs") / "whole"
    code, _, err = start(directory, "--stages=tokenizer,pretrain,sft")
    assert code == 0, err
    yield directory
    patch.undo()
