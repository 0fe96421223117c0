"""Settings: what is refused, and that they survive as JSON."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxchat.cli.experiments import experiment_names, load_experiment
from jaxchat.config import (
    STAGES,
    CostConfig,
    EvaluateConfig,
    Experiment,
    FinetuneConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    PretrainConfig,
    RLConfig,
    ScheduleConfig,
    TokenizerConfig,
)
from jaxchat.errors import UserError, closest
from jaxchat.model.config import GPTConfig
from jaxchat.runs.config_json import from_json, to_json


@given(st.integers(1, 128))
def test_model_sizes_follow_from_depth(depth):
    try:
        model = ModelConfig(depth=depth)
    except UserError as error:
        near = [int(word) for word in str(error).rpartition(": ")[2].split(" and ")]
        assert depth not in near
        for other in near:
            assert ModelConfig(depth=other).depth == other
        # None between them fits.
        for between in range(max([d for d in near if d < depth], default=0) + 1, max(near)):
            with pytest.raises(UserError):
                ModelConfig(depth=between)
        return
    assert model.width == 64 * depth == model.num_heads * model.head_dim
    assert model.head_dim % 2 == 0  # rotary pairs
    assert model.head_dim <= 128 and model.kv_heads == model.num_heads


def test_known_models():
    """The numbers of the published runs: d20 is 1280 wide with 10 heads, d32 2048 with 16."""
    assert (ModelConfig(depth=20).width, ModelConfig(depth=20).num_heads) == (1280, 10)
    assert (ModelConfig(depth=32).width, ModelConfig(depth=32).num_heads) == (2048, 16)
    assert GPTConfig(vocab_size=300).padded_vocab_size == 384
    assert GPTConfig(vocab_size=384).padded_vocab_size == 384


@pytest.mark.parametrize(
    "build, words",
    [
        (lambda: ModelConfig(depth=0), "model.depth is 0"),
        (lambda: ModelConfig(sequence_len=1), "model.sequence-len is 1"),
        (
            lambda: ModelConfig(window_pattern="SXL"),
            "model.window-pattern is 'SXL'; it must be one letter per layer, S",
        ),
        (lambda: ModelConfig(window_pattern=""), "model.window-pattern is ''"),
        (lambda: ModelConfig(depth=12, num_kv_heads=4), "model.num-kv-heads is 4; it must be a divisor of the 6 heads"),
        (lambda: ModelConfig(depth=12, num_kv_heads=0), "model.num-kv-heads is 0"),
        (
            lambda: Experiment(model=ModelConfig(depth=12, num_kv_heads=3), mesh=MeshConfig(tensor=2)),
            "mesh.tensor is 2; it must divide the 3 heads of keys and values",
        ),
        (lambda: MeshConfig(fsdp=0), "mesh.fsdp is 0; it must be at least 1"),
        (lambda: MeshConfig(data=-2), "mesh.data is -2; it must be at least -1"),
        (lambda: MeshConfig(data=0), "mesh.data is 0; it must be at least 1, or -1 for all devices"),
        (lambda: OptimizerConfig(matrix_lr=0.0), "optimizer.matrix-lr is 0.0; it must be above 0"),
        (
            lambda: OptimizerConfig(newton_schulz_steps=0),
            "optimizer.newton-schulz-steps is 0; it must be at least 1 and at most 50",
        ),
        (
            lambda: OptimizerConfig(muon_momentum=0.8),
            "optimizer.muon-momentum-start is 0.85; it must be at most the muon-",
        ),
        (lambda: ScheduleConfig(warmup_ratio=0.6, decay_ratio=0.6), "sum to at most 1"),
        (lambda: ScheduleConfig(final_fraction=1.5), "schedule.final-fraction"),
        (lambda: TokenizerConfig(max_chars=0), "tokenizer.max-chars"),
        (lambda: PretrainConfig(batch_tokens=0), "batch-tokens is 0; it must be at least 1"),
        (lambda: PretrainConfig(num_iterations=0), "num-iterations is 0"),
        (lambda: PretrainConfig(lr_fraction=0.0), "lr-fraction"),
        (lambda: FinetuneConfig(mixture=()), "mixture is empty"),
        (lambda: FinetuneConfig(epochs=0), "epochs"),
        (lambda: FinetuneConfig(num_iterations=-1), "num-iterations is -1"),
        (lambda: RLConfig(samples_per_question=1), "at least 2"),
        (lambda: RLConfig(questions_per_step=0), "rl.questions-per-step"),
        (lambda: RLConfig(eval_questions=0), "rl.eval-questions is 0; it must be at least 1"),
        (lambda: PretrainConfig(tokens_per_param=-1), "pretrain.tokens-per-param is -1; it must be above 0"),
        (lambda: PretrainConfig(target_flops=0), "pretrain.target-flops is 0; it must be above 0"),
        (lambda: PretrainConfig(save_every=-1), "pretrain.save-every is -1; it must be at least 0"),
        (lambda: RLConfig(device_rows=0), "rl.device-rows is 0; it must be at least 1 and at most 65,536, or auto"),
        (lambda: RLConfig(device_rows="all"), "rl.device-rows is 'all'; it must be a whole number, or auto"),
        (lambda: RLConfig(device_rows=None), "rl.device-rows is None; it must be a whole number, or auto"),
        (lambda: FinetuneConfig(eval_tokens=0), "eval-tokens is 0; it must be at least 1"),
        (lambda: ModelConfig(rope_base=0), "model.rope-base is 0; it must be at least 1"),
        (lambda: OptimizerConfig(adam_b1=2), "optimizer.adam-b1 is 2; it must be at least 0 and at most 0.999999"),
        (lambda: CostConfig(devices=0), "cost.devices is 0; it must be at least 1"),
        (lambda: CostConfig(expected_mfu=0), "cost.expected-mfu is 0; it must be above 0 and at most 1"),
        (lambda: RLConfig(temperature=0.0), "rl.temperature is 0.0; it must be at least 0.01"),
        (lambda: RLConfig(top_k=0), "rl.top-k is 0; it must be at least 1"),
        (lambda: RLConfig(tasks=()), "rl.tasks is empty; name at least one task"),
        (
            lambda: RLConfig(questions_per_step=2048, samples_per_question=1024),
            "at most 1,048,576 answers, not 2,097,152",
        ),
        (
            lambda: EvaluateConfig(of=("sfd",)),
            "evaluate.of names 'sfd', did you mean 'sft'? The stages with a model are",
        ),
        (lambda: EvaluateConfig(of=("sft", "sft")), "evaluate.of names 'sft' more than once"),
        (lambda: EvaluateConfig(core=("pretrian",)), "evaluate.core names 'pretrian', did you mean 'pretrain'?"),
        (lambda: EvaluateConfig(core=("sft", "sft")), "evaluate.core names 'sft' more than once"),
        (lambda: EvaluateConfig(core_per_task=10), "evaluate.core-per-task is 10; it must be at least 11"),
        (lambda: EvaluateConfig(tasks=("sums", "sums:5")), "evaluate.tasks names 'sums' more than once"),
        (lambda: Experiment(seed=-1), "seed is -1; it must be at least 0"),
        (lambda: Experiment(seed=1 << 31), "seed is 2147483648; it must be at most 2,147,483,647"),
        (lambda: Experiment(model=MeshConfig()), "it must be of class ModelConfig"),
        (lambda: Experiment(stages=("sft", "pretrain")), "stages must be in order"),
        (lambda: Experiment(stages=("sft", "sft")), "each once"),
        (lambda: Experiment(stages=("sfd",)), "stages names the unknown stage 'sfd', did you mean 'sft'?"),
    ],
)
def test_impossible_settings(build, words):
    with pytest.raises(UserError) as refused:
        build()
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", experiment_names())
def test_experiments_survive_as_json(name):
    experiment = load_experiment(name)
    assert from_json(to_json(experiment)) == experiment


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=60)  # at most 255 bytes


@given(
    st.sets(st.sampled_from(STAGES)),
    st.integers(0, 2**31 - 1),
    st.tuples(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1)),
    st.one_of(st.none(), TEXT),
    st.lists(TEXT, min_size=1, max_size=3),
)
def test_any_experiment_survives_as_json(stages, seed, coefficients, path, mixture):
    experiment = Experiment(
        stages=tuple(stage for stage in STAGES if stage in stages),
        seed=seed,
        tokenizer=TokenizerConfig(path=path),
        optimizer=OptimizerConfig(newton_schulz_coefficients=coefficients),
        sft=FinetuneConfig(mixture=tuple(mixture)),
        evaluate=EvaluateConfig(of=()),
    )
    assert from_json(to_json(experiment)) == experiment


def test_json_of_another_version():
    values = json.loads(to_json(Experiment(name="x")))
    del values["rl"]["temperature"], values["model"]["window_pattern"]  # an older version did not know them: defaults
    assert from_json(json.dumps(values)) == Experiment(name="x")
    values["rl"]["charm"] = 1
    with pytest.raises(UserError, match="fields that this version of jaxchat does not know: charm"):
        from_json(json.dumps(values))


def test_settings_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Experiment().seed = 3


def test_closest():
    assert closest("d13", ["d12", "speedrun"]) == ", did you mean 'd12'?"
    assert closest("zebra", ["d12", "speedrun"]) == "."


def test_humaneval_is_added_in_one_form_only():
    assert EvaluateConfig(humaneval=True, tasks=("sums",)).tasks == ("sums", "humaneval")
    assert EvaluateConfig(humaneval=True, tasks=("nanochat_humaneval:9",)).tasks == ("nanochat_humaneval:9",)
