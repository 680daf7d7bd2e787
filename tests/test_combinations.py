"""Every function of the library with every way of calling it: the value and gradients are those of float64, or it is refused.

If DPO_WRITE_RESULTS is 1, the results are written to benchmarks/results/library_combinations.json for docs/compatibility.md.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import forward_ad
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh
from torch.nn.functional import logsigmoid
from torch.utils.checkpoint import checkpoint

import dpo_kernels

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks/results/library_combinations.json"
FUNCTIONS = ("dpo_loss", "linear_dpo_loss", "token_logps", "linear_logps", "sequence_logps")
PAIRS, LENGTH, HIDDEN, VOCAB = 2, 5, 16, 40
REF_SUMS = torch.tensor([-9.0, -20.0, -14.0, -11.0])


@dataclass(frozen=True)
class Call:
    """A call: rows [2P, T, V or H] or packed [N, ...], the head's weight for hidden states, labels, bounds if packed."""

    function: str
    rows: Tensor
    weight: Tensor | None
    labels: Tensor
    bounds: Tensor | None = None

    def value(self, rows: Tensor | None = None) -> Tensor:
        """A scalar of the call's result: the loss, or a weighted sum of the log-probabilities."""
        rows = self.rows if rows is None else rows
        function: Any = getattr(dpo_kernels, self.function)
        given = (rows,) if self.weight is None else (rows, self.weight)
        packed = (
            {}
            if self.bounds is None or self.function in ("token_logps", "linear_logps")
            else {"cu_seqlens": self.bounds}
        )
        if "dpo_loss" in self.function:
            return function(*given, self.labels, ref_logps=REF_SUMS, **packed).loss
        found = function(*given, self.labels, **packed)
        return (found * upstream(found)).sum()

    def leaves(self) -> list[Tensor]:
        return [self.rows] if self.weight is None else [self.rows, self.weight]


def upstream(like: Tensor) -> Tensor:
    """Unequal weights, so that a mix-up of tokens or sequences shows."""
    return torch.linspace(0.5, 2.0, like.numel(), dtype=like.dtype).view(like.shape)


def base(function: str, dtype: torch.dtype = torch.float32) -> Call:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, VOCAB, (2 * PAIRS, LENGTH), generator=generator)
    labels[:, 0], labels[1, 3:] = -100, -100
    width = HIDDEN if function.startswith("linear") else VOCAB
    rows = torch.randn(2 * PAIRS, LENGTH, width, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(VOCAB, HIDDEN, generator=generator).div(2).to(dtype).requires_grad_()
    return Call(function, rows, weight if function.startswith("linear") else None, labels)


def truth(call: Call) -> tuple[Tensor, list[Tensor]]:
    """The value and the gradients of the base call's leaves by plain float64 operations."""
    leaves = [leaf.detach().double().requires_grad_() for leaf in call.leaves()]
    logits = leaves[0] if len(leaves) == 1 else leaves[0] @ leaves[1].T
    logps = logits.log_softmax(-1).gather(-1, call.labels.clamp(min=0)[..., None])[..., 0] * (call.labels != -100)
    if "dpo_loss" in call.function:
        chosen, rejected = (logps.sum(-1) - REF_SUMS.double()).chunk(2)
        value = -logsigmoid(0.1 * (chosen - rejected)).mean()
    else:
        found = logps.sum(-1) if call.function == "sequence_logps" else logps
        value = (found * upstream(found)).sum()
    return value.detach(), list(torch.autograd.grad(value, leaves))


def _backward(call: Call, value: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
    value = call.value() if value is None else value
    found = torch.autograd.grad(value, call.leaves())
    return value.detach(), [grad.full_tensor() if isinstance(grad, DTensor) else grad for grad in found]


def packed(call: Call) -> tuple[Tensor, list[Tensor]]:
    bounds = torch.arange(2 * PAIRS + 1) * LENGTH
    value, grads = _backward(
        replace(
            call, rows=call.rows.detach().flatten(0, 1).requires_grad_(), labels=call.labels.flatten(), bounds=bounds
        )
    )
    return value, [grads[0].view_as(call.rows), *grads[1:]]


def sliced(call: Call) -> tuple[Tensor, list[Tensor]]:
    wider = torch.cat([call.rows, call.rows.detach()[:, -1:].exp()], dim=1).detach().requires_grad_()
    value, grads = _backward(replace(call, rows=wider), replace(call, rows=wider).value(wider[:, :-1]))
    assert not grads[0][:, -1].any()
    return value, [grads[0][:, :-1], *grads[1:]]


def compiled(call: Call) -> tuple[Tensor, list[Tensor]]:
    torch._dynamo.reset()
    return _backward(call, torch.compile(lambda: call.value(), fullgraph=True, backend="aot_eager")())


def autocast(call: Call) -> tuple[Tensor, list[Tensor]]:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = call.value()
    return _backward(call, value)


def checkpointed(call: Call) -> tuple[Tensor, list[Tensor]]:
    value: Any = checkpoint(call.value, call.rows, use_reentrant=False)
    return _backward(call, value)


def inference(call: Call) -> tuple[Tensor, list[Tensor]]:
    with torch.inference_mode():
        value = call.value()
    return value.clone(), []


def no_grad(call: Call) -> tuple[Tensor, list[Tensor]]:
    with torch.no_grad():
        return call.value(), []


def twice(call: Call) -> tuple[Tensor, list[Tensor]]:
    value = call.value()
    first = torch.autograd.grad(value, call.leaves(), retain_graph=True)
    value, second = _backward(call, value)
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one, other)
    return value, second


def sharded(call: Call) -> tuple[Tensor, list[Tensor]]:
    mesh = init_device_mesh("cpu", (1,))
    tensors = [distribute_tensor(leaf.detach(), mesh, [Shard(0)]).requires_grad_() for leaf in call.leaves()[-1:]]
    if call.weight is None:
        return _backward(replace(call, rows=tensors[0]))
    return _backward(replace(call, weight=tensors[0]))


def double_backward(call: Call) -> tuple[Tensor, list[Tensor]]:
    grads = torch.autograd.grad(call.value(), call.leaves(), create_graph=True)
    torch.autograd.grad(sum(grad.square().sum() for grad in grads), call.leaves())
    raise AssertionError("a double backward without an error")


def transformed(call: Call) -> tuple[Tensor, list[Tensor]]:
    return call.value().detach(), [torch.func.grad(call.value)(call.rows.detach())]


def mapped(call: Call) -> tuple[Tensor, list[Tensor]]:
    return torch.func.vmap(call.value)(torch.stack([call.rows.detach()] * 2))[0], []


def forward_mode(call: Call) -> tuple[Tensor, list[Tensor]]:
    with forward_ad.dual_level():
        return call.value(forward_ad.make_dual(call.rows.detach(), torch.ones_like(call.rows))).detach(), []


DTYPES = {name: getattr(torch, name) for name in ("float64", "bfloat16", "float16")}


def _of(dtype: str) -> Callable[[Call], tuple[Tensor, list[Tensor]]]:
    return lambda call: _backward(base(call.function, DTYPES[dtype]))


#: By way of calling: how, and the error of the value and of the gradients' norm that the arithmetic allows.
WAYS: dict[str, tuple[Callable[[Call], tuple[Tensor, list[Tensor]]], float]] = {
    "padded": (_backward, 1e-5),
    "packed": (packed, 1e-5),
    "a slice of the rows": (sliced, 1e-5),
    "float64": (_of("float64"), 1e-12),
    "bfloat16": (_of("bfloat16"), 2e-2),
    "float16": (_of("float16"), 5e-3),
    "autocast": (autocast, 2e-2),
    "torch.compile": (compiled, 1e-5),
    "activation checkpointing": (checkpointed, 1e-5),
    "inference_mode": (inference, 1e-5),
    "no_grad": (no_grad, 1e-5),
    "a second backward": (twice, 1e-5),
    "DTensor as logits or head": (sharded, 1e-5),
    "double backward": (double_backward, 0.0),
    "torch.func.grad": (transformed, 0.0),
    "torch.func.vmap": (mapped, 0.0),
    "forward-mode AD": (forward_mode, 0.0),
}
_ONCE = "dpo_kernels has no double backward: the gradient kernels are not differentiable"
_INSIDE = "{rows} is inside a torch.func transform or forward-mode differentiation"
#: By way of calling, the error of the functions that do not support it, in which {rows} is the name of the first argument.
REFUSED = {
    "DTensor as logits or head": "{rows} is a DTensor, and the kernels read plain tensors; pass {rows}.full_tensor()",
    "double backward": _ONCE,
    "torch.func.grad": _INSIDE,
    "torch.func.vmap": _INSIDE,
    "forward-mode AD": _INSIDE,
}
FOUND: dict[str, dict[str, str]] = {}


@pytest.fixture(scope="module", autouse=True)
def results(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of one process. Afterwards, write what was found if everything was tried."""
    store = dist.FileStore(str(tmp_path_factory.mktemp("group") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()
    if os.environ.get("DPO_WRITE_RESULTS") == "1" and all(len(FOUND.get(name, ())) == len(WAYS) for name in FUNCTIONS):
        RESULTS.write_text(json.dumps({"torch": torch.__version__, "functions": FOUND}, indent=1) + "\n")


def refusal(function: str, way: str) -> str:
    """How the error of a function that does not support a way of calling begins; "" if it supports it."""
    if way.startswith("DTensor") and function.startswith("linear"):
        return ""  # the head's weight is gathered
    return REFUSED.get(way, "").format(rows="hidden" if function.startswith("linear") else "logits")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_function_in_a_way_of_calling(function: str, way: str) -> None:
    how, tolerance = WAYS[way]
    said = refusal(function, way)
    call = base(function)
    if said:
        with pytest.raises((NotImplementedError, RuntimeError, TypeError)) as error:
            how(call)
        assert str(error.value).startswith(said)
    else:
        value, gradients = how(call)
        expected, wanted = truth(base(function, DTYPES.get(way, torch.float32)))
        assert (value.double() - expected).abs() <= tolerance * expected.abs().clamp(min=1)
        assert len(gradients) in (0, len(wanted))
        assert bool(gradients) == (way not in ("inference_mode", "no_grad"))
        for found, grad in zip(gradients, wanted, strict=False):
            assert (found.double() - grad).norm() <= tolerance * grad.norm()
    FOUND.setdefault(function, {})[way] = said and str(error.value)


def test_the_results_are_the_table_s() -> None:
    found = json.loads(RESULTS.read_text(encoding="utf-8"))["functions"]
    assert list(found) == list(FUNCTIONS)
    for function, ways in found.items():
        assert list(ways) == list(WAYS)
        assert all(bool(line) == bool(refusal(function, way)) for way, line in ways.items())
        assert all(line.startswith(refusal(function, way)) for way, line in ways.items())
