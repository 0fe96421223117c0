"""Reinforcement learning on questions whose answers can be checked, in the same loop as all training."""

from __future__ import annotations

import numpy as np

from jaxchat.errors import check
from jaxchat.rl.rollouts import Rollouts, questions_of, sampling, score
from jaxchat.rl.signal import EARLY
from jaxchat.stages.samples import prompts_of_chats
from jaxchat.stages.training import Training
from jaxchat.stages.workspace import Workspace
from jaxchat.tasks.items import spread
from jaxchat.train.loop import Evaluator

SAMPLES = 3
EVALUATION_SEED = 0
SAME = "all answers of each question had the same reward"


def run(workspace: Workspace) -> None:
    """Trains the parent's parameters on the rewards of their own samples; skipped if the data has none of the tasks.

    Raises:
      UserError: no question fits into the context.
    """
    experiment, tokenizer = workspace.experiment, workspace.tokenizer()
    config, model = experiment.rl, workspace.model_config(tokenizer)
    tasks = workspace.load_tasks("rl", config.tasks, "train")
    if not tasks:
        workspace.say(f"rl        skipped: the data folder has none of its tasks ({', '.join(config.tasks)})")
        workspace.finish("rl", parent=None, steps=0, tokens=0, seconds=0.0, skipped=True)
        return
    questions = questions_of(tasks, tokenizer, model.sequence_len)
    check(bool(questions), f"rl: none of its tasks' questions fits into model.sequence-len {model.sequence_len}")
    tests = workspace.load_tasks("rl", config.tasks, "test", quiet=True)
    held_out = questions_of(tests, tokenizer, model.sequence_len)
    if not held_out:
        workspace.say("rl        its tasks have no test questions: reward_eval is measured on training questions")
        held_out = questions
    parent = workspace.parent_of("rl")
    params, step = workspace.load_params(parent, model)
    steps = config.num_iterations or max(1, len(questions) // config.questions_per_step)
    training = Training(workspace, "rl", config, model, tokenizer, steps, parent={"stage": parent, "step": step})
    source = Rollouts(config, questions, training.engine(params), mesh=workspace.mesh, seed=experiment.seed)
    left_out = sum(map(len, tasks)) - len(questions)
    if left_out:
        workspace.say(f"rl        {left_out:,} of its questions fill model.sequence-len {model.sequence_len}: left out")
    asked = spread(held_out, config.eval_questions)

    def evaluate(step, params):
        engine = training.engine(params)
        prompts = [tokenizer.render_for_completion(conversation) for _, conversation in asked]
        completions = engine.generate(prompts, **sampling(config), seed=EVALUATION_SEED)
        yield "reward_eval", float(np.mean(score(asked, completions, tokenizer)))

    def warn_early(metrics):
        def look(step, params):
            if step == EARLY and source.signal.absent:
                metrics.note(f"{SAME} in the first {step} steps {source.signal.advice(config)}")
            return ()

        return Evaluator(EARLY, look, at_start=False)

    prompts = prompts_of_chats(tokenizer, [conversation for _, conversation in spread(held_out, SAMPLES)])
    training.train(
        lambda: params,
        source,
        lambda metrics: (
            Evaluator(config.eval_every, evaluate),
            training.sampler(metrics, prompts),
            warn_early(metrics),
        ),
        at_end=lambda: source.signal.facts(),
        method=config.method,
    )
    if source.signal.absent:
        again = "then start again with --redo=rl"
        workspace.say(f"rl changed nothing: {SAME} in every step {source.signal.advice(config)}; {again}")
