"""One turn of the engine: plan, call the programs, read a result, and decide what follows for every row."""

from __future__ import annotations

import traceback
from collections import deque
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array

from jaxchat.infer.answers import Answer
from jaxchat.infer.request import MOST_ALTERNATIVES, NewToken, NoOutput, Tool
from jaxchat.infer.runner import STEPS, Runner
from jaxchat.infer.scheduler import Chunk, Row, Scheduler
from jaxchat.infer.settings import Level, joint_level, needs_seen
from jaxchat.tools.calculator import calculate
from jaxchat.tools.python import given_up

TOOL_WAIT = 0.02  # seconds that a turn waits for a tool, if there is nothing else to do


class _Call(NamedTuple):
    """A program's result that the host has not read: of `begin` or `decode` with lanes, else of `read`."""

    result: Array
    lanes: list[list[Row]]
    steps: int
    chunks: list[Chunk]


class Turns:
    """The requests in flight, as long as there is a cache.

    Attributes:
      answers: of the requests in flight, by their numbers.
      changed: answers with something that no step has given back yet.
    """

    def __init__(self, runner: Runner, scheduler: Scheduler):
        self.runner, self.scheduler = runner, scheduler
        self.answers: dict[int, Answer] = {}
        self.changed: dict[int, Answer] = {}
        # The host of a GPU prepares the next call while this one runs; on a CPU both would want the same cores.
        self.lookahead = 0 if runner.on_cpu else 1
        self._calls: deque[_Call] = deque()
        self._tools: dict[Future, Answer] = {}
        self._threads: ThreadPoolExecutor | None = None

    def add(self, answer: Answer) -> None:
        """Puts a request at the end of the queue."""
        self.answers[answer.number] = answer
        self.scheduler.add(answer.row)

    def leave(self, answer: Answer) -> None:
        """Takes out a request whose answer has ended."""
        self.scheduler.leave(answer.row)
        del self.answers[answer.number]
        self.changed[answer.number] = answer

    def turn(self) -> bool:
        """One turn; returns False if there was nothing to do but to wait for tools."""
        runner, scheduler = self.runner, self.scheduler
        self._collect_tools()
        plan = scheduler.plan()
        for row in plan.joined:
            runner.join(row, row.owner.stops, row.owner.pause)
        if plan.joined:
            runner.set_sampling(plan.joined, [row.owner.request.sampling for row in plan.joined])
        if plan.chunks:
            scores = runner.read(plan.chunks, plan.scored)
            if scores is not None:
                self._calls.append(_Call(scores, [], 0, plan.chunks))
        if plan.copies:
            runner.copy(plan.copies)
        if any(plan.begun):
            self._begin(runner, plan.begun)
        decodes = any(plan.lanes)
        if decodes:
            self._calls.append(_Call(runner.decode(plan.lanes, _level(plan.lanes)), plan.lanes, STEPS, []))
        idle = not (decodes or plan.chunks or plan.copies or self._calls)
        if idle and self._tools:
            wait(self._tools, TOOL_WAIT, FIRST_COMPLETED)
            return self._collect_tools()
        # First tokens are taken at once, unless there are prompts to be read meanwhile.
        at_once = not decodes and not (any(plan.begun) and (scheduler.reading or scheduler.waiting))
        while len(self._calls) > (0 if at_once else self.lookahead):
            self._take(runner, self._calls.popleft())
        return True

    def _begin(self, runner: Runner, lanes: list[list[Row]]) -> None:
        for row in (row for rows in lanes for row in rows):
            if needs_seen(row.owner.request.sampling):
                runner.set_seen(row)
        self._calls.append(_Call(runner.begin(lanes, _level(lanes)), lanes, 1, []))

    def _take(self, runner: Runner, call: _Call) -> None:
        """Reads a result, and gives every request its tokens."""
        result = np.asarray(call.result)
        for chunk, scores in runner.chunk_rows(call.chunks, result) if call.chunks else ():
            answer: Answer = chunk.row.owner
            if chunk.row.scored and answer.finish is None:
                wanted = answer.request.logprobs or 0
                answer.scores += _tokens(scores, wanted, sampled=False)
                self.changed[answer.number] = answer
        for row, written in runner.lane_rows(call.lanes, result) if call.lanes else ():
            row.ahead -= call.steps
            answer = row.owner
            for token in _tokens(written, answer.request.logprobs):
                if answer.finish is not None:
                    break
                self._wrote(answer, token)

    def _wrote(self, answer: Answer, token: NewToken) -> None:
        """Gives a row a token that it has drawn, and decides what follows."""
        scheduler, tool = self.scheduler, answer.request.tool
        scheduler.wrote(answer.row, token.id)
        self.changed[answer.number] = answer
        answer.add(token)
        if answer.finish is not None:
            self.leave(answer)
        elif tool is not None:
            call = answer.call(token.id)
            if token.id == answer.pause:  # here the device has paused the row
                scheduler.pause(answer.row)
                if call is None:
                    scheduler.resume(answer.row, [])
                # The calculator is fast, and several processes have to go on with its answer at the same point.
                elif tool is calculate or answer.request.instant or jax.process_count() > 1:
                    self._resume(answer, _output_of(tool, call, answer))
                else:
                    self._threads = self._threads or ThreadPoolExecutor(self.runner.slots, "tool")
                    self._tools[self._threads.submit(_output_of, tool, call, answer)] = answer

    def _collect_tools(self) -> bool:
        """Takes the results of tools that have ended; returns whether there were any."""
        done = [future for future in self._tools if future.done()]
        for future in done:
            answer = self._tools.pop(future)
            if answer.finish is None:
                self._resume(answer, future.result())
        return bool(done)

    def _resume(self, answer: Answer, value: str | NoOutput | None) -> None:
        """Forces in what a tool has answered."""
        tokens = answer.tool_tokens(value)
        self.scheduler.resume(answer.row, tokens)
        self.changed[answer.number] = answer
        for token in tokens:
            if answer.finish is None:
                answer.add(NewToken(token, sampled=False))
        if answer.finish is not None:
            self.leave(answer)


def _output_of(tool: Tool, call: str, answer: Answer) -> str | NoOutput | None:
    """What a tool answers to a call; None, with a traceback on stderr, if it fails: other requests go on.

    `run_code` stops its program once the answer has ended.
    """
    token = given_up.set(lambda: answer.finish is not None)
    try:
        return None if answer.finish is not None else tool(call)
    except Exception:
        traceback.print_exc()
        return None
    finally:
        given_up.reset(token)


def _level(lanes: list[list[Row]]) -> Level:
    return joint_level(row.owner.level for rows in lanes for row in rows)


def _tokens(details: np.ndarray, alternatives: int | None, sampled: bool = True) -> list[NewToken]:
    """Tokens as the programs give them, [N, 1 or more]: their ids and, if `alternatives` are wanted, what follows.

    An id of -1 is no token.
    """
    if alternatives is None:
        return [NewToken(id, sampled) for id in details[:, 0].tolist() if id >= 0]
    details = details[details[:, 0] >= 0]
    ids = details[:, 0].tolist()
    floats = np.ascontiguousarray(details).view(np.float32)
    own = floats[:, 1].tolist()
    best = details[:, 2 : 2 + alternatives].tolist()
    values = floats[:, 2 + MOST_ALTERNATIVES :][:, :alternatives].tolist()
    rows = zip(ids, own, best, values, strict=True)
    return [NewToken(id, sampled, mine, tuple(zip(others, theirs, strict=True))) for id, mine, others, theirs in rows]
