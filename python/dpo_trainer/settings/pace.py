"""How often a run logs, evaluates and saves by default, depending on the run's length and the data's size."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

#: Settings whose default None lets `Pace` choose the value.
PACED = ("logging_steps", "eval_steps", "save_steps")
#: Number of points of a curve.
POINTS = 20
#: Largest number of steps between two logs, and between two checkpoints.
LOG_AT_LEAST, SAVE_AT_LEAST = 10, 500
#: Number of checkpoints that are kept if `save_steps` and `save_total_limit` are not given. With two, one is left if the
#: newest is damaged.
KEPT = 2
#: Time that evaluations may take, as a share of the training time; and time of an evaluated pair, as a share of a trained
#: pair's, since it needs the forward pass only.
EVALUATION_SHARE, EVALUATED_PAIR = 1 / 4, 1 / 3
#: Time of a sampled answer, in evaluated pairs. Its tokens are generated one at a time.
SAMPLED_ANSWER = 4


@contextlib.contextmanager
def without_pace(config: Any) -> Iterator[None]:
    """A context in which settings of PACED that are None have a number, which the checks of TrainingArguments require.

    `eval_steps` takes the value of a given `logging_steps`, as in transformers, and keeps it.
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
    """Steps between two logs of a run with this number of steps: a twentieth of the run, 1 at least, 10 at most."""
    return max(1, min(LOG_AT_LEAST, steps // POINTS))


def eval_steps(steps: int, trained: float, evaluated: int, sampled: int) -> int:
    """Steps between two evaluations of a run.

    The run has 20 evaluations, or fewer so that they take at most a quarter of the training time, but at least 2.

    Args:
        steps: number of steps of the run.
        trained: number of pairs that all steps train on. A pair counts once in each epoch.
        evaluated: number of pairs of an evaluation.
        sampled: number of answers that an evaluation samples.
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
        evaluations: steps between two evaluations if every checkpoint must be of an evaluated step, else None.
    """
    wanted = min(SAVE_AT_LEAST, math.ceil(steps / 10))
    return wanted if evaluations is None else evaluations * max(1, wanted // evaluations)
