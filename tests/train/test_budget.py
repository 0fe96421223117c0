"""The arithmetic of a run against published numbers, real parameter trees and its own suggestions."""

import re

import jax
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from jaxchat.config import CostConfig, PretrainConfig
from jaxchat.errors import UserError
from jaxchat.model.config import GPTConfig
from jaxchat.model.gpt import abstract_params
from jaxchat.train.budget import (
    BatchPlan,
    attended_keys,
    batch_plans,
    count_parameters,
    flops_per_token,
    split_batch,
    training_length,
)

D20 = GPTConfig(depth=20, vocab_size=65536)


def test_d20_has_nanochats_published_numbers():
    assert count_parameters(D20).total == 560_988_160
    assert flops_per_token(D20) == pytest.approx(3.491758e9, rel=1e-7)
    assert training_length(PretrainConfig(batch_tokens=524_288), D20) == 21_400


@pytest.mark.parametrize(
    "model",
    [GPTConfig(depth=4, vocab_size=1000), GPTConfig(depth=8, num_kv_heads=1), GPTConfig(depth=6, num_kv_heads=3)],
)
def test_counts_what_the_model_has(model):
    params, counted = abstract_params(model), count_parameters(model)

    def size(tree):
        return sum(leaf.size for leaf in jax.tree.leaves(tree))

    assert (counted.embedding, counted.matrices, counted.head) == tuple(
        size(params[k]) for k in ("embed", "blocks", "head")
    )
    assert counted.total == size(params)


def test_flops_grow_with_the_sequence_by_attention_alone():
    short, long = GPTConfig(depth=12, sequence_len=1024), GPTConfig(depth=12, sequence_len=2048)
    assert flops_per_token(long) - flops_per_token(short) == 12 * 12 * 768 * 1024


@pytest.mark.parametrize(
    "length, window", [(16, None), (16, 0), (16, 4), (16, 14), (16, 15), (16, 40), (2, 0), (37, 9)]
)
def test_attended_keys_are_those_of_the_mask(length, window):
    mask = [[k <= q and (window is None or q - k <= window) for k in range(length)] for q in range(length)]
    assert attended_keys(length, window) == sum(map(sum, mask))


@pytest.mark.parametrize("pattern", ["L", "S", "SL", "SSSL", "LLS"])
def test_attentions_flops_are_those_of_the_masks_of_all_layers(pattern):
    """As in the published numbers, whose T keys a token count the future: both halves of each layer's band."""
    model = GPTConfig(depth=6, sequence_len=64, window_pattern=pattern)
    letters = (pattern * 6)[:5] + "L"
    reach = {"S": 16, "L": 64}
    pairs = sum(abs(q - k) <= reach[letter] for letter in letters for q in range(64) for k in range(64))
    counted = count_parameters(model)
    attention = flops_per_token(model) - 6 * (counted.matrices + counted.head)
    assert attention == 12 * 384 * pairs // 64


def test_horizon_is_iterations_then_flops_then_tokens():
    flops = flops_per_token(D20) * 524_288
    assert training_length(PretrainConfig(num_iterations=7, target_flops=1e18), D20) == 7
    assert training_length(PretrainConfig(target_flops=100.4 * flops), D20) == 100
    assert training_length(PretrainConfig(tokens_per_param=10), D20) == 10_700
    assert training_length(PretrainConfig(target_flops=1.0), D20) == 1


def test_batch_plan_of_the_speedrun_on_eight_devices_and_on_one():
    assert split_batch(524_288, 32, 2048, 8) == BatchPlan(device_rows=32, rows=256, accumulation=1)
    assert split_batch(524_288, 32, 2048, 1) == BatchPlan(device_rows=32, rows=32, accumulation=8)


def test_a_small_batch_takes_fewer_rows_a_device():
    assert split_batch(4096, 32, 128, 1) == BatchPlan(device_rows=32, rows=32, accumulation=1)
    assert split_batch(4096, 32, 128, 8) == BatchPlan(device_rows=4, rows=32, accumulation=1)


@pytest.mark.parametrize(
    "arguments, says",
    [
        ((500_000, 32, 2048, 1), "nearest that work: batch-tokens 458752 or 524288"),
        ((524_288, 24, 2048, 1), "batch-tokens 491520 or 540672, or device-rows 16 or 32"),
        ((1100, 4, 512, 1), "nearest that work: batch-tokens 1024 or 1536"),
        ((100, 1, 512, 2), "nearest that work: batch-tokens 1024"),
    ],
)
def test_a_batch_that_does_not_divide_is_refused_with_what_does(arguments, says):
    with pytest.raises(UserError, match=re.escape(says) + "$"):
        split_batch(*arguments)


@given(
    batch=st.integers(1, 1 << 16),
    device_rows=st.integers(1, 64),
    sequence_len=st.sampled_from([2, 3, 64, 128]),
    devices=st.sampled_from([1, 2, 3, 8]),
)
def test_plans_are_exact_and_suggestions_work(batch, device_rows, sequence_len, devices):
    try:
        plan = split_batch(batch, device_rows, sequence_len, devices)
    except UserError as error:
        remedies = str(error).split("nearest that work: ")[1]
        batches, _, rows = remedies.partition(", or ")
        for value in map(int, re.findall(r"\d+", batches)):
            split_batch(value, device_rows, sequence_len, devices)
        for value in map(int, re.findall(r"\d+", rows)):
            split_batch(batch, value, sequence_len, devices)
    else:
        assert plan.rows == plan.device_rows * devices and plan.accumulation >= 1
        assert plan.accumulation * plan.rows * sequence_len == batch


def test_auto_has_all_divisors_of_a_devices_rows_the_most_first():
    plans = batch_plans(12 * 2 * 64, "auto", 64, 2)
    assert [plan.device_rows for plan in plans] == [12, 6, 4, 3, 2, 1]
    assert plans[0] == BatchPlan(device_rows=12, rows=24, accumulation=1)
    assert all(plan.rows * plan.accumulation == 24 and plan.rows == 2 * plan.device_rows for plan in plans)
    assert batch_plans(524_288, 32, 2048, 1) == (split_batch(524_288, 32, 2048, 1),)


@pytest.mark.parametrize("batch, nearest", [(1000, "768 or 1024"), (100, "256")])
def test_a_batch_that_no_number_of_rows_divides_is_refused_with_what_does(batch, nearest):
    with pytest.raises(UserError, match=rf"multiple of 256 \(2 .* sequence-len 128\).* work: batch-tokens {nearest}$"):
        batch_plans(batch, "auto", 128, 2)


@given(batch=st.integers(1, 1 << 16), device_rows=st.integers(1, 64))
def test_no_nearer_batch_would_do(batch, device_rows):
    fits = [n * 128 for n in range(1, device_rows)] + [n * device_rows * 128 for n in range(1, 1 << 10)]
    assume(batch not in fits)
    with pytest.raises(UserError) as error:
        split_batch(batch, device_rows, 64, 2)
    batches = re.search(r"work: batch-tokens ([\d or]+)", str(error.value)).group(1)
    nearest = min(abs(int(n) - batch) for n in batches.split(" or "))
    assert nearest == min(abs(n - batch) for n in fits)


def test_hours_and_cost():
    speedrun = flops_per_token(D20) * 524_288 * 21_400
    assert speedrun == pytest.approx(3.917670e19, rel=1e-6)
    node = CostConfig(devices=8, dollars_per_device_hour=3.0, expected_mfu=0.5)
    assert node.hours(speedrun, 1e15) == pytest.approx(3.91767e19 / 0.5 / 8e15 / 3600, rel=1e-6)
    assert CostConfig(devices=2, expected_mfu=0.5).hours(3600e12, 1e12) == 1.0
    assert node.dollars(2.5) == 60.0 and node.dollars(2.5, devices=2) == 15.0
