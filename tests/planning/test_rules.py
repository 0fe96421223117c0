"""Horizon, batch, rates and decay by rules: against the figures that nanochat's own runs have."""

import math

import pytest

from jaxchat.cli.launch import main
from jaxchat.cli.options import configure
from jaxchat.config import (
    Experiment,
    Impossible,
    ModelConfig,
    OptimizerConfig,
    PhasesConfig,
    PretrainConfig,
    TokenizerConfig,
)
from jaxchat.errors import UserError
from jaxchat.model.config import GPTConfig
from jaxchat.model.parameters import count_parameters
from jaxchat.optim.optimizer import adamw_groups
from jaxchat.planning.rules import best_batch, follow_rules, rules_lines
from jaxchat.recipes import (
    RATES,
    REFERENCE_BATCH,
    REFERENCE_STEPS,
    counted_parameters,
    decay_of,
    momentum_of,
    rate_factor,
    relative_horizon,
)
from jaxchat.train.budget import training_tokens

VOCABULARY = 32_768


def by_rules(depth, given=(), **changes):
    experiment = Experiment(
        rules="nanochat", model=ModelConfig(depth=depth), tokenizer=TokenizerConfig(vocab_size=VOCABULARY), **changes
    )
    return follow_rules(experiment, given)


@pytest.mark.parametrize("depth", [6, 12, 20])
@pytest.mark.parametrize("kv", [None, 1])
def test_the_parameters_are_those_of_the_model(depth, kv):
    model = ModelConfig(depth=depth, num_kv_heads=kv, value_embeddings=True)
    count = count_parameters(GPTConfig.of(model, 50_000))
    assert counted_parameters(model, 50_000) == count.matrices + count.head


@pytest.mark.parametrize(
    "depth, exponent", [(6, 17), (8, 18), (12, 19), (14, 19), (16, 19), (18, 20), (24, 20), (26, 20), (32, 21)]
)
def test_batches(depth, exponent):
    assert by_rules(depth).pretrain.batch_tokens == 1 << exponent


@pytest.mark.parametrize(
    "depth, flops, lowest, highest",  # the batches between which ours were best, in benchmarks/RESULTS.md
    [(4, 3e15, 15, 16), (8, 1e16, 14, 16), (6, 1e16, 15, 17), (8, 3e16, 15, 17), (4, 1e16, 15, 17)],
)
def test_batches_of_short_trainings_are_those_that_were_best(depth, flops, lowest, highest):
    options = [f"--model.depth={depth}", f"--pretrain.target-flops={flops}"]
    config = configure("d12_modern", options, None, ()).pretrain
    assert 1 << lowest <= config.batch_tokens <= 1 << highest
    assert config.target_flops == flops and config.num_iterations is None


def test_tokens_by_parameters_and_few_tokens():
    config = configure("d12_modern", ["--pretrain.tokens-per-param=0.5"], None, ()).pretrain
    assert config.batch_tokens == 1 << round(19 + 0.77 * math.log2(0.5 * 135_266_304 / (2520 * 524_288)))
    assert best_batch(1e5) == best_batch(2e7) == 32_768 and best_batch(2520 * 524_288) == 524_288


@pytest.mark.parametrize("depth, decay", [(12, 0.28), (16, 0.131), (20, 0.100), (24, 0.060)])
def test_decays(depth, decay):
    assert by_rules(depth).optimizer.matrix_weight_decay == pytest.approx(decay, rel=0.01)


def test_at_the_reference_the_rates_are_the_tables_and_the_horizon_12_tokens_a_parameter():
    experiment = by_rules(12)
    assert {name: getattr(experiment.optimizer, name) for name in RATES} == RATES
    assert experiment.pretrain.num_iterations == 2520
    assert experiment.pretrain.num_iterations * 524_288 == pytest.approx(
        12 * counted_parameters(experiment.model, VOCABULARY), rel=1e-3
    )


def test_rates_follow_the_root_of_the_batch_and_fall_with_the_tokens_of_trainings_shorter_than_the_reference():
    shallow = by_rules(6)
    small, large = shallow.optimizer, by_rules(24).optimizer
    shorter = shallow.pretrain.num_iterations * 131_072 / (REFERENCE_STEPS * REFERENCE_BATCH)
    assert shorter == pytest.approx(relative_horizon(shallow.model, VOCABULARY), rel=1e-3)
    for name in RATES:
        assert getattr(small, name) == pytest.approx(RATES[name] * 0.25**0.5 * shorter**-0.32)
        assert getattr(large, name) == pytest.approx(RATES[name] * 2**0.5)
    assert {*RATES} == {"matrix_lr", *(f"{name}_lr" for name in adamw_groups(small))}


@pytest.mark.parametrize(
    "batch, steps, lower, higher",
    [(131_072, 400, 1.0, 2.0), (65_536, 800, 0.7, 1.4), (65_536, 400, 1.0, 2.0)],
)
def test_rates_of_short_trainings_lie_where_a_d12_learnt_most(batch, steps, lower, higher):
    assert lower <= rate_factor(batch, batch * steps) <= higher


def test_momentum_is_lower_in_short_trainings():
    assert momentum_of(2520) == momentum_of(5000) | {"muon_momentum_ratio": pytest.approx(400 / 2520)}
    assert momentum_of(2520)["muon_momentum"] == pytest.approx(0.97)
    assert 1 - momentum_of(630)["muon_momentum"] == pytest.approx(2 * 0.03)
    for steps in (1, 10, 100, 400, 1000, 10_000):
        OptimizerConfig(**momentum_of(steps))  # refuses a start or an end above it
        assert momentum_of(steps)["muon_momentum_ratio"] * steps <= 400.001


def test_momentum_follows_the_rules_where_it_falls_with_the_rates():
    options = ["--rules=nanochat", "--pretrain.num-iterations=630"]
    plain, modern = (configure(name, options, None, ()).optimizer for name in ("d12", "d12_modern"))
    assert plain.muon_momentum == OptimizerConfig().muon_momentum and plain.muon_momentum_ratio is None
    assert modern.muon_momentum == pytest.approx(0.94) and modern.muon_momentum_ratio == 0.35
    own = configure("d12_modern", [*options, "--optimizer.muon-momentum=0.96"], None, ()).optimizer
    assert own.muon_momentum == 0.96 and own.muon_momentum_end == 0.9


def test_what_the_user_sets_stays_and_the_rest_follows_from_it():
    options = ["--pretrain.batch-tokens=131072", "--pretrain.num-iterations=400", "--optimizer.head-lr=0.005"]
    experiment = configure("d12", ["--rules=nanochat", *options], None, ())
    assert (experiment.pretrain.batch_tokens, experiment.pretrain.num_iterations) == (131_072, 400)
    assert experiment.optimizer.matrix_lr == pytest.approx(0.02 * rate_factor(131_072, 400 * 131_072))
    assert experiment.optimizer.head_lr == 0.005
    # Of a short training the decay is that of a long one.
    assert experiment.optimizer.matrix_weight_decay == pytest.approx(0.14) == decay_of(131_072, 1.0)
    assert relative_horizon(experiment.model, VOCABULARY) == 1
    flops = configure("d12", ["--rules=nanochat", "--pretrain.target-flops=1e18"], None, ())
    assert flops.pretrain.num_iterations is None and flops.pretrain.target_flops == 1e18
    tokens = training_tokens(flops.pretrain, GPTConfig.of(flops.model, VOCABULARY))
    assert flops.optimizer.matrix_lr == pytest.approx(0.02 * rate_factor(524_288, tokens)) and tokens < 1.3e9
    shorter = configure("d12", ["--rules=nanochat", "--pretrain.tokens-per-matrix-param=8"], None, ())
    assert shorter.pretrain.num_iterations == 1680


def test_without_rules_nothing_changes():
    experiment = configure("d12", [], None, ())
    assert follow_rules(experiment) is experiment and rules_lines(experiment) == []


def test_following_twice_is_following_once():
    once = by_rules(20)
    assert follow_rules(once) == once


def test_rules_and_sizes_contradict_each_other():
    with pytest.raises(Impossible, match="rules is nanochat, which starts from the depth, and sizes is auto"):
        Experiment(rules="nanochat", sizes="auto")
    with pytest.raises(UserError, match="--rules=nanoch: the value must be one of none, nanochat"):
        configure("d12", ["--rules=nanoch"], None, ())


def test_the_dry_run_says_what_they_decided(tmp_path, capsys):
    tiny = ["--model.depth=2", "--model.sequence-len=64", "--tokenizer.vocab-size=300", "--pretrain.device-rows=8"]
    tiny += [f"--run-dir={tmp_path}"]
    assert main(["--experiment=quickstart", "--rules=nanochat", "--dry-run", *tiny]) == 0
    said = capsys.readouterr().out
    assert "rules     442,368 parameters in matrices and head; batch 32,768 tokens; 162 steps" in said
    assert "rules     learning rates 1.46 times the reference's: matrix 0.0292" in said
    assert "Muon's weight decay" in said


def test_a_batch_that_grows_takes_more_steps_for_the_same_tokens():
    grows = by_rules(12, pretrain=PretrainConfig(phases=PhasesConfig(batch_tokens=(131_072, 262_144))))
    assert grows.pretrain.batch_tokens == 524_288
    assert grows.pretrain.num_iterations == pytest.approx(2520 * (4 + 2 + 1) / 3, abs=1)
    assert f"{by_rules(12).pretrain.num_iterations * 524_288:,}"[:5] in rules_lines(grows)[0]
