"""The beginning of a run that starts from the model of another one."""

from __future__ import annotations

from jaxchat.checkpoint import Checkpoints
from jaxchat.export.incoming import place_model
from jaxchat.infer.trained import load_tokenizer_of
from jaxchat.model.parameters import abstract_on
from jaxchat.runs.init_from import STAGE, StartingModel
from jaxchat.stages.workspace import Workspace


def place_start(workspace: Workspace, start: StartingModel) -> None:
    """Leaves the model and the tokenizer of `start` in the workspace's run.

    Raises:
      UserError: a checkpoint or the tokenizer is damaged; the disk fails.
    """
    tokenizer = load_tokenizer_of(start.run)
    model = workspace.model_config(tokenizer)
    checkpoints = Checkpoints(start.run.checkpoints(start.stage))
    params = checkpoints.restore_params(abstract_on(workspace.mesh, model), start.step)
    place_model(
        workspace.directory,
        workspace.experiment,
        STAGE,
        tokenizer,
        params,
        step=start.step,
        source=start.source(),
        mesh=workspace.mesh,
    )
    workspace.say(f"{STAGE:<9} is the model of {start.stage} of {start.run}, step {start.step:,}")
