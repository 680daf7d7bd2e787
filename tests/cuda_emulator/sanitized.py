"""The reduced table that runs under AddressSanitizer and UndefinedBehaviorSanitizer, in a process of its own.

`python sanitized.py LIBRARY` exits with 0 and says so; with a second argument it hands the kernel a row that is one element
short, which must end in a report.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # tests/, for cuda_emulator
from bad_bounds import bad_bounds

from cuda_emulator import Emulator, Order
from dpo_kernels.backends.eager import TokenKL

PLAIN = {"ignore_index": -100, "logit_scale": 1.0, "logit_softcap": 0.0}
NOTHING = {"entropy": False, "kl": False, "accuracy": False, "mean_logits": False, "log_sum_sq": False}
EVERYTHING = dict.fromkeys(NOTHING, True)


def table(library: Path) -> None:
    """Every kernel, at sizes with heads, tails, several tiles, clusters, and every dtype."""
    beta, smoothing = torch.full((1,), 0.1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    for order in Order:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for vocab in (1, 33, 5003):
                em = Emulator(library, order=order, seed=vocab)
                # Rows end exactly where the allocation ends, so one element too many is seen.
                logits, ref = torch.randn(2, 2, vocab).to(dtype), torch.randn(2, 2, vocab).to(dtype)
                labels = torch.randint(0, vocab, (2, 2))
                labels[0, 1] = -100
                weights = (labels >= 0).double()
                counters = torch.zeros(3, dtype=torch.int32)
                for options in (NOTHING, EVERYTHING):
                    tokens, _ = em.fused_forward(
                        logits, labels, ref, weights, None, None, beta, smoothing, False,
                        counters=counters, **PLAIN, **options,
                    )  # fmt: skip
                    out = torch.empty_like(logits)
                    em.logits_grad(logits, labels, tokens[0], tokens[1], weights, **PLAIN, out=out)
                # tokens: of EVERYTHING, with the reference and kl
                for grads in ((weights, None), (weights, weights)):
                    divergences = TokenKL(ref, tokens[2], tokens[4], *grads)
                    em.logits_grad(logits, labels, *tokens[:2], weights, **PLAIN, out=out, token_kl=divergences)
                other = TokenKL(ref.to(torch.bfloat16), tokens[2], tokens[4], weights, weights)
                em.logits_grad(logits, labels, *tokens[:2], weights, **PLAIN, out=logits, token_kl=other)
                logits = ref.clone()
                em.token_logps(logits[:, :1], labels[:, :1].contiguous(), ref[:, 1:], **PLAIN, **EVERYTHING)
                cu = torch.tensor([0, 3, 4])
                em.preference_loss(
                    *(t.reshape(1, 4) for t in (tokens[0], tokens[2], weights)), cu, None, beta, smoothing, True
                )
        em = Emulator(library, order=order)
        logits = torch.randn(1, 2, 300)
        labels, capped = torch.zeros(1, 2, dtype=torch.int64), {**PLAIN, "logit_softcap": 5.0}
        tokens = em.token_logps(logits, labels, logits, **capped, **EVERYTHING)
        ones = torch.ones(1, 2, dtype=torch.float64)
        divergences = TokenKL(logits, tokens[2], tokens[4], ones, ones)
        em.logits_grad(logits, labels, *tokens[:2], ones, **capped, out=torch.empty_like(logits), token_kl=divergences)
        for _, bounds in bad_bounds(8):
            logits, labels, weights = (
                torch.randn(1, 8, 33),
                torch.zeros(1, 8, dtype=torch.int64),
                torch.ones(1, 8).double(),
            )
            args = (weights, torch.tensor(bounds), None, beta.repeat(2), smoothing.repeat(2), False)
            counters = torch.zeros(6, dtype=torch.int32)
            tokens, _ = em.fused_forward(logits, labels, None, *args, counters=counters, **PLAIN, **NOTHING)
            em.preference_loss(tokens[0], None, *args)
            em.sequence_sums(tokens[0], *args[:2])
    print("sanitized table done")


def overrun(library: Path) -> None:
    """A tensor that claims one logit more than it has."""
    short = torch.randn(999)
    claimed = torch.as_strided(short, (1, 1, 999), (999, 999, 1))
    em = Emulator(library)
    labels = torch.zeros(1, 1, dtype=torch.int64)
    params, outputs = em._token_params(claimed, labels, None, **PLAIN, **NOTHING)
    params.vocab = 1000
    em.call("emu_token_logps", ctypes.byref(params), *em.device)
    print(outputs[0])


if __name__ == "__main__":
    (overrun if len(sys.argv) > 2 else table)(Path(sys.argv[1]))
