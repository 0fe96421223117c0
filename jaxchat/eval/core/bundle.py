"""The bundle of CORE's tasks: what `core.yaml` lists, the items in its files, and what guessing scores.

BUNDLE/core.yaml                    the tasks: label, file, kind, number of examples, delimiter
BUNDLE/eval_data/.../NAME.jsonl     the items of a task, an object a line
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import yaml

from jaxchat.data.records import place, read_records
from jaxchat.data.text.reading import Unreadable
from jaxchat.errors import UserError, check, closest
from jaxchat.storage import AnyPath, first_line, readable, to_path

Kind = Literal["multiple_choice", "schema", "language_modeling"]
Version = Literal["core_v1", "core_v2"]
VERSIONS: tuple[Version, ...] = get_args(Version)
FILE_NAME = "core.yaml"
PLACES = ("eval/eval_bundle", "eval_bundle", ".")  # of a bundle in a data folder

# The 22 tasks, and what guessing scores in percent. DCLM corrected three of its values in September 2025 and calls the
# two means Core_v1 and Core_v2 (github.com/mlfoundations/dclm, pull request 115). nanochat's bundle keeps the first,
# so that the values published for nanochat are of that version.
BASELINES: Mapping[str, tuple[float, float]] = {
    "hellaswag_zeroshot": (25, 25),
    "jeopardy": (0, 0),
    "bigbench_qa_wikidata": (0, 0),
    "arc_easy": (25, 25),
    "arc_challenge": (25, 25),
    "copa": (50, 50),
    "commonsense_qa": (20, 40.3),
    "piqa": (50, 50),
    "openbook_qa": (25, 25),
    "lambada_openai": (0, 0),
    "hellaswag": (25, 25),
    "winograd": (50, 50),
    "winogrande": (50, 50),
    "bigbench_dyck_languages": (0, 0),
    "agi_eval_lsat_ar": (20, 25),
    "bigbench_cs_algorithms": (0, 0),
    "bigbench_operators": (0, 0),
    "bigbench_repeat_copy_logic": (0, 0),
    "squad": (0, 0),
    "coqa": (0, 0),
    "boolq": (62, 62),
    "bigbench_language_identification": (9.1, 25),
}


@dataclass(frozen=True)
class CoreTask:
    """A task of the bundle.

    Attributes:
      label: its name, such as `arc_easy`.
      kind: "multiple_choice" items have `query`, `choices` and `gold`, the index of the right choice; "schema" items
        `context_options`, `continuation` and `gold`; "language_modeling" items `context` and `continuation`.
      shots: examples before each item.
      delimiter: between a question and its answer.
      items: in the order of the file.
      lines: the line of the file that each item is on.
      path: the file.
    """

    label: str
    kind: Kind
    shots: int
    delimiter: str
    items: tuple[Mapping[str, Any], ...]
    lines: tuple[int, ...]
    path: str

    @property
    def baselines(self) -> dict[Version, float]:
        """What guessing scores, in [0, 1], by version; empty for a task that is not one of CORE's."""
        known = BASELINES.get(self.label)
        return {} if known is None else {version: b / 100 for version, b in zip(VERSIONS, known, strict=True)}


@dataclass(frozen=True)
class Bundle:
    """The tasks of a bundle, in the order of its `core.yaml`.

    Attributes:
      missing: the tasks of CORE that it lacks, and why.
    """

    path: str
    tasks: tuple[CoreTask, ...]
    missing: Mapping[str, str]

    def only(self, labels: tuple[str, ...] | list[str]) -> Bundle:
        """The bundle with some of its tasks; the others count as missing.

        Raises:
          UserError: it lacks one of them.
        """
        there = {task.label: task for task in self.tasks}
        for label in labels:
            why = self.missing.get(label)
            check(why is None, f"{self.path} cannot be asked for {label}: {why}")
            check(label in there, f"{self.path} has no task {label!r}{closest(label, there)}")
        left = {label: "was not asked for" for label in there if label in BASELINES and label not in labels}
        tasks = tuple(task for task in self.tasks if task.label in labels)
        return dataclasses.replace(self, tasks=tasks, missing={**self.missing, **left})


def find_bundle(data: str | os.PathLike) -> AnyPath | None:
    """The bundle in a data folder, or the folder itself if it is one; None if there is none."""
    return next((folder for name in PLACES if ((folder := to_path(data) / name) / FILE_NAME).exists()), None)


def load_bundle(folder: str | os.PathLike) -> Bundle:
    """Reads a bundle. A task whose file is absent is `missing`.

    Raises:
      UserError: `core.yaml` is missing or damaged, no task has a file, or an item cannot be used.
    """
    root = to_path(folder)
    listed = _read_list(root / FILE_NAME)
    missing = {label: f"{root / FILE_NAME} does not list it" for label in BASELINES}
    tasks, read = [], functools.cache(_read_items)  # two tasks of the full bundle share a file
    for label, entry in listed.items():
        path = root / "eval_data" / entry["dataset_uri"]
        if path.exists():
            missing.pop(label, None)
            items, lines = read(path, entry["icl_task_type"])
            shots, delimiter = entry["num_fewshot"][0], entry.get("continuation_delimiter", " ")
            tasks.append(CoreTask(label, entry["icl_task_type"], shots, delimiter, items, lines, str(path)))
        else:
            missing[label] = f"{path} is missing"
    check(bool(tasks), f"{root} has none of the files that its {FILE_NAME} lists; {_REMEDY}")
    return Bundle(str(root), tuple(tasks), missing)


_REMEDY = "download it again: jaxchat data get core"
_FIELDS: dict[str, tuple[type, str]] = {
    "dataset_uri": (str, "text"),
    "icl_task_type": (str, "text"),
    "num_fewshot": (list, "a list of whole numbers"),
}


def _read_list(path: AnyPath) -> dict[str, dict[str, Any]]:
    """The entries of `core.yaml` by label."""
    try:
        with readable(path):
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; give the folder of a CORE bundle (jaxchat data get core)") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML ({first_line(error)}); {_REMEDY}") from None
    entries = content.get("icl_tasks") if isinstance(content, dict) else None
    check(isinstance(entries, list) and entries != [], f"{path} has no list 'icl_tasks'; {_REMEDY}")
    listed: dict[str, dict[str, Any]] = {}
    for number, entry in enumerate(cast(list, entries), start=1):
        where = f"{path}: task {number}"
        check(isinstance(entry, dict) and isinstance(entry.get("label"), str), f"{where} has no label; {_REMEDY}")
        where = f"{path}: {entry['label']}"
        # Its decisions are kept in a file of that name.
        named = re.fullmatch(r"\w[\w.-]*", entry["label"])
        check(named is not None, f"{where} is no label; it must be letters, digits, _, - and .")
        for name, (kind, words) in _FIELDS.items():
            check(isinstance(entry.get(name), kind), f"{where}: {name!r} must be {words}; {_REMEDY}")
        shots, kind = entry["num_fewshot"], entry["icl_task_type"]
        check(
            shots != [] and all(_is_index(n) and n >= 0 for n in shots),
            f"{where}: 'num_fewshot' must be a list of whole numbers, such as [10]; {_REMEDY}",
        )
        check(
            kind in get_args(Kind),
            f"{where}: tasks of the type {kind!r} cannot be asked; known: {', '.join(get_args(Kind))}",
        )
        check(isinstance(entry.get("continuation_delimiter", ""), str), f"{where}: the delimiter must be text")
        check(entry["label"] not in listed, f"{where} is listed twice; remove one of the two")
        listed[entry["label"]] = entry
    return listed


def _read_items(path: AnyPath, kind: Kind) -> tuple[tuple[Mapping[str, Any], ...], tuple[int, ...]]:
    items, lines = [], []
    try:
        for number, item in read_records(path):
            try:
                _check_item(item, kind)
            except ValueError as error:
                raise UserError(f"{place(path, number)}: {error}; correct or remove it") from None
            items.append(item)
            lines.append(number)
    except Unreadable as error:
        raise UserError(f"{error}; {_REMEDY}") from None
    check(bool(items), f"{path} has no items; {_REMEDY}")
    return tuple(items), tuple(lines)


def _check_item(item: Any, kind: Kind) -> None:
    """Raises ValueError for an item that cannot be asked."""
    if isinstance(item, ValueError):
        raise item
    texts = {"multiple_choice": ("query",), "schema": ("continuation",)}.get(kind, ("context", "continuation"))
    for name in texts:
        if not isinstance(item.get(name), str):
            raise ValueError(f"{name!r} is not text" if name in item else f"{name!r} is missing")
    if kind == "language_modeling":
        if not item["continuation"]:
            raise ValueError("'continuation' is empty: there is nothing to predict")
        return
    options = "choices" if kind == "multiple_choice" else "context_options"
    if options not in item:
        raise ValueError(f"{options!r} is missing")
    given, gold = item[options], item.get("gold")
    if not isinstance(given, list) or not all(isinstance(option, str) for option in given):
        raise ValueError(f"{options!r} is not a list of texts")
    if not given:
        raise ValueError(f"{options!r} is empty")
    if not _is_index(gold):
        raise ValueError("'gold' is not the index of a choice" if "gold" in item else "'gold' is missing")
    if not 0 <= cast(int, gold) < len(given):
        last = len(given) - 1
        raise ValueError(f"'gold' is {gold}, and the {len(given)} choices have the indices 0 to {last}")


def _is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
