"""The charts of the report and of the comparison: their curves, and their shape in a healthy run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Line:
    """A curve: the metric's name, a label, the source of its records ("train" or "eval") and the number of its colour."""

    metric: str
    label: str
    source: str
    colour: int


@dataclass(frozen=True)
class Chart:
    """A chart: its curves, a text about its healthy shape, and perhaps a level to compare the curves with."""

    key: str
    title: str
    group: str
    healthy: str
    lines: tuple[Line, ...]
    level: float | None = None
    level_label: str = ""
    percent: bool = False


#: Titles of the groups of charts, in the page's order.
LEARNT, DRIFTING, HEALTH = GROUPS = ("Did it learn?", "Is it drifting?", "Health")


def _both(metric: str) -> tuple[Line, ...]:
    return Line(metric, "training", "train", 1), Line(metric, "held out", "eval", 2)


CHARTS = (
    Chart(
        "loss",
        "Loss",
        LEARNT,
        "Starts at log 2 = 0.6931, since policy and reference are equal, and falls. Judge by the held-out curve: if it "
        "rises while the training loss still falls, the model memorises the training pairs. If the loss stays at log 2, "
        "the model does not change: raise the learning rate.",
        _both("loss"),
    ),
    Chart(
        "accuracy",
        "Accuracy",
        LEARNT,
        "Share of pairs whose chosen answer gained more over the reference than the rejected answer. About 50 % is "
        "guessing. On held-out human data, 60 to 80 % is usual. 100 % in training with a flat held-out curve is "
        "overfitting. Well below 50 % suggests swapped columns.",
        _both("rewards/accuracies"),
        level=0.5,
        level_label="guessing",
        percent=True,
    ),
    Chart(
        "rewards",
        "Rewards",
        DRIFTING,
        "Beta times (log-prob under the policy minus log-prob under the reference). Both curves start at 0, then chosen is"
        " above rejected. Often both fall. If chosen falls far, the model unlearns good answers too: lower the learning"
        " rate or raise beta.",
        (Line("rewards/chosen", "chosen", "train", 3), Line("rewards/rejected", "rejected", "train", 4)),
        level=0.0,
    ),
    Chart(
        "margins",
        "Reward margin",
        LEARNT,
        "Chosen reward minus rejected reward. It grows, more slowly over time. A held-out margin far below the training "
        "margin is overfitting.",
        _both("rewards/margins"),
        level=0.0,
    ),
    Chart(
        "kl",
        "KL from the reference",
        DRIFTING,
        "Exact, per completion token, in nats. It rises slowly from 0 as the margin grows. A sudden rise means that the"
        " policy moves far from the model before training: lower the learning rate, raise beta, or stop earlier.",
        _both("kl"),
    ),
    Chart(
        "logps",
        "Log-probabilities",
        DRIFTING,
        "Summed over a completion. The gap should grow. If both fall quickly, that is likelihood displacement.",
        (Line("logps/chosen", "chosen", "train", 3), Line("logps/rejected", "rejected", "train", 4)),
    ),
    Chart(
        "win_rate",
        "Win rate",
        LEARNT,
        "Share of held-out prompts for which the scorer prefers the policy's answer. Compared with the answers before "
        "training, it starts at 50 %. If margins grow and the win rate does not, the policy learnt about the data's answers "
        "only.",
        (Line("win_rate", "held out", "eval", 2),),
        level=0.5,
        level_label="even",
        percent=True,
    ),
    Chart(
        "entropy",
        "Entropy",
        DRIFTING,
        "Of the next token, in nats, over the completions. It stays roughly level. A fall towards 0 means that the model "
        "gives every prompt the same answer.",
        _both("entropy"),
    ),
    Chart(
        "grad_norm",
        "Gradient norm",
        HEALTH,
        "Before clipping. It varies by a small factor. Single spikes suggest unusual pairs, steady growth suggests a "
        "learning rate that is too high.",
        (Line("grad_norm", "training", "train", 1),),
    ),
    Chart(
        "memory",
        "Memory",
        HEALTH,
        "Of the process (resident memory; on a GPU the allocator's), in MiB, at each log. It is level after the first steps. "
        "A steady rise is a leak, jumps are longer batches.",
        (Line("memory_mib", "MiB", "train", 5),),
    ),
    Chart(
        "throughput",
        "Throughput",
        HEALTH,
        "Tokens without padding per second of training, without evaluations and checkpoints. It is level after the first"
        " step.",
        (Line("tokens_per_second", "tokens / s", "train", 5),),
    ),
    Chart(
        "learning_rate",
        "Learning rate",
        HEALTH,
        "The learning rate of each logged step.",
        (Line("learning_rate", "learning rate", "train", 5),),
    ),
)
