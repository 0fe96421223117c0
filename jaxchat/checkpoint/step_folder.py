"""How one checkpoint lies in its folder, and how Orbax writes and reads it.

The folder of a step holds four items: `params`, `training` (the rest of the state), `data` (the position in the
training data) and `meta` (facts about the run, and the type and shape of every array). `manifest.json` beside them
lists their files. Arrays are stored as nested dicts that follow the leaves' paths, so that what is on disk does not
depend on the classes a state is made of.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint import options

from jaxchat.checkpoint.device_copy import copy_to_host
from jaxchat.runs.files import Damaged, Object, read_json
from jaxchat.storage import is_remote, readable

PARAMS, TRAINING, DATA, META = "params", "training", "data", "meta"
ITEMS = (PARAMS, TRAINING, DATA, META)


# --- write --------------------------------------------------------------------------------------------------------


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        return False  # the training loop decides at which step a process that must end saves for the last time


def make_manager(
    directory: epath.Path,
    policy: ocp.checkpoint_managers.PreservationPolicy,
    on_files_written: Callable[[], None],
) -> ocp.CheckpointManager:
    """Orbax's manager for the steps in `directory`; it deletes what `policy` does not keep, and half-written saves.

    `on_files_written` is called in a thread once all files of a step are there, before its folder counts as complete.
    """
    settings = ocp.CheckpointManagerOptions(
        create=False,
        multiprocessing_options=_all_processes(),
        preservation_policy=policy,
        cleanup_tmp_directories=True,
        atomicity_options=_atomicity(directory),
        async_options=ocp.AsyncOptions(post_finalization_callback=on_files_written),
    )
    return _Manager(directory, options=settings, item_handlers=_handlers())


def write(manager: ocp.CheckpointManager, step: int, state: dict[str, Any], data: dict, meta: dict) -> None:
    """Copies the state to the host and returns; Orbax's threads write it to the folder of `step`."""
    if jax.process_count() == 1:
        copy_to_host(state)
    params, rest = _split(state)
    items = {
        PARAMS: ocp.args.PyTreeSave(_to_nested_dict(params)),
        TRAINING: ocp.args.PyTreeSave(_to_nested_dict(rest)),
        DATA: ocp.args.JsonSave(data),
        META: ocp.args.JsonSave({"meta": meta, "arrays": leaf_types(state)}),
    }
    manager.save(step, args=ocp.args.Composite(**items), force=True)


def is_complete(folder: epath.Path) -> bool:
    """Whether the folder of a step was written to its end."""
    return ocp.path.step.is_path_finalized(folder, atomicity_options=_atomicity(folder))


def _atomicity(path: epath.Path) -> options.AtomicityOptions:
    # A local folder is complete when it is renamed. An object store renames by copying one file after the other, so
    # there a marker file, written last, says that the others are complete.
    return (
        options.AtomicityOptions(mode=options.AtomicityMode.COMMIT_FILE)
        if is_remote(path)
        else (options.AtomicityOptions())
    )


def _all_processes() -> options.MultiprocessingOptions:
    """All processes, listed by number.

    Orbax then synchronises them through the coordinator. By default it would run a program on all devices, which a
    thread dispatches in between the training steps, in each process at another place.
    """
    return options.MultiprocessingOptions(active_processes=set(range(jax.process_count())))


def _handlers() -> dict[str, ocp.CheckpointHandler]:
    # Of an array that several devices hold, each process writes a part; a single process writes what `copy_to_host`
    # has brought to the host. Pinned memory, Orbax's usual way to the host, would be filled on the steps' own stream.
    arrays = ocp.type_handlers.ArrayHandler(use_replica_parallel=jax.process_count() > 1)
    settings = {
        "type_handler_registry": ocp.type_handlers.create_type_handler_registry((jax.Array, arrays)),
        "enable_pinned_host_transfer": False,
        "multiprocessing_options": _all_processes(),
    }
    return {
        PARAMS: ocp.PyTreeCheckpointHandler(**settings),
        TRAINING: ocp.PyTreeCheckpointHandler(**settings),
        DATA: ocp.JsonCheckpointHandler(),
        META: ocp.JsonCheckpointHandler(),
    }


# --- restore ------------------------------------------------------------------------------------------------------


def read_state(folder: epath.Path, abstract_state: dict[str, Any]) -> tuple[dict[str, Any], dict, dict]:
    """The state, `data` and `meta` in the folder of a step; arguments as for `Checkpoints.restore`."""
    params, rest = _split(abstract_state)
    restored = _read(
        folder,
        params=_restore_args(params),
        training=_restore_args(rest),
        data=ocp.args.JsonRestore(),
        meta=ocp.args.JsonRestore(),
    )
    state = {PARAMS: _from_nested_dict(params, restored.params), **_from_nested_dict(rest, restored.training)}
    return state, restored.data, restored.meta["meta"]


def read_params(folder: epath.Path, abstract_params: Any) -> Any:
    """Only the parameters in the folder of a step."""
    restored = _read(folder, params=_restore_args(abstract_params))
    return _from_nested_dict(abstract_params, restored.params)


def read_position(folder: epath.Path) -> dict:
    """Only the position in the training data in the folder of a step."""
    return _read(folder, data=ocp.args.JsonRestore()).data


def read_meta(folder: epath.Path) -> dict | None:
    """Only `meta` in the folder of a step; None if it is damaged.

    It is read without Orbax, which would start JAX's devices: before that, processes may still have to connect.
    """
    try:
        found = read_json(folder / META / "metadata", Object({"meta": Object()}), "")
    except Damaged:
        return None
    return found and found["meta"]


def read_leaf_types(folder: epath.Path) -> dict[str, str]:
    """The `leaf_types` of the state that was saved in the folder of a step."""
    return _read(folder, meta=ocp.args.JsonRestore()).meta["arrays"]


def _read(folder: epath.Path, **items: Any) -> Any:
    with readable(folder), ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
        return reader.restore(folder, args=ocp.args.Composite(**items))


def _restore_args(abstract: Any) -> ocp.args.PyTreeRestore:
    def place(leaf):
        sharding = getattr(leaf, "sharding", None) or SingleDeviceSharding(jax.local_devices()[0])
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    item = _to_nested_dict(jax.tree.map(place, abstract))
    return ocp.args.PyTreeRestore(item=item, restore_args=ocp.checkpoint_utils.construct_restore_args(item))


# --- trees --------------------------------------------------------------------------------------------------------


def leaf_types(tree: Any) -> dict[str, str]:
    """The type and shape of each leaf, such as `float32[64,256]`, by its path, such as `params/head/kernel`."""
    return {"/".join(path): f"{x.dtype}{list(x.shape)}".replace(" ", "") for path, x in _leaves(tree)}


def _split(state: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The parameters, and the rest."""
    return state[PARAMS], {key: value for key, value in state.items() if key != PARAMS}


def _leaves(tree: Any) -> list[tuple[tuple[str, ...], Any]]:
    """Each leaf with its path."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [(tuple(jax.tree_util.keystr((key,), simple=True) for key in path), leaf) for path, leaf in leaves]


def _to_nested_dict(tree: Any) -> dict[str, Any]:
    root: dict[str, Any] = {}
    for path, leaf in _leaves(tree):
        node = root
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = leaf
    return root


def _from_nested_dict(structure: Any, root: dict[str, Any]) -> Any:
    """The inverse of `_to_nested_dict`, in the structure of a given tree."""
    leaves = []
    for path, _ in _leaves(structure):
        node = root
        for name in path:
            node = node[name]
        leaves.append(node)
    return jax.tree.unflatten(jax.tree.structure(structure), leaves)
