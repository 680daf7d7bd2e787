"""The charts of the report and of the comparison: what each shows, and what it looks like in a healthy run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Line:
    """A curve: metric name, label, the records it comes from ("train" or "eval") and the number of its colour."""

    metric: str
    label: str
    source: str
    colour: int


@dataclass(frozen=True)
class Chart:
    """A chart of the report: what it shows, what a healthy one looks like, and perhaps a level to compare it with."""

    key: str
    title: str
    group: str
    healthy: str
    lines: tuple[Line, ...]
    level: float | None = None
    level_label: str = ""
    percent: bool = False


#: The questions that the charts answer, in this order.
LEARNT, DRIFTING, HEALTH = GROUPS = ("Did it learn?", "Is it drifting?", "Health")


def _both(metric: str) -> tuple[Line, ...]:
    return Line(metric, "training", "train", 1), Line(metric, "held out", "eval", 2)


CHARTS = (
    Chart(
        "loss",
        "Loss",
        LEARNT,
        "Starts at log 2 = 0.6931, where policy and reference agree, and falls. Judge by the held-out curve: "
        "training loss that keeps falling while held-out loss turns up is memorising. Stuck at log 2 means that "
        "nothing moves: raise the learning rate.",
        _both("loss"),
    ),
    Chart(
        "accuracy",
        "Accuracy",
        LEARNT,
        "Share of pairs whose chosen answer gained more over the reference than the rejected one. Around 50 % is "
        "guessing; held out, 60 to 80 % is usual on human data. 100 % in training with a flat held-out curve is "
        "overfitting; well below 50 % suggests swapped columns.",
        _both("rewards/accuracies"),
        level=0.5,
        level_label="guessing",
        percent=True,
    ),
    Chart(
        "rewards",
        "Rewards",
        DRIFTING,
        "Beta times (log-prob under the policy minus under the reference). Both start at 0 and part: chosen above"
        " rejected. Often both fall; if chosen falls far, the model unlearns good answers too: lower the learning"
        " rate or raise beta.",
        (Line("rewards/chosen", "chosen", "train", 3), Line("rewards/rejected", "rejected", "train", 4)),
        level=0.0,
    ),
    Chart(
        "margins",
        "Reward margin",
        LEARNT,
        "Chosen minus rejected reward. Grows steadily and slows; a held-out margin that lags far behind training "
        "is overfitting.",
        _both("rewards/margins"),
        level=0.0,
    ),
    Chart(
        "kl",
        "KL from the reference",
        DRIFTING,
        "Exact, per completion token, in nats. Rises slowly from 0; the price paid for the margin. A sudden climb"
        " means the policy is running away from the model it started as: lower the learning rate, raise beta, or "
        "stop earlier.",
        _both("kl"),
    ),
    Chart(
        "logps",
        "Log-probabilities",
        DRIFTING,
        "Summed over a completion. Chosen should gain on rejected, wherever the two begin. Both falling quickly is likelihood "
        "displacement: the model unlearns good answers too.",
        (Line("logps/chosen", "chosen", "train", 3), Line("logps/rejected", "rejected", "train", 4)),
    ),
    Chart(
        "win_rate",
        "Win rate",
        LEARNT,
        "Share of held-out prompts on which the scorer prefers what the policy writes. Against the answers before training "
        "it starts at 50 %. Margins that grow while this does not are learnt about the data's answers only.",
        (Line("win_rate", "held out", "eval", 2),),
        level=0.5,
        level_label="even",
        percent=True,
    ),
    Chart(
        "entropy",
        "Entropy",
        DRIFTING,
        "Of the next token, in nats, over the completions. Roughly level; a collapse towards 0 means one answer "
        "to everything.",
        _both("entropy"),
    ),
    Chart(
        "grad_norm",
        "Gradient norm",
        HEALTH,
        "Before clipping. Even, within a factor of a few; lone spikes point to odd pairs, steady growth to a "
        "learning rate that is too high.",
        (Line("grad_norm", "training", "train", 1),),
    ),
    Chart(
        "memory",
        "Memory",
        HEALTH,
        "Of the process (resident; on a GPU what the allocator holds), in MiB, at each log. Level after the first steps; a "
        "steady climb is a leak, jumps are longer batches.",
        (Line("memory_mib", "MiB", "train", 5),),
    ),
    Chart(
        "throughput",
        "Throughput",
        HEALTH,
        "Real tokens (no padding) per second of training, evaluations and checkpoints left out. Level, apart from"
        " the first step.",
        (Line("tokens_per_second", "tokens / s", "train", 5),),
    ),
    Chart(
        "learning_rate",
        "Learning rate",
        HEALTH,
        "The schedule as it was applied.",
        (Line("learning_rate", "learning rate", "train", 5),),
    ),
)
