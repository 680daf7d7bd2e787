"""TRL's way until 1.14, written anew from its behaviour: a pass of its own for each quantity that its log shows.

Policy and reference log-probabilities, entropy, mean logits of both sides (over rows picked out by a mask, which copies
them) and the chosen side's token accuracy. Its shift of the logits, one more copy, is left out: the inputs here are
aligned already. In 16-bit types its log-probabilities are rounded to 16 bits before they are summed, as they were then;
the gradient check shows what that costs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Peer
from .eager import dpo_from_sums

_ENTROPY_ROWS = 128


def label_logps(logits: Tensor, labels: Tensor) -> Tensor:
    """[2P, T] log-probabilities, row by row to bound the temporaries."""
    index = labels.unsqueeze(-1)
    if logits.dtype in (torch.float32, torch.float64):
        normalisers = torch.stack([row.logsumexp(-1) for row in logits])
        return logits.gather(-1, index).squeeze(-1) - normalisers
    rows = [row.log_softmax(-1).gather(-1, i).squeeze(-1) for row, i in zip(logits, index, strict=True)]
    return torch.stack(rows)


def token_entropy(logits: Tensor) -> Tensor:
    """[2P, T], in chunks of rows."""
    chunks = []
    for rows in logits.flatten(0, -2).split(_ENTROPY_ROWS):
        log_p = rows.log_softmax(-1)
        chunks.append(-(log_p.exp() * log_p).sum(-1))
    return torch.cat(chunks).view(logits.shape[:-1])


class TRLOld(Peer):
    name = "trl_old"
    title = "TRL until 1.14"
    statistics = ("entropy", "mean_logits", "accuracy")

    def forward(self) -> Tensor:
        logits, labels = self.problem.logits, self.problem.labels
        mask = torch.ones_like(labels, dtype=torch.bool)
        sums = (label_logps(logits, labels) * mask).sum(-1)
        with torch.no_grad():
            ref_sums = (label_logps(self.problem.ref_logits, labels) * mask).sum(-1)
            watched = logits.detach()
            entropy = token_entropy(watched)[mask].mean()
            chosen, rejected = watched.chunk(2)
            chosen_mask, rejected_mask = mask.chunk(2)
            mean_chosen = chosen[chosen_mask].mean(-1).sum() / chosen_mask.sum()
            mean_rejected = rejected[rejected_mask].mean(-1).sum() / rejected_mask.sum()
            hits = chosen.argmax(-1) == labels.chunk(2)[0]
            accuracy = hits[chosen_mask].float().mean()
        # Its log takes plain numbers, which on a GPU waits for the device at every step.
        self.logged = [value.item() for value in (entropy, mean_chosen, mean_rejected, accuracy)]
        return dpo_from_sums(sums, ref_sums)
