"""Trains recipes of jaxchat and measures what they learn; `quality.py` and `scaling.py` call a `Trainer` for each run.

It is the pretraining of launch.py: its step, optimizer, batches and validation rows. Nothing is saved or sampled, so
that the devices do nothing but train and evaluate. What follows from the number of steps and from
`--pretrain.lr-fraction` comes with the batches: recipes that differ in nothing else, like seeds, run one compiled
program. So do those whose rates differ by a common factor, as rules set them by the length of a training.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import hashlib
import io
import math
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock
from jaxchat_steps import run_steps

from jaxchat.config import Experiment, OptimizerConfig, ScheduleConfig
from jaxchat.planning.settle import replace_fields


def by_matrix_rate(experiment: Experiment) -> Experiment:
    """The same training with the usual rate of matrices, the other rates in proportion, and the factor in lr_fraction.

    The rates keep six digits.
    """
    optimizer = experiment.optimizer
    factor = optimizer.matrix_lr / OptimizerConfig().matrix_lr
    if factor in (0, 1):
        return experiment
    names = [field.name for field in dataclasses.fields(optimizer) if field.name.endswith("_lr")]
    rates = {name: float(f"{getattr(optimizer, name) / factor:.6g}") for name in names}
    return replace_fields(
        dataclasses.replace(experiment, optimizer=dataclasses.replace(optimizer, **rates)),
        {"pretrain.lr_fraction": experiment.pretrain.lr_fraction * factor},
    )


def program(experiment: Experiment) -> str:
    """What decides the compiled program of a training, and perhaps a little more."""
    from jaxchat.optim.schedules import momentum_follows_length

    training = dataclasses.replace(
        experiment.pretrain, lr_fraction=1.0, num_iterations=1, target_flops=None, schedule=ScheduleConfig()
    )
    optimizer = experiment.optimizer
    if momentum_follows_length(optimizer):  # it comes with the batches
        momentum = ("muon_momentum_start", "muon_momentum", "muon_momentum_ratio", "muon_momentum_end")
        optimizer = dataclasses.replace(optimizer, **dict.fromkeys(momentum, 0.5))
    return repr(dataclasses.replace(experiment, seed=0, pretrain=training, optimizer=optimizer))


class Trainer:
    """Trains one recipe after another, and keeps what several need: tokenizers, validation rows, compiled steps.

    `scratch` is a folder that keeps the tokenizers, which other processes use too.
    """

    def __init__(self, scratch: str | Path):
        self.scratch = Path(scratch)
        self._rows: dict[str, Any] = {}
        self._steps: dict[str, tuple[Any, Any]] = {}  # and the plans of their batches

    def __call__(self, experiment: Experiment, at: Sequence[int]) -> dict[str, Any]:
        """The seconds of each step, and the bits per byte after each number of steps in `at`, whose last ends it.

        Also how often the text was read from end to end, and what it was trained on.
        A training whose loss is no longer a number ends there: its last bits per byte are NaN.

        Raises:
          UserError: the text, or the settings on this machine's devices, cannot be used.
        """
        import jax

        from jaxchat.devices.machine import machine_info, peak_memory_bytes
        from jaxchat.stages import tokenizer
        from jaxchat.stages.workspace import Workspace
        from jaxchat.train.budget import count_parameters

        gc.collect()  # of what the run before has left in the devices' memory
        experiment = by_matrix_rate(experiment)
        self.scratch.mkdir(parents=True, exist_ok=True)
        given, kept = experiment, self.scratch / f"tokenizer-{_digest(experiment.tokenizer, experiment.data)}"
        with contextlib.ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=self.scratch)))
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
            with FileLock(f"{kept}.lock"):
                if kept.exists():
                    experiment = replace_fields(experiment, {"tokenizer.path": str(kept)})
                workspace = Workspace(experiment, folder / "run", say=lambda line: None)
                tokenizer.run(workspace)
                if not kept.exists():
                    shutil.copytree(workspace.directory.tokenizer, folder / "kept")
                    os.rename(folder / "kept", kept)
            model = workspace.model_config(workspace.tokenizer())
            times, scores, passes = self._train(workspace, model, at, given)
        return {
            "times": times,
            "scores": scores,
            "passes": passes,
            "parameters": count_parameters(model).total,
            "peak_memory_bytes": peak_memory_bytes(),
            "device": jax.devices()[0].device_kind,
            "machine": machine_info(),
        }

    def _train(self, workspace, model, at: Sequence[int], given: Experiment):
        from jaxchat.data.positions import epoch
        from jaxchat.eval.bpb import evaluate_bpb
        from jaxchat.stages.pretrain import training_batches, validation_rows
        from jaxchat.stages.training import Training, fresh_params
        from jaxchat.stages.validation import in_batches
        from jaxchat.train.horizon import Horizon
        from jaxchat.train.phases import Phases

        tokenizer, text, config = workspace.tokenizer(), workspace.text(), workspace.experiment.pretrain
        phases = Phases(config, at[-1]) if config.phases.change else None
        horizon = Horizon(config.schedule, lambda: math.inf)
        training = Training(workspace, "pretrain", config, model, tokenizer, at[-1], phases=phases, horizon=horizon)
        horizon.steps, horizon.rates = at[-1], {step: float(training.schedule(step)) for step in range(at[-1])}
        batches = training_batches(workspace, tokenizer, text, phases)
        source = training.paced(batches, horizon)
        read = _digest(given.tokenizer, given.data, given.seed, config.eval_tokens, model.sequence_len)
        if read not in self._rows:
            self._rows[read] = validation_rows(workspace, tokenizer, text)
        state, step = self._compiled(training, lambda: fresh_params(workspace, model), source, program(given))
        times: list[float] = []
        scores: list[tuple[int, float]] = []
        for before, after in zip((0, *at), at, strict=False):
            state, seconds, metrics = run_steps(step, state, source, after - before, first=before)
            times += seconds
            if not math.isfinite(metrics["loss"]):
                scores.append((after, math.nan))
                break
            rows = in_batches(self._rows[read], batches.plan.rows)
            bpb = evaluate_bpb(state["params"], model, rows, tokenizer.token_bytes(), compute=workspace.compute)
            scores.append((after, float(bpb)))
        return times, scores, epoch(source.get_state())

    def _compiled(self, training, start, source, key: str):
        """The state at step 0, and the step, which is compiled if no earlier run had its program."""
        if key not in self._steps:
            state, step = training.compiled(start, source)
            self._steps[key] = step, source.plan
            return state, step
        step, source.plan = self._steps[key]
        return training.begin(start, step.planned.state), step


def _digest(*settings: Any) -> str:
    return hashlib.sha256(repr(settings).encode()).hexdigest()[:16]
