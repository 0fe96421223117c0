"""The report stage: what the run trained and what its models can do, for people and for programs."""

from __future__ import annotations

from jaxchat.devices.processes import on_process_zero
from jaxchat.eval.changes import changes
from jaxchat.model.config import GPTConfig
from jaxchat.model.parameters import count_parameters
from jaxchat.runs.report import write_report
from jaxchat.stages.workspace import Workspace


def run(workspace: Workspace) -> None:
    """Leaves `report.md`, `report.json` and `plots/` in the run directory."""
    on_process_zero(lambda: _write(workspace))


def _write(workspace: Workspace) -> None:
    experiment, directory = workspace.experiment, workspace.directory
    tokenizer = directory.read_record("tokenizer") or {}
    vocab_size = tokenizer.get("metrics", {}).get("vocab_size", experiment.tokenizer.vocab_size)
    model = GPTConfig.of(experiment.model, vocab_size)
    write_report(
        directory,
        vocab_size=vocab_size,
        parameters=count_parameters(model).total,
        changes=changes(directory),
        say=lambda line: workspace.say(f"report    {line}"),
    )
