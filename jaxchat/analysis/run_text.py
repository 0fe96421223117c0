"""The text that a run was trained and validated on, as it is there now."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from jaxchat.config import DataConfig
from jaxchat.data.text.folder import TextSplits, find_text
from jaxchat.data.text.listing import text_folder
from jaxchat.data.text.shards import OnBad
from jaxchat.errors import UserError
from jaxchat.runs.directory import RunDirectory
from jaxchat.storage import AnyPath, to_path


def trained_on(directory: RunDirectory, files: Iterable[AnyPath]) -> list[AnyPath]:
    """Those of the files that only trained the run's model, as far as its record names them."""
    text = (directory.read_record("pretrain") or {}).get("text", {})
    folder = text_folder(to_path(directory.read_config().data.folder or directory.generated_data))
    # Text in a single file is in both lists: its documents are divided.
    names = set(text.get("train_files", [])) - set(text.get("val_files", []))
    trained = {str((folder / name).resolve()) for name in names}
    return [file for file in files if str(file.resolve()) in trained]


def text_of(directory: RunDirectory, data: DataConfig, *, on_bad: OnBad, say: Callable[[str], None]) -> TextSplits:
    """The text in the folder of `data`, which is the run's unless the user names another.

    Raises:
      UserError: as `find_text`; or the file that the run validated on is gone, and one that it was trained on would be
        taken in its place.
    """
    folder = data.folder or directory.generated_data
    text = find_text(folder, data.val_shard, on_bad=on_bad, say=say)
    if instead := trained_on(directory, text.val.files):
        lost = ", ".join((directory.read_record("pretrain") or {}).get("text", {}).get("val_files", []))
        raise UserError(
            f"{folder} has changed: the run validated on {lost}, and was trained on {instead[0].name}, which would "
            f"take its place; put {lost} back"
        )
    return text
