"""Does the loss work inside torch.compile without graph breaks and without recompiling, and is the step as fast?"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpo_kernels import dpo_loss, linear_dpo_loss

from . import method
from .conftest import DTYPES, Settings, wanted
from .method import Contender, Samples
from .peers.eager import textbook_loss
from .problem import BETA
from .report import SPREAD, TIME, Column, Result, listed

#: [2P, T], vocabulary, hidden size of a model of one block.
SIZES = {"small": ((2, 32), 4096, 64), "default": ((4, 32), 49152, 256), "full": ((8, 128), 49152, 576)}


class Model(nn.Module):
    """A block and a head: enough of a model for the compiler to fuse more than the loss."""

    def __init__(self, vocab: int, hidden: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, hidden)
        self.norm = nn.RMSNorm(hidden)
        self.up, self.down = nn.Linear(hidden, 4 * hidden, bias=False), nn.Linear(4 * hidden, hidden, bias=False)
        self.head = nn.Linear(hidden, vocab, bias=False)

    def hidden(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        return x + self.down(F.silu(self.up(self.norm(x))))


def textbook(model: Model, tokens: Tensor, labels: Tensor, ref_logits: Tensor) -> Tensor:
    return textbook_loss(model.head(model.hidden(tokens)), ref_logits, labels)


def logits_path(model: Model, tokens: Tensor, labels: Tensor, ref_logits: Tensor) -> Tensor:
    logits = model.head(model.hidden(tokens))
    return dpo_loss(logits, labels, ref_logits=ref_logits, beta=BETA, inplace_backward=True).loss


def linear_path(model: Model, tokens: Tensor, labels: Tensor, ref_logps: Tensor) -> Tensor:
    return linear_dpo_loss(model.hidden(tokens), model.head.weight, labels, ref_logps=ref_logps, beta=BETA).loss


#: No name contains another benchmark's name, so that `-k` with a benchmark's name selects its tests alone.
LOSSES = {"textbook": textbook, "whole": logits_path, "hidden": linear_path}
TITLES = {"textbook": "eager textbook", "whole": "dpo_loss", "hidden": "linear_dpo_loss, reference precomputed"}

ALL = [f"{loss}-{how}" for loss in LOSSES for how in ("plain", "compiled")]
#: The small size only tests for graph breaks.
NAMES = {"small": ["textbook-plain", "whole-compiled", "hidden-compiled"], "default": ALL, "full": ALL}

COLUMNS = [
    Column("title", "model and loss"),
    TIME,
    SPREAD,
    Column("vs_best", "faster than the textbook by", "ratio"),
    Column("best_peer", "which textbook"),
    Column("breaks", "graph breaks", "count"),
]
DETAILS = [
    Column("title", "model and loss"),
    Column("first_call_s", "first call", "time"),
    Column("other_length_s", "first call at another length", "time"),
    Column("graphs", "graphs", "count"),
]


def summary(rows: list[dict[str, Any]]) -> str:
    """Graph breaks and ratios of our compiled rows."""
    mine = [row for row in rows if row["ours"] and row.get("breaks") is not None]
    if not mine:
        return ""
    against = [f"{row['vs_best']:.2f} with {row['title'].partition(',')[0]}" for row in mine if row.get("vs_best")]
    return (
        f"torch.compile takes model and loss as one graph ({sum(row['breaks'] for row in mine)} graph breaks)"
        + (f". Its step reaches this multiple of the textbook loss's speed: {listed(against)}" if against else "")
        + "."
    )


RESULT = partial(
    Result,
    "compile",
    "torch.compile: a small model with the loss inside the compiled graph",
    COLUMNS,
    details=DETAILS,
    summary=summary,
)


@pytest.fixture(scope="module")
def samples(
    settings: Settings, publish: Callable[[Result], Result], request: pytest.FixtureRequest
) -> dict[str, Samples]:
    (batch, length), vocab, hidden = SIZES[settings.sizes]
    dtype, device = DTYPES[settings.dtypes[0]], settings.device
    torch.manual_seed(0)
    model = Model(vocab, hidden).to(device, dtype)
    parameters = list(model.parameters())

    def inputs(length: int, name: str) -> tuple[Tensor, ...]:
        tokens, labels = torch.randint(vocab, (2, batch, length), device=device)
        with torch.no_grad():
            logits = model.head(model.hidden(tokens))
            if name == "hidden":
                logps = logits.float().log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1).sum(-1)
                return tokens, labels, logps
        return tokens, labels, logits

    contenders, facts = [], {}
    names = wanted(request, "test_compile", "name")
    clock = method.Clock(device)
    for name in names:
        loss_name, how = name.split("-")
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        plain = LOSSES[loss_name]
        # fullgraph=True raises at any graph break.
        # The small size only tests for graph breaks, so it skips code generation.
        backend = "aot_eager" if settings.sizes == "small" else "inductor"
        call = torch.compile(plain, fullgraph=True, backend=backend) if how == "compiled" else plain
        here = inputs(length, loss_name)

        def step(call: Callable[..., Tensor] = call, here: tuple[Tensor, ...] = here) -> Any:
            return torch.autograd.grad(call(model, *here), parameters)

        first = clock.time(step)
        other = inputs(length + 8, loss_name)
        again = clock.time(lambda call=call, other=other: torch.autograd.grad(call(model, *other), parameters))
        facts[name] = {"first_call_s": first}
        method.tell(f"{name}: first call {1e3 * first:.3g} ms")
        if how == "compiled":
            counters = torch._dynamo.utils.counters
            facts[name] |= {
                "other_length_s": again,
                "graphs": counters["stats"]["unique_graphs"],
                "breaks": sum(counters["graph_break"].values()),
            }
        contenders.append(Contender(name, step))
    found = method.interleave(contenders, 7 if settings.sizes == "full" else 3, device=device, called=True)
    heading = f"{settings.dtypes[0]}: {batch} x {length} tokens, H = {hidden}, V = {vocab:,}, loss and all gradients"
    result = RESULT()
    for name in names:
        loss_name, how = name.split("-")
        ours = loss_name != "textbook"
        row: dict[str, Any] = {"case": heading, "title": f"{TITLES[loss_name]}, {how}", "ours": ours, **facts[name]}
        row |= {"median_s": found[name].median, "spread": found[name].spread, "select": f"test_compile[{name}]"}
        if ours and (best := method.best_ratio(found, name, ["textbook-plain", "textbook-compiled"])):
            row |= best.row(f"eager textbook, {best.peer.partition('-')[2]}")
            row["select"] += f" or test_compile[{best.peer}]"
        result.rows.append(row)
    for loss_name in ("whole", "hidden"):
        if f"{loss_name}-plain" in found and f"{loss_name}-compiled" in found:
            gain = method.ratio(found[f"{loss_name}-plain"], found[f"{loss_name}-compiled"])
            result.notes.append(
                f"{TITLES[loss_name]}: the step is {gain:.2f} times as fast with the loss inside the compiled model as "
                f"without torch.compile; {facts[f'{loss_name}-compiled']['breaks']} graph breaks."
            )
    publish(result)
    return found


def test_compile(samples: dict[str, Samples], name: str, replay: Callable[[Samples], None]) -> None:
    replay(samples[name])
