"""Which way from logits to log-probabilities of tokens is fastest, with gradients, with and without a differentiated entropy?

These are the functions that trainers of other losses call (SFT, KTO, GRPO). "Entropy" means a loss with an entropy bonus.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from dpo_kernels import token_logps

from . import method
from .conftest import DTYPES, Settings, wanted
from .method import Contender, Samples
from .peers.base import not_installed
from .problem import LogitsProblem, error_budget
from .report import BEST_PEER, EXTRA, SPREAD, TIME, VS_BEST, Column, Result

SHAPES = {"small": [(4, 32, 8192)], "default": [(4, 64, 49152)], "full": [(8, 128, 49152)]}

COLUMNS = [Column("title", "method"), TIME, SPREAD, VS_BEST, BEST_PEER, EXTRA]
#: Weight of the entropy in the loss.
BONUS = 0.01


def textbook(logits: Tensor, labels: Tensor, entropy: bool) -> Tensor:
    """The mean log-probability, plus the bonus times the mean entropy if asked for."""
    log_p = (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)
    value = log_p.gather(-1, labels.unsqueeze(-1)).mean()
    return value - BONUS * (log_p.exp() * log_p).sum(-1).mean() if entropy else value


def ours(logits: Tensor, labels: Tensor, entropy: bool, inplace: bool) -> Tensor:
    if not entropy:
        logps = token_logps(logits, labels, inplace_backward=inplace)
        assert isinstance(logps, Tensor)
        return logps.mean()
    logps, found = token_logps(
        logits, labels, statistics=("entropy",), differentiable_entropy=True, inplace_backward=inplace
    )
    return logps.mean() + BONUS * found["entropy"].mean()


def of_trl(logits: Tensor, labels: Tensor, entropy: bool) -> Tensor:
    """TRL's functions for tensors of logits."""
    from trl.trainer.utils import selective_log_softmax, selective_log_softmax_and_entropy

    if not entropy:
        return selective_log_softmax(logits, labels).mean()
    logps, found = selective_log_softmax_and_entropy(logits, labels)
    return logps.mean() + BONUS * found.mean()


#: Name -> (title, makes the function (logits, labels, entropy) -> value).
METHODS: dict[str, tuple[str, Callable[[], Callable[[Tensor, Tensor, bool], Tensor]]]] = {
    "eager": ("eager PyTorch", lambda: textbook),
    "compiled": ("torch.compile", lambda: torch.compile(textbook, fullgraph=True, dynamic=False)),
    "trl": ("TRL 1.16, selective_log_softmax", lambda: of_trl),
    "ours": ("dpo_kernels", lambda: partial(ours, inplace=False)),
    "ours_inplace": ("dpo_kernels, in place", lambda: partial(ours, inplace=True)),
}
WORK = {"logps": ("log-probabilities", False), "entropy": ("log-probabilities and entropy", True)}
#: One row for each work and method; small runs compile nothing.
_ALL = [f"{work}-{method_}" for work in WORK for method_ in METHODS]
NAMES = {"small": [name for name in _ALL if "compiled" not in name], "default": _ALL, "full": _ALL}


def summary(rows: list[dict[str, Any]]) -> str:
    """How much faster than the best peer we are, for each kind of work."""
    found = [
        f"{row['vs_best']:.1f} times as fast as {row['best_peer']} ({row['case']})"
        for row in rows
        if row["title"] == METHODS["ours_inplace"][0] and row.get("vs_best")
    ]
    return f"dpo_kernels, in place, is {', '.join(found)}." if found else ""


RESULT = partial(
    Result,
    "logps",
    "Log-probabilities of tokens from logits, with gradient",
    COLUMNS,
    summary=summary,
)


def prepare(problem: LogitsProblem) -> None:
    """Restores the logits. The next copy has no gradient, which the step would replace and so seem to need no memory for."""
    problem.next()
    problem.logits.grad = None


def step(problem: LogitsProblem, run: Callable[[Tensor, Tensor, bool], Tensor], entropy: bool) -> Tensor:
    """The gradient of the logits, [2P, T, V]."""
    run(problem.logits, problem.labels, entropy).backward()
    assert problem.logits.grad is not None
    return problem.logits.grad


def truth_of(problem: LogitsProblem, entropy: bool) -> Tensor:
    """The gradient in float64."""
    exact = problem.logits.detach().double().requires_grad_()
    textbook(exact, problem.labels, entropy).backward()
    assert exact.grad is not None
    return exact.grad


def check_gradients(problem: LogitsProblem, steps: dict[str, Callable[[], Tensor]], truth: Tensor) -> None:
    """Call each method once. Raise AssertionError for a gradient whose label entries or other entries are wrong."""
    index = problem.labels.unsqueeze(-1)
    for name, run in steps.items():
        prepare(problem)
        difference = run().double() - truth
        at_label = float(difference.gather(-1, index).norm() / truth.gather(-1, index).norm())
        others = float(difference.scatter(-1, index, 0.0).norm() / truth.scatter(-1, index, 0.0).norm())
        error = max(at_label, others)
        # A wrong or missing part of the gradient is off by percents.
        assert error <= error_budget(problem.dtype), f"{METHODS[name][0]}: gradient off by {error:.2g}"


@pytest.fixture(scope="module")
def samples(
    shape: tuple[int, int, int],
    settings: Settings,
    publish: Callable[[Result], Result],
    request: pytest.FixtureRequest,
) -> dict[str, Samples]:
    dtype = settings.dtypes[0]
    problem = LogitsProblem(shape, DTYPES[dtype], settings.device)
    names = wanted(request, "test_logps", "name", shape=shape)
    result, everything = RESULT(), {}
    for work, (title, entropy) in WORK.items():
        chosen = [name.partition("-")[2] for name in names if name.startswith(f"{work}-")]
        steps = {
            name: partial(step, problem, METHODS[name][1](), entropy)
            for name in chosen
            if name != "trl" or not_installed("trl") is None
        }
        prepare(problem)
        check_gradients(problem, steps, truth_of(problem, entropy))
        contenders = [Contender(name, run, partial(prepare, problem)) for name, run in steps.items()]
        found = method.interleave(contenders, settings.rounds, device=settings.device, called=True)
        everything |= {f"{work}-{name}": sample for name, sample in found.items()}
        for name, sample in found.items():
            row: dict[str, Any] = {
                "case": f"{dtype} {list(shape)}, {title}",
                "title": METHODS[name][0],
                "ours": name.startswith("ours"),
                "median_s": sample.median,
                "spread": sample.spread,
                "extra_bytes": sample.extra_bytes,
                "select": f"test_logps[{'x'.join(map(str, shape))}-{work}-{name}]",
            }
            if row["ours"] and (best := method.best_ratio(found, name, [n for n in found if not n.startswith("ours")])):
                row |= best.row(METHODS[best.peer][0])
            result.rows.append(row)
    publish(result)
    return everything


def test_logps(samples: dict[str, Samples], name: str, replay: Callable[[Samples], None]) -> None:
    if name not in samples:
        pytest.skip(not_installed("trl") or name)
    replay(samples[name])
