"""Where the tasks of an experiment come from: the user's folder first, then the generated corpus."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from jaxchat.config import DataConfig
from jaxchat.data.hub.catalogue import DATASETS
from jaxchat.data.identity.description import parse_identity
from jaxchat.data.text.reading import Findings
from jaxchat.errors import MissingData
from jaxchat.storage import AnyPath, to_path
from jaxchat.tasks import WITHOUT_DATA, Task, is_file, load_task
from jaxchat.tasks.base import Split
from jaxchat.tasks.conversations import Conversations
from jaxchat.tasks.identity import NAME as IDENTITY
from jaxchat.tasks.identity import ChatsAs, load_identity

GENERATED = ("chat", "sums", "letters", "facts", "long_sums")  # the tasks of the generated corpus


class NotYet(Exception):
    """The files of a task are still to be downloaded or generated."""


@dataclass(frozen=True)
class TaskSource:
    """Loads tasks.

    Attributes:
      data: the experiment's.
      generated: gives the folder of the generated corpus, which it writes if need be; None if it must not.
      downloading: whether the files of a task are still being downloaded.
    """

    data: DataConfig
    generated: Callable[[], AnyPath] | None
    downloading: Callable[[str], bool] = lambda task: False

    def load(self, name: str, split: Split, limit: int | None, findings: Findings) -> Task:
        """The task `name`, from the user's folder, or, where that has no such files, generated.

        Raises:
          NotYet: its files are still to be downloaded or generated.
          MissingData, UserError: as `load_task`.
        """
        folder = self.data.folder
        if name == IDENTITY:
            return load_identity(self.data.identity, split, limit)
        if name in WITHOUT_DATA:
            return load_task(name, split, "", limit, findings)
        if folder is not None or is_file(name):
            try:
                return load_task(name, split, folder or "", limit, findings)
            except MissingData:
                if self.downloading(name):
                    raise NotYet from None
                # The generated facts are about a world that the user's text does not know.
                if name not in GENERATED or name == "facts" or (name == "chat" and has_chats(self.data)):
                    raise
        if self.generated is None:
            if name not in (*GENERATED, "spelling"):
                raise MissingData(f"{name} needs a data folder; name one with --data")
            raise NotYet
        task = load_task(name, split, self.generated(), limit, findings)
        if isinstance(task, Conversations) and self.data.identity is not None:
            return ChatsAs(task, parse_identity(self.data.identity))
        return task


def has_chats(data: DataConfig) -> bool:
    """Whether the user's folder has conversations."""
    return data.folder is not None and (to_path(data.folder) / "chat").exists()


def dataset_of(task: str) -> str | None:
    """The data set of "jaxchat data list" that has the files of a task; None if there is none."""
    task = task.removeprefix("nanochat_")
    names = [dataset.name for dataset in DATASETS if not dataset.is_text]
    return next((name for name in names if task == name or task.startswith(f"{name}_")), None)
