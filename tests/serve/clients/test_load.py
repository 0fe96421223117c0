"""The load and the fuzzing of benchmarks/serving, short; and that they notice what is wrong."""

import asyncio
import json
import random

import pytest

from benchmarks.serving import fuzz, load
from benchmarks.serving.http1 import Reply, fault_of_error
from benchmarks.serving.questions import CHAT, Answer, Sample, Stream, questions
from benchmarks.serving.rubbish import KINDS
from benchmarks.serving.schemas import COMPLETIONS, Call


def test_nothing_is_lost_or_mixed_up(server):
    tally, figures = asyncio.run(load.measure(server, clients=16, rubbish=4, seconds=6, chance=random.Random(1)))
    assert not tally.faults
    assert figures["answers"] > 16 and figures["left halfway"] > 0 and len(figures["rubbish"]) > len(KINDS) // 2
    assert figures["milliseconds"]["to the first token"]["p50"] > 0 and figures["tokens a second"] > 0
    assert "16 clients" in load.table(figures)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_each_kind_of_rubbish(server, kind):
    assert asyncio.run(KINDS[kind](server.address, random.Random(kind))) is None


def test_questions_are_all_different():
    asked = questions("m")
    assert len({question.body for question in asked}) == len(asked) > 64


def test_faults_of_an_answer_are_noticed():
    right = Answer((Sample("It is 92.", "stop", ("It", " is", " 92."), (-0.1, -0.2, -0.3)),))

    def fault(sample, **more):
        return Stream(samples={0: sample}, **more).fault(right)

    assert fault(right.samples[0]) is None
    assert fault(Sample("It is", None, ("It", " is"), (-0.1, -0.2)), left=True) is None
    assert fault(Sample("It is", None, ("It", " is"), (-0.1, -0.2)))
    assert fault(Sample("It was", None, ("It",), (-0.1,)), left=True)
    assert fault(right.samples[0]._replace(text="It is 93."))
    assert fault(right.samples[0]._replace(finish="length"))
    assert fault(right.samples[0]._replace(logprobs=(-0.1, -0.2, -0.4)))
    assert Stream().fault(right) and Stream(samples={0: right.samples[0], 1: right.samples[0]}).fault(right)


def test_fuzzing_finds_nothing(server):
    figures = fuzz.fuzz(server, seconds=8, first_seed=2)
    assert not figures["failures"]
    assert figures["requests"] > 50 and figures["by path and status"][CHAT]["200"] > 0
    assert "0 failures" in fuzz.table(figures)


def reply(value, status=200):
    return Reply(status, {"content-type": "application/json"}, json.dumps(value).encode())


def test_fuzzing_notices_what_is_wrong():
    sent = {"prompt": "a", "n": 2, "max_tokens": 3}
    call = Call("POST", COMPLETIONS, b"", (), sent)
    choices = [{"index": i, "text": "b", "logprobs": None, "finish_reason": "stop"} for i in range(2)]
    right = {"choices": choices, "usage": {"prompt_tokens": 1, "completion_tokens": 4, "total_tokens": 5}}
    assert fuzz.fault_of(call, reply(right)) is None
    for wrong in (
        {**right, "choices": choices[:1]},
        {**right, "choices": [choices[0], {**choices[1], "finish_reason": None}]},
        {**right, "choices": [choices[0], {**choices[1], "text": 1}]},
        {**right, "usage": {"prompt_tokens": 1, "completion_tokens": 4, "total_tokens": 6}},
        {**right, "usage": {"prompt_tokens": 1, "completion_tokens": 7, "total_tokens": 8}},
        {"choices": choices, "value": float("nan")},
        {},
    ):
        assert fuzz.fault_of(call, reply(wrong)), wrong
    assert fuzz.fault_of(call, reply(right, 500)) and fuzz.fault_of(call, reply({"detail": "x"}, 400))
    error = {"error": {"message": "no", "type": "invalid_request_error", "param": None, "code": None}}
    assert fault_of_error(reply(error, 400)) is None
    assert fault_of_error(reply({"error": {**error["error"], "message": "two\nlines"}}, 400))
