"""The data sets that `jaxchat data get` can download: where they are, and which files of a data folder they become."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jaxchat.data.hub.convert import ToItem, arc_item, chat_item, columns
from jaxchat.errors import UserError, check, closest

DEFAULT_SHARDS = 8  # two billion characters: what a tokenizer is trained on


@dataclass(frozen=True)
class Shards:
    """Shuffled pretraining text as parquet files `shard_00000` to `shard_LAST` with a column `text`.

    The last shard is for validation, however many others are used.
    """

    last: int
    shard_bytes: int = 92_000_000

    def path(self, index: int) -> str:
        """The path of a shard on the hub."""
        return f"shard_{index:05d}.parquet"

    def name(self, index: int) -> str:
        """The path of a shard in a data folder."""
        return f"pretrain/{self.path(index)}"

    @property
    def validation(self) -> str:
        return self.name(self.last)


@dataclass(frozen=True)
class Table:
    """Parquet files matching `pattern`, whose rows become the lines of the file `name` in a data folder."""

    pattern: str
    name: str
    to_item: ToItem


@dataclass(frozen=True)
class Archive:
    """A zip file outside the hub, whose checksum stands for its revision. The contents of its `folder` become the
    folder `name` in a data folder."""

    url: str
    sha256: str
    folder: str
    name: str


@dataclass(frozen=True)
class Dataset:
    """A data set. `repo` is its name on the hub, "" for an archive; `size` is about how many bytes it downloads."""

    name: str
    about: str
    license: str
    repo: str
    content: Shards | tuple[Table, ...] | Archive
    size: int

    @property
    def is_text(self) -> bool:
        """Whether it is pretraining text."""
        return isinstance(self.content, Shards)

    @property
    def shards(self) -> Shards:
        """The shards of pretraining text."""
        assert isinstance(self.content, Shards), f"{self.name} has no shards"
        return self.content

    @property
    def source(self) -> str:
        return self.content.url if isinstance(self.content, Archive) else f"datasets/{self.repo}"


def _text(name: str, about: str, terms: str, repo: str, last: int) -> Dataset:
    shards = Shards(last)
    return Dataset(name, about, terms, repo, shards, (last + 1) * shards.shard_bytes)


_MMLU = columns("question", "subject", "choices", "answer")
_HUMANEVAL = columns("task_id", "prompt", "entry_point", "canonical_solution", "test")

DATASETS = (
    _text("climbmix", "pretraining text: web pages by topic and quality, 400 billion tokens, shuffled",
          "CC BY-NC 4.0", "karpathy/climbmix-400b-shuffle", 6542),
    _text("fineweb-edu", "pretraining text: web pages of educational value, 100 billion tokens, shuffled",
          "ODC-By 1.0", "karpathy/fineweb-edu-100b-shuffle", 1822),
    Dataset("smoltalk", "conversations for small models: 460,000 for training, 24,000 for validation",
            "Apache-2.0", "HuggingFaceTB/smol-smoltalk", (
        Table("data/train-*.parquet", "chat/smoltalk/train.jsonl.gz", chat_item),
        Table("data/test-*.parquet", "chat/smoltalk/val.jsonl.gz", chat_item),
    ), 970_000_000),
    Dataset("mmlu", "14,042 multiple-choice questions on 57 subjects", "MIT", "cais/mmlu", (
        Table("all/dev-*.parquet", "eval/mmlu/dev.jsonl", _MMLU),
        Table("all/validation-*.parquet", "eval/mmlu/val.jsonl", _MMLU),
        Table("all/test-*.parquet", "eval/mmlu/test.jsonl", _MMLU),
    ), 4_000_000),
    Dataset("arc", "multiple-choice questions of school science, easy and challenging", "CC BY-SA 4.0",
            "allenai/ai2_arc", (
        Table("ARC-Easy/train-*.parquet", "eval/arc_easy/train.jsonl", arc_item),
        Table("ARC-Easy/validation-*.parquet", "eval/arc_easy/val.jsonl", arc_item),
        Table("ARC-Easy/test-*.parquet", "eval/arc_easy.jsonl", arc_item),
        Table("ARC-Challenge/train-*.parquet", "eval/arc_challenge/train.jsonl", arc_item),
        Table("ARC-Challenge/validation-*.parquet", "eval/arc_challenge/val.jsonl", arc_item),
        Table("ARC-Challenge/test-*.parquet", "eval/arc_challenge.jsonl", arc_item),
    ), 1_300_000),
    Dataset("gsm8k", "8,792 problems of school arithmetic in words", "MIT", "openai/gsm8k", (
        Table("main/train-*.parquet", "eval/gsm8k/train.jsonl", columns("question", "answer")),
        Table("main/test-*.parquet", "eval/gsm8k/test.jsonl", columns("question", "answer")),
    ), 2_700_000),
    Dataset("humaneval", "164 Python functions to write", "MIT", "openai/openai_humaneval", (
        Table("openai_humaneval/test-*.parquet", "eval/humaneval.jsonl", _HUMANEVAL),
    ), 84_000),
    Dataset("core", "the 22 tasks of CORE, the score of base models", "of each task", "", Archive(
        "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip",
        "90a7c19e28ee7a52b4f6e1f87658deb9fde7f63deba2379045bdb1fe9ea5d200", "eval_bundle", "eval/eval_bundle",
    ), 162_000_000),
)  # fmt: skip


@dataclass(frozen=True)
class Request:
    """A data set to download; of pretraining text, the validation shard and the first `shards` others."""

    dataset: Dataset
    shards: int = 0

    @property
    def is_text(self) -> bool:
        return self.dataset.is_text


def parse_request(entry: str, shards: int | None = None) -> Request:
    """Parses `NAME`, or `NAME:SHARDS` for pretraining text; `shards` is used if the entry has no number.

    Raises:
      UserError: an unknown data set, an impossible number of shards, or one for a data set without shards.
    """
    name, colon, number = entry.partition(":")
    names = {dataset.name: dataset for dataset in DATASETS}
    if name not in names:
        raise UserError(f"unknown data set {name!r}{closest(name, names)} There are: {', '.join(names)}")
    dataset = names[name]
    if not isinstance(dataset.content, Shards):
        check(not colon, f"{entry}: {name} is not pretraining text and has no shards; write {name}")
        return Request(dataset)
    check(not colon or number.isascii() and number.isdigit(), f"{entry}: write {name}:SHARDS, such as {name}:50")
    check(not colon or shards in (None, int(number)), f"{entry} and --shards {shards} differ; write only one")
    wanted, most = int(number) if colon else DEFAULT_SHARDS if shards is None else shards, dataset.content.last
    check(1 <= wanted <= most, f"{name} has {most:,} shards for training; ask for 1 to {most:,}, not {wanted:,}")
    return Request(dataset, wanted)


def parse_requests(entries: Sequence[str], shards: int | None = None) -> list[Request]:
    """Parses several entries as `parse_request` does; at most one may be pretraining text.

    Raises:
      UserError: as `parse_request`; two texts; `shards` without a text.
    """
    requests = list(dict.fromkeys(parse_request(entry, shards) for entry in entries))
    texts = [request.dataset.name for request in requests if request.is_text]
    check(len(texts) == len(set(texts)), f"{''.join(texts[:1])} is requested with several numbers of shards; write one")
    check(len(texts) <= 1, f"{' and '.join(texts)} are both pretraining text; download each to a separate folder")
    check(shards is None or bool(texts), f"{', '.join(entries)} has no shards; leave --shards out")
    return requests
