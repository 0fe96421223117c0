"""`jaxchat eval`: tasks, CORE and bits per byte of one model, measured one after another and kept in a folder.

    FOLDER/report.json           all figures, with the settings that they were made with
    FOLDER/report.md             the same as tables
    FOLDER/answers.html          a page to read answers and failures in
    FOLDER/answers/TASK.jsonl    all answers to a task
    FOLDER/core/SETTINGS/        all decisions of CORE
    FOLDER/text.jsonl            all documents whose bits per byte were measured

What is there already of tasks and CORE is kept if it was made with the same settings; texts, whose files may have
changed, are measured anew. Everything is written as soon as it is known, so that a command that was stopped goes on
where it was. Several processes measure together; process 0 alone reads and writes the folder, and shows how far they
are.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
from etils import epath
from jax.sharding import Mesh

from jaxchat.data.text.given import GivenFile
from jaxchat.devices.machine import machine_info
from jaxchat.devices.processes import on_process_zero
from jaxchat.errors import check
from jaxchat.eval import page
from jaxchat.eval.chat import evaluate_task
from jaxchat.eval.core import Bundle, evaluate_core
from jaxchat.eval.core.prompts import order_of
from jaxchat.eval.statistics import chat_core
from jaxchat.eval.tables import interval, model_line, tables
from jaxchat.eval.text_bpb import text_bpb
from jaxchat.infer.engine import Engine
from jaxchat.infer.trained import TrainedModel
from jaxchat.model.parameters import count_parameters
from jaxchat.ops.compute import Compute
from jaxchat.runs.directory import RunDirectory
from jaxchat.runs.files import Object, free_name, read_json, read_lines, write_bytes, write_json
from jaxchat.runs.progress import LiveLine
from jaxchat.stages.evaluate import how_asked
from jaxchat.storage import is_remote
from jaxchat.tasks import Task

Say = Callable[[str], None]
_NUMBERS = ("score", "low", "high", "temperature")
_COUNTS = ("count", "cut", "too_long", "samples", "max_new_tokens")
_TASK = Object({**dict.fromkeys(_NUMBERS, float), **dict.fromkeys(_COUNTS, int), "pass_at": Object(others=float),
                "dtype": str})  # fmt: skip
_CORE = Object({"tasks": Object(others=Object()), "missing": Object(), "max_per_task": (None, int), "answers": str})
_TEXT = Object({"total": Object(), "sources": Object(others=Object()), "dtype": str})
_REPORT = Object({"model": Object(), "tasks": Object(others=_TASK), "core": (None, _CORE), "text": (None, _TEXT)})
_ANSWER = Object({"question": str, "answer": str, "right": str, "score": float, "cut": bool})
_DECISION = Object({"index": int, "line": int, "right": bool, "question": str, "scores": [(None, float)]})
_DOCUMENT = Object({"source": str, "index": int, "beginning": str, "bits_per_byte": float, "bytes": int, "tokens": int})


@dataclass(frozen=True)
class Wanted:
    """What to measure, and how.

    Attributes:
      tasks: each with the most questions to ask, None for all.
      samples: answers to each question.
      bundle: of CORE; None for none.
      core_per_task: the most items of each of its tasks, None for all.
      texts: whose bits per byte are measured.
      dtype: in which the model computes.
    """

    tasks: Sequence[tuple[Task, int | None]]
    samples: int
    temperature: float
    max_new_tokens: int
    batch_rows: int | Literal["auto"]
    bundle: Bundle | None
    core_per_task: int | None
    texts: Sequence[GivenFile]
    dtype: str


def evaluate(
    trained: TrainedModel, mesh: Mesh | None, run: str, folder: epath.Path, wanted: Wanted, say: Say
) -> dict[str, Any]:
    """Measures what is wanted, and leaves it in `folder`, beside what is there of the same model.

    Of several processes each must make the same call.

    Args:
      mesh: what the model is on; None for a single device.
      run: the run directory as the user names it.
      say: takes lines for the user.

    Returns what is in `report.json`.
    """
    for task in wanted.bundle.tasks if wanted.bundle else ():
        order_of(task, wanted.core_per_task)  # refuses what would be refused after all else was measured
    evaluation = _Evaluation(trained, mesh, run, folder, wanted, say)
    # A GPU would else round the operands of fp32 products to TF32.
    exact = jax.default_matmul_precision("highest") if wanted.dtype == "float32" else contextlib.nullcontext()
    evaluation.write()  # what is interrupted is continued only in a folder that has a report
    with exact:
        evaluation.measure_text()  # first: it takes the least, and finds out what is wrong with a text
        evaluation.measure_tasks()
        evaluation.measure_core()
    return evaluation.report


class _Evaluation:
    def __init__(
        self, trained: TrainedModel, mesh: Mesh | None, run: str, folder: epath.Path, wanted: Wanted, say: Say
    ):
        self.trained, self.folder, self.wanted, self.say = trained, folder, wanted, say
        self.compute = Compute(wanted.dtype, mesh)
        self.report: dict[str, Any] = on_process_zero(lambda: self._open(run))

    def _open(self, run: str) -> dict[str, Any]:
        """The report that is in the folder, if it is of this model, or a new one."""
        trained, path = self.trained, self.folder / "report.json"
        which = {"stage": trained.stage, "step": trained.step, "id": RunDirectory(run).id_of(trained.stage)}
        model = {
            "run": run, "experiment": trained.experiment.name, **which, "depth": trained.model.depth,
            "parameters": count_parameters(trained.model).total, "vocab_size": trained.model.vocab_size,
            "sequence_len": trained.model.sequence_len,
        }  # fmt: skip
        report = read_json(path, _REPORT, "delete it, or choose another --out")
        if report is None:
            there = self.folder.exists() and any(self.folder.iterdir())
            check(not there, f"{self.folder} is not empty and not an evaluation; choose another --out")
        elif any(report["model"].get(name) != value for name, value in which.items()):
            check(not is_remote(self.folder), f"{self.folder} has results of another model; choose another --out")
            aside = free_name(self.folder)
            self.folder.rename(aside)
            self.say(f"{self.folder} had results of another model; they are now in {aside}")
            report = None
        fresh = {"tasks": {}, "chat_core": None, "core": None, "text": None}
        return {**fresh, **(report or {}), "model": model, "machine": machine_info()}

    def write(self) -> None:
        """Writes the report, its tables and the page."""
        on_process_zero(self._write)

    def _write(self) -> None:
        write_json(self.folder / "report.json", self.report)
        write_bytes(self.folder / "report.md", f"{tables(self.report)}\n".encode())
        model = self.report["model"]
        title = f"Answers of {model['experiment'] or model['run']}, {model['stage']}"
        html = page.page(title, model_line(self.report), [*self._groups()])
        write_bytes(self.folder / "answers.html", html.encode("utf-8", "replace"))

    # --- tasks ------------------------------------------------------------------------------------------------------

    def measure_tasks(self) -> None:
        wanted, tasks, engine = self.wanted, self.report["tasks"], None
        for task, limit in wanted.tasks:
            if len(task) < (limit or 0):
                self.say(f"{task.name} has {len(task):,} questions, not {limit:,}")
            settings = self._settings(task, limit)
            path = self._answers(task.name)
            before = tasks.get(task.name, {})
            same = all(before.get(name) == value for name, value in settings.items())
            if same and on_process_zero(path.exists):
                self.say(f"{task.name}: the same questions were asked before; {path} has the answers")
                continue
            engine = engine or Engine(
                self.trained.model, self.trained.params, self.trained.tokenizer, dtype=wanted.dtype
            )
            began = time.perf_counter()
            with _progress(task.name) as show:
                result = evaluate_task(
                    engine,
                    task,
                    limit=limit,
                    max_new_tokens=wanted.max_new_tokens,
                    batch_size=wanted.batch_rows,
                    temperature=settings["temperature"],
                    samples=settings["samples"],
                    progress=show,
                )
            _write_lines(path, [dataclasses.asdict(answer) for answer in result.answers])
            facts = ("score", "low", "high", "count", "cut", "too_long")
            tasks[task.name] = {
                **{name: getattr(result, name) for name in facts},
                "pass_at": {str(k): value for k, value in result.pass_at.items()},
                **settings,
                "seconds": round(time.perf_counter() - began, 1),
            }
            self.report["chat_core"] = chat_core({name: entry["score"] for name, entry in tasks.items()})
            self.say(f"{task.name}: {str(result).strip()}")
            self.write()

    def _settings(self, task: Task, limit: int | None) -> dict[str, Any]:
        """What decides a task's score besides the model."""
        wanted, chosen = self.wanted, task.kind == "multiple_choice"
        samples, temperature = (1, 0.0) if chosen else (wanted.samples, wanted.temperature)
        asked = how_asked(task, limit, max_new_tokens=wanted.max_new_tokens, temperature=temperature)
        return {**asked, "samples": samples, "dtype": wanted.dtype}

    def _answers(self, task: str) -> epath.Path:
        return self.folder / "answers" / f"{task}.jsonl"

    # --- CORE -------------------------------------------------------------------------------------------------------

    def measure_core(self) -> None:
        wanted, bundle = self.wanted, self.wanted.bundle
        if bundle is None:
            return
        began = time.perf_counter()
        keep = self.folder / "core" / f"{wanted.dtype}-{wanted.core_per_task or 'all'}"
        with _progress("CORE") as show:
            result = evaluate_core(
                self.trained.model,
                self.trained.params,
                self.trained.tokenizer,
                bundle,
                compute=self.compute,
                max_per_task=wanted.core_per_task,
                keep=keep,
                progress=lambda done, total, _: show(done, total),
            )
        self.report["core"] = {
            **result.scores(),
            "tasks": {label: dataclasses.asdict(task) for label, task in result.tasks.items()},
            "missing": dict(result.missing),
            "max_per_task": wanted.core_per_task,
            "bundle": bundle.path,
            "answers": keep.relative_to(self.folder).as_posix(),
            "dtype": wanted.dtype,
            "seconds": round(time.perf_counter() - began, 1),
        }
        self.write()

    # --- text -------------------------------------------------------------------------------------------------------

    def measure_text(self) -> None:
        wanted = self.wanted
        if not wanted.texts:
            return
        began, size = time.perf_counter(), sum(file.bytes for file in wanted.texts)
        documents = itertools.chain.from_iterable(file.documents() for file in wanted.texts)
        with _progress("text") as show:
            found = text_bpb(
                self.trained.model,
                self.trained.params,
                self.trained.tokenizer,
                documents,
                compute=self.compute,
                progress=lambda done: show(round(done), round(max(size, done))),
            )
        names = ", ".join(file.name for file in wanted.texts[:3])
        check(bool(found.documents), f"{names}: there is no text to predict; name other files")
        lines = [{**dataclasses.asdict(one), "bits_per_byte": one.bits_per_byte} for one in found.documents]
        _write_lines(self.folder / "text.jsonl", lines)
        self.report["text"] = {
            "total": dataclasses.asdict(found.total),
            "sources": {name: dataclasses.asdict(bits) for name, bits in found.sources.items()},
            "dtype": wanted.dtype,
            "seconds": round(time.perf_counter() - began, 1),
        }
        self.write()

    # --- the page ---------------------------------------------------------------------------------------------------

    def _groups(self) -> Iterator[page.Group]:
        report = self.report
        for name, entry in report["tasks"].items():
            answers, _ = read_lines(self._answers(name), _ANSWER, "delete it")
            items, file = [page.answer_item(one) for one in answers], f"answers/{name}.jsonl"
            yield page.group(name, f"{entry['score']:.1%}", _interval(entry), items, file)
        core = report["core"] or {"tasks": {}}
        for label, entry in core["tasks"].items():
            file = f"{core['answers']}/{label}.jsonl"
            lines, _ = read_lines(self.folder / file, _DECISION, "delete it")
            items = [page.core_item(line) for line in lines]
            yield page.group(f"CORE: {label}", f"{entry['accuracy']:.1%}", _interval(entry), items, file)
        if report["text"] is not None:
            documents, _ = read_lines(self.folder / "text.jsonl", _DOCUMENT, "delete it")
            documents.sort(key=lambda one: -one["bits_per_byte"])
            figure = f"{report['text']['total']['bits_per_byte']:.4f} bits per byte"
            items = [page.document_item(one) for one in documents]
            yield page.group("text", figure, "the hardest documents first", items, "text.jsonl")


def _interval(entry: dict[str, Any]) -> str:
    return f"95 % interval {interval(entry['low'], entry['high'])}"


def _write_lines(path: epath.Path, values: Sequence[dict[str, Any]]) -> None:
    def write() -> None:
        write_bytes(path, "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values).encode())

    on_process_zero(write)


@contextlib.contextmanager
def _progress(name: str) -> Iterator[Callable[[int, int], None]]:
    """A function that shows on stderr how much of how much is done, and the time left; on process 0 alone."""
    if jax.process_index() > 0:
        yield lambda done, total: None
        return
    line = LiveLine("eval", None)
    try:
        yield functools.partial(line.show_progress, name)
    finally:
        line.close()
