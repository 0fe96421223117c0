"""A budget of time: what the user may write, how it is shared, and that simulated machines end when they should."""

import dataclasses
import random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxchat.config import STAGES, ScheduleConfig
from jaxchat.config.amount import parse_amount
from jaxchat.errors import UserError
from jaxchat.runs.time_budget import LEAST, PARTS, TimeBudget, read_record, resumed
from jaxchat.stages.question_count import FEWEST, find_count
from jaxchat.train.horizon import Horizon


class Clock:
    """A clock that goes only when it is told to."""

    def __init__(self):
        self.seconds = 1000.0

    def __call__(self):
        return self.seconds

    def go(self, seconds):
        self.seconds += seconds


def budget_of(seconds, stages=STAGES, **settings):
    clock = Clock()
    return TimeBudget(f"{seconds}s", seconds, list(stages), began=clock.seconds, now=clock, **settings), clock


# --- what the user writes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("15m", 900), ("2h", 7200), ("1h30m", 5400), ("90s", 90), ("1.5h", 5400), ("2d", 172_800), (" 15 MIN ", 900)],
)
def test_a_time(text, seconds):
    assert parse_amount(text).seconds_on(8, 0.0) == seconds


@pytest.mark.parametrize("text", ["10usd", "$10", "10$", "10 USD"])
def test_a_price_is_the_time_that_it_pays_for(text):
    assert parse_amount(text).seconds_on(8, 2.5) == 3600 * 10 / (8 * 2.5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("15", "give a unit: 15m, 15h or 15usd"),
        ("soon", "give a time or a price: 15m, 1h30m, 2h or 10usd"),
        ("-3m", "give a time or a price"),
        ("", "give a time or a price"),
        ("15m or so", "give a time or a price"),
        ("0h", "more than nothing"),
        ("0usd", "more than nothing"),
        ("400d", "at most a year"),
    ],
)
def test_what_is_no_budget(text, message):
    with pytest.raises(ValueError, match=message.replace("?", ".")):
        parse_amount(text)


def test_a_price_needs_the_price_of_a_device():
    with pytest.raises(UserError, match="dollars-per-device-hour is 0; give a time"):
        parse_amount("10usd").seconds_on(1, 0.0)


# --- how it is shared -------------------------------------------------------------------------------------------------


@given(st.floats(100, 1e6), st.sets(st.sampled_from(STAGES), min_size=1))
def test_the_stages_share_all_of_it(seconds, chosen):
    stages = [stage for stage in STAGES if stage in chosen]
    budget, _ = budget_of(seconds, stages)
    shares = [budget.planned(stage) for stage in stages]
    assert sum(shares) == pytest.approx(seconds) and min(shares) >= 0


def test_what_a_stage_saves_is_passed_on_to_all_that_follow():
    least = sum(LEAST.values())
    budget, clock = budget_of(1000.0 + least)
    before = {stage: budget.planned(stage) for stage in STAGES}
    budget.begin("tokenizer")
    assert budget.left_of("tokenizer") == pytest.approx(
        LEAST["tokenizer"] + 1000 * PARTS["tokenizer"] / sum(PARTS.values())
    )
    clock.go(5.0)
    budget.end("tokenizer")
    saved = before["tokenizer"] - 5
    rest = sum(PARTS.values()) - PARTS["tokenizer"]
    assert budget.share("pretrain") == pytest.approx(before["pretrain"] + saved * PARTS["pretrain"] / rest)


def test_what_the_evaluation_cannot_use_is_for_the_others():
    budget, _ = budget_of(10_000.0)
    before = {stage: budget.planned(stage) for stage in STAGES}
    budget.longest["evaluate"] = 100.0
    assert budget.planned("evaluate") == 100 and budget.planned("report") == before["report"]
    assert sum(budget.planned(stage) for stage in STAGES) == pytest.approx(10_000)
    spared, others = before["evaluate"] - 100, sum(PARTS.values()) - PARTS["evaluate"]
    assert budget.planned("sft") == pytest.approx(before["sft"] + spared * PARTS["sft"] / others)


def test_what_short_stages_cannot_use_goes_on_to_those_that_can():
    budget, _ = budget_of(10_000.0)
    budget.longest |= {"evaluate": 100.0, "midtrain": 200.0, "sft": 1450.0}  # the last only with what the others spare
    shares = {stage: budget.planned(stage) for stage in STAGES}
    assert [shares[stage] for stage in ("evaluate", "midtrain", "sft")] == [100, 200, 1450]
    assert sum(shares.values()) == pytest.approx(10_000)
    free = [(shares[stage] - LEAST[stage]) / PARTS[stage] for stage in ("tokenizer", "pretrain", "rl")]
    assert free == pytest.approx([free[0]] * 3)
    everything = dict.fromkeys(STAGES, 50.0)
    budget.longest |= everything
    assert {stage: budget.planned(stage) for stage in STAGES}["pretrain"] >= 50  # and nothing is divided by zero


def test_a_stage_that_takes_too_long_takes_it_from_those_that_follow():
    budget, clock = budget_of(500.0)
    budget.begin("pretrain")
    clock.go(483.0)
    budget.end("pretrain")
    following = ("midtrain", "sft", "rl", "evaluate", "report")
    assert budget.share("midtrain") == pytest.approx(17 * LEAST["midtrain"] / sum(LEAST[each] for each in following))
    clock.go(100.0)
    assert budget.share("sft") == 0 and budget.share("report") == 0


def test_a_run_that_was_stopped_has_what_is_left(tmp_path):
    budget, clock = budget_of(500.0)
    budget.begin("pretrain")
    clock.go(100.0)
    budget.end("pretrain")
    budget.begin("midtrain")
    clock.go(20.0)
    budget.write(tmp_path)
    clock.go(1e5)  # between the two processes
    again, clock = budget_of(500.0)
    again = resumed(again, read_record(tmp_path))
    assert again.left == pytest.approx(380.0)
    again.begin("midtrain")
    clock.go(30.0)
    again.end("midtrain")
    assert again.record["pretrain"]["seconds"] == 100 and again.record["midtrain"]["seconds"] == 50
    assert again.left == pytest.approx(350.0)
    more = resumed(dataclasses.replace(again, seconds=900.0), read_record(tmp_path))
    assert more.left == pytest.approx(900 - 120 - 30)


def test_a_finished_run_that_is_started_again_has_all_of_it(tmp_path):
    budget, clock = budget_of(500.0)
    clock.go(490.0)
    budget.finished, budget.questions = True, 40
    budget.write(tmp_path)
    again = resumed(budget_of(500.0)[0], read_record(tmp_path))
    assert again.left == 500.0 and again.questions == 40
    assert resumed(again, None) is again


def test_it_is_written_at_most_every_few_seconds(tmp_path):
    budget, clock = budget_of(500.0)
    budget.write(tmp_path, 10.0)
    clock.go(9.0)
    budget.write(tmp_path, 10.0)
    assert (read_record(tmp_path) or {})["spent"] == 0
    clock.go(1.0)
    budget.write(tmp_path, 10.0)
    assert (read_record(tmp_path) or {})["spent"] == 10


def test_too_short_for_its_stages():
    budget, clock = budget_of(60.0)
    with pytest.raises(UserError, match=r"too short for tokenizer, .*; give at least 2m, or fewer --stages"):
        budget.check_enough()
    budget_of(60.0, ["tokenizer", "pretrain"])[0].check_enough()
    with pytest.raises(UserError, match=r"300.0s, of which 5m 00s are spent; .* give --budget=7m, or go on without"):
        dataclasses.replace(budget, text="300.0s", seconds=300.0, before=300.0).check_enough()


# --- simulated machines -----------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Machine:
    """Seconds that things take on it: all of them `noise` apart from each other, and later `drift` times as long."""

    step: float
    evaluation: float
    compiling: float
    noise: float
    drift: float
    seed: int
    answer: float = 0.02


def run(machine, seconds, stages=STAGES, decays=(("sft", 1.0),)):
    """A run of all stages on a machine; the part of the budget that it took, and of each stage steps and rates."""
    budget, clock = budget_of(seconds, stages)
    draw, trained = random.Random(machine.seed), {}

    def take(amount):
        slower = 1 + (machine.drift - 1) * min(1.0, budget.spent / seconds)
        clock.go(amount * slower * draw.uniform(1 - machine.noise, 1 + machine.noise))

    def ask(count):
        for _ in range(16):  # models and tasks
            take(count * machine.answer)

    def train(stage):
        schedule = ScheduleConfig(decay_ratio=dict(decays).get(stage, 0.2))
        horizon = Horizon(schedule, lambda: budget.left_of(stage), now=clock)
        first = [True]

        def validate(step, params):
            take(machine.evaluation + machine.compiling / 2 * first[0])
            first[0] = False
            return ()

        def sample(step, params):
            take(machine.evaluation / 2)
            return ()

        every = 20
        validated, sampled = horizon.timed(every, validate), horizon.timed(0, sample)
        take(machine.compiling)
        validated(0, None)
        step, num_steps, lengths = 0, 1, []
        while step < num_steps:
            num_steps = horizon(step)
            lengths.append(num_steps)
            take(machine.step * (5 if stage == "rl" else 1))
            step += 1
            if step == num_steps or step % every == 0:
                validated(step, None)
        sampled(step, None)
        trained[stage] = (num_steps, [horizon.rates[i] for i in range(num_steps)], lengths)

    for stage in stages:
        budget.begin(stage)
        if stage == "tokenizer":
            take(2.0)
        elif stage == "report":
            take(3.0)
        elif stage == "evaluate":
            count = find_count(10**6, ask, lambda: budget.left_of("evaluate"), clock)
            ask(count)
        else:
            train(stage)
        budget.end(stage)
    return budget.spent / seconds, trained


machines = st.builds(
    Machine,
    step=st.floats(0.4, 3.0),
    evaluation=st.floats(0.1, 6.0),
    compiling=st.floats(0.5, 15.0),
    noise=st.floats(0.0, 0.5),
    drift=st.floats(0.5, 2.0),
    seed=st.integers(0, 1000),
)


@settings(max_examples=20, deadline=None)
@given(machines, st.sampled_from([600.0, 900.0]))
@example(Machine(3.0, 6.0, 15.0, 0.5, 2.0, 3), 900.0)
@example(Machine(0.05, 6.0, 15.0, 0.0, 0.5, 3), 900.0)
def test_a_run_ends_within_seven_percent_of_its_time(machine, seconds):
    part, trained = run(machine, seconds)
    assert 0.93 <= part <= 1.07
    for stage, (steps, rates, lengths) in trained.items():
        assert rates[0] == 1.0 and all(0 <= rate <= 1 for rate in rates)
        assert rates[-1] <= 1 / max(1, round(0.2 * steps)) + 1e-9  # as a training of so many steps ends
        constant = 0.5 if stage == "sft" else 0.8
        falling = (i for i, length in enumerate(lengths) if i >= 6 and i >= int(constant * length))
        assert len(set(lengths[next(falling, steps) :])) <= 1  # fixed when the rates begin to fall


@pytest.mark.parametrize("decay", [0.0, 0.2, 0.5, 1.0])
def test_on_a_steady_machine_the_rates_are_those_of_a_training_of_so_many_steps(decay):
    from jaxchat.optim.schedules import multiplier

    _, trained = run(Machine(1.0, 1.0, 3.0, 0.0, 1.0, 0), 900.0, decays=[("pretrain", decay)])
    steps, rates, _ = trained["pretrain"]
    expected = multiplier(ScheduleConfig(decay_ratio=decay), steps)
    assert rates == pytest.approx([expected(i) for i in range(steps)], abs=0.02 if decay == 1 else 1e-9)


def test_a_stage_without_time_takes_one_step():
    clock = Clock()
    horizon = Horizon(ScheduleConfig(), lambda: -5.0, now=clock)
    assert horizon(0) == 1


def test_data_that_is_read_sixteen_times_ends_a_stage():
    clock = Clock()
    horizon = Horizon(ScheduleConfig(), lambda: 1e6, now=clock)
    step = 0
    while step < horizon(step):
        horizon.saw(step, step // 10)
        clock.go(1.0)
        step += 1
    assert step == horizon.most == 160 and horizon.rates[159] == pytest.approx(1 / 32)


@pytest.mark.parametrize(("passes", "each", "most"), [(4, 30, 120), (4, 2, 20)])
def test_conversations_are_read_less_often_but_for_some_steps(passes, each, most):
    clock = Clock()
    horizon = Horizon(ScheduleConfig(decay_ratio=1.0), lambda: 1e6, passes=passes, now=clock)
    step = 0
    while step < horizon(step):
        horizon.saw(step, step // each)
        clock.go(1.0)
        step += 1
    assert step == horizon.most == most and horizon.rates[most - 1] == pytest.approx(1 / most)


def test_what_is_fixed_stays_when_a_training_goes_on():
    clock = Clock()
    horizon = Horizon(ScheduleConfig(), lambda: 1e9, now=clock)
    assert horizon.resume(85, 100) == 100
    for step in range(85, 100):
        clock.go(1.0)
        assert horizon(step) == 100
    assert horizon.rates[85] == pytest.approx(15 / 20) and horizon.rates[99] == pytest.approx(1 / 20)


def test_what_is_open_follows_the_time_when_a_training_goes_on():
    clock = Clock()
    horizon = Horizon(ScheduleConfig(), lambda: 1061.0 - clock.seconds, now=clock)
    horizon.resume(30, 100)
    step = 30
    while step < (steps := horizon(step)):
        clock.go(1.0)
        step += 1
        if step == steps:
            break
    assert steps == pytest.approx(30 + 61, abs=1)


@settings(max_examples=50, deadline=None)
@given(st.floats(1e-4, 2.0), st.floats(5.0, 300.0), st.floats(0.0, 5.0), st.integers(1, 10_000))
def test_as_many_questions_as_there_is_time_for(each, seconds, fixed, most):
    clock = Clock()

    def ask(count):
        clock.go(fixed + each * count)

    left = lambda: 1000.0 + seconds - clock.seconds  # noqa: E731
    count = find_count(most, ask, left, clock)
    assert min(FEWEST, most) <= count <= most
    ask(count)
    smallest = 3 * (fixed + each * min(most, FEWEST))  # what cannot be avoided: two rounds, and the questions
    assert clock.seconds - 1000.0 <= max(seconds, smallest) + 1e-6
