"""The objectives: exact policy gradients on a model whose every answer can be listed, clips, KL, masks, micro-batches.

The model has a table of logits: one row for each beginning of an answer, which is picked by a one-hot hidden state. So
what the chunked loss makes of its head is the gradient for the table.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxchat.config import MeshConfig, RLConfig
from jaxchat.devices.mesh import make_mesh
from jaxchat.errors import UserError
from jaxchat.rl.advantages import ADVANTAGES
from jaxchat.rl.objectives import PolicyObjective, kl_loss, kl_value, shares
from jaxchat.train import loss as loss_module
from jaxchat.train.loss import LossConfig, objective_sum, token_nll

IDS, STOP, LONGEST, CAP = 3, 3, 3, 15.0
VOCAB = IDS + 1
PADDED = 8
METHODS = ("reinforce", "clipped", "cispo", "gspo")


def listed():
    """All answers: of up to two tokens and a stop, or of three tokens."""
    ended = [(*ids, STOP) for count in range(LONGEST) for ids in itertools.product(range(IDS), repeat=count)]
    return ended + list(itertools.product(range(IDS), repeat=LONGEST))


ANSWERS = listed()
BEGINNINGS = {ids: i for i, ids in enumerate({answer[:n] for answer in ANSWERS for n in range(len(answer))})}
TABLE = 1.5 * jax.random.normal(jax.random.key(0), (len(BEGINNINGS), PADDED))
OTHER = TABLE + 0.4 * jax.random.normal(jax.random.key(1), TABLE.shape)
REWARDS = np.array([(1.0 if answer[-1] == STOP else 0.0) * (0.5 + answer.count(1)) for answer in ANSWERS])
CONFIG = LossConfig(VOCAB, CAP)

TARGETS = np.full((len(ANSWERS), LONGEST), -1, np.int32)
STATES = np.zeros((len(ANSWERS), LONGEST), np.int32)
for row, answer in enumerate(ANSWERS):
    TARGETS[row, : len(answer)] = answer
    STATES[row, : len(answer)] = [BEGINNINGS[answer[:n]] for n in range(len(answer))]


def token_log_p(table, temperature=1.0):
    """The log-probabilities of all answers' tokens, by plain autodiff; 0 where there is none."""
    scores = (CAP * jnp.tanh(table / CAP))[:, :VOCAB] / temperature
    log_p = jax.nn.log_softmax(scores)[STATES]
    own = jnp.take_along_axis(log_p, jnp.maximum(TARGETS, 0)[..., None], -1)[..., 0]
    return jnp.where(TARGETS >= 0, own, 0.0)


def log_p_of(table):
    return token_log_p(table).sum(axis=1)


def table_gradient(objective, rows, tokens, table=TABLE, config=CONFIG):
    """The objective's loss and gradient for the table, over answers by their numbers, by the code under test."""
    return gradient_of(table, jnp.asarray(rows), tokens, objective, config, loss_module.CHUNK_BYTES)


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def gradient_of(table, rows, tokens, objective, config, chunk_bytes):
    hidden = jax.nn.one_hot(jnp.asarray(STATES)[rows], len(BEGINNINGS))

    def of(table):
        return objective_sum(hidden, table, jnp.asarray(TARGETS)[rows], tokens, objective, config)

    (loss, sums), gradient = jax.value_and_grad(of, has_aux=True)(table)
    return loss, gradient, sums


def expected_estimate(how, method, size=2, behaviour=TABLE, **settings):
    """The mean, over all groups of answers that `behaviour` may give, of the descent that the objective takes."""
    probability = np.exp(np.asarray(log_p_of(behaviour), np.float64))
    rows = np.array(list(itertools.product(range(len(ANSWERS)), repeat=size)))
    advantages = ADVANTAGES[how](REWARDS[rows])
    weights = np.prod(probability[rows], axis=1)
    flat = rows.reshape(-1)
    each = np.repeat(weights / size, size)[:, None] * np.ones(LONGEST)
    tokens = {
        "advantages": np.broadcast_to(advantages.reshape(-1)[:, None], each.shape),
        "behaviour": np.asarray(token_log_p(behaviour))[flat],
        "shares": each,
    }
    tokens = {name: jnp.asarray(values, jnp.float32) for name, values in tokens.items()}
    return -table_gradient(PolicyObjective(method=method, **settings), flat, tokens)[1]


def close(found, wanted, tolerance=2e-4):
    np.testing.assert_allclose(found, wanted, atol=tolerance * float(jnp.abs(wanted).max()))


def climbed(how):
    """What the mean over pairs should be, by autodiff over all answers."""

    def value(table):
        # Advantages and the probabilities of pairs are constants; the log-probabilities carry the gradient.
        log_p, p = log_p_of(table), jnp.exp(log_p_of(TABLE))
        rows = np.array(list(itertools.product(range(len(ANSWERS)), repeat=2)))
        pairs = p[rows].prod(axis=1)
        return jnp.sum(pairs[:, None] * ADVANTAGES[how](REWARDS[rows]) * log_p[rows]) / 2

    return jax.grad(value)(TABLE)


@pytest.mark.parametrize("method", METHODS)
def test_the_mean_estimate_is_the_policy_gradient(method):
    """(1 - 1/G) of it for the group's own mean, all of it for the mean of the others."""
    wanted = jax.grad(lambda table: jnp.sum(jnp.exp(log_p_of(table)) * REWARDS))(TABLE)
    close(expected_estimate("centred", method), 0.5 * wanted)
    close(expected_estimate("leave_one_out", method), wanted)


def test_the_mean_estimate_of_groups_of_three():
    wanted = jax.grad(lambda table: jnp.sum(jnp.exp(log_p_of(table)) * REWARDS))(TABLE)
    close(expected_estimate("centred", "reinforce", size=3), 2 / 3 * wanted)


@pytest.mark.parametrize("how", ["standardised", "maximum_likelihood"])
def test_other_advantages_give_their_own_estimate(how):
    wanted = climbed(how)
    for method in METHODS:
        close(expected_estimate(how, method), wanted)


def written_out(method, table, behaviour, advantages, *, low=0.2, high=0.28, cap=5.0):
    """The table of formulas, in plain JAX over whole answers: the loss of each token."""
    log_p, old = token_log_p(table), token_log_p(behaviour)
    there = TARGETS >= 0
    rho = jnp.exp(log_p - old)
    if method == "gspo":
        rho = jnp.exp(jnp.sum(log_p - old, 1, keepdims=True) / there.sum(1, keepdims=True)) * jnp.ones_like(log_p)
    if method == "reinforce":
        loss = -advantages * log_p
    elif method == "cispo":
        loss = -jax.lax.stop_gradient(jnp.minimum(rho, cap)) * advantages * log_p
    else:
        loss = -jnp.minimum(rho * advantages, jnp.clip(rho, 1 - low, 1 + high) * advantages)
    return jnp.where(there, loss, 0.0)


def tokens_of(behaviour, advantages, average="answers"):
    each = shares((TARGETS >= 0).sum(1), average, LONGEST)
    tokens = {
        "advantages": np.broadcast_to(advantages, TARGETS.shape),
        "behaviour": np.asarray(token_log_p(behaviour)),
        "shares": np.broadcast_to(each[:, None], TARGETS.shape),
    }
    return {name: jnp.asarray(values, jnp.float32) for name, values in tokens.items()}


@pytest.mark.parametrize("average", ["tokens", "answers", "length"])
@pytest.mark.parametrize("method", METHODS)
def test_after_an_update_losses_are_the_published_formulas(method, average):
    advantages = np.random.default_rng(0).normal(size=(len(ANSWERS), 1))
    there = (TARGETS >= 0).sum(1, keepdims=True)
    normaliser = {"tokens": there.sum(), "answers": there * len(ANSWERS), "length": len(ANSWERS) * LONGEST}[average]

    def reference(table):
        return jnp.sum(written_out(method, table, OTHER, advantages) / normaliser)

    wanted, gradient = jax.value_and_grad(reference)(TABLE)
    tokens, everything = tokens_of(OTHER, advantages, average), np.arange(len(ANSWERS))
    loss, found, sums = table_gradient(PolicyObjective(method=method), everything, tokens)
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)
    close(found, gradient, 1e-5)
    log_p, old = token_log_p(TABLE), token_log_p(OTHER)
    count = there.sum()
    np.testing.assert_allclose(sums["logprob_difference"] / count, jnp.abs(log_p - old).sum() / count, rtol=1e-4)
    ratios = jnp.exp(log_p - old)
    moved = jnp.where(TARGETS >= 0, ratios - 1 - jnp.log(ratios), 0.0)
    np.testing.assert_allclose(sums["kl_from_sampling"], moved.sum(), rtol=1e-3)
    outside = (TARGETS >= 0) & (jnp.abs(jnp.exp(log_p - old) - 1) > 0.1)
    assert int(sums["ratio_outside"]) == int(outside.sum()) > 0
    p = jnp.exp(jax.nn.log_softmax(TABLE[:, :VOCAB]))[STATES]
    entropy = jnp.where(TARGETS >= 0, -jnp.sum(p * jnp.log(p), -1), 0.0)
    np.testing.assert_allclose(sums["entropy"], entropy.sum(), rtol=2e-2)  # of capped logits, a little flatter


@pytest.mark.parametrize("method", METHODS)
def test_at_the_sampling_parameters_all_are_reinforce(method):
    advantages = np.random.default_rng(0).normal(size=(len(ANSWERS), 1))
    hidden = jax.nn.one_hot(STATES, len(BEGINNINGS))
    tokens = tokens_of(TABLE, advantages)
    tokens["behaviour"] = -token_nll(hidden, TABLE, jnp.array(TARGETS), CONFIG)
    everything = np.arange(len(ANSWERS))
    _, gradient, sums = table_gradient(PolicyObjective(method=method), everything, tokens)
    close(gradient, table_gradient(PolicyObjective(), everything, tokens)[1], 1e-6)
    assert sums["logprob_difference"] == 0 == sums["kl_from_sampling"]
    assert sums["ratio_outside"] == 0 and sums.get("clipped", 0) == 0


def test_the_clip_stops_exactly_what_has_gone_far_enough():
    """Gradient 0 where (rho > 1 + high, A > 0) or (rho < 1 - low, A < 0), and nowhere else."""
    ratios = np.array([0.5, 0.79, 0.81, 1.0, 1.27, 1.29, 3.0])
    log_p = jnp.full((2, len(ratios)), -1.0)
    tokens = {
        "behaviour": log_p - np.log(ratios),
        "advantages": jnp.array([[1.0], [-1.0]]) * jnp.ones((2, len(ratios))),
        "targets": jnp.ones((2, len(ratios))),
    }
    objective = PolicyObjective(method="clipped", low=0.2, high=0.28)
    slopes = jax.grad(lambda log_p: jnp.sum(objective(log_p, tokens)[0]))(log_p)
    np.testing.assert_allclose(slopes[0], np.where(ratios > 1.28, 0, -ratios), rtol=1e-5)
    np.testing.assert_allclose(slopes[1], np.where(ratios < 0.8, 0, ratios), rtol=1e-5)
    assert objective(log_p, tokens)[1]["clipped"].tolist() == [(ratios > 1.28).tolist(), (ratios < 0.8).tolist()]
    capped = PolicyObjective(method="cispo", cap=2.0)
    slopes = jax.grad(lambda log_p: jnp.sum(capped(log_p, tokens)[0]))(log_p)
    np.testing.assert_allclose(slopes[0], -np.minimum(ratios, 2.0), rtol=1e-5)


def test_ratios_without_bound_stay_finite():
    log_p = jnp.array([[-1e4, -1.0]])
    for behaviour in (jnp.array([[-1.0, -1e4]]), jnp.array([[-1e4, -1e4]])):
        tokens = {"behaviour": behaviour, "advantages": jnp.array([[0.0, -1.0]]), "targets": jnp.ones((1, 2))}
        for method in METHODS:
            objective = PolicyObjective(method=method)
            slopes = jax.grad(lambda x, objective=objective, tokens=tokens: jnp.sum(objective(x, tokens)[0]))(log_p)
            assert np.isfinite(slopes).all() and slopes[0, 0] == 0 or method == "gspo"
            assert np.isfinite(slopes).all()


def test_kl_has_the_gradient_of_the_kl():
    """Over all answers: E[k1] = E[k3] = KL and E[grad k2] = grad KL, but E[grad k1] = 0."""
    reference = log_p_of(OTHER)

    def kl(table):
        log_p = log_p_of(table)
        return jnp.sum(jnp.exp(log_p) * (log_p - reference))

    p = jnp.exp(log_p_of(TABLE))
    np.testing.assert_allclose(jnp.sum(p * kl_value(log_p_of(TABLE)[None], reference[None])[0]), kl(TABLE), rtol=1e-5)
    assert (kl_value(reference[None], reference[None]) == 0).all()
    assert (jax.grad(lambda x: jnp.sum(kl_loss(x, reference[None])))(reference[None]) == 0).all()
    wanted = jax.grad(kl)(TABLE)
    close(jax.grad(lambda table: jnp.sum(p * kl_loss(log_p_of(table)[None], reference[None])[0]))(TABLE), wanted)
    of_k1 = jax.grad(lambda table: jnp.sum(p * (log_p_of(table) - reference)))(TABLE)
    assert float(jnp.abs(of_k1).max()) < 1e-3 * float(jnp.abs(wanted).max())


def test_inside_the_loss_kl_is_that_of_each_tokens_distribution():
    """After the beginning that it follows: how often beginnings come has no gradient. Its value is that of answers."""
    p = np.exp(np.asarray(log_p_of(TABLE), np.float64))

    def after(table):
        return jax.nn.log_softmax((CAP * jnp.tanh(table / CAP))[:, :VOCAB])

    came = np.zeros(len(BEGINNINGS))  # the probability of each beginning
    for states, targets, chance in zip(STATES, TARGETS, p, strict=True):
        np.add.at(came, states[targets >= 0], chance)

    def kl(table):
        log_p = after(table)
        return jnp.sum(came[:, None] * jnp.exp(log_p) * (log_p - after(OTHER)))

    tokens = {
        "advantages": jnp.zeros(TARGETS.shape),
        "behaviour": token_log_p(TABLE),
        "reference": token_log_p(OTHER),
        "shares": jnp.asarray(p[:, None] * np.ones(TARGETS.shape), jnp.float32),
    }
    _, gradient, _ = table_gradient(PolicyObjective(kl=1.0), np.arange(len(ANSWERS)), tokens)
    close(gradient, jax.grad(kl)(TABLE))
    log_p, reference = log_p_of(TABLE), log_p_of(OTHER)
    of_tokens = kl_value(token_log_p(TABLE), tokens["reference"]).sum(axis=1)
    np.testing.assert_allclose(jnp.sum(p * of_tokens), jnp.sum(p * (log_p - reference)), rtol=1e-4)
    np.testing.assert_allclose(kl(TABLE), jnp.sum(p * (log_p - reference)), rtol=1e-4)


def test_kl_and_entropy_inside_the_loss():
    """Both weigh what plain autodiff over the whole table gives them, at a temperature too."""
    advantages = np.random.default_rng(0).normal(size=(len(ANSWERS), 1))
    tokens = tokens_of(OTHER, advantages)
    tokens["behaviour"] = token_log_p(OTHER, 0.7)
    tokens["reference"] = token_log_p(OTHER + 0.3, 0.7)
    objective = PolicyObjective(method="clipped", kl=0.4, entropy=0.2, temperature=0.7)

    def reference(table):
        log_p = token_log_p(table, 0.7)
        rho = jnp.exp(log_p - tokens["behaviour"])
        loss = -jnp.minimum(rho * advantages, jnp.clip(rho, 0.8, 1.28) * advantages)
        loss += 0.4 * jnp.square(log_p - tokens["reference"]) / 2
        scores = jax.nn.log_softmax((CAP * jnp.tanh(table / CAP))[:, :VOCAB] / 0.7)[STATES]
        loss -= 0.2 * -jnp.sum(jnp.exp(scores) * scores, -1)
        return jnp.sum(jnp.where(TARGETS >= 0, loss * tokens["shares"], 0.0))

    wanted, gradient = jax.value_and_grad(reference)(TABLE)
    loss, found, sums = table_gradient(objective, np.arange(len(ANSWERS)), tokens)
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)
    close(found, gradient, 1e-5)
    assert sums["kl"] > 0


@pytest.mark.parametrize("entropy", [0.0, 0.3])
@pytest.mark.parametrize("method", METHODS)
def test_what_is_no_target_contributes_nothing(method, entropy):
    """Whatever stands in tokens that are forced, of the prompt, or padding: not a bit of the gradient changes."""
    tokens = tokens_of(OTHER, np.random.default_rng(0).normal(size=(len(ANSWERS), 1)))
    tokens["reference"] = token_log_p(OTHER)
    objective, everything = PolicyObjective(method=method, kl=0.1, entropy=entropy), np.arange(len(ANSWERS))
    wanted = table_gradient(objective, everything, tokens)
    for junk in (7.0, -1e30, np.nan, np.inf):
        held = {name: jnp.where(TARGETS >= 0, values, junk) for name, values in tokens.items()}
        for one, other in zip(jax.tree.leaves(wanted), jax.tree.leaves(table_gradient(objective, everything, held)),
                              strict=True):  # fmt: skip
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("devices, chunk_bytes", [(1, 1), (2, 1 << 30), (4, 4 * 4 * PADDED * LONGEST)])
@pytest.mark.parametrize("method", ["clipped", "gspo"])
def test_chunks_and_devices_make_no_difference(method, devices, chunk_bytes, monkeypatch):
    tokens = tokens_of(OTHER, np.random.default_rng(0).normal(size=(len(ANSWERS), 1)))
    objective, everything = PolicyObjective(method=method, entropy=0.1), np.arange(len(ANSWERS))
    wanted = table_gradient(objective, everything, tokens)
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", chunk_bytes)
    mesh = make_mesh(MeshConfig(fsdp=min(devices, 2)), jax.devices()[:devices])
    found = table_gradient(objective, everything, tokens, config=CONFIG._replace(mesh=mesh))
    for one, other in zip(jax.tree.leaves(wanted), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_an_objective_holds_no_more_logits_than_cross_entropy(monkeypatch):
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", 1 << 20)
    batch, length, width, vocab = 8, 512, 16, 2048
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in [(batch, length, width), (width, vocab)]]
    targets, each = (jax.ShapeDtypeStruct((batch, length), dtype) for dtype in (jnp.int32, jnp.float32))
    tokens = {"advantages": each, "behaviour": each, "shares": each}

    def run(hidden, head, targets, tokens, objective):
        return objective_sum(hidden, head, targets, tokens, objective, LossConfig(vocab, CAP))[0]

    for method in ("clipped", "gspo"):  # gspo holds a whole row's: 4 MiB of 32
        step = jax.jit(jax.value_and_grad(run, (0, 1)), static_argnums=4)
        compiled = step.lower(*shapes, targets, tokens, PolicyObjective(method=method)).compile()
        analysis = compiled.memory_analysis()
        assert analysis is not None and analysis.temp_size_in_bytes < 4 * batch * length * vocab / 2
        products = compiled.as_text().count(" dot(")
        assert products <= 3, f"{method} makes {products} matrix products"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "clipped", "top_k": 50}, "rl.top-k is 50, but clipped needs the probabilities"),
        ({"kl": 0.1, "top_k": 50}, "rl.top-k is 50, but kl needs the probabilities"),
        ({"updates_per_batch": 2}, "rl.updates-per-batch is 2, but after one update the model would answer otherwise"),
        ({"clip_low": 1.0}, "rl.clip-low is 1.0; it must be above 0 and below 1"),
    ],
)
def test_settings_that_do_not_go_together_are_refused_in_a_line(settings, message):
    with pytest.raises(UserError) as refused:
        RLConfig(**settings)
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_defaults_are_the_published_constants():
    def limits(**settings):
        objective = PolicyObjective.of(RLConfig(**settings))
        return objective.low, objective.high

    assert limits(method="clipped") == (0.2, 0.28)  # DAPO
    assert limits(method="gspo") == (3e-4, 4e-4)  # GSPO
    assert limits(method="gspo", clip_low=0.1) == (0.1, 4e-4)
    assert PolicyObjective.of(RLConfig(method="cispo")).cap == 5.0
    assert RLConfig(top_k=50).method == "reinforce" and RLConfig(method="best_of_n", updates_per_batch=2).kl == 0
