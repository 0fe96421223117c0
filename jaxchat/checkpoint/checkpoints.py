"""Checkpoints of a stage by Orbax: saved behind the training's back, checked when read, restored onto any mesh.

A step's folder holds the items `params`, `training` (the rest of the state), `data` (where the input stands) and
`meta`, and `manifest.json` with the size and CRC-32 of each file. It counts only when all of that is written.

Several processes save and restore together, each its own part of the arrays, into one shared directory. Process 0
decides which steps are there, writes the manifest and deletes; each checks the files that it reads its share of. All
must save at the same steps.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint import options

from jaxchat.checkpoint import s3
from jaxchat.checkpoint.integrity import find_damage, write_manifest
from jaxchat.checkpoint.retention import Retention
from jaxchat.checkpoint.snapshot import Snapshots, to_host
from jaxchat.checkpoint.trees import kinds, like, nested
from jaxchat.config import CheckpointConfig
from jaxchat.devices.processes import agreed, exchange
from jaxchat.errors import UserError, check
from jaxchat.storage import first_line, is_remote, readable, reason, storage_errors

WORTHS = "worths.json"
PARAMS, TRAINING, DATA, META = "params", "training", "data", "meta"
# Orbax tells of every save and restore what no user can act upon; what matters is raised.
logging.getLogger("absl").setLevel(logging.CRITICAL)


class Checkpoints:
    """The checkpoints of one stage in `directory`, any path that `etils.epath` opens; `config` says which are kept.

    A state is a dict of pytrees of `jax.Array`, one of them `params`, and at least one other.

    After a failed save `failed` is true, and after Ctrl-C in the wait for one: threads of Orbax's wait ten minutes for
    the rest of it, and who would end must not wait for them. Who would end otherwise waits first, by `wait` or `close`:
    Orbax cannot go on while Python shuts down.
    """

    failed = False

    def __init__(self, directory: epath.PathLike, config: CheckpointConfig | None = None):
        path = epath.Path(directory)
        # Orbax wants an absolute path, and epath's `absolute` takes gs://bucket for a relative one.
        self.directory = path if path.is_absolute() else path.absolute()
        self._atomicity = options.AtomicityOptions()
        if is_remote(self.directory):
            s3.install()
            # Storage renames by copying, one file after the other: there a file written last says that all is there.
            self._atomicity = options.AtomicityOptions(mode=options.AtomicityMode.COMMIT_FILE)
        self._config = config or CheckpointConfig()
        self._policy = Retention(self._config)
        self._worths: dict[int, float] | None = None  # of steps that were evaluated: the more the better
        self._manager: ocp.CheckpointManager | None = None
        self._thread: ThreadPoolExecutor | None = None  # of one thread, the only one to call the manager
        self._error: BaseException | None = None  # from there, not yet told
        self._snapshots = Snapshots()
        self._saving: int | None = None

    def prepare(self, abstract_tree: dict[str, Any]) -> None:
        """Compiles what the first save would wait for."""
        self._snapshots.prepare(abstract_tree)

    def copy(self, state_tree: dict[str, Any]) -> dict[str, Any] | None:
        """The state's copy on its own devices, for a `save` that comes when later steps have taken the state's buffers.

        It is dispatched, not waited for. None if a device of any process has no room for it.
        """
        self.wait()  # for the copy before: there is room for one
        here = self._snapshots.has_room(state_tree)
        return self._snapshots.take(state_tree) if all(exchange("room" if here else "")) else None

    def save(self, step: int, state_tree: dict[str, Any], *, data: dict, meta: dict, is_copy: bool = False) -> None:
        """Has a thread write the state, or a copy that nobody else needs, which is deleted then, and returns.

        Of a state it makes a copy itself; without one, it returns when the state is on the host. A step that is there
        already stays as it is. `data` and `meta` are JSON. Errors of the writing are raised by the next call.
        """
        self.wait()
        self._saving = step
        with self._told():
            self._writer()
        copy = state_tree if is_copy else None
        if step in self.steps():
            jax.tree.map(lambda x: x.delete(), copy)
            return
        copy = copy or self.copy(state_tree)
        on_host = self._begin(self._write, self._manager, step, state_tree if copy is None else copy, data, meta)
        if copy is None:
            self._finish(on_host)
        else:
            on_host.add_done_callback(lambda _: jax.tree.map(lambda x: x.delete(), copy))

    @staticmethod
    def _write(manager: ocp.CheckpointManager, step: int, state_tree: dict[str, Any], data: dict, meta: dict) -> None:
        """Copies the state to the host and returns; threads of Orbax's write it."""
        if jax.process_count() == 1:
            to_host(state_tree)
        params, rest = _split(state_tree)
        items = {
            PARAMS: ocp.args.PyTreeSave(nested(params)),
            TRAINING: ocp.args.PyTreeSave(nested(rest)),
            DATA: ocp.args.JsonSave(data),
            META: ocp.args.JsonSave({"meta": meta, "arrays": kinds(state_tree)}),
        }
        manager.save(step, args=ocp.args.Composite(**items), force=True)

    def note_worth(self, step: int, worth: float) -> None:
        """Remembers, with the checkpoints, how good the state of a step is, the more the better: for `keep_best`."""
        if self._config.keep_best:
            self._load_worths()[step] = worth
            agreed(self._write_worths)

    def _load_worths(self) -> dict[int, float]:
        if self._worths is None:
            self._worths = {int(step): worth for step, worth in agreed(self._read_worths).items()}
        return self._worths

    def _read_worths(self) -> dict[str, float]:
        path = self.directory / WORTHS
        try:
            with readable(path):
                data = path.read_bytes()
            return json.loads(data)
        except (FileNotFoundError, ValueError):  # without it, or with a torn one, the best is one of those to come
            return {}

    def _write_worths(self) -> None:
        with self._told():
            self.directory.mkdir(parents=True, exist_ok=True)
            part = self.directory / f"{WORTHS}.part"
            part.write_text(json.dumps(self._worths))
            part.replace(self.directory / WORTHS)

    def steps(self) -> list[int]:
        """The steps whose checkpoints are complete, ascending, after waiting for the one being written."""
        self.wait()
        return agreed(self._complete)

    def _complete(self) -> list[int]:
        if not self.directory.exists():
            return []
        return sorted(
            int(folder.name)
            for folder in self.directory.iterdir()
            if folder.name.isdecimal() and ocp.path.step.is_path_finalized(folder, atomicity_options=self._atomicity)
        )

    def latest_step(self) -> int | None:
        """The newest complete step, damaged or not; None without any."""
        return max(self.steps(), default=None)

    def best_step(self) -> int | None:
        """The complete step whose evaluation was the best of those that `keep_best` remembers; None without any."""
        worths, steps = self._load_worths(), self.steps()
        return max((step for step in worths if step in steps), key=worths.__getitem__, default=None)

    def restore(self, abstract_tree: dict[str, Any], step: int | None = None) -> tuple[dict[str, Any], dict, dict]:
        """The state (in the structure, types and shardings of `abstract_tree`), `data` and `meta` of a step.

        Args:
          abstract_tree: the saved state's ShapeDtypeStructs or arrays; a leaf without sharding goes to one device.
          step: the newest by default.

        Raises:
          UserError: no such checkpoint, a damaged one, or one of another model or optimizer.
        """
        step = self._existing(step)
        self._verify(step, (PARAMS, TRAINING, DATA, META))
        self._check_fit(step, abstract_tree)
        params, rest = _split(abstract_tree)
        restored = _read(
            self._folder(step),
            params=_restore_args(params),
            training=_restore_args(rest),
            data=ocp.args.JsonRestore(),
            meta=ocp.args.JsonRestore(),
        )
        tree = {PARAMS: like(params, restored.params), **like(rest, restored.training)}
        return tree, restored.data, restored.meta["meta"]

    def restore_params(self, abstract_params: Any, step: int | None = None) -> Any:
        """Only the parameters, without reading the optimizer's state; arguments and errors as `restore`."""
        step = self._existing(step)
        self._verify(step, (PARAMS, META))
        self._check_fit(step, {PARAMS: abstract_params})
        restored = _read(self._folder(step), params=_restore_args(abstract_params))
        return like(abstract_params, restored.params)

    def wait(self) -> None:
        """Returns when everything is on disk; raises what went wrong on the way there."""
        if self._manager is not None:
            self._finish(self._begin(self._manager.wait_until_finished))

    def _begin(self, work: Callable[..., None], *args: Any) -> Future:
        """Has the thread do it, behind what it has begun. The manager raises an error once in each thread that asks."""
        return self._thread.submit(self._noting_errors, work, *args)

    def _noting_errors(self, work: Callable[..., None], *args: Any) -> None:
        try:
            with self._told():
                work(*args)
        except BaseException as error:
            self._error = self._error or error

    def _finish(self, begun: Future) -> None:
        """Waits for it, and raises what went wrong in the thread until then; Ctrl-C ends the wait and nothing else."""
        try:
            begun.result()
        except KeyboardInterrupt:
            Checkpoints.failed = True
            raise
        error, self._error = self._error, None
        if error is not None:
            raise error

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """A disk that is full, read-only or gone is a line for the user; what was complete before stays as it is."""
        try:
            yield
        except (*storage_errors(), ValueError) as error:  # TensorStore raises the latter
            Checkpoints.failed = True
            try:
                good = max(self._complete(), default=None)
                newest = "there is none yet" if good is None else f"the newest good one is {self._folder(good)}"
            except storage_errors() as gone:
                newest = f"what is there cannot be seen either ({first_line(gone)})"
            mend = "see that it can be reached" if is_remote(self.directory) else "make room, or the folder writable"
            raise UserError(
                f"in {self.directory} nothing can be written ({reason(error)}); {newest}; "
                f"{mend}, and the same command goes on from there"
            ) from error

    def close(self) -> None:
        """Waits and releases the threads."""
        if self._manager is not None:
            closed, self._manager = self._begin(self._manager.close), None
            self._thread.shutdown(wait=False)  # once that is done
            self._finish(closed)

    def _folder(self, step: int) -> epath.Path:
        return self.directory / str(step)

    def _writer(self) -> None:
        # Built by the first save, since it clears away what a killed writer left: a reader must not.
        self._policy.worths = dict(self._load_worths())
        if self._manager is None:
            agreed(self._make_directory)
            settings = ocp.CheckpointManagerOptions(
                create=False,
                multiprocessing_options=_processes(),
                preservation_policy=self._policy,
                cleanup_tmp_directories=True,
                atomicity_options=self._atomicity,
                async_options=ocp.AsyncOptions(post_finalization_callback=self._write_manifest),
            )
            self._manager = _Manager(self.directory, options=settings, item_handlers=_handlers())
            self._thread = ThreadPoolExecutor(1)

    def _make_directory(self) -> None:
        with self._told():
            self.directory.mkdir(parents=True, exist_ok=True)

    def _write_manifest(self) -> None:
        """Orbax calls this when a step's files are complete, before it renames or marks their folder as finished."""
        if jax.process_index() != 0:
            return
        written = [f for f in self.directory.iterdir() if f.name.split(".")[0] == str(self._saving)]
        for folder in written:
            write_manifest(folder, (PARAMS, TRAINING, DATA, META))

    def _existing(self, step: int | None) -> int:
        steps = self.steps()
        check(bool(steps), f"there is no checkpoint in {self.directory}; run the stage that writes it")
        there = ", ".join(map(str, steps))
        check(
            step is None or step in steps, f"there is no checkpoint of step {step} in {self.directory}, only of {there}"
        )
        return steps[-1] if step is None else step

    def _verify(self, step: int, items: tuple[str, ...]) -> None:
        """Raises a UserError that names the newest good step, unless the items' files are as they were written."""
        damage = find_damage(self._folder(step), items)
        if damage is None:
            return
        good = next((s for s in reversed(self.steps()) if s < step and not find_damage(self._folder(s), items)), None)
        anew = "choose another --run-dir" if is_remote(self.directory) else "start again with --fresh"
        advice = anew if good is None else f"delete that folder to go on from step {good}"
        raise UserError(f"checkpoint {self._folder(step)} is damaged ({damage}); {advice}")

    def _check_fit(self, step: int, abstract_tree: dict[str, Any]) -> None:
        saved = _read(self._folder(step), meta=ocp.args.JsonRestore()).meta["arrays"]
        saved = {name: kind for name, kind in saved.items() if name.split("/")[0] in abstract_tree}
        wanted = kinds(abstract_tree)
        for name in sorted({*saved, *wanted}, key=lambda name: (not name.startswith(PARAMS), name)):
            there, here = saved.get(name, "missing"), wanted.get(name, "missing")
            check(
                there == here,
                f"checkpoint {self._folder(step)} is of other settings: {name} is {there} there and {here} here; "
                "use the settings that it was saved with",
            )


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        return False  # the loop decides when a process that must end saves for the last time


def _processes() -> options.MultiprocessingOptions:
    """All of them, by their numbers: Orbax's then wait for each other at the coordinator, and not by programs on the
    devices, which a thread would dispatch among the training's, in each process in another order."""
    return options.MultiprocessingOptions(active_processes=set(range(jax.process_count())))


def _handlers() -> dict[str, ocp.CheckpointHandler]:
    """What saves the items. Pinned memory, Orbax's usual way to the host, is filled on the steps' own stream. Of parts
    that several devices have, each process brings some; one that is alone takes what `to_host` has brought there."""
    arrays = ocp.type_handlers.ArrayHandler(use_replica_parallel=jax.process_count() > 1)
    settings = {
        "type_handler_registry": ocp.type_handlers.create_type_handler_registry((jax.Array, arrays)),
        "enable_pinned_host_transfer": False,
        "multiprocessing_options": _processes(),
    }
    trees = {name: ocp.PyTreeCheckpointHandler(**settings) for name in (PARAMS, TRAINING)}
    return trees | {name: ocp.JsonCheckpointHandler() for name in (DATA, META)}


def _split(state_tree: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The parameters, and the rest."""
    return state_tree[PARAMS], {key: value for key, value in state_tree.items() if key != PARAMS}


def _restore_args(abstract: Any) -> ocp.args.PyTreeRestore:
    def place(leaf):
        sharding = getattr(leaf, "sharding", None) or SingleDeviceSharding(jax.local_devices()[0])
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    item = nested(jax.tree.map(place, abstract))
    return ocp.args.PyTreeRestore(item=item, restore_args=ocp.checkpoint_utils.construct_restore_args(item))


def _read(folder: epath.Path, **items: Any) -> Any:
    with readable(folder), ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
        return reader.restore(folder, args=ocp.args.Composite(**items))
