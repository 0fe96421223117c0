"""Commands that make text of files that are not read as they are, for messages."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from jaxchat.storage import AnyPath

# What the column with the text is often called, likeliest first.
_USUAL = ("content", "contents", "body", "document", "story", "article", "raw_content", "passage", "completion")


def rename_column(path: AnyPath, names: Sequence[str]) -> str:
    """Renames one of the columns or fields `names` of a parquet or jsonl file, which has none called `text`."""
    lower = {name.lower(): name for name in names}
    name = next((lower[usual] for usual in ("text", *_USUAL) if usual in lower), names[0])
    if path.name.lower().endswith(".parquet"):
        return _python(
            "import os, sys, pyarrow.parquet as pq; f, old = sys.argv[1:]; t = pq.read_table(f); "
            "pq.write_table(t.rename_columns({old: 'text'}), f + '.part'); os.replace(f + '.part', f)",
            path,
            name,
        )
    return _python(
        "import json, os, sys; f, old = sys.argv[1:]; out = open(f + '.part', 'w'); "
        "[print(json.dumps({('text' if k == old else k): v for k, v in json.loads(l).items()}), file=out) "
        "for l in open(f, encoding='utf-8-sig') if l.strip()]; "
        "out.close(); os.replace(f + '.part', f)",
        path,
        name,
    )


def one_text_column(path: AnyPath) -> str:
    """Keeps the first of several columns `text` of a parquet file."""
    command = _python(
        "import os, sys, pyarrow.parquet as pq; f = sys.argv[1]; t = pq.ParquetFile(f).read(); "
        "i = t.column_names.index('text'); pq.write_table(t.select([i]), f + '.part'); os.replace(f + '.part', f)",
        path,
    )
    return f"to keep the first alone: {command}"


def join_strings(path: AnyPath) -> str:
    """Joins the lists of strings in the column `text` of a parquet file by line ends."""
    return _python(
        "import os, sys, pyarrow.parquet as pq, pyarrow.compute as c; f = sys.argv[1]; t = pq.read_table(f); "
        "i = t.column_names.index('text'); s = c.binary_join(t['text'], chr(10)); "
        "pq.write_table(t.set_column(i, 'text', s), f + '.part'); os.replace(f + '.part', f)",
        path,
    )


def convert(path: AnyPath) -> str | None:
    """Writes a parquet file beside a table of another kind; None if no such table is called like this."""
    ending = path.name.lower().rpartition(".")[2]
    read = {
        "csv": "c.read_csv(f, parse_options=c.ParseOptions(newlines_in_values=True))",
        "tsv": "c.read_csv(f, parse_options=c.ParseOptions(delimiter='\\t', newlines_in_values=True))",
        "arrow": "pyarrow.ipc.open_stream(f).read_all()",
        "feather": "pyarrow.feather.read_table(f)",
    }.get(ending)
    if read is None:
        return None
    modules = {"arrow": "pyarrow.ipc", "feather": "pyarrow.feather"}.get(ending, "pyarrow.csv as c")
    return _python(
        f"import sys, {modules}, pyarrow.parquet as pq; f = sys.argv[1]; "
        f"pq.write_table({read}, f.rpartition('.')[0] + '.parquet')",
        path,
    )


def _python(program: str, *arguments: AnyPath | str) -> str:
    # In double quotes, since the programs contain single ones.
    return f'python -c "{program}" {shlex.join(map(str, arguments))}'
