"""The checkpoints of a stage: saved in the background, verified when read, restored onto any mesh.

What a checkpoint's folder holds, and how it is written and read, is in `step_folder.py`.

Several processes save and restore together, each its own part of the arrays, in one shared directory; all must save at
the same steps. Process 0 decides which steps exist, writes the manifests and deletes old steps. When restoring, each
process verifies a share of the files.
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

from jaxchat.checkpoint import step_folder
from jaxchat.checkpoint.device_copy import DeviceCopies
from jaxchat.checkpoint.manifest import find_damage, write_manifest
from jaxchat.checkpoint.retention import Retention
from jaxchat.checkpoint.step_folder import DATA, ITEMS, META, PARAMS, leaf_types
from jaxchat.config import CheckpointConfig
from jaxchat.devices.processes import exchange, on_process_zero
from jaxchat.errors import UserError, check
from jaxchat.runs.files import Damaged, Object, read_json
from jaxchat.runs.records import IMPORT_AGAIN, RECORD, came_by_import
from jaxchat.storage import first_line, is_remote, reason, storage_errors, to_path

SCORES = "worths.json"


class Checkpoints:
    """The checkpoints of one stage in `directory`, any path that `etils.epath` opens; `config` says which are kept.

    A state is a dict of pytrees of `jax.Array`: `params`, and at least one other.

    Call `wait` or `close` before the program ends: Orbax cannot finish a save while Python shuts down. After a failed
    save its threads wait up to ten minutes for the rest of it, and Python would wait for them: end with `os._exit`.
    """

    def __init__(self, directory: epath.PathLike, config: CheckpointConfig | None = None):
        _silence_orbax()
        path = epath.Path(to_path(directory))
        # Orbax wants an absolute path, and epath's `absolute` takes gs://bucket for a relative one.
        self.directory = path if path.is_absolute() else path.absolute()
        if str(self.directory).startswith("s3://"):
            from jaxchat.checkpoint import s3  # replaces a private function of Orbax: only where it is needed

            s3.enable()
        self._config = config or CheckpointConfig()
        self._retention = Retention(self._config)
        self._scores: dict[int, float] | None = None  # None until read
        self._copies = DeviceCopies()
        # The first save makes the manager; from then on only this one thread calls it.
        self._manager: ocp.CheckpointManager | None = None
        self._thread = ThreadPoolExecutor(1)
        self._error: BaseException | None = None  # raised in the thread, and not yet here
        self._saving: int | None = None

    # --- save -----------------------------------------------------------------------------------------------------

    def prepare(self, abstract_tree: dict[str, Any]) -> None:
        """Compiles what the first save would otherwise wait for."""
        self._copies.prepare(abstract_tree)

    def copy(self, state_tree: dict[str, Any]) -> dict[str, Any] | None:
        """A copy of the state on its own devices, to `save` after later steps have overwritten the state.

        It is dispatched and not waited for. None if a device of any process has no room for it.
        """
        self.wait()  # there is room for one copy only
        has_room = self._copies.has_room(state_tree)
        return self._copies.take(state_tree) if all(exchange("room" if has_room else "")) else None

    def save(self, step: int, state_tree: dict[str, Any], *, data: dict, meta: dict, is_copy: bool = False) -> None:
        """Saves the state in the background; a step that exists already is left as it is.

        Args:
          state_tree: the state, which may be overwritten as soon as the call returns: it is copied on the devices, or,
            if they have no room, to the host before the call returns.
          data, meta: JSON.
          is_copy: `state_tree` is a copy that nobody else needs; it is saved as it is, and then deleted.

        Raises:
          UserError: this save cannot begin, or an earlier one has failed since the last call.
        """
        self.wait()
        self._saving = step
        with self._write_errors():
            self._prepare_to_write()
        copy = state_tree if is_copy else None
        if step in self.steps():
            jax.tree.map(lambda x: x.delete(), copy)
            return
        copy = copy or self.copy(state_tree)
        tree = state_tree if copy is None else copy
        on_host = self._in_background(step_folder.write, self._manager, step, tree, data, meta)
        if copy is None:
            self._await(on_host)
        else:
            on_host.add_done_callback(lambda _: jax.tree.map(lambda x: x.delete(), copy))

    def _prepare_to_write(self) -> None:
        self._retention.scores = dict(self._load_scores())
        if self._manager is None:
            on_process_zero(self._make_directory)
            # Not earlier: the manager deletes what a killed writer has left, and somebody who only reads must not.
            self._manager = step_folder.make_manager(self.directory, self._retention, self._write_manifest)

    def _make_directory(self) -> None:
        with self._write_errors():
            self.directory.mkdir(parents=True, exist_ok=True)

    def _write_manifest(self) -> None:
        if jax.process_index() != 0:
            return
        # The folder may still have its temporary name.
        for folder in [f for f in self.directory.iterdir() if f.name.split(".")[0] == str(self._saving)]:
            write_manifest(folder, ITEMS)

    def wait(self) -> None:
        """Returns when everything is on disk; raises the error of a save that has failed."""
        if self._manager is not None:
            self._await(self._in_background(self._manager.wait_until_finished))

    def close(self) -> None:
        """Waits, and ends the threads; what is closed can still be read from, but not saved to."""
        if self._manager is not None:
            closed, self._manager = self._in_background(self._manager.close), None
            self._thread.shutdown(wait=False)  # it still does what it was given
            self._await(closed)

    def _in_background(self, work: Callable[..., None], *args: Any) -> Future:
        """Has the thread do it, after what it was given before."""
        return self._thread.submit(self._keep_error, work, *args)

    def _keep_error(self, work: Callable[..., None], *args: Any) -> None:
        # Kept here, since Orbax's manager raises an error once in each thread that asks.
        try:
            with self._write_errors():
                work(*args)
        except BaseException as error:
            self._error = self._error or error

    def _await(self, work: Future) -> None:
        """Waits for it, and raises what has gone wrong in the thread so far; Ctrl-C ends only the wait."""
        work.result()
        error, self._error = self._error, None
        if error is not None:
            raise error

    @contextlib.contextmanager
    def _write_errors(self) -> Iterator[None]:
        """Turns the errors of a disk that is full, read-only or gone into one line for the user."""
        try:
            yield
        except (*storage_errors(), ValueError) as error:  # TensorStore raises ValueError
            try:
                good = max(self._complete_steps(), default=None)
                newest = "there is no checkpoint yet"
                if good is not None:
                    newest = f"the newest good checkpoint is {self._folder(good)}"
            except storage_errors() as unreachable:
                newest = f"its checkpoints cannot be listed either ({first_line(unreachable)})"
            remedy = "make sure that it can be reached"
            if not is_remote(self.directory):
                remedy = "free some space, or make the folder writable"
            raise UserError(
                f"cannot write to {self.directory} ({reason(error)}); {newest}; {remedy}, "
                "then run the same command again to resume"
            ) from error

    # --- which steps exist, and which are best --------------------------------------------------------------------

    def steps(self) -> list[int]:
        """The steps with a complete checkpoint, ascending; waits for the one being written."""
        self.wait()
        return on_process_zero(self._complete_steps)

    def _complete_steps(self) -> list[int]:
        if not self.directory.exists():
            return []
        return sorted(
            int(folder.name)
            for folder in self.directory.iterdir()
            if folder.name.isdecimal() and step_folder.is_complete(folder)
        )

    def latest_step(self) -> int | None:
        """The newest complete step, damaged or not; None if there is none."""
        return max(self.steps(), default=None)

    def best_step(self) -> int | None:
        """The complete step with the best score recorded for `keep_best`; None if there is none."""
        scores, steps = self._load_scores(), self.steps()
        return max((step for step in scores if step in steps), key=scores.__getitem__, default=None)

    def scores(self) -> dict[int, float]:
        """The scores recorded, by step; some may be of steps whose checkpoints are deleted."""
        return dict(self._load_scores())

    def record_score(self, step: int, score: float) -> None:
        """Records how good the state of a step is, higher is better; used by `keep_best`, and ignored without it."""
        if self._config.keep_best:
            self._load_scores()[step] = score
            on_process_zero(self._write_scores)

    def forget_scores(self, after: int) -> None:
        """Forgets the scores of all later steps, which are about to be done again."""
        kept = {step: score for step, score in self._load_scores().items() if step <= after}
        if self._config.keep_best and kept != self._scores:
            self._scores = kept
            on_process_zero(self._write_scores)

    def _load_scores(self) -> dict[int, float]:
        if self._scores is None:
            self._scores = {int(step): score for step, score in on_process_zero(self._read_scores).items()}
        return self._scores

    def _read_scores(self) -> dict[str, float]:
        path = self.directory / SCORES
        try:
            scores = read_json(path, Object(others=float), "delete it") or {}
        except Damaged:
            return {}  # the best is among the steps to come
        return {step: score for step, score in scores.items() if step.isdecimal()}

    def _write_scores(self) -> None:
        with self._write_errors():
            self.directory.mkdir(parents=True, exist_ok=True)
            part = self.directory / f"{SCORES}.part"
            part.write_text(json.dumps(self._scores))
            part.replace(self.directory / SCORES)

    # --- restore --------------------------------------------------------------------------------------------------

    def restore(self, abstract_tree: dict[str, Any], step: int | None = None) -> tuple[dict[str, Any], dict, dict]:
        """The state (in the structure, types and shardings of `abstract_tree`), `data` and `meta` of a step.

        Args:
          abstract_tree: the state as ShapeDtypeStructs or arrays; a leaf without a sharding goes to one device.
          step: the newest by default.

        Raises:
          UserError: there is no such checkpoint, it is damaged, or it is of another model or optimizer.
        """
        step = self._existing(step)
        self._verify_files(step, ITEMS)
        self._verify_types(step, abstract_tree)
        return step_folder.read_state(self._folder(step), abstract_tree)

    def restore_params(self, abstract_params: Any, step: int | None = None) -> Any:
        """Only the parameters, without reading the optimizer's state; arguments and errors as for `restore`."""
        step = self._existing(step)
        self._verify_files(step, (PARAMS, META))
        self._verify_types(step, {PARAMS: abstract_params})
        return step_folder.read_params(self._folder(step), abstract_params)

    def read_position(self) -> dict:
        """`data` of the newest step. Raises `UserError` as `restore` does."""
        step = self._existing(None)
        self._verify_files(step, (DATA,))
        return step_folder.read_position(self._folder(step))

    def read_meta(self) -> dict | None:
        """`meta` of the newest step, without starting JAX's devices; None if there is none, or it is damaged."""
        step = self.latest_step()
        return None if step is None else step_folder.read_meta(self._folder(step))

    def _folder(self, step: int) -> epath.Path:
        return self.directory / str(step)

    def _existing(self, step: int | None) -> int:
        steps = self.steps()
        check(bool(steps), f"there is no checkpoint in {self.directory}; {self._again()}")
        listed = ", ".join(map(str, steps))
        check(
            step is None or step in steps,
            f"there is no checkpoint of step {step} in {self.directory}, only of {listed}",
        )
        return steps[-1] if step is None else step

    def _verify_files(self, step: int, items: tuple[str, ...]) -> None:
        """Raises a UserError that names the newest good step, unless the items' files are as they were written."""
        damage = find_damage(self._folder(step), items)
        if damage is None:
            return
        good = next((s for s in reversed(self.steps()) if s != step and not find_damage(self._folder(s), items)), None)
        advice = "choose another --run-dir" if is_remote(self.directory) else self._again()
        if good is not None:
            record = self.directory.parent / "stage.json"
            both = f"delete it and {record}" if record.exists() else "delete that folder"
            advice = f"{both} to resume from step {good}, or {advice}"
        raise UserError(f"checkpoint {self._folder(step)} is damaged ({damage}); {advice}")

    def _again(self) -> str:
        """The remedy that makes the checkpoints anew."""
        stage = self.directory.parent  # RUN/STAGE/checkpoints
        try:
            record = read_json(stage / "stage.json", RECORD, "") or {}
        except UserError:
            record = {}
        return IMPORT_AGAIN if came_by_import(record) else f"train again with --redo={stage.name}"

    def _verify_types(self, step: int, abstract_tree: dict[str, Any]) -> None:
        """Raises a UserError, about a parameter first, unless the checkpoint has just these arrays."""
        saved = step_folder.read_leaf_types(self._folder(step))
        saved = {name: leaf_type for name, leaf_type in saved.items() if name.split("/")[0] in abstract_tree}
        wanted = leaf_types(abstract_tree)
        for name in sorted({*saved, *wanted}, key=lambda name: (not name.startswith(PARAMS), name)):
            there, here = saved.get(name, "missing"), wanted.get(name, "missing")
            check(
                there == here,
                f"checkpoint {self._folder(step)} was saved with other settings: {name} is {there} there and {here} "
                f"here; use the settings it was saved with, or {self._again()}",
            )


def _silence_orbax() -> None:
    # It logs every save and restore; the errors that a user can act on are raised.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
