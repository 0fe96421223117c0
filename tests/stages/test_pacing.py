"""What comes with the batches where time decides how long a training is."""

from types import SimpleNamespace

import numpy as np
import pytest

from jaxchat.config import MeshConfig, OptimizerConfig, ScheduleConfig
from jaxchat.devices.mesh import make_mesh
from jaxchat.optim.schedules import matrix_decay, muon_momentum
from jaxchat.stages.pacing import Paced
from jaxchat.train.horizon import Horizon
from jaxchat.train.step import MOVING

SCHEDULE = ScheduleConfig(decay_ratio=0.5)
OPTIMIZER = OptimizerConfig(matrix_weight_decay=0.4, muon_momentum_ratio=0.25, muon_momentum_end=0.7)


def paced(*moving):
    """Of ten steps, as far as is known."""
    source = SimpleNamespace(next_batch=lambda step, params: ({"inputs": step}, {}), abstract=lambda plan: {})
    workspace = SimpleNamespace(mesh=make_mesh(MeshConfig()), keep_time=lambda: None)
    horizon = Horizon(SCHEDULE, lambda: 100.0)
    horizon.steps, horizon.rates = 10, dict.fromkeys(range(40), 0.5)
    return Paced(source, horizon, workspace, 0.1, *moving)  # pyright: ignore[reportArgumentType]


def test_the_rate_alone():
    batch, _ = paced().next_batch(3, None)
    assert set(batch) == {"inputs", "rate"} and float(batch["rate"]) == pytest.approx(0.05)
    assert set(paced().abstract(None)) == {"rate"}  # pyright: ignore[reportArgumentType]


def test_what_else_is_compiled_has_a_rate_too():
    source = paced()
    source.source.others = lambda: [{"reach": 0.5}, {"reach": 1.0}]
    found = source.others()
    assert [batch["reach"] for batch in found] == [0.5, 1.0] and all(batch["rate"].shape == () for batch in found)


def test_momentum_and_decay_follow_the_number_of_steps_that_is_known():
    def schedules(steps):
        return {
            "muon_momentum": muon_momentum(OPTIMIZER, SCHEDULE, steps),
            "muon_decay": matrix_decay(OPTIMIZER, steps),
        }

    source = paced(schedules)
    for steps in (10, 40):
        source.horizon.steps = steps
        for step in (0, 4, 9):
            batch, _ = source.next_batch(step, None)
            assert set(batch) == {"inputs", "rate", *MOVING}
            assert float(batch["muon_decay"]) == pytest.approx(0.4 * (1 + np.cos(np.pi * step / steps)) / 2)
            assert float(batch["muon_momentum"]) == pytest.approx(float(schedules(steps)["muon_momentum"](step)))
    assert set(source.abstract(None)) == {"rate", *MOVING}  # pyright: ignore[reportArgumentType]
