"""The scheduler with devices that note which text each place of each page holds, and what rows read there."""

import random
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxchat.infer.pages import PagePool
from jaxchat.infer.scheduler import FEW, WAITS, Budget, Row, Scheduler

PAGE, STEPS, STOP, PAUSE, WORDS = 4, 3, 0, 1, 12


def next_token(text, key):
    return random.Random(repr((text, key))).randrange(WORDS)


def answer_of(prompt, limit, key, tool):
    """What a row must write, whatever its company: the tool's answer follows each `PAUSE`."""
    text = list(prompt)
    while len(text) < len(prompt) + limit:
        text.append(next_token(text, key))
        if text[-1] == STOP:
            break
        if text[-1] == PAUSE and tool:
            text.extend(tool)
    return text[len(prompt) :][:limit]


class Devices:
    """Does what a plan says, in its order."""

    def __init__(self, shards, pages, slots):
        self.held = [[[None] * PAGE for _ in range(pages)] for _ in range(shards)]
        self.rows = [[None] * slots for _ in range(shards)]
        self.states = [[None] * slots for _ in range(shards)]

    def write(self, row, at, text):
        self.held[row.shard][row.pages[at // PAGE]][at % PAGE] = tuple(text[: at + 1])

    def check(self, row, text):
        for at in range(len(text)):
            assert self.held[row.shard][row.pages[at // PAGE]][at % PAGE] == tuple(text[: at + 1])

    def run(self, plan):
        for row, start, count in plan.chunks:
            for at in range(start, start + count):
                self.write(row, at, row.tokens)
        for row, start, count in plan.chunks:
            self.check(row, row.tokens[: start + count])
            if start + count == len(row.tokens):
                self.states[row.shard][row.slot] = list(row.tokens)
        copied = [list(self.held[shard][source]) for shard, source, _ in plan.copies]
        for (shard, _, target), content in zip(plan.copies, copied, strict=True):
            self.held[shard][target] = content
        begun = [(row, 1, self.begin(row)) for rows in plan.begun for row in rows]
        return begun + [(row, STEPS, self.decode(row)) for rows in plan.lanes for row in rows]

    def begin(self, row):
        assert self.states[row.shard][row.source] == row.tokens
        self.rows[row.shard][row.slot] = {"text": list(row.tokens), "runs": True, "written": row.written}
        return self.draw(row, 1)

    def decode(self, row):
        row.ahead += STEPS
        return self.draw(row, STEPS)

    def draw(self, row, steps):
        state, new = self.rows[row.shard][row.slot], []
        for _ in range(steps):
            if state["runs"]:
                text = state["text"]
                if steps > 1:
                    self.write(row, len(text) - 1, text)
                self.check(row, text)
                new.append(next_token(text, row.owner["key"]))
                text.append(new[-1])
                state["written"] += 1
                ends = new[-1] == STOP or state["written"] >= row.limit
                state["runs"] = not ends and not (new[-1] == PAUSE and row.owner["tool"])
        return new


def new_scheduler(shards=1, pages=24, slots=4, **budget):
    budget = Budget(**{"chunk": 3, "idle": 6, "busy": 2, "scored": 1, "sizes": (1, 2, 6)} | budget)
    return Scheduler([PagePool(pages, PAGE) for _ in range(shards)], slots, budget)


def serve(scheduler, devices, arrivals, chance, lookahead):
    """Serves rows that arrive over time, until all have ended; some are cancelled. Returns those that were not."""
    results, finished, alive, slow = deque(), [], [], []

    def end(row, done):
        scheduler.leave(row)
        alive.remove(row)
        if done:
            finished.append(row)

    while arrivals or alive:
        for _ in range(chance.randrange(4)):
            if arrivals:
                scheduler.add(arrivals[0])
                alive.append(arrivals.pop(0))
        if alive and chance.random() < 0.05:
            end(chance.choice(alive), False)
        for row in [row for row in slow if chance.random() < 0.5]:
            slow.remove(row)
            if row in alive:
                scheduler.resume(row, row.owner["tool"][: row.limit - row.written])
                if row.written >= row.limit:
                    end(row, True)
        plan = scheduler.plan()
        results.append(devices.run(plan))
        while len(results) > (lookahead if any(plan.lanes) or any(plan.begun) else 0):
            for row, steps, tokens in results.popleft():
                row.ahead -= steps
                for token in tokens:
                    if row not in alive:
                        break
                    scheduler.wrote(row, token)
                    if token == STOP or row.written >= row.limit:
                        end(row, True)
                    elif token == PAUSE and row.owner["tool"]:
                        scheduler.pause(row)
                        slow.append(row)
    return finished


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), shards=st.integers(1, 3), lookahead=st.integers(0, 1))
def test_every_row_reads_its_own_text_and_no_page_is_lost(seed, shards, lookahead):
    chance = random.Random(seed)
    beginnings = [[chance.randrange(2, WORDS) for _ in range(chance.randrange(1, 20))] for _ in range(3)]
    rows = []
    for _ in range(25):
        prompt = [*chance.choice(beginnings), *(chance.randrange(2, 5) for _ in range(chance.randrange(6)))]
        tool = [chance.randrange(2, WORDS) for _ in range(chance.randrange(9))] if chance.random() < 0.5 else []
        owner = {"key": chance.randrange(3), "tool": tool}
        if rows and chance.random() < 0.3:  # a sample of the same prompt
            prompt = rows[-1].tokens[: rows[-1].prompt]
        scored = chance.random() < 0.2
        rows.append(Row(prompt[:], len(prompt), chance.randrange(1, 20), scored=scored, pauses=bool(tool), owner=owner))
    scheduler = new_scheduler(shards)
    finished = serve(scheduler, Devices(shards, 24, 4), list(rows), chance, lookahead)
    for row in finished:
        expected = answer_of(row.tokens[: row.prompt], row.limit, row.owner["key"], row.owner["tool"])
        assert row.tokens[row.prompt :] == expected
    assert len(finished) > 10
    assert scheduler.running == 0 and not scheduler.waiting and scheduler.usage == 0
    assert all(pool.available == pool.count for pool in scheduler.pools) and not scheduler._replaced


def add(scheduler, *prompts, limit=4, **options):
    rows = [Row(list(prompt), len(prompt), limit, **options) for prompt in prompts]
    for row in rows:
        scheduler.add(row)
    return rows


@pytest.mark.parametrize(("length", "copies"), [(10, 3), (12, 0)])
def test_samples_of_one_prompt_read_it_once(length, copies):
    scheduler = new_scheduler(idle=12)
    rows = add(scheduler, *[range(2, 2 + length)] * 4, limit=2)
    plan = scheduler.plan()
    assert sum(chunk.count for chunk in plan.chunks) == length and plan.begun == [rows[:1]] and plan.lanes == [[]]
    plan = scheduler.plan()  # while the device reads
    assert not plan.chunks and plan.begun == [rows[1:]] and len(plan.copies) == copies
    assert {row.source for row in rows} == {rows[0].slot}
    assert {tuple(row.pages[: length // PAGE]) for row in rows} == {tuple(rows[0].pages[: length // PAGE])}
    assert len({row.pages[length // PAGE] for row in rows}) == 4
    assert scheduler.plan().lanes == [rows]
    assert scheduler.hits == 3 * length and scheduler.queries == 4 * length


@pytest.mark.parametrize("change", ["none", "another reads", "the first leaves", "other parameters"])
def test_no_sample_begins_with_what_may_be_gone(change):
    scheduler = new_scheduler(chunk=4)
    (first,) = add(scheduler, range(2, 10))
    scheduler.plan()
    if change == "another reads":
        add(scheduler, [3, 3])
        scheduler.plan()
    elif change == "the first leaves":
        scheduler.leave(first)
    elif change == "other parameters":
        scheduler.forget_cached()
    (sample,) = add(scheduler, range(2, 10))
    plan = scheduler.plan()
    assert plan.begun == [[sample]]
    assert sample.source == (first.slot if change == "none" else sample.slot)
    read = {"none": 0, "other parameters": 8}.get(change, 4)
    assert sum(chunk.count for chunk in plan.chunks) == read


def test_running_rows_wait_for_first_tokens_only_for_some_turns():
    scheduler = new_scheduler(pages=64, slots=10)
    lanes = []
    for i in range(WAITS + 2):
        add(scheduler, [4, i], limit=40)
        lanes.append(len(scheduler.plan().lanes[0]))
        for row in scheduler.decoding[:-2]:
            scheduler.leave(row)
    assert lanes == [0] * (WAITS + 1) + [3]  # the first of them waits for nobody


def test_one_first_token_holds_up_only_a_few_rows():
    scheduler = new_scheduler(pages=64, slots=10)
    rows = add(scheduler, *([2, i] for i in range(FEW)), limit=9)
    scheduler.plan()
    (late,) = add(scheduler, [3, 3])
    plan = scheduler.plan()
    assert plan.begun == [[late]] and plan.lanes == [[*rows, late]]


def test_the_next_row_takes_the_place_of_one_whose_last_tokens_are_planned():
    for pauses in (False, True):
        scheduler = new_scheduler(slots=1)
        first, second = add(scheduler, [2, 3], [4, 5], limit=2)
        first.pauses = pauses
        scheduler.plan()
        assert scheduler.plan().lanes == [[first]]
        first.ahead += STEPS
        assert scheduler.plan().joined == ([] if pauses else [second])
        for token in (7, 8):
            scheduler.wrote(first, token)
        scheduler.leave(first)
        assert scheduler.running == (0 if pauses else 1)


def test_a_copy_comes_before_what_is_read_after_it():
    scheduler = new_scheduler(chunk=8)
    (first,) = add(scheduler, range(2, 9))
    scheduler.plan()
    (second,) = add(scheduler, [*range(2, 8), *[9] * 8])
    plan = scheduler.plan()
    assert [copy.source for copy in plan.copies] == [first.pages[1]] and not plan.chunks and second.cached == 6
    plan = scheduler.plan()
    assert [chunk[1:] for chunk in plan.chunks] == [(6, 8)] and not plan.copies


def test_long_prompts_are_read_in_parts_while_others_decode():
    scheduler = new_scheduler(pages=64)
    (talking,) = add(scheduler, [5, 6], limit=40)
    scheduler.plan()
    (reading,) = add(scheduler, range(2, 32))
    plans = [scheduler.plan() for _ in range(5)]
    assert [sum(chunk.count for chunk in plan.chunks) for plan in plans] == [6] * 5
    assert all(plan.lanes == [[talking]] for plan in plans[:-1])
    assert plans[-1].begun == [[reading]]


def test_requests_keep_their_order_and_run_to_their_end():
    """The second needs all pages, the third only one: it does not overtake."""
    scheduler = new_scheduler(pages=4)
    first, second, third = add(scheduler, [2], [3], [4], limit=9)
    second.limit = 16
    plan = scheduler.plan()
    assert plan.joined == [first]
    scheduler.leave(first)
    assert scheduler.plan().joined == [second]
    scheduler.leave(second)
    assert scheduler.plan().joined == [third]


def test_a_prompt_with_scores_is_read_whole():
    scheduler = new_scheduler()
    add(scheduler, range(2, 12))
    scheduler.plan()
    add(scheduler, range(2, 12), scored=True)
    read = 0
    for _ in range(5):
        plan = scheduler.plan()
        assert plan.scored == bool(plan.chunks) and len(plan.chunks) <= 1
        read += sum(chunk.count for chunk in plan.chunks)
    assert read == 10


@pytest.mark.parametrize("shards", [2, 3])
def test_rows_spread_over_the_shards(shards):
    scheduler = new_scheduler(shards)
    rows = add(scheduler, *[[2, 3, 4]] * 2 * shards)
    scheduler.plan()  # one of each shard reads
    scheduler.plan()
    assert sorted(row.shard for row in rows) == sorted([*range(shards)] * 2)
