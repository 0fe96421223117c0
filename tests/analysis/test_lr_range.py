"""The learning-rate range test: its rule on curves of known answers, and the command on a tiny run."""

import hashlib
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxchat.analysis.lr_range import GROUPS, MIN_STEPS, RangeTest, measure, smooth, suggest, with_factors
from jaxchat.cli.main import main
from jaxchat.config import OptimizerConfig
from jaxchat.model.config import GPTConfig
from jaxchat.optim.optimizer import make_optimizer
from tests.tiny import ARGUMENTS, ROOT, refusal, start, values

MODEL = GPTConfig(depth=1, vocab_size=512)
CONSTANT = "--pretrain.schedule.decay-ratio=0"
STEPS = MIN_STEPS
CONFIGURED = OptimizerConfig().matrix_lr


def command(directory, *arguments):
    return ["lr-range", *ARGUMENTS, CONSTANT, f"--run-dir={directory}", f"--steps={STEPS}", *arguments]


def result(directory):
    """lr_range.json, which is strict JSON."""

    def refuse(constant):
        raise AssertionError(constant)

    return json.loads((Path(directory) / "lr_range.json").read_text(), parse_constant=refuse)


# --- the rule


def curve(places, *, others=0.0, fall=2.0, fall_at=0.3, fall_width=0.05, rise_at=0.7, noise=0.0, seed=0):
    """A loss over `places` (0 to 1 of the range): what the other groups learn, a fall of the group's own, a rise."""
    loss = 3 + others * np.exp(-places / 0.03) + fall / (1 + np.exp((places - fall_at) / fall_width))
    loss = loss + 40 * np.maximum(0, places - rise_at) ** 2
    return loss + noise * np.random.default_rng(seed).normal(size=len(places))


def within(value, expected, factor):
    assert expected / factor < value < expected * factor, (value, expected)


STEPS_OF_CURVES = st.integers(80, 600)
SEEDS = st.integers(0, 2**32 - 1)
PLACES = st.floats(0.45, 0.6)


@given(STEPS_OF_CURVES, PLACES, st.floats(0, 0.03), SEEDS)
def test_steepest_fall_of_a_curve_like_the_heads(steps, fall_at, noise, seed):
    """A flat start, one long fall, and a rise that comes much later: the steepest place, which smoothing shifts by
    about a twentieth of the range."""
    rates, places = np.geomspace(1e-5, 10, steps), np.linspace(0, 1, steps)
    losses = curve(places, fall=4.0, fall_at=fall_at, rise_at=0.8, noise=noise, seed=seed)
    within(suggest(rates, losses).value, 10 ** (-5 + 6 * (fall_at + 0.03)), 4)


@given(STEPS_OF_CURVES, st.floats(0.5, 0.75), st.floats(0, 0.03), SEEDS)
def test_tenth_of_the_lowest_of_a_curve_like_the_matrices(steps, rise_at, noise, seed):
    """A steep start that the other groups make, little after it, and a rise."""
    rates, places = np.geomspace(1e-5, 10, steps), np.linspace(0, 1, steps)
    losses = curve(places, others=4.0, fall=0.6, fall_at=rise_at - 0.03, rise_at=rise_at, noise=noise, seed=seed)
    found = suggest(rates, losses)
    within(found.value, 10 ** (-5 + 6 * (rise_at + 0.05)) / 10, 4)
    assert found.value <= found.lowest / 10 * 1.1


@given(st.integers(60, 300), st.floats(0.1, 5), st.floats(0, 0.02), SEEDS)
def test_no_suggestion_without_a_rise(steps, height, noise, seed):
    places = np.linspace(0, 1, steps)
    found = suggest(np.geomspace(1e-3, 7, steps), curve(places, others=height, rise_at=2.0, noise=noise, seed=seed))
    assert found.value is None and "does not rise up to 7;" in found.why


@given(st.integers(MIN_STEPS, 300), st.floats(0.05, 1))
def test_no_suggestion_without_a_fall(steps, slope):
    found = suggest(np.geomspace(0.5, 7, steps), 2 + slope * np.arange(steps))
    assert found.value is None and "does not fall above 0.5; try a lower --min" in found.why


@given(st.floats(1e-6, 1e6))
def test_suggestion_goes_with_the_unit_of_the_rate(unit):
    rates, places = np.geomspace(1e-5, 10, 120), np.linspace(0, 1, 120)
    losses = curve(places, others=4.0, fall=0.6, fall_at=0.6, rise_at=0.7)
    plain = suggest(rates, losses)
    exact = rates / 10 if plain.why.startswith("a tenth") else rates  # each an eighth above the one before
    expected = unit * exact[np.abs(exact - plain.value).argmin()]
    half = 0.5 * 10.0 ** (math.floor(math.log10(expected)) - 1)  # of the second digit, to which a rate is rounded
    assert abs(suggest(unit * rates, losses).value - expected) <= (1 + 1e-9) * half


def test_suggestion_never_from_the_start_that_the_other_groups_make():
    """Were the first quarter counted, the steepest fall would be the first step."""
    rates, places = np.geomspace(1e-5, 10, 200), np.linspace(0, 1, 200)
    for height in (1.0, 5.0, 50.0):
        assert suggest(rates, curve(places, others=height, fall=0.0, rise_at=0.7)).value > rates[60]


def test_suggestion_below_the_range_says_so():
    rates = np.geomspace(1e-3, 10, 100)
    found = suggest(rates, curve(np.linspace(0, 1, 100), others=4.0, fall=0.0, rise_at=0.1))
    assert found.value < 1e-3 and "try a --min lower than 0.001" in found.why


def test_divergence_counts_as_a_rise():
    rates = np.geomspace(1e-4, 1, 60)
    losses = list(np.linspace(6, 2, 50))
    assert suggest(rates, losses).value is None
    assert suggest(rates, losses, diverged=True).value == pytest.approx(rates[49] / 10, rel=0.05)
    assert suggest(rates, [], diverged=True).value is None


@given(st.lists(st.floats(0, 100), min_size=1, max_size=50), st.integers(50, 500))
def test_smoothing_is_a_weighted_mean(losses, steps):
    decay = 1 - 20 / steps
    for i, value in enumerate(smooth(losses, steps)):
        weights = decay ** np.arange(i, -1, -1.0)
        assert value == pytest.approx(np.average(losses[: i + 1], weights=weights), rel=1e-9, abs=1e-9)


# --- the optimizer


def params(scale=1.0, seed=0):
    rng = np.random.default_rng(seed)

    def array(*shape):
        return jnp.asarray(rng.normal(size=shape) * scale, jnp.float32)

    return {
        "embed": {"embedding": array(16, 8)},
        "blocks": {"0": {"mlp": {"up": {"kernel": array(8, 32)}, "down": {"kernel": array(32, 8)}}}},
        "head": {"kernel": array(8, 16)},
    }


def trained(optimizer, state, steps):
    values, update = params(), jax.jit(optimizer.update)
    for step in range(steps):
        updates, state = update(params(seed=step + 1), state, values)
        values = optax.apply_updates(values, updates)
    return values


def optimizer_of(**settings):
    return make_optimizer(OptimizerConfig(weight_decay=0.1, **settings), MODEL, lambda count: 1.0)


@pytest.mark.parametrize("group", GROUPS)
def test_a_factor_is_another_rate(group):
    name = f"{group}_lr"
    factored = with_factors(optimizer_of(), 3)
    state = factored.init(params())
    table = state.table.at[:, GROUPS.index(group)].set(jnp.array([0.25, 3.0, 40.0]))
    found = trained(factored, state._replace(table=table), 3)
    rate = getattr(OptimizerConfig(), name)
    expected, inner = params(), None
    for step, factor in enumerate((0.25, 3.0, 40.0)):
        plain = optimizer_of(**{name: rate * factor})
        inner = plain.init(params()) if inner is None else inner
        updates, inner = jax.jit(plain.update)(params(seed=step + 1), inner, expected)
        expected = optax.apply_updates(expected, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), found, expected)


def test_without_factors_nothing_changes():
    factored, plain = with_factors(optimizer_of(), 3), optimizer_of()
    found, expected = (trained(o, o.init(params()), 3) for o in (factored, plain))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


# --- the command


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A run whose pretraining is finished, with a constant rate."""
    directory = tmp_path_factory.mktemp("runs") / "tiny"
    steps = f"--pretrain.num-iterations={STEPS}"
    code, _, err = start(directory, CONSTANT, steps, "--stages=tokenizer,pretrain")
    assert code == 0, err
    return directory


def hashes(directory):
    files = (path for path in directory.rglob("*") if path.is_file() and path.name != ".lock")
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_rates_as_configured_give_the_losses_of_pretraining(pretrained, capsys):
    """Pretraining's own model, data, order, optimizer and mesh; and nothing in the run's directory is touched."""
    before = hashes(pretrained)
    near = [f"--min={CONFIGURED * (1 - 1e-6)}", f"--max={CONFIGURED * (1 + 1e-6)}", "--group=matrix"]
    steps = f"--pretrain.num-iterations={STEPS}"
    assert main(command(pretrained, steps, "--cost.dollars-per-device-hour=9", *near)) == 0
    assert capsys.readouterr().out.count("tokenizer") == 0
    after = hashes(pretrained)
    assert {path: after[path] for path in before} == before
    assert {path.name for path in after.keys() - before.keys()} == {"lr_range.json", "lr_range.png"}
    found = result(pretrained)["groups"]["matrix"]["loss"]
    expected = [loss for _, loss in values(pretrained, "pretrain")]
    assert len(found) == len(expected) == STEPS
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert expected[-1] < expected[0] - 1


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """A run directory that the test has begun, and what it printed."""
    directory = tmp_path_factory.mktemp("runs") / "fresh"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4", "PYTHONPATH": str(ROOT)}
    module = [sys.executable, "-m", "jaxchat.cli.main"]
    done = subprocess.run(
        [*module, *command(directory)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    return directory, done.stdout, done.stderr


def test_all_groups_from_nothing(fresh):
    directory, out, err = fresh
    found = result(directory)
    assert list(found["groups"]) == list(GROUPS) and found["steps"] == STEPS and found["batch_tokens"] == 512
    for group, test in found["groups"].items():
        configured = getattr(OptimizerConfig(), f"{group}_lr")
        assert test["configured"] == configured and test["option"] == f"--optimizer.{group}-lr"
        rates = np.array(test["rates"])
        np.testing.assert_allclose(rates[0], configured / 1000)
        np.testing.assert_allclose(rates[1:] / rates[:-1], 1e6 ** (1 / (STEPS - 1)))
        assert len(rates) == len(test["loss"]) == len(test["smoothed"])
        assert test["stopped"] is not None or len(rates) == STEPS
        # The same fresh parameters, whose head is zero, and the same first batch.
        assert test["loss"][0] == pytest.approx(math.log(300), rel=1e-4)
    # Without a head nothing is learnt, whatever the other groups do.
    assert found["groups"]["head"]["loss"][5] > found["groups"]["matrix"]["loss"][5]
    assert "lr-range" in err and "left" in err


def test_table_and_options(fresh):
    directory, out, _ = fresh
    groups = result(directory)["groups"]
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line.split()[:1] and line[0] != " "}
    options = [f"{test['option']}={test['suggested']:g}" for test in groups.values() if test["suggested"]]
    for group, test in groups.items():
        assert rows[group][1] == f"{test['configured']:g}"
        assert rows[group][2] == (f"{test['suggested']:g}" if test["suggested"] else "none")
    assert (" ".join(options) if options else "curves:") in out
    assert str(directory / "lr_range.png") in out


def test_plot_has_a_panel_a_group(fresh):
    directory, _, _ = fresh
    image = matplotlib.image.imread(directory / "lr_range.png")[..., :3]
    assert image.shape[1] > 2 * image.shape[0]
    blue = np.abs(image - np.array([0x00, 0x72, 0xB2]) / 255).max(-1) < 0.02
    for panel in np.array_split(blue, 3, axis=1):
        assert panel.sum() > 200


def test_training_goes_on_from_it(fresh):
    """Its tokenizer is the run's."""
    directory, _, _ = fresh
    before = hashes(directory / "tokenizer")
    code, out, err = start(directory, CONSTANT, "--stages=tokenizer,pretrain")
    assert code == 0 and "tokenizer already finished; skipped" in out, err
    assert hashes(directory / "tokenizer") == before
    assert (directory / "lr_range.json").exists()


def test_all_groups_share_one_compiled_step(pretrained):
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, _, **facts: compiled.append(event) if event.endswith("backend_compile_duration") else None
    )
    counts = []
    for group in ("all", "matrix", "all"):  # the first warms up what JAX keeps between calls
        compiled.clear()
        assert main(command(pretrained, f"--pretrain.num-iterations={STEPS}", f"--group={group}")) == 0
        counts.append(len(compiled))
    assert counts[1] == counts[2] > 0


@pytest.mark.parametrize(
    "losses, kept, stopped",
    [
        ([5.0, 4.0, math.nan, 3.0], 2, "loss nan at a rate of 22"),
        ([5.0, 4.0, math.inf, 3.0], 2, "loss inf at a rate of 22"),
        ([2.0, 1.0, 9.0, 1.0], 3, "loss above 4 times the lowest at a rate of 22"),
    ],
)
def test_divergence_ends_a_test_early(losses, kept, stopped):
    class Source:
        def next_batch(self, step, parameters):
            return None, {}

    test, following = RangeTest("head", 0.1, np.geomspace(1, 100, 4)), iter(losses)
    measure(test, {"params": None}, lambda state, batch: (state, {"loss": next(following)}), Source(), lambda *_: None)
    assert (test.losses, test.stopped, test.diverged) == (losses[:kept], stopped, True)


def test_interrupted(pretrained, tmp_path):
    """Ctrl-C leaves what was measured, and exit code 130."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4", "PYTHONPATH": str(ROOT)}
    arguments = command(tmp_path / "run", "--steps=50000", "--group=matrix")
    process = subprocess.Popen(
        [sys.executable, "-m", "jaxchat.cli.main", *arguments],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    for line in process.stderr:
        if "/50000" in line:
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err
    assert "interrupted; the measurements so far are in" in out
    test = result(tmp_path / "run")["groups"]["matrix"]
    assert test["stopped"] == "interrupted" and test["suggested"] is None and 1 <= len(test["loss"]) < 50000
    assert (tmp_path / "run" / "lr_range.png").stat().st_size > 1000


# --- errors


@pytest.mark.parametrize(
    "arguments, expected",
    {
        "": "no experiment given; write --experiment=auto|",
        "--experiment=quickstar": "unknown experiment 'quickstar', did you mean 'quickstart'?",
        "--experiment=quickstart --model.dept=2": "unknown option --model.dept, did you mean '--model.depth'?",
        "--experiment=quickstart --model.depth=two": "--model.depth=two: the value must be a whole number",
        "--experiment=quickstart --step=5": "unknown option --step, did you mean '--steps'?",
        "--experiment=quickstart --fresh": "unknown option --fresh",
        "--experiment=quickstart --steps=many": "--steps takes a whole number; see jaxchat lr-range --h",
        "--experiment=quickstart --steps=19": "--steps is 19; it must be at least 20",
        "--experiment=quickstart --min=1 --max=1": "the matrix rate cannot rise from --min 1 to --max 1",
        "--experiment=quickstart --min=30": "the matrix rate cannot rise from --min 30 to --max 20",
        "--experiment=quickstart --min=0": "--min is 0.0; it must be above 0",
        "--experiment=quickstart --min=nan": "--min is nan; it must be finite, above 0",
        "--experiment=quickstart --max=inf": "--max is inf; it must be finite",
        "--experiment=quickstart --group=heads": "--group: unknown value 'heads', did you mean 'head'?",
        "--experiment=quickstart --data=nowhere": "data folder 'nowhere' does not exist",
        "--experiment=d12 --data.download": "d12 trains on your text",
        "--experiment=quickstart --pretrain.batch-tokens=1000": "pretrain: batch-tokens 1000 is not a multiple",
    }.items(),
)
def test_bad_input(tmp_path, capsys, arguments, expected):
    (tmp_path / "run").mkdir()
    code = main(["lr-range", *arguments.split(), f"--run-dir={tmp_path / 'run'}"])
    out, err = capsys.readouterr()
    assert expected in refusal((code, out, err)) and out == ""
    assert not (tmp_path / "run" / "lr_range.json").exists()


def test_run_of_other_settings_is_refused(pretrained, capsys):
    code = main(command(pretrained, "--model.depth=2"))
    assert "pretrain was made with model.depth 1, not 2" in refusal((code, *capsys.readouterr()))


def test_outside_a_checkout(tmp_path):
    """The experiments belong to the checkout, not to the installed package: it has to be the working directory."""
    (tmp_path / "installed").mkdir()
    (tmp_path / "installed" / "jaxchat").symlink_to(ROOT / "jaxchat")
    arguments = [sys.executable, "-m", "jaxchat.cli.main", "lr-range", "--experiment=quickstar"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed"), "PYTHONSAFEPATH": "1"}
    for folder, expected in {tmp_path: "start the command in the folder", ROOT: "'quickstart'?"}.items():
        done = subprocess.run(arguments, cwd=folder, env=environment, capture_output=True, text=True)
        assert expected in refusal(done)
