"""From rewards to the weight of each sample's log-probability in the loss.

An objective takes rewards `[questions, samples]` and returns weights of the same shape; NaN leaves a sample out.

"reinforce" is GRPO (arXiv:2402.03300) without its trust region and without dividing by the standard deviation, averaged
over tokens as in DAPO (arXiv:2503.14476). "best_of_n" is supervised fine-tuning on each question's best sample.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float


def reinforce_weights(rewards: Float[np.ndarray, "Q N"]) -> Float[np.ndarray, "Q N"]:
    """Each reward minus the mean over its question's samples; exactly 0 where all are equal.

    The rounding of a mean would leave weights such as 1e-17 there, which Muon follows by a full step.
    """
    differ = rewards.max(axis=1, keepdims=True) > rewards.min(axis=1, keepdims=True)
    return np.where(differ, rewards - rewards.mean(axis=1, keepdims=True), 0.0)


def best_of_n_weights(rewards: Float[np.ndarray, "Q N"]) -> Float[np.ndarray, "Q N"]:
    """1 for the first of each question's best samples and NaN for the others; all NaN where the rewards are equal."""
    weights = np.full(rewards.shape, np.nan)
    differ = rewards.max(axis=1) > rewards.min(axis=1)
    weights[differ, rewards.argmax(axis=1)[differ]] = 1.0
    return weights


OBJECTIVES = {"reinforce": reinforce_weights, "best_of_n": best_of_n_weights}  # by the name of `RLConfig.method`
