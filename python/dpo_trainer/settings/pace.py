"""How often a run logs, evaluates and saves where nobody says so: it depends on the run's length and on the data's size."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

#: Settings whose default, None, leaves the pace to `Pace`.
PACED = ("logging_steps", "eval_steps", "save_steps")
#: Points of a curve in a run of any length.
POINTS = 20
#: Most steps between two logs, and between two checkpoints.
LOG_AT_LEAST, SAVE_AT_LEAST = 10, 500
#: Checkpoints that are kept where `save_steps` and `save_total_limit` are not given: if the newest is damaged, one is left.
KEPT = 2
#: Time that evaluations may take, as a share of training, and the time of an evaluated pair, in trained pairs: a forward alone.
EVALUATION_SHARE, EVALUATED_PAIR = 1 / 4, 1 / 3
#: A sampled answer, in evaluated pairs: it is written a token at a time.
SAMPLED_ANSWER = 4


@contextlib.contextmanager
def without_pace(config: Any) -> Iterator[None]:
    """Stand-ins for the settings that are None, for the checks of TrainingArguments, which wants numbers.

    `eval_steps` follows a given `logging_steps`, as in transformers.
    """
    missing = [name for name in PACED if getattr(config, name) is None]
    if config.logging_steps is not None and "eval_steps" in missing:
        missing.remove("eval_steps")
        config.eval_steps = config.logging_steps if config.eval_strategy == "steps" else None
    # With load_best_model_at_end every checkpoint must be of an evaluation's step.
    other = next((value for value in (config.save_steps, config.eval_steps) if value is not None), 1)
    for name in missing:
        setattr(config, name, 1 if name == "logging_steps" else other)
    yield
    for name in missing:
        setattr(config, name, None)


def logging_steps(steps: int) -> int:
    """Steps between two logs of a run of so many steps: 20 logs at least, and one every 10 steps."""
    return max(1, min(LOG_AT_LEAST, steps // POINTS))


def eval_steps(steps: int, trained: float, evaluated: int, sampled: int) -> int:
    """Steps between two evaluations: 20 of them, or as many as take a quarter of the training time, but at least 2.

    Args:
        steps: of the run.
        trained: pairs that all steps train on; a pair counts once an epoch.
        evaluated: pairs of an evaluation.
        sampled: answers that an evaluation samples.
    """
    cost = EVALUATED_PAIR * (evaluated + SAMPLED_ANSWER * sampled)
    points = max(2, min(POINTS, int(EVALUATION_SHARE * trained / max(cost, 1))))
    return math.ceil(steps / points)


def dividing(wanted: int, multiple: int) -> int:
    """The largest divisor of `multiple` up to `wanted`: checkpoints so many steps apart are then of evaluated steps."""
    return next(steps for steps in range(min(wanted, multiple), 0, -1) if multiple % steps == 0)


def save_steps(steps: int, evaluations: int | None) -> int:
    """Steps between two checkpoints: a tenth of the run, 500 at most.

    Args:
        evaluations: steps between two evaluations, where checkpoints must be of evaluated steps.
    """
    wanted = min(SAVE_AT_LEAST, math.ceil(steps / 10))
    return wanted if evaluations is None else evaluations * max(1, wanted // evaluations)
