"""The reduced table that runs under AddressSanitizer and UndefinedBehaviorSanitizer, in a separate process.

`python sanitized.py LIBRARY` prints a line and exits with 0. With a second argument it passes a row that is one element too
short to the kernel, which must cause a sanitizer report.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # tests/, for cuda_emulator
from bad_bounds import bad_bounds

from cuda_emulator import Emulator, Order, build_operators
from dpo_kernels.backends import cuda
from dpo_kernels.backends.whole_call import Family, Weighting
from dpo_kernels.stages import STATISTICS, TokenKL, Transform

PLAIN = Transform()


def table(library: Path) -> None:
    """Run every kernel with every dtype, at sizes that have heads, tails, several tiles and clusters."""
    beta, smoothing = torch.full((1,), 0.1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    for order in Order:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for vocab in (1, 33, 5003):
                em = Emulator(library, order=order, seed=vocab)
                # Rows end exactly where the allocation ends, so that reading one element too many is detected.
                logits, ref = torch.randn(2, 2, vocab).to(dtype), torch.randn(2, 2, vocab).to(dtype)
                labels = torch.randint(0, vocab, (2, 2))
                labels[0, 1] = -100
                weights = (labels >= 0).double()
                for statistics in ((), STATISTICS):
                    tokens = em.token_logps(logits, labels, ref, PLAIN, statistics)
                    out = torch.empty_like(logits)
                    em.logits_grad(logits, labels, *tokens[:3], weights, PLAIN, out)
                # tokens holds all statistics, including the reference's log-probabilities and kl
                for grads in ((weights, None), (weights, weights)):
                    divergences = TokenKL(ref, *tokens[3:6], tokens[7], *grads)
                    em.logits_grad(logits, labels, *tokens[:3], weights, PLAIN, out, divergences)
                other = TokenKL(ref.to(torch.bfloat16), *tokens[3:6], tokens[7], weights, weights)
                em.logits_grad(logits, labels, *tokens[:3], weights, PLAIN, logits, other)
                logits = ref.clone()
                em.token_logps(logits[:, :1], labels[:, :1].contiguous(), ref[:, 1:], PLAIN, STATISTICS)
                cu = torch.tensor([0, 3, 4])
                em.preference_loss(
                    *(t.reshape(1, 4) for t in (tokens[0], tokens[2], weights)), cu, None, beta, smoothing, True
                )
        em = Emulator(library, order=order)
        logits = torch.randn(1, 2, 300)
        labels, capped = torch.zeros(1, 2, dtype=torch.int64), Transform(softcap=5.0)
        tokens = em.token_logps(logits, labels, logits, capped, STATISTICS)
        ones = torch.ones(1, 2, dtype=torch.float64)
        divergences = TokenKL(logits, *tokens[3:6], tokens[7], ones, ones)
        em.logits_grad(logits, labels, *tokens[:3], ones, capped, torch.empty_like(logits), divergences)
        for _, bounds in bad_bounds(8):
            logits, labels, weights = (
                torch.randn(1, 8, 33),
                torch.zeros(1, 8, dtype=torch.int64),
                torch.ones(1, 8).double(),
            )
            args = (weights, torch.tensor(bounds), None, beta.repeat(2), smoothing.repeat(2), False)
            tokens = em.token_logps(logits, labels, None, PLAIN, ())
            em.preference_loss(tokens[0], None, *args)
            em.sequence_sums(tokens[0], *args[:2])


def whole_calls(library: Path) -> None:
    """Run the backend from Python: packed and padded, with all options and with none, and with invalid bounds."""
    torch.ops.load_library(str(build_operators(library)))
    cuda._kernels = torch.ops.dpo_kernels_cuda_emulated
    each, sums = torch.rand(2, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    settings = [
        ((), None, "mean", Family(None, None, 0.1, None, 0.0, False)),
        (STATISTICS, each, "none", Family(sums, each, 0.0, each / 3, 0.0, True)),
    ]
    bounds = [None, torch.tensor([0, 3, 3, 4, 8]), torch.zeros(5, dtype=torch.int64)]
    for cu in (*bounds, *(torch.tensor(b) for _, b in bad_bounds(8))):
        for statistics, pair_weights, reduction, family in settings:
            shape = (4, 2) if cu is None else (1, 8)
            logits, ref, labels = torch.randn(*shape, 33), torch.randn(*shape, 33), torch.randint(0, 33, shape)
            labels[0, 1] = -100
            labels[-1, -1] = 33
            token_weights = None if pair_weights is None else torch.rand(shape, dtype=torch.float64) + 0.1
            weighting = Weighting(token_weights, cu, pair_weights, reduction)
            tokens, sequences, _, loss = cuda.preference_forward(
                logits, labels, ref, PLAIN, statistics, weighting, family
            )
            cuda.preference_backward(logits, labels, tokens, sequences, loss, PLAIN, weighting, logits)


def overrun(library: Path) -> None:
    """Call the kernel with one logit more than the tensor has."""
    short = torch.randn(999)
    claimed = torch.as_strided(short, (1, 1, 999), (999, 999, 1))
    print(Emulator(library).token_logps(claimed, torch.zeros(1, 1, dtype=torch.int64), None, PLAIN, (), vocab=1000))


if __name__ == "__main__":
    emulator = Path(sys.argv[1])
    if len(sys.argv) > 2:
        overrun(emulator)
    else:
        table(emulator)
        whole_calls(emulator)
        print("sanitized table done")
