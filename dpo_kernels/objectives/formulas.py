"""The formulas of the objectives and of their reported rewards: functions of `Pairs`, differentiated by autograd."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .pairs import Pairs, Rewards

# --- pieces that several objectives share -------------------------------------------------------------------------


def _per_token(sums: Tensor, lengths: Tensor) -> Tensor:
    """Weighted mean over a sequence's tokens; 0 for a sequence without tokens."""
    return sums / torch.where(lengths > 0, lengths, torch.ones_like(lengths))


def _smoothed(x: Tensor, e: Tensor) -> Tensor:
    """Cross-entropy at logit x of a label that is wrong with probability e."""
    # Where e is 0 the second term is left out: it could be 0 * inf, which is NaN.
    return -(1 - e) * F.logsigmoid(x) - torch.where(e == 0, torch.zeros_like(x), e * F.logsigmoid(-x))


def _chosen_nll(pairs: Pairs) -> Tensor:
    return -_per_token(pairs.chosen_logps, pairs.chosen_lengths)


def _quantiles(values: Tensor, by: Tensor) -> Tensor:
    """`values` reordered: the pair with the k-th smallest `by` gets the k-th smallest value.

    Stable sorts order ties by position, so the result and its gradient are deterministic.
    """
    rank = by.detach().argsort(stable=True).argsort(stable=True)
    return values.sort(stable=True).values[rank]


# --- the objectives -----------------------------------------------------------------------------------------------


def sigmoid(pairs: Pairs) -> Tensor:
    """DPO's loss, with label smoothing (conservative DPO)."""
    return _smoothed(pairs.beta * pairs.margins, pairs.label_smoothing)


def robust(pairs: Pairs) -> Tensor:
    """DPO's loss, made unbiased for labels that are flipped with probability label_smoothing."""
    x = pairs.beta * pairs.margins
    e = pairs.label_smoothing
    wrong = torch.where(e == 0, torch.zeros_like(x), e * F.logsigmoid(-x))
    return (-(1 - e) * F.logsigmoid(x) + wrong) / (1 - 2 * e)


def sigmoid_norm(pairs: Pairs) -> Tensor:
    """DPO's loss on mean-token log-ratios."""
    chosen = _per_token(pairs.chosen_logratios, pairs.chosen_lengths)
    rejected = _per_token(pairs.rejected_logratios, pairs.rejected_lengths)
    return _smoothed(pairs.beta * (chosen - rejected), pairs.label_smoothing)


def hinge(pairs: Pairs) -> Tensor:
    """Hinge loss of sequence likelihood calibration (SLiC)."""
    return F.relu(1 - pairs.beta * pairs.margins)


def ipo(pairs: Pairs) -> Tensor:
    """Squared distance of the per-token log-ratio difference from 1 / (2 beta)."""
    chosen = _per_token(pairs.chosen_logratios, pairs.chosen_lengths)
    rejected = _per_token(pairs.rejected_logratios, pairs.rejected_lengths)
    return (chosen - rejected - 1 / (2 * pairs.beta)) ** 2


def exo_pair(pairs: Pairs) -> Tensor:
    """Reverse KL between the policy's preference and the smoothed label."""
    x = pairs.beta * pairs.margins
    e = pairs.label_smoothing
    right, wrong = F.logsigmoid(x), F.logsigmoid(-x)
    return right.exp() * (right - torch.log1p(-e)) + wrong.exp() * (wrong - torch.log(e))


def nca_pair(pairs: Pairs) -> Tensor:
    """Noise-contrastive classification of each response on its own."""
    chosen, rejected = pairs.beta * pairs.chosen_logratios, pairs.beta * pairs.rejected_logratios
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def bco_pair(pairs: Pairs, shift: Tensor | float = 0.0) -> Tensor:
    """Binary classification of chosen against rejected at the decision boundary `shift`."""
    chosen, rejected = pairs.beta * pairs.chosen_logratios, pairs.beta * pairs.rejected_logratios
    return -F.logsigmoid(chosen - shift) - F.logsigmoid(shift - rejected)


def sppo_hard(pairs: Pairs) -> Tensor:
    """Squared distances of the log-ratios from +1 / (2 beta) (chosen) and -1 / (2 beta) (rejected)."""
    target = 0.5 / pairs.beta
    return (pairs.chosen_logratios - target) ** 2 + (pairs.rejected_logratios + target) ** 2


def aot(pairs: Pairs) -> Tensor:
    """DPO's loss on the differences between the k-th smallest margins of policy and reference."""
    policy = pairs.chosen_logps - pairs.rejected_logps
    reference = pairs.ref_chosen_logps - pairs.ref_rejected_logps
    return _smoothed(pairs.beta * (policy - _quantiles(reference, by=policy)), pairs.label_smoothing)


def aot_unpaired(pairs: Pairs) -> Tensor:
    """DPO's loss on the differences between the k-th smallest chosen and rejected log-ratios."""
    chosen = pairs.chosen_logratios
    return _smoothed(pairs.beta * (chosen - _quantiles(pairs.rejected_logratios, by=chosen)), pairs.label_smoothing)


def apo_zero(pairs: Pairs) -> Tensor:
    """Raises the chosen log-ratio and lowers the rejected one, independently."""
    return torch.sigmoid(-pairs.beta * pairs.chosen_logratios) + torch.sigmoid(pairs.beta * pairs.rejected_logratios)


def apo_down(pairs: Pairs) -> Tensor:
    """Lowers both log-ratios, the rejected one more."""
    return torch.sigmoid(pairs.beta * pairs.chosen_logratios) + torch.sigmoid(-pairs.beta * pairs.margins)


def discopop(pairs: Pairs, tau: float) -> Tensor:
    """Logistic loss blended with the exponential loss by a steep sigmoid gate."""
    x = pairs.beta * pairs.margins
    # exp(-x) * sigmoid(x / tau) as one exponential: as a product it would be inf * 0 at very negative x.
    gated_exponential = torch.exp(F.logsigmoid(x / tau) - x)
    return -F.logsigmoid(x) * torch.sigmoid(-x / tau) + gated_exponential


def sft(pairs: Pairs) -> Tensor:
    """Negative log-likelihood of the chosen tokens, scaled so that its mean over pairs is the mean over all tokens."""
    total = pairs.chosen_lengths.sum()
    tokens = torch.where(total > 0, total, torch.ones_like(total))
    return -pairs.chosen_logps * (pairs.chosen_logps.shape[0] / tokens)


def simpo(pairs: Pairs, gamma: float) -> Tensor:
    """Logistic loss on the difference of mean-token log-probabilities minus a margin, without a reference."""
    chosen = _per_token(pairs.chosen_logps, pairs.chosen_lengths)
    rejected = _per_token(pairs.rejected_logps, pairs.rejected_lengths)
    return _smoothed(pairs.beta * (chosen - rejected) - gamma, pairs.label_smoothing)


def cpo(pairs: Pairs, alpha: float) -> Tensor:
    """DPO with a uniform reference, plus the chosen response's mean-token negative log-likelihood."""
    preference = _smoothed(pairs.beta * (pairs.chosen_logps - pairs.rejected_logps), pairs.label_smoothing)
    return preference + alpha * _chosen_nll(pairs) if alpha else preference


def orpo(pairs: Pairs, alpha: float) -> Tensor:
    """Negative log-likelihood of the chosen response plus beta times a log odds-ratio penalty."""
    eps = torch.finfo(pairs.chosen_logps.dtype).eps
    # Clamped, because the odds are infinite at probability 1 (which a sequence without tokens has).
    chosen = _per_token(pairs.chosen_logps, pairs.chosen_lengths).clamp(max=-eps)
    rejected = _per_token(pairs.rejected_logps, pairs.rejected_lengths).clamp(max=-eps)
    log_odds = (chosen - rejected) - (torch.log(-torch.expm1(chosen)) - torch.log(-torch.expm1(rejected)))
    penalty = -pairs.beta * F.logsigmoid(log_odds)
    return penalty + alpha * _chosen_nll(pairs) if alpha else penalty


def dpop(pairs: Pairs, penalty: float) -> Tensor:
    """DPO with a penalty on chosen responses that are less likely under the policy than under the reference."""
    x = pairs.beta * (pairs.margins - penalty * F.relu(-pairs.chosen_logratios))
    return _smoothed(x, pairs.label_smoothing)


def rpo(pairs: Pairs, alpha: float) -> Tensor:
    """DPO plus the mean-token negative log-likelihood of the chosen response."""
    return sigmoid(pairs) + alpha * _chosen_nll(pairs)


def beta_dpo(pairs: Pairs, running: Tensor | float = 0.0, *, alpha: float, momentum: float) -> Tensor:
    """DPO with a larger beta on batches whose mean reward margin exceeds `running`, and a smaller one on others."""
    rewards = (pairs.beta * pairs.margins).detach()
    scale = 1 + alpha * (rewards.mean() - running)
    beta = (pairs.beta * scale).clamp(min=1e-3)
    return _smoothed(beta * pairs.margins, pairs.label_smoothing)


def _token_kl(pairs: Pairs) -> tuple[Tensor, Tensor]:
    if pairs.chosen_kl is None or pairs.rejected_kl is None:
        raise ValueError(
            "tdpo needs the token-level KL(reference || policy), which sums of log-probabilities do not determine: call "
            "dpo_loss with ref_logits"
        )
    return pairs.chosen_kl, pairs.rejected_kl


def tdpo(pairs: Pairs) -> Tensor:
    """DPO with the difference of the two answers' sequential KLs subtracted from the margin."""
    chosen_kl, rejected_kl = _token_kl(pairs)
    return _smoothed(pairs.beta * (pairs.margins - (rejected_kl - chosen_kl)), pairs.label_smoothing)


def tdpo2(pairs: Pairs, alpha: float) -> Tensor:
    """Like tdpo, with the KL difference scaled by alpha, and without the gradient that would raise the chosen answer's KL."""
    chosen_kl, rejected_kl = _token_kl(pairs)
    return _smoothed(pairs.beta * (pairs.margins - alpha * (rejected_kl - chosen_kl.detach())), pairs.label_smoothing)


# --- rewards to report --------------------------------------------------------------------------------------------


def logratio_rewards(pairs: Pairs) -> Rewards:
    """beta (log pi - log pi_ref): the implicit reward (DPO paper, section 5)."""
    return pairs.beta * pairs.chosen_logratios, pairs.beta * pairs.rejected_logratios


def logp_rewards(pairs: Pairs) -> Rewards:
    """beta log pi."""
    return pairs.beta * pairs.chosen_logps, pairs.beta * pairs.rejected_logps


def mean_logp_rewards(pairs: Pairs) -> Rewards:
    """beta log pi / length."""
    chosen = _per_token(pairs.chosen_logps, pairs.chosen_lengths)
    return pairs.beta * chosen, pairs.beta * _per_token(pairs.rejected_logps, pairs.rejected_lengths)


def token_rewards(pairs: Pairs) -> Rewards:
    """beta (log pi - log pi_ref + sequential KL)."""
    chosen_kl, rejected_kl = _token_kl(pairs)
    return pairs.beta * (pairs.chosen_logratios + chosen_kl), pairs.beta * (pairs.rejected_logratios + rejected_kl)
