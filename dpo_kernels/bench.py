"""`python -m dpo_kernels bench`: times of loss and gradient on this machine, compared with eager PyTorch.

A round copies fresh logits into place, which also measures the bandwidth of a copy. Then it times the loss and in-place
gradient of dpo_kernels, and the loss and gradient of eager PyTorch. Both are measured in every round, so that other load on the
machine affects both. The work is counted in bytes:

    loss      logits and reference logits read once
    gradient  logits read once, the gradient written once

The reported share is these bytes divided by the time, as a fraction of the copy's bandwidth (bytes read and written per second).
"""

from __future__ import annotations

import itertools
import os
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backends
from .functional import dpo_loss

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEFAULT_SHAPE = {"cuda": (16, 512, 128256), "cpu": (4, 128, 32768)}
#: Peak memory of eager PyTorch's float32 copies, log-softmaxes and gradients, in bytes per logit.
EAGER_BYTES = 20
BETA = 0.1


class ShapeError(ValueError):
    """The shape cannot be measured on this machine; the message gives the reason."""


def parse_shape(text: str) -> tuple[int, int, int]:
    """(sequences, tokens per sequence, V) from "TOKENSxVOCAB" or "SEQUENCESxTOKENSxVOCAB"."""
    try:
        sizes = [int(part) for part in text.lower().split("x")]
    except ValueError:
        sizes = []
    if len(sizes) not in (2, 3) or min(sizes) < 1:
        raise ShapeError(f"--shape must be TOKENSxVOCAB or SEQUENCESxTOKENSxVOCAB, such as 8192x128256; got {text!r}")
    if len(sizes) == 2:
        # The largest of 16, 8 and 4 sequences that gives at least 128 tokens each; otherwise 2 sequences.
        tokens, vocab = sizes
        count = next((n for n in (16, 8, 4) if tokens % n == 0 and tokens // n >= 128), 2)
        sizes = [count, tokens // count, vocab]
        if tokens % 2:
            raise ShapeError(f"the number of tokens must be even, half chosen and half rejected; got {tokens}")
    if sizes[0] % 2:
        raise ShapeError(f"the number of sequences must be even, half chosen and half rejected; got {sizes[0]}")
    return sizes[0], sizes[1], sizes[2]


def free_memory(device: torch.device) -> int:
    """Free memory of the device in bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def needed_memory(shape: tuple[int, int, int], dtype: torch.dtype) -> int:
    """Bytes for the logits, their copy, the reference's logits, eager PyTorch's gradient and its temporaries."""
    return shape[0] * shape[1] * shape[2] * (4 * dtype.itemsize + EAGER_BYTES)


def _eager_loss(logits: Tensor, ref_logits: Tensor, labels: Tensor) -> Tensor:
    """The usual implementation: float32 log-softmaxes, a gather, and equation 7 of Rafailov et al. 2023."""

    def sums(values: Tensor) -> Tensor:
        return values.float().log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1).sum(-1)

    with torch.no_grad():
        ref_chosen, ref_rejected = sums(ref_logits).chunk(2)
    chosen, rejected = sums(logits).chunk(2)
    return -F.logsigmoid(BETA * ((chosen - ref_chosen) - (rejected - ref_rejected))).mean()


def _clock(device: torch.device) -> Callable[[], float]:
    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return now


def measure(
    shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, seconds: float
) -> dict[str, list[float]]:
    """Seconds of every round by name: "copy", "loss", "gradient", "eager loss", "eager gradient"; at least three rounds."""
    g = torch.Generator(device).manual_seed(0)
    source, ref = (torch.empty(shape, dtype=dtype, device=device) for _ in range(2))
    for row in range(shape[0]):  # one sequence at a time: float32 random numbers for all of them might not fit
        draft = torch.randn(shape[1:], generator=g, device=device, dtype=torch.float32) * 2
        source[row] = draft
        ref[row] = draft + 0.1 * torch.randn(shape[1:], generator=g, device=device, dtype=torch.float32)
    labels = torch.randint(shape[2], shape[:2], generator=g, device=device)
    logits = torch.empty_like(source)
    now = _clock(device)
    times: dict[str, list[float]] = {name: [] for name in ("copy", "loss", "gradient", "eager loss", "eager gradient")}

    def round_of() -> list[float]:
        stops = [now()]
        logits.copy_(source)
        stops.append(now())
        loss = dpo_loss(logits.requires_grad_(), labels, ref_logits=ref, beta=BETA, inplace_backward=True).loss
        stops.append(now())
        loss.backward()
        stops.append(now())
        logits.grad = None
        logits.requires_grad_(False)
        leaf = source.detach().requires_grad_()
        begin = now()
        loss = _eager_loss(leaf, ref, labels)
        middle = now()
        loss.backward()
        end = now()
        return [*(b - a for a, b in itertools.pairwise(stops)), middle - begin, end - middle]

    round_of()  # warm-up: compiles, and maps fresh memory
    deadline = time.perf_counter() + seconds
    while len(times["copy"]) < 3 or time.perf_counter() < deadline:
        for name, spent in zip(times, round_of(), strict=True):
            times[name].append(spent)
    return times


def run(device: torch.device, shape: str | None, dtype: str | None, seconds: float) -> None:
    """Measure and print a table. Raises ShapeError for a shape that is malformed or does not fit into memory."""
    kind = DTYPES[dtype] if dtype else torch.bfloat16 if device.type == "cuda" else torch.float32
    sizes = parse_shape(shape) if shape else DEFAULT_SHAPE[device.type]
    free = free_memory(device)
    while shape is None and needed_memory(sizes, kind) > free and sizes[1] > 16:
        sizes = (sizes[0], sizes[1] // 2, sizes[2])  # only the default shape is reduced to fit
    if needed_memory(sizes, kind) > free:
        raise ShapeError(
            f"[{sizes[0] * sizes[1]} x {sizes[2]}] {str(kind).removeprefix('torch.')} needs "
            f"{needed_memory(sizes, kind) / 1e9:.3g} GB together with eager PyTorch, but {device} has {free / 1e9:.3g} GB "
            "free; give a smaller --shape"
        )
    if device.type == "cuda":
        torch.cuda.set_device(device)
        where = torch.cuda.get_device_name(device)
    else:
        where = f"{torch.get_num_threads()} CPU threads"
    times = measure(sizes, kind, device, seconds)
    # Resolved after the first call, whose self-check may have changed the backend.
    name = backends.resolve(device, kind)
    print("\n".join(table(times, sizes, kind, f"{name} backend, {where}")))


def table(times: dict[str, list[float]], shape: tuple[int, int, int], dtype: torch.dtype, where: str) -> list[str]:
    """The lines to print: medians with quartiles, share of the copy's bandwidth, and speed-up over eager PyTorch."""
    nbytes = 2 * shape[0] * shape[1] * shape[2] * dtype.itemsize  # the same for the copy, the loss and the gradient
    copy = statistics.median(times["copy"])
    lines = [
        f"[{shape[0] * shape[1]} x {shape[2]}] {str(dtype).removeprefix('torch.')}, {where}, {len(times['copy'])} rounds; "
        f"copy {nbytes / copy / 1e9:.4g} GB/s",
        f"{'':<16} {'ms':>9}  {'quartiles':<17} {'of copy':>8}  {'eager, ms':>10}  {'quartiles':<17} {'of copy':>8}  faster",
    ]

    def column(spent: list[float], work: float) -> str:
        low, middle, high = statistics.quantiles(spent, n=4)
        share = work / middle / (nbytes / copy)
        return f"{middle * 1e3:9.3f}  {f'{low * 1e3:.3f}-{high * 1e3:.3f}':<17} {share:8.0%}"

    both = {"loss": nbytes, "gradient": nbytes}
    rows = {name: (times[name], times[f"eager {name}"], work) for name, work in both.items()}
    total = [[a + b for a, b in zip(times[f"{k}loss"], times[f"{k}gradient"], strict=True)] for k in ("", "eager ")]
    rows["both"] = (total[0], total[1], 2 * nbytes)
    for name, (ours, eager, work) in rows.items():
        # The ratio is taken within each round, where both run under the same load.
        ratio = statistics.median(e / o for o, e in zip(ours, eager, strict=True))
        lines.append(f"{name:<16} {column(ours, work)}  {column(eager, work):>10}  {ratio:.2f} x")
    return lines
