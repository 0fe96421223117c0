"""CORE against its definition in NumPy, item by item, and what becomes of the decisions."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxchat.config import MeshConfig
from jaxchat.devices.mesh import make_mesh
from jaxchat.errors import UserError
from jaxchat.eval.core import BASELINES, CoreResult, TaskScore, evaluate, evaluate_core, load_bundle
from jaxchat.eval.statistics import wilson_interval
from jaxchat.model.gpt import init_params
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


def test_a_limit_changes_the_items_and_their_examples(config, params, tokenizer, bundle, tmp_path):
    (task,) = bundle.only(["winogrande"]).tasks
    evaluate_core(config, params, tokenizer, bundle, max_per_task=3, tasks=["winogrande"], keep=tmp_path)
    expected = by_definition(config, params, tokenizer, task, limit=3)
    assert_as_defined(kept_lines(tmp_path, "winogrande"), expected, "winogrande")
    assert expected != by_definition(config, params, tokenizer, task)[:3]


def test_the_optional_parts_of_the_model_see_what_lies_on_the_page_before(config, tokenizer, bundle, tmp_path):
    config = dataclasses.replace(
        config, attention_scale=1.4, residual_scales=True, value_embeddings=True, smear=True, bigrams=True, backout=True
    )
    keys = iter(jax.random.split(jax.random.key(2), 100))
    params = jax.tree.map(
        lambda leaf: leaf + 0.1 * jax.random.normal(next(keys), leaf.shape), init_params(config, jax.random.key(0))
    )
    evaluate_core(config, params, tokenizer, bundle, tasks=["piqa", "jeopardy"], keep=tmp_path)
    for task in bundle.only(["piqa", "jeopardy"]).tasks:
        expected = by_definition(config, params, tokenizer, task)
        assert_as_defined(kept_lines(tmp_path, task.label), expected, task.label)


def test_devices_share_the_items(config, params, tokenizer, bundle, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "ROWS_ON_CPU", 8)
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2))
    placed = jax.device_put(params, shardings(mesh, params))
    result = evaluate_core(config, placed, tokenizer, bundle, compute=Compute(mesh=mesh), keep=tmp_path)
    assert result == whole[1]
    for label in result.tasks:
        for line, alone in zip(kept_lines(tmp_path, label), kept_lines(whole[0], label), strict=True):
            given, scores = (np.array(x.pop("scores"), float) for x in (line, alone))
            np.testing.assert_allclose(given, scores, atol=1e-5)
            assert line == alone
    # The decisions do not depend on the mesh: they go on from those of another one.
    calls = []
    again = evaluate_core(config, params, tokenizer, bundle, keep=tmp_path, progress=lambda *facts: calls.append(facts))
    assert again == result and calls == []


def test_bfloat16_moves_scores_by_its_rounding(config, params, tokenizer, bundle, whole, tmp_path):
    evaluate_core(config, params, tokenizer, bundle, compute=Compute(jnp.bfloat16), tasks=["copa"], keep=tmp_path)
    given, exact = ([line["scores"] for line in kept_lines(f, "copa")] for f in (tmp_path, whole[0]))
    given, exact = (np.concatenate([np.array(scores, float) for scores in x]) for x in (given, exact))
    np.testing.assert_allclose(given, exact, atol=0.1)
    assert not np.array_equal(given, exact, equal_nan=True)


class Stop(Exception):
    pass


def test_an_evaluation_goes_on_where_it_stopped(config, params, tokenizer, bundle, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "ROWS_ON_CPU", 8)
    calls = []

    def progress(done, total, label):
        calls.append((done, total, label))
        if len(calls) == 4:
            raise Stop

    with pytest.raises(Stop):
        evaluate_core(config, params, tokenizer, bundle, keep=tmp_path, progress=progress)
    there = {path.name: len(path.read_text().splitlines()) for path in tmp_path.glob("*.jsonl")}
    assert 0 < sum(there.values()) < sum(score.count for score in whole[1].tasks.values())
    # What is there is not computed again: a decision that nothing would make stays.
    path = tmp_path / "piqa.jsonl"
    first, *others = path.read_text(encoding="utf-8").splitlines(keepends=True)
    was = json.loads(first)["right"]
    path.write_text(json.dumps({**json.loads(first), "right": not was}) + "\n" + "".join(others), encoding="utf-8")
    result = evaluate_core(
        config, params, tokenizer, bundle, keep=tmp_path, progress=lambda *facts: calls.append(facts)
    )
    count = whole[1].tasks["piqa"].count
    moved = result.tasks["piqa"].accuracy - whole[1].tasks["piqa"].accuracy
    assert moved == pytest.approx((-1 if was else 1) / count)
    assert {**result.tasks, "piqa": None} == {**whole[1].tasks, "piqa": None}
    assert calls[0][0] == 0
    done, totals = [call[0] for call in calls], {call[1] for call in calls}
    assert done == sorted(done) and len(totals) == 1 and done[-1] == totals.pop()


def test_decisions_of_another_model_are_moved_aside(config, params, tokenizer, bundle, whole, tmp_path):
    evaluate_core(config, params, tokenizer, bundle, tasks=["copa"], keep=tmp_path)
    before = (tmp_path / "copa.jsonl").read_bytes()
    head = params["head"]["kernel"]
    other = {**params, "head": {"kernel": head[::-1]}}  # the same numbers, in other places
    evaluate_core(config, other, tokenizer, bundle, tasks=["copa", "winograd"], keep=tmp_path)
    assert (tmp_path / "copa.jsonl.old-1").read_bytes() == before != (tmp_path / "copa.jsonl").read_bytes()
    evaluate_core(config, other, tokenizer, bundle, tasks=["winograd"], keep=tmp_path)
    assert len(list(tmp_path.glob("*.old-*"))) == 1


def test_what_cannot_be_asked_is_refused(config, params, tokenizer, bundle, bundle_folder):
    def refusal(**options):
        with pytest.raises(UserError) as caught:
            evaluate_core(options.pop("config", config), params, tokenizer, bundle, **options)
        return str(caught.value)

    assert refusal(max_per_task=2) == (
        "piqa puts 2 other items before each as examples, and 2 items are too few for that; ask for at least 3"
    )
    assert refusal(tasks=["pica"]) == f"{bundle_folder} has no task 'pica', did you mean 'piqa'?"
    assert refusal(tasks=["squad"]) == (
        f"{bundle_folder} cannot be asked for squad: {bundle_folder}/core.yaml does not list it"
    )
    small = dataclasses.replace(config, vocab_size=270)
    assert refusal(config=small) == (
        "the tokenizer has 300 ids and the model 270: it is another model's; use the tokenizer that the model was "
        "trained with"
    )


def test_a_mean_over_some_tasks_has_another_name(whole):
    _, result = whole
    assert set(result.missing) == set(BASELINES) - set(result.tasks)
    centered = {
        label: (result.tasks[label].accuracy - chance) / (1 - chance)
        for label, chance in dict(
            piqa=0.5, copa=0.5, winograd=0.5, winogrande=0.5, jeopardy=0, lambada_openai=0
        ).items()
    }
    mean = pytest.approx(sum(centered.values()) / 6)
    assert result.scores() == {"centered_mean_v1_of_6": mean, "centered_mean_v2_of_6": mean}


def test_core_is_the_mean_over_all_22_tasks_by_both_baselines():
    tasks = {}
    for label, chances in BASELINES.items():
        centered = {f"core_v{v}": (0.25 - b / 100) / (1 - b / 100) for v, b in enumerate(chances, start=1)}
        tasks[label] = TaskScore(label, 0.25, 100, 0.2, 0.3, centered, 0)
    tasks["mine"] = TaskScore("mine", 1.0, 10, 0.7, 1.0, {}, 0)  # not one of CORE's
    scores = CoreResult(tasks, {}).scores()
    assert list(scores) == ["core_v1", "core_v2"]
    # Three tasks have other baselines: commonsense_qa 20 and 40.3, lsat_ar 20 and 25, language identification 9.1, 25.
    difference = (0.05 / 0.8 - (0.25 - 0.403) / 0.597) + 0.05 / 0.8 + (0.25 - 0.091) / 0.909
    assert scores["core_v1"] - scores["core_v2"] == pytest.approx(difference / 22)
    assert CoreResult({"mine": tasks["mine"]}, {}).scores() == {}
