"""CORE against its definition in NumPy, item by item, and what becomes of the decisions."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxchat.config import MeshConfig
from jaxchat.devices.mesh import make_mesh
from jaxchat.errors import UserError
from jaxchat.eval.core import evaluate, evaluate_core, load_bundle
from jaxchat.eval.statistics import wilson_interval
from jaxchat.model.parameters import shardings
from jaxchat.ops.compute import Compute
from tests.eval.core.by_definition import decisions


@pytest.fixture(scope="module")
def bundle(bundle_folder):
    return load_bundle(bundle_folder)


def kept_lines(folder, label):
    return [json.loads(line) for line in (folder / f"{label}.jsonl").read_text(encoding="utf-8").splitlines()]


def assert_as_defined(lines, expected, task):
    assert [line["index"] for line in lines] == list(range(len(expected)))
    assert [line["line"] - 1 for line in lines] == [place for place, _, _ in expected]
    assert [line["right"] for line in lines] == [right for _, right, _ in expected]
    for line, (_, _, scores) in zip(lines, expected, strict=True):
        given = [math.nan if score is None else score for score in line["scores"]]
        np.testing.assert_allclose(given, scores, atol=2e-5, rtol=2e-5, err_msg=f"{task} {line}")


def by_definition(config, params, tokenizer, task, limit=None):
    return decisions(config, params, tokenizer, task.kind, task.shots, task.delimiter, task.items, limit)


@pytest.fixture(scope="module")
def whole(config, params, tokenizer, bundle, tmp_path_factory):
    folder = tmp_path_factory.mktemp("kept")
    return folder, evaluate_core(config, params, tokenizer, bundle, keep=folder)


def test_every_item_is_decided_as_defined(config, params, tokenizer, bundle, whole):
    folder, result = whole
    for task in bundle.tasks:
        expected = by_definition(config, params, tokenizer, task)
        lines = kept_lines(folder, task.label)
        assert_as_defined(lines, expected, task.label)
        accuracy = np.mean([right for _, right, _ in expected])
        score = result.tasks[task.label]
        assert score.accuracy == pytest.approx(accuracy) and score.count == len(expected)
        assert (score.low, score.high) == wilson_interval(score.accuracy, score.count)
    # The items are such that they tell the cases apart.
    empty = [line for label in ("copa", "winograd") for line in kept_lines(folder, label) if None in line["scores"]]
    assert {line["scores"].index(None) for line in empty} >= {0, 1}
    longest = max(len(tokenizer.encode(choice)) for choice in bundle.tasks[0].items[6]["choices"])
    assert longest > config.sequence_len
