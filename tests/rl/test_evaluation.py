"""Validation during RL: which questions, what their answers say, and what is kept of them."""

from __future__ import annotations

import itertools
import json
import math
import zlib
from collections import Counter

import jax
import numpy as np
import pytest
from etils import epath
from hypothesis import given
from hypothesis import strategies as st

from jaxchat.config import RLConfig
from jaxchat.errors import UserError
from jaxchat.eval.statistics import wilson_interval
from jaxchat.infer.engine import Engine
from jaxchat.model.config import GPTConfig
from jaxchat.model.gpt import init_params
from jaxchat.rl.evaluation import SEED, Validation, describe, hold_out_questions, measures, spread_over_tasks
from jaxchat.rl.reward import OwnReward
from jaxchat.rl.rollouts import sampling, score
from jaxchat.tasks.base import ListTask, calculations_of, question_and_answer
from jaxchat.tokenizer import Tokenizer

MODEL = GPTConfig(depth=1, sequence_len=32, vocab_size=265)
CONFIG, TEXTS = RLConfig(max_new_tokens=5, pass_k=3), ("go", "say", "well", "and?", "now?")


class Even(ListTask):
    """Right by a checksum of the answer, which a model without training hits now and then."""

    def score(self, conversation, completion, *, cut=False):
        return float(zlib.crc32(completion.encode()) % 2 == 0)


def questions(name, texts):
    task = Even(name, [question_and_answer(text, "a") for text in texts])
    return [(task, conversation) for conversation in task]


def texts_of(found):
    return [(task.name, conversation["messages"][0]["content"]) for task, conversation in found]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer([bytes([i]) for i in range(256)])


@pytest.fixture(scope="module")
def engines(tokenizer):
    """Of two models, without the zeros that a training begins with."""
    leaves, tree = jax.tree.flatten(jax.jit(init_params, static_argnums=0)(MODEL, jax.random.key(1)))
    models = []
    for seed in (2, 3):
        draw = np.random.default_rng(seed)
        moved = [leaf + 0.1 * draw.standard_normal(leaf.shape, np.float32) for leaf in leaves]
        models.append(Engine(MODEL, jax.tree.unflatten(tree, moved), tokenizer, dtype="float32"))
    return models


class TestHeldOut:
    def test_a_validation_split_is_used_as_it_is(self):
        training, validation = questions("sums", "abc"), questions("sums", "de")
        assert hold_out_questions(training, validation) == (training, validation)

    def test_a_task_without_one_gives_every_20th(self):
        training = [*questions("sums", "abc"), *questions("letters", map(str, range(60)))]
        kept, held_out = hold_out_questions(training, questions("sums", "d"))
        assert texts_of(held_out) == [("sums", "d"), ("letters", "19"), ("letters", "39"), ("letters", "59")]
        assert len(kept) == 60 and not set(texts_of(kept)) & set(texts_of(held_out))

    def test_what_is_asked_twice_is_on_one_side(self):
        """As with a task that is named twice, or a file with a question twice."""
        training = questions("letters", [str(i % 30) for i in range(60)])
        kept, held_out = hold_out_questions(training, [])
        assert texts_of(held_out) == [("letters", "19")] and len(kept) == 58
        kept, held_out = hold_out_questions(questions("sums", "abca"), questions("sums", "cde"))
        assert len(kept) == 4 and texts_of(held_out) == [("sums", "d"), ("sums", "e")]

    def test_one_question_is_for_training(self):
        kept, held_out = hold_out_questions(questions("sums", "a"), [])
        assert len(kept) == 1 and held_out == []

    @given(st.lists(st.integers(1, 30), min_size=1, max_size=5), st.integers(1, 80))
    def test_tasks_share_an_evaluation_evenly(self, sizes, most):
        asked = [question for i, size in enumerate(sizes) for question in questions(f"task{i}", map(str, range(size)))]
        chosen = spread_over_tasks(asked, most)
        counts = Counter(task.name for task, _ in chosen)
        assert len(chosen) == min(most, sum(sizes)) and len(set(texts_of(chosen))) == len(chosen)
        for i, j in itertools.permutations(range(len(sizes)), 2):  # who has fewer than another has given all
            fewer, more = counts[f"task{i}"], counts[f"task{j}"]
            assert fewer >= more - 1 or fewer == sizes[i]
        assert chosen == spread_over_tasks(asked, most)


def answer(task, question, score, samples, calculations=1):
    return {"task": task, "question": question, "score": score, "calculations": calculations,
            "samples": [{"score": sample} for sample in samples]}  # fmt: skip


class TestMeasures:
    def test_by_task_and_calculations(self):
        answers = [
            answer("sums", "a", 1.0, [1, 0, 0, 0]),
            answer("sums", "b", 0.0, [0, 0, 0, 0]),
            answer("stories", "a", 1.0, [1, 1, 0, 1], 1),
            answer("stories", "b", 0.0, [0, 1, 0, 0], 3),
        ]
        found = measures(answers)
        shown = {name: found[name] for name in found if "_low" not in name and "_high" not in name}
        assert shown == {
            "asked": 4, "greedy": 0.5, "pass_1": 5 / 16, "pass_4": 0.75,
            "asked/sums": 2, "greedy/sums": 0.5, "pass_1/sums": 0.125, "pass_4/sums": 0.5,
            "asked/stories": 2, "greedy/stories": 0.5, "pass_1/stories": 0.5, "pass_4/stories": 1.0,
            "asked/stories/1": 1, "greedy/stories/1": 1.0, "pass_1/stories/1": 0.75, "pass_4/stories/1": 1.0,
            "asked/stories/3": 1, "greedy/stories/3": 0.0, "pass_1/stories/3": 0.25, "pass_4/stories/3": 1.0,
        }  # fmt: skip
        assert (found["greedy_low"], found["greedy_high"]) == wilson_interval(0.5, 4)
        for name in shown:
            if not name.startswith("asked"):
                measure, _, part = name.partition("/")
                part = f"/{part}" if part else ""
                assert found[f"{measure}_low{part}"] <= found[name] <= found[f"{measure}_high{part}"]

    def test_the_change_is_of_the_same_questions(self):
        rng = np.random.default_rng(0)
        old, new = (rng.integers(0, 2, (50, 9)) for _ in range(2))
        before = [answer("sums", str(i), float(row[0]), row[1:].tolist()) for i, row in enumerate(old)]
        after = [answer("sums", str(i), float(row[0]), row[1:].tolist()) for i, row in enumerate(new)]
        others = [answer("sums", "new", 1.0, [1] * 8), answer("letters", "3", 1.0, [1] * 8)]
        found = measures([*others, *after[::-1]], before)
        moved = new[:, 0] - old[:, 0]
        assert (found["greedy_gained"], found["greedy_lost"]) == (np.sum(moved > 0), np.sum(moved < 0))
        assert found["greedy_z"] == pytest.approx(moved.sum() / np.sqrt((moved**2).sum()))
        rates = new[:, 1:].mean(1) - old[:, 1:].mean(1)
        assert found["pass_1_z"] == found["pass_1_z/sums"] == pytest.approx(rates.sum() / np.sqrt((rates**2).sum()))
        assert found["asked"] == 52 and "greedy_z/letters" not in found
        with_fewer = measures(after, [{**line, "samples": line["samples"][:2]} for line in before])
        assert "pass_1_z" in with_fewer and "pass_8_z" not in with_fewer

    def test_in_a_line(self):
        before = [answer("sums", str(i), float(i > 6), [0, 1]) for i in range(10)]
        after = [answer("sums", str(i), float(i > 1), [1, 1]) for i in range(10)]
        assert describe(measures(before)) == (
            "greedy 30.0% (10.8 to 60.3) of 10, pass@1 50.0% (29.9 to 70.1), pass@2 100.0% (72.2 to 100.0)"
        )
        assert describe(measures(after, before)).endswith("; since step 0 5 wrong to right, 0 right to wrong, z 2.2")

    def test_calculations_are_calls_of_the_calculator(self):
        parts = [{"type": kind, "text": "4"} for kind in ("python", "python_output", "text")]
        assert calculations_of(question_and_answer("?", [*parts, *parts])) == 2
        assert calculations_of(question_and_answer("?", "4")) == 0


class Own(OwnReward):
    """Rewards by length; the first answer has none."""

    def score(self, calls):
        return [math.nan, *(float(len(text)) for _, text, _ in calls[1:])]


class TestValidation:
    def test_answers_are_kept_and_compared_with_those_before(self, tokenizer, engines, tmp_path):
        config, asked, folder = CONFIG, questions("even", TEXTS), epath.Path(tmp_path / "validation")
        calls = []
        values = Validation(config, asked, tokenizer, folder).measure(0, engines[0], lambda *call: calls.append(call))
        assert calls[-1] == (20, 20) and calls == sorted(calls)
        lines = [json.loads(line) for line in (folder / "0.jsonl").read_text().splitlines()]
        prompts = [tokenizer.render_for_completion(conversation) for _, conversation in asked]
        greedy = engines[0].generate(prompts, max_new_tokens=5, temperature=0.0)
        sampled = engines[0].generate([p for p in prompts for _ in range(3)], **sampling(config), seed=SEED)
        assert [line["answer"] for line in lines] == [tokenizer.decode(c.tokens) for c in greedy]
        assert [line["score"] for line in lines] == score(asked, greedy, tokenizer)
        given = [sample for line in lines for sample in line["samples"]]
        assert [sample["answer"] for sample in given] == [tokenizer.decode(c.tokens) for c in sampled]
        assert [sample["cut"] for sample in given] == [not c.finished for c in sampled]
        assert [(line["task"], line["question"], line["right"]) for line in lines] == [
            ("even", text, "a") for text in TEXTS
        ]
        rewards = [sample["score"] for sample in given]
        assert values == {"reward_eval": pytest.approx(np.mean(rewards)), **measures(lines)}
        assert values["pass_1"] == pytest.approx(values["reward_eval"])

        later = Validation(config, asked, tokenizer, folder)  # as after a resume
        values = later.measure(4, engines[1])
        now = [json.loads(line) for line in (folder / "4.jsonl").read_text().splitlines()]
        assert {name: values[name] for name in measures(now, lines)} == measures(now, lines)
        assert values["greedy_gained"] + values["greedy_lost"] > 0
        (folder / "0.jsonl").unlink()
        assert "greedy_z" not in later.measure(4, engines[1])

    def test_an_own_reward_stands_beside_the_tasks_scores(self, tokenizer, engines, tmp_path):
        folder, own = epath.Path(tmp_path), Own("mine:reward", print)
        values = Validation(CONFIG, questions("even", TEXTS), tokenizer, folder, own).measure(0, engines[0])
        given = [s for line in (folder / "0.jsonl").read_text().splitlines() for s in json.loads(line)["samples"]]
        assert [sample["reward"] for sample in given] == [None, *(len(s["answer"]) for s in given[1:])]
        assert values["reward_eval"] == pytest.approx(np.mean([sample["reward"] for sample in given[1:]]))
        mean = pytest.approx(np.mean([sample["score"] for sample in given]))
        assert values["score_eval"] == mean and values["pass_1"] == mean

    def test_a_folder_in_the_way_is_named(self, tokenizer, engines, tmp_path):
        (tmp_path / "0.jsonl").mkdir()
        validation = Validation(CONFIG, questions("even", TEXTS), tokenizer, epath.Path(tmp_path))
        with pytest.raises(UserError, match=r"0\.jsonl is in the way"):
            validation.measure(0, engines[0])
