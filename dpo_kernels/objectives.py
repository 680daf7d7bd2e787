"""The pair objectives: functions on vectors of length P, their mixing, and one registry that everything else iterates.

An objective sees no logits and no device: it gets the summed log-probabilities of each pair under policy and reference
(`Pairs`) and returns a loss per pair. Autograd differentiates it; the kernels take dL/dS from there.

Hyper-parameters that belong to one objective (SimPO's gamma, DPOP's penalty, ...) are bound before the call instead of
travelling through every signature of the library: `loss_type="simpo"` takes the defaults,
`loss_type=objective("simpo", gamma=1.0, beta=2.0)` sets them, and `"simpo(gamma=1.0, beta=2.0)"` is the same in the
text of a configuration file or command line. In a mix each objective so keeps its own.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Pairs:
    """What an objective may look at; every tensor is [P], float64 inside the kernels' path.

    Attributes:
        chosen_logps, rejected_logps: weighted sums of token log-probabilities under the policy, in nats.
        ref_chosen_logps, ref_rejected_logps: the same under the reference (0 when there is none).
        chosen_lengths, rejected_lengths: sums of the token weights (token counts, when no weights are given).
        beta: inverse temperature of the implicit reward; scalar or [P].
        label_smoothing: probability that the pair's label is wrong; scalar or [P].
        chosen_kl, rejected_kl: weighted sums over the tokens of KL(reference || policy), in nats; only for objectives
            whose row says `needs_token_kl`.
    """

    chosen_logps: Tensor
    rejected_logps: Tensor
    ref_chosen_logps: Tensor
    ref_rejected_logps: Tensor
    chosen_lengths: Tensor
    rejected_lengths: Tensor
    beta: Tensor
    label_smoothing: Tensor
    chosen_kl: Tensor | None = None
    rejected_kl: Tensor | None = None

    @classmethod
    def from_sums(
        cls,
        sums: Tensor,
        ref_sums: Tensor,
        lengths: Tensor,
        beta: Tensor,
        label_smoothing: Tensor,
        kl_sums: Tensor | None = None,
    ) -> Pairs:
        """Split [2P] vectors (chosen first, then rejected) into pairs."""
        chosen_kl, rejected_kl = (None, None) if kl_sums is None else kl_sums.chunk(2)
        (chosen, rejected), (ref_chosen, ref_rejected) = sums.chunk(2), ref_sums.chunk(2)
        chosen_lengths, rejected_lengths = lengths.chunk(2)
        return cls(
            chosen,
            rejected,
            ref_chosen,
            ref_rejected,
            chosen_lengths,
            rejected_lengths,
            beta,
            label_smoothing,
            chosen_kl,
            rejected_kl,
        )

    @property
    def chosen_logratios(self) -> Tensor:
        """log pi(chosen) - log pi_ref(chosen)."""
        return self.chosen_logps - self.ref_chosen_logps

    @property
    def rejected_logratios(self) -> Tensor:
        """log pi(rejected) - log pi_ref(rejected)."""
        return self.rejected_logps - self.ref_rejected_logps

    @property
    def margins(self) -> Tensor:
        """The log-ratio difference whose sigmoid is the preference probability (before beta)."""
        return self.chosen_logratios - self.rejected_logratios


Objective = Callable[[Pairs], Tensor]


# --- pieces that several objectives share -------------------------------------------------------------------------


def _per_token(sums: Tensor, lengths: Tensor) -> Tensor:
    """Weighted mean over a sequence's tokens; 0 for a sequence without any."""
    return sums / torch.where(lengths > 0, lengths, torch.ones_like(lengths))


def _smoothed(x: Tensor, e: Tensor) -> Tensor:
    """Cross-entropy of a label that is wrong with probability e, at logit x."""
    # A smoothing of exactly 0 must not meet the other side's infinity: 0 * inf is NaN.
    return -(1 - e) * F.logsigmoid(x) - torch.where(e == 0, torch.zeros_like(x), e * F.logsigmoid(-x))


def _chosen_nll(pairs: Pairs) -> Tensor:
    return -_per_token(pairs.chosen_logps, pairs.chosen_lengths)


def _quantiles(values: Tensor, by: Tensor) -> Tensor:
    """`values` sorted and dealt out so that the pair with the k-th smallest `by` gets the k-th smallest value.

    Ties go by position (stable sorts), so the result and its gradient are deterministic.
    """
    rank = by.detach().argsort(stable=True).argsort(stable=True)
    return values.sort(stable=True).values[rank]


# --- the objectives -----------------------------------------------------------------------------------------------


def sigmoid(pairs: Pairs) -> Tensor:
    """DPO's loss, with label smoothing (conservative DPO)."""
    return _smoothed(pairs.beta * pairs.margins, pairs.label_smoothing)


def robust(pairs: Pairs) -> Tensor:
    """Unbiased under labels flipped with probability label_smoothing."""
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
    """Margin loss of sequence likelihood calibration."""
    return F.relu(1 - pairs.beta * pairs.margins)


def ipo(pairs: Pairs) -> Tensor:
    """Squared distance of the per-token log-ratio difference from 1 / (2 beta)."""
    chosen = _per_token(pairs.chosen_logratios, pairs.chosen_lengths)
    rejected = _per_token(pairs.rejected_logratios, pairs.rejected_lengths)
    return (chosen - rejected - 1 / (2 * pairs.beta)) ** 2


def exo_pair(pairs: Pairs) -> Tensor:
    """Reverse KL from the policy's preference to the smoothed label's."""
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
    """Log-ratios regressed on +-1 / (2 beta)."""
    target = 0.5 / pairs.beta
    return (pairs.chosen_logratios - target) ** 2 + (pairs.rejected_logratios + target) ** 2


def aot(pairs: Pairs) -> Tensor:
    """The policy's margins must exceed the reference's quantile by quantile."""
    policy = pairs.chosen_logps - pairs.rejected_logps
    reference = pairs.ref_chosen_logps - pairs.ref_rejected_logps
    return _smoothed(pairs.beta * (policy - _quantiles(reference, by=policy)), pairs.label_smoothing)


def aot_unpaired(pairs: Pairs) -> Tensor:
    """The chosen log-ratios must exceed the rejected ones quantile by quantile."""
    chosen = pairs.chosen_logratios
    return _smoothed(pairs.beta * (chosen - _quantiles(pairs.rejected_logratios, by=chosen)), pairs.label_smoothing)


def apo_zero(pairs: Pairs) -> Tensor:
    """Chosen up, rejected down, each against the reference."""
    return torch.sigmoid(-pairs.beta * pairs.chosen_logratios) + torch.sigmoid(pairs.beta * pairs.rejected_logratios)


def apo_down(pairs: Pairs) -> Tensor:
    """Both down, rejected further."""
    return torch.sigmoid(pairs.beta * pairs.chosen_logratios) + torch.sigmoid(-pairs.beta * pairs.margins)


def discopop(pairs: Pairs, tau: float) -> Tensor:
    """Logistic loss blended with the exponential one by a steep gate."""
    x = pairs.beta * pairs.margins
    # exp(-x) * sigmoid(x / tau) in the exponent, where it cannot become inf * 0 at very negative x.
    gated_exponential = torch.exp(F.logsigmoid(x / tau) - x)
    return -F.logsigmoid(x) * torch.sigmoid(-x / tau) + gated_exponential


def sft(pairs: Pairs) -> Tensor:
    """Negative log-likelihood of the chosen tokens, so scaled that its mean over pairs is the mean over all tokens."""
    total = pairs.chosen_lengths.sum()
    tokens = torch.where(total > 0, total, torch.ones_like(total))
    return -pairs.chosen_logps * (pairs.chosen_logps.shape[0] / tokens)


def simpo(pairs: Pairs, gamma: float) -> Tensor:
    """Mean-token log-probabilities must differ by a margin, without a reference."""
    chosen = _per_token(pairs.chosen_logps, pairs.chosen_lengths)
    rejected = _per_token(pairs.rejected_logps, pairs.rejected_lengths)
    return _smoothed(pairs.beta * (chosen - rejected) - gamma, pairs.label_smoothing)


def cpo(pairs: Pairs, alpha: float) -> Tensor:
    """DPO under a uniform reference, plus the chosen response's likelihood."""
    preference = _smoothed(pairs.beta * (pairs.chosen_logps - pairs.rejected_logps), pairs.label_smoothing)
    return preference + alpha * _chosen_nll(pairs) if alpha else preference


def orpo(pairs: Pairs, alpha: float) -> Tensor:
    """Likelihood of the chosen response plus beta times a log odds-ratio penalty."""
    eps = torch.finfo(pairs.chosen_logps.dtype).eps
    # At probability 1 (or without tokens) the odds are infinite.
    chosen = _per_token(pairs.chosen_logps, pairs.chosen_lengths).clamp(max=-eps)
    rejected = _per_token(pairs.rejected_logps, pairs.rejected_lengths).clamp(max=-eps)
    log_odds = (chosen - rejected) - (torch.log(-torch.expm1(chosen)) - torch.log(-torch.expm1(rejected)))
    penalty = -pairs.beta * F.logsigmoid(log_odds)
    return penalty + alpha * _chosen_nll(pairs) if alpha else penalty


def dpop(pairs: Pairs, penalty: float) -> Tensor:
    """DPO with a penalty on chosen responses that the policy likes less than the reference does."""
    x = pairs.beta * (pairs.margins - penalty * F.relu(-pairs.chosen_logratios))
    return _smoothed(x, pairs.label_smoothing)


def rpo(pairs: Pairs, alpha: float) -> Tensor:
    """DPO plus the mean-token negative log-likelihood of the chosen response."""
    return sigmoid(pairs) + alpha * _chosen_nll(pairs)


def beta_dpo(pairs: Pairs, running: Tensor | float = 0.0, *, alpha: float, momentum: float) -> Tensor:
    """DPO whose beta rises on batches of easier pairs than usual (`running`) and falls on harder ones."""
    rewards = (pairs.beta * pairs.margins).detach()
    scale = 1 + alpha * (rewards.mean() - running)
    beta = (pairs.beta * scale).clamp(min=1e-3)
    return _smoothed(beta * pairs.margins, pairs.label_smoothing)


def _token_kl(pairs: Pairs) -> tuple[Tensor, Tensor]:
    if pairs.chosen_kl is None or pairs.rejected_kl is None:
        raise ValueError(
            "tdpo reads the token-level KL(reference || policy), which sums of log-probabilities do not determine: call "
            "dpo_loss with ref_logits"
        )
    return pairs.chosen_kl, pairs.rejected_kl


def tdpo(pairs: Pairs) -> Tensor:
    """DPO with each answer's sequential KL as part of its value."""
    chosen_kl, rejected_kl = _token_kl(pairs)
    return _smoothed(pairs.beta * (pairs.margins - (rejected_kl - chosen_kl)), pairs.label_smoothing)


def tdpo2(pairs: Pairs, alpha: float) -> Tensor:
    """As tdpo, scaled, and without a gradient that would widen the chosen answer's KL."""
    chosen_kl, rejected_kl = _token_kl(pairs)
    return _smoothed(pairs.beta * (pairs.margins - alpha * (rejected_kl - chosen_kl.detach())), pairs.label_smoothing)


# --- rewards to report --------------------------------------------------------------------------------------------

Rewards = tuple[Tensor, Tensor]


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


# --- f-divergences ------------------------------------------------------------------------------------------------


def _reverse_kl(logratio: Tensor, alpha: float) -> Tensor:
    return logratio


def _forward_kl(logratio: Tensor, alpha: float) -> Tensor:
    return -torch.expm1(-logratio)


def _js(logratio: Tensor, alpha: float) -> Tensor:
    return math.log(2) + F.logsigmoid(logratio)


def _alpha(logratio: Tensor, alpha: float) -> Tensor:
    if abs(alpha - 1) < 1e-6:
        return logratio
    # exp must stay finite, or the difference of two scores is inf - inf.
    ceiling = 80.0 if logratio.dtype == torch.float32 else 700.0
    return torch.expm1(((alpha - 1) * logratio).clamp(max=ceiling)) / (alpha - 1)


#: f'(pi / pi_ref) as a function of log(pi / pi_ref), which takes the log-ratio's place (Wang et al. 2023, Beyond
#: Reverse KL: Generalizing Direct Preference Optimization with Diverse Divergence Constraints).
DIVERGENCES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "reverse_kl": _reverse_kl,
    "forward_kl": _forward_kl,
    "js": _js,
    "alpha": _alpha,
}

#: The divergences' formulas, u = log(pi / pi_ref).
DIVERGENCE_FORMULAS = {
    "reverse_kl": "u",
    "forward_kl": "1 - exp(-u)",
    "js": "log 2 + log sigmoid(u)",
    "alpha": "(exp((a - 1) u) - 1) / (a - 1), a = divergence_alpha; u at a = 1",
}


# --- the registry -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Range:
    """An interval of legal values; `str()` shows it as mathematics does."""

    low: float
    high: float
    closed_low: bool = True
    closed_high: bool = True

    def holds(self, low: float, high: float) -> bool:
        """Whether all of [low, high] is legal (NaN is not)."""
        above = low >= self.low if self.closed_low else low > self.low
        return above and (high <= self.high if self.closed_high else high < self.high)

    def __str__(self) -> str:
        left = "[" if self.closed_low and math.isfinite(self.low) else "("
        right = "]" if self.closed_high and math.isfinite(self.high) else ")"
        return f"{left}{self.low:g}, {self.high:g}{right}"


POSITIVE = Range(0, math.inf, closed_low=False)
NON_NEGATIVE = Range(0, math.inf)


@dataclass(frozen=True)
class Parameter:
    """A hyper-parameter that belongs to one objective.

    Attributes:
        name: keyword of `objective(...)`.
        default: its value when not given.
        legal: values that make sense.
        help: what it does, in a phrase.
    """

    name: str
    default: float
    legal: Range
    help: str


@dataclass(frozen=True)
class ObjectiveInfo:
    """One row of the registry.

    Attributes:
        name: the value of `loss_type`.
        function: (Pairs, **parameters) -> losses [P]; with `observe`, (Pairs, running mean, **parameters).
        formula: in plain text. c, r: log-ratios log pi - log pi_ref of chosen and rejected; x = beta (c - r); e:
            label_smoothing; |.| lengths in tokens; s = sigmoid.
        source: paper: authors, year, title, equation.
        use: when to take it, in a sentence.
        smoothing_range: legal label_smoothing; None where it has no meaning.
        parameters: the objective's own hyper-parameters.
        needs_reference: compares with a reference, so calling without one is an error.
        needs_token_kl: reads Pairs.chosen_kl and rejected_kl, so the reference must come as logits (or hidden states).
        couples_pairs: a pair's loss depends on the other pairs of the batch.
        divergence: accepts `divergence=`: the loss depends on the two log-ratios through their difference, where
            f-DPO's unknown normalizer cancels.
        observe: for objectives that keep a running mean between calls: the values it is the mean of.
        reward: what is reported as rewards/chosen and rewards/rejected.
        typical_beta: where to start.
        kernel: (robust,) if the stage-2 kernel computes it in the forward launch itself; None otherwise.
    """

    name: str
    function: Callable[..., Tensor]
    formula: str
    source: str
    use: str
    smoothing_range: Range | None = None
    parameters: tuple[Parameter, ...] = ()
    needs_reference: bool = True
    needs_token_kl: bool = False
    couples_pairs: bool = False
    divergence: bool = False
    observe: Callable[[Pairs], Tensor] | None = None
    reward: Callable[[Pairs], Rewards] = logratio_rewards
    typical_beta: float = 0.1
    kernel: tuple[bool] | None = None


_SMOOTHING = Range(0, 1)
_NLL = Parameter("alpha", 1.0, NON_NEGATIVE, "weight of the chosen response's mean-token negative log-likelihood")

_ROWS = (
    ObjectiveInfo(
        "sigmoid",
        sigmoid,
        "-(1 - e) log s(x) - e log s(-x)",
        "Rafailov et al. 2023, Direct Preference Optimization: Your Language Model is Secretly a Reward Model, eq. 7; "
        "label smoothing: Mitchell 2023, A note on DPO with noisy preferences & relationship to IPO",
        "The default. With label smoothing (conservative DPO) when some labels are wrong.",
        _SMOOTHING,
        divergence=True,
        kernel=(False,),
    ),
    ObjectiveInfo(
        "sigmoid_norm",
        sigmoid_norm,
        "-(1 - e) log s(n) - e log s(-n), n = beta (c/|chosen| - r/|rejected|)",
        "Lambert et al. 2024, Tulu 3: Pushing Frontiers in Open Language Model Post-Training (length-normalized DPO)",
        "When answers grow longer with training: length no longer buys reward. Takes a larger beta.",
        _SMOOTHING,
        divergence=True,
        typical_beta=5.0,
    ),
    ObjectiveInfo(
        "robust",
        robust,
        "(-(1 - e) log s(x) + e log s(-x)) / (1 - 2 e)",
        "Chowdhury et al. 2024, Provably Robust DPO: Aligning Language Models with Noisy Feedback, eq. 12",
        "When a known share e of the labels is flipped at random: unbiased, at a higher variance than smoothing.",
        Range(0, 0.5, closed_high=False),
        divergence=True,
        kernel=(True,),
    ),
    ObjectiveInfo(
        "hinge",
        hinge,
        "max(0, 1 - x)",
        "Liu et al. 2023, Statistical Rejection Sampling Improves Preference Optimization (normalized hinge loss); "
        "after Zhao et al. 2023, SLiC-HF: Sequence Likelihood Calibration with Human Feedback",
        "Pairs beyond the margin stop pulling: a plain guard against over-optimising easy pairs.",
        divergence=True,
    ),
    ObjectiveInfo(
        "ipo",
        ipo,
        "(c/|chosen| - r/|rejected| - 1/(2 beta))^2",
        "Azar et al. 2023, A General Theoretical Paradigm to Understand Learning from Human Preferences, eq. 17, on "
        "mean-token log-ratios as in its authors' experiments",
        "Nearly deterministic labels, where DPO would push margins without end: here they have a target.",
        divergence=True,
    ),
    ObjectiveInfo(
        "exo_pair",
        exo_pair,
        "s(x) (log s(x) - log(1 - e)) + s(-x) (log s(-x) - log e)",
        "Ji et al. 2024, Towards Efficient Exact Optimization of Language Model Alignment, eq. 16",
        "Mode-seeking variant of DPO; give label_smoothing (the paper: 1e-3), it is the target's other side.",
        Range(0, 1, closed_low=False, closed_high=False),
        divergence=True,
    ),
    ObjectiveInfo(
        "nca_pair",
        nca_pair,
        "-log s(beta c) - log s(-beta c) / 2 - log s(-beta r) / 2",
        "Chen et al. 2024, Noise Contrastive Alignment of Language Models with Explicit Rewards (pairwise NCA)",
        "When DPO lowers the likelihood of chosen answers: absolute rewards are learnt, not their difference only.",
        typical_beta=0.01,
    ),
    ObjectiveInfo(
        "bco_pair",
        bco_pair,
        "-log s(beta c) - log s(-beta r)",
        "Jung et al. 2024, Binary Classifier Optimization for Large Language Model Alignment, with reward shift 0",
        "Thumbs-up / thumbs-down data that happen to be paired.",
    ),
    ObjectiveInfo(
        "bco_running",
        bco_pair,
        "-log s(beta c - d) - log s(d - beta r), d = running mean of all rewards seen",
        "Jung et al. 2024, Binary Classifier Optimization for Large Language Model Alignment (reward shift)",
        "As bco_pair, as the paper has it: the shift tightens the bound on DPO's loss.",
        couples_pairs=True,
        observe=lambda pairs: torch.cat(logratio_rewards(pairs)),
    ),
    ObjectiveInfo(
        "sppo_hard",
        sppo_hard,
        "(c - 1/(2 beta))^2 + (r + 1/(2 beta))^2",
        "Wu et al. 2024, Self-Play Preference Optimization for Language Model Alignment, eq. 4.7 with hard "
        "probabilities",
        "Rounds of self-play, labels from a preference model.",
        typical_beta=0.001,
    ),
    ObjectiveInfo(
        "aot",
        aot,
        "-(1 - e) log s(y) - e log s(-y), y = beta (k-th smallest policy margin - k-th smallest reference margin)",
        "Melnyk et al. 2024, Distributional Preference Alignment of LLMs via Optimal Transport (paired)",
        "Large batches: the distribution of margins must improve everywhere, not each pair's.",
        _SMOOTHING,
        couples_pairs=True,
    ),
    ObjectiveInfo(
        "aot_unpaired",
        aot_unpaired,
        "-(1 - e) log s(y) - e log s(-y), y = beta (k-th smallest c - k-th smallest r)",
        "Melnyk et al. 2024, Distributional Preference Alignment of LLMs via Optimal Transport (unpaired)",
        "Large batches of good and bad answers that do not belong to the same prompts.",
        _SMOOTHING,
        couples_pairs=True,
    ),
    ObjectiveInfo(
        "apo_zero",
        apo_zero,
        "s(-beta c) + s(beta r)",
        "D'Oosterlinck et al. 2024, Anchored Preference Optimization and Contrastive Revisions, eq. 7",
        "Chosen answers better than what the model writes now: raises them, lowers the rejected ones.",
    ),
    ObjectiveInfo(
        "apo_down",
        apo_down,
        "s(beta c) + s(-x)",
        "D'Oosterlinck et al. 2024, Anchored Preference Optimization and Contrastive Revisions, eq. 8",
        "Chosen answers worse than what the model writes now: lowers both, the rejected ones more.",
    ),
    ObjectiveInfo(
        "discopop",
        discopop,
        "-(1 - s(x/tau)) log s(x) + s(x/tau) exp(-x)",
        "Lu et al. 2024, Discovering Preference Optimization Algorithms with and for Large Language Models, eq. 5",
        "The loss a language model found by search; not convex around x = 0.",
        typical_beta=0.05,
        parameters=(Parameter("tau", 0.05, POSITIVE, "temperature of the gate"),),
        divergence=True,
    ),
    ObjectiveInfo(
        "sft",
        sft,
        "-log pi(chosen) P / (tokens of all chosen)",
        "maximum likelihood",
        "As a term of a mix: keeps the chosen answers likely.",
        needs_reference=False,
        couples_pairs=True,
    ),
    ObjectiveInfo(
        "simpo",
        simpo,
        "-(1 - e) log s(m) - e log s(-m), m = beta (log pi(chosen)/|chosen| - log pi(rejected)/|rejected|) - gamma",
        "Meng et al. 2024, SimPO: Simple Preference Optimization with a Reference-Free Reward, eq. 6",
        "No reference model in memory; reward is what generation ranks by. Takes a larger beta.",
        _SMOOTHING,
        (Parameter("gamma", 0.5, NON_NEGATIVE, "target reward margin"),),
        needs_reference=False,
        reward=mean_logp_rewards,
        typical_beta=2.0,
    ),
    ObjectiveInfo(
        "cpo",
        cpo,
        "-(1 - e) log s(m) - e log s(-m) - alpha log pi(chosen)/|chosen|, m = beta (log pi(chosen) - log pi(rejected))",
        "Xu et al. 2024, Contrastive Preference Optimization: Pushing the Boundaries of LLM Performance in Machine "
        "Translation, eq. 3 and its likelihood term",
        "No reference model in memory; the likelihood term stands in for it.",
        _SMOOTHING,
        (_NLL,),
        needs_reference=False,
        reward=logp_rewards,
    ),
    ObjectiveInfo(
        "orpo",
        orpo,
        "-alpha log pi(chosen)/|chosen| - beta log s(o), o = log odds(chosen) - log odds(rejected), "
        "odds = p/(1 - p), p = exp(log pi/| |)",
        "Hong et al. 2024, ORPO: Monolithic Preference Optimization without Reference Model, eq. 6 and 7 "
        "(lambda = beta)",
        "One stage from a base model: instruction tuning and preferences at once, no reference.",
        None,
        (_NLL,),
        needs_reference=False,
        reward=mean_logp_rewards,
    ),
    ObjectiveInfo(
        "dpop",
        dpop,
        "-(1 - e) log s(y) - e log s(-y), y = x - beta penalty max(0, -c)",
        "Pal et al. 2024, Smaug: Fixing Failure Modes of Preference Optimisation with DPO-Positive, eq. 3",
        "Chosen and rejected differ in few tokens: DPO would lower both, here the chosen one may not fall.",
        _SMOOTHING,
        (Parameter("penalty", 50.0, NON_NEGATIVE, "weight of a fall of the chosen log-ratio (the paper's lambda)"),),
        typical_beta=0.3,
    ),
    ObjectiveInfo(
        "rpo",
        rpo,
        "-(1 - e) log s(x) - e log s(-x) - alpha log pi(chosen)/|chosen|",
        "Pang et al. 2024, Iterative Reasoning Preference Optimization, eq. 1",
        "Reasoning chains, and whenever the likelihood of chosen answers falls under DPO.",
        _SMOOTHING,
        (_NLL,),
    ),
    ObjectiveInfo(
        "tdpo",
        tdpo,
        "-(1 - e) log s(y) - e log s(-y), y = x - beta (K(rejected) - K(chosen)), K = sum over tokens of KL(pi_ref || pi)",
        "Zeng et al. 2024, Token-level Direct Preference Optimization (TDPO1)",
        "KL to the reference grows faster on rejected answers than wanted: balances it token by token.",
        _SMOOTHING,
        needs_token_kl=True,
        reward=token_rewards,
    ),
    ObjectiveInfo(
        "tdpo2",
        tdpo2,
        "-(1 - e) log s(y) - e log s(-y), y = x - alpha beta (K(rejected) - stop-gradient K(chosen))",
        "Zeng et al. 2024, Token-level Direct Preference Optimization (TDPO2)",
        "As tdpo, with the strength of the balance in alpha; the paper's better one.",
        _SMOOTHING,
        (Parameter("alpha", 0.5, NON_NEGATIVE, "weight of the KL difference"),),
        needs_token_kl=True,
        reward=token_rewards,
    ),
    ObjectiveInfo(
        "beta_dpo",
        beta_dpo,
        "-(1 - e) log s(b x) - e log s(-b x), b = 1 + alpha (mean of x over the batch - its running mean)",
        "Wu et al. 2024, beta-DPO: Direct Preference Optimization with Dynamic beta (batch-level dynamic beta; beta at "
        "least 1e-3 as in its code)",
        "Data of mixed quality: batches of easy pairs get a larger beta, close pairs a smaller one.",
        _SMOOTHING,
        (
            Parameter("alpha", 0.6, NON_NEGATIVE, "how strongly beta follows the batch"),
            Parameter("momentum", 0.9, Range(0, 1, closed_high=False), "memory of the running mean"),
        ),
        couples_pairs=True,
        observe=lambda pairs: pairs.beta * pairs.margins,
    ),
)

#: Every named objective, by its name.
OBJECTIVES: dict[str, ObjectiveInfo] = {row.name: row for row in _ROWS}


def _unknown(kind: str, name: str, known: Sequence[str]) -> ValueError:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ";"
    return ValueError(f"unknown {kind} {name!r}{hint} known: {', '.join(sorted(known))}")


def lookup(name: str) -> ObjectiveInfo:
    """The registry's row for `name`. Raises ValueError listing the known names and the nearest match."""
    if name in OBJECTIVES:
        return OBJECTIVES[name]
    raise _unknown("loss_type", name, list(OBJECTIVES))


# --- objectives with their hyper-parameters -----------------------------------------------------------------------


@dataclass(frozen=True)
class BoundObjective:
    """A registry row with its hyper-parameters: a callable Pairs -> losses [P]. Made by `objective`.

    Attributes:
        info: the row.
        parameters: (name, value) of each of the row's parameters.
        beta, label_smoothing: override the call's; None takes the call's.
        divergence: a name in `DIVERGENCES`.
        divergence_alpha: the alpha of the alpha-divergence.
    """

    info: ObjectiveInfo
    parameters: tuple[tuple[str, float], ...] = ()
    beta: float | None = None
    label_smoothing: float | None = None
    divergence: str = "reverse_kl"
    divergence_alpha: float = 1.0

    def _own(self, pairs: Pairs) -> Pairs:
        if self.beta is not None:
            pairs = replace(pairs, beta=torch.full_like(pairs.beta, self.beta))
        if self.label_smoothing is not None:
            pairs = replace(pairs, label_smoothing=torch.full_like(pairs.label_smoothing, self.label_smoothing))
        return pairs

    def __call__(self, pairs: Pairs, *state: Tensor) -> Tensor:
        pairs = self._own(pairs)
        if self.divergence != "reverse_kl":
            score = DIVERGENCES[self.divergence]
            nothing = torch.zeros_like(pairs.ref_chosen_logps)
            pairs = replace(
                pairs,
                chosen_logps=score(pairs.chosen_logratios, self.divergence_alpha),
                rejected_logps=score(pairs.rejected_logratios, self.divergence_alpha),
                ref_chosen_logps=nothing,
                ref_rejected_logps=nothing,
            )
        return self.info.function(pairs, *state, **dict(self.parameters))

    def rewards(self, pairs: Pairs) -> Rewards:
        """(chosen, rejected) rewards [P] that this objective reports; never of a divergence's scores."""
        return self.info.reward(self._own(pairs))

    @property
    def kernel(self) -> tuple[bool] | None:
        """(robust,) if the stage-2 kernel computes exactly this; None otherwise."""
        plain = self.beta is None and self.label_smoothing is None and self.divergence == "reverse_kl"
        return self.info.kernel if plain else None

    def __str__(self) -> str:
        """The text form, which `loss_type` accepts."""
        said = [f"{name}={value:g}" for name, value in self.parameters]
        own = {"beta": self.beta, "label_smoothing": self.label_smoothing}
        said += [f"{name}={value:g}" for name, value in own.items() if value is not None]
        if self.divergence != "reverse_kl":
            said.append(f"divergence={self.divergence}")
            if self.divergence == "alpha":
                said.append(f"divergence_alpha={self.divergence_alpha:g}")
        return f"{self.info.name}({', '.join(said)})" if said else self.info.name


class RunningObjective(nn.Module):
    """An objective that keeps a running mean between calls; a module, so that checkpoints and `.train()` reach it.

    In training mode each call first adds its batch to the mean (over all processes, where torch.distributed runs; then
    every process must call at the same step), then uses the mean as a constant. In eval mode the mean stands still.
    With the parameter `momentum` the mean forgets exponentially, starting from 0; without, it is over all values seen.
    """

    mean: Tensor
    count: Tensor

    def __init__(self, bound: BoundObjective) -> None:
        super().__init__()
        self.bound = bound
        self.register_buffer("mean", torch.zeros((), dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    @property
    def info(self) -> ObjectiveInfo:
        """The registry's row."""
        return self.bound.info

    @torch.no_grad()
    def _observe(self, pairs: Pairs) -> None:
        assert self.info.observe is not None
        values = self.info.observe(self.bound._own(pairs)).detach()
        seen = torch.stack([values.sum(), torch.full_like(values.sum(), values.numel())])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(seen)
        total, number = seen[0], seen[1]
        self.mean, self.count = self.mean.to(seen), self.count.to(seen)
        batch_mean = torch.where(number > 0, total / number.clamp(min=1), self.mean)
        momentum = dict(self.bound.parameters).get("momentum")
        self.count = self.count + number
        share = number / self.count.clamp(min=1) if momentum is None else 1 - momentum
        self.mean = self.mean + share * (batch_mean - self.mean)

    def forward(self, pairs: Pairs) -> Tensor:
        """Losses [P]."""
        if self.training:
            self._observe(pairs)
        return self.bound(pairs, self.mean.to(pairs.chosen_logps))

    def rewards(self, pairs: Pairs) -> Rewards:
        """See `BoundObjective.rewards`."""
        return self.bound.rewards(pairs)

    def __str__(self) -> str:
        return str(self.bound)

    def extra_repr(self) -> str:
        """Shown by print(module)."""
        return str(self.bound)


Named = BoundObjective | RunningObjective


def _check_range(what: str, value: float, legal: Range) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{what} must be a number; got {type(value).__name__}")
    if not legal.holds(value, value):
        raise ValueError(f"{what} must lie in {legal}; got {value:g}")
    return float(value)


def objective(
    name: str,
    *,
    beta: float | None = None,
    label_smoothing: float | None = None,
    divergence: str = "reverse_kl",
    divergence_alpha: float = 1.0,
    **parameters: float,
) -> Named:
    """A named objective with its hyper-parameters set, to be passed as `loss_type` or in a mix.

        dpo_loss(logits, labels, loss_type=objective("simpo", gamma=1.0, beta=2.0))
        DPOLoss(loss_type=[objective("sigmoid", divergence="js"), "sft"], loss_weights=[1.0, 0.1])

    Args:
        name: a name in `OBJECTIVES`.
        beta, label_smoothing: this objective's own, instead of the call's.
        divergence: "reverse_kl" (DPO), "forward_kl", "js" or "alpha" (f-DPO, Wang et al. 2023); only where the row's
            `divergence` is true.
        divergence_alpha: alpha of "alpha"; 1 is reverse_kl, 0 is forward_kl.
        parameters: the row's own parameters.

    Returns:
        A callable Pairs -> losses [P]. For rows with a running mean it is an nn.Module with state: make it once.

    Raises:
        ValueError: unknown name, parameter or divergence (with the known ones), or a value out of its range.
    """
    info = lookup(name)
    known = {parameter.name: parameter for parameter in info.parameters}
    for given in parameters:
        if given not in known:
            takes = ["beta", "divergence"] if info.divergence else ["beta"]
            takes = [*known, *takes, *(["label_smoothing"] if info.smoothing_range else [])]
            raise ValueError(f"objective {name!r} has no parameter {given!r}; it has: {', '.join(takes)}")
    values = tuple(
        (key, _check_range(f"{key} of {name!r}", parameters.get(key, parameter.default), parameter.legal))
        for key, parameter in known.items()
    )
    if divergence not in DIVERGENCES:
        raise _unknown("divergence", divergence, list(DIVERGENCES))
    if divergence != "reverse_kl" and not info.divergence:
        able = ", ".join(row.name for row in _ROWS if row.divergence)
        raise ValueError(
            f"objective {name!r} cannot take divergence={divergence!r}: f-DPO's normalizer cancels only in the "
            f"difference of the two log-ratios. Objectives that can: {able}"
        )
    if beta is not None:
        _check_range(f"beta of {name!r}", beta, POSITIVE)
    if label_smoothing is not None:
        check_smoothing(name, label_smoothing)
    bound = BoundObjective(info, values, beta, label_smoothing, divergence, float(divergence_alpha))
    return bound if info.observe is None else RunningObjective(bound)


_DEFAULTS: dict[str, BoundObjective] = {
    row.name: cast(BoundObjective, objective(row.name)) for row in _ROWS if row.observe is None
}
_CALL = re.compile(r"\s*(\w+)\s*\((.*)\)\s*", re.DOTALL)


def parse(text: str) -> Named:
    """The objective that a text names: "simpo", or with hyper-parameters "simpo(gamma=1.0, beta=2)".

    Raises:
        ValueError: see `objective`, or the text has another form.
    """
    if text in _DEFAULTS:
        return _DEFAULTS[text]
    call = _CALL.fullmatch(text)
    if call is None:
        return objective(text.strip())
    keywords: dict[str, float | str] = {}
    for item in filter(None, (part.strip() for part in call[2].split(","))):
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals:
            raise ValueError(f"cannot read {item!r} in loss_type {text!r}; write name(key=value, ...)")
        try:
            keywords[key] = float(value)
        except ValueError:
            keywords[key] = value.strip("'\"")
    return objective(call[1], **keywords)  # type: ignore[arg-type]


def as_list(loss_type: str | Objective | Sequence[str | Objective]) -> list[str | Objective]:
    """One objective or several, as a list."""
    return [loss_type] if isinstance(loss_type, str) or callable(loss_type) else list(loss_type)


def build(loss_type: str | Objective | Sequence[str | Objective]) -> list[Objective]:
    """The objectives that `loss_type` names, as callables; those with state are made anew: the caller keeps them."""
    found: list[Objective] = []
    for entry in as_list(loss_type):
        if not isinstance(entry, str) and not callable(entry):
            raise TypeError(f"loss_type must hold names or callables on Pairs; got {type(entry).__name__}")
        found.append(parse(entry) if isinstance(entry, str) else entry)
    if not found:
        raise ValueError("loss_type is empty; name at least one objective")
    return found


def resolve(loss_type: str | Objective | Sequence[str | Objective]) -> list[Objective]:
    """As `build`, but a name whose objective has state is an error: nobody would keep the state.

    Raises:
        ValueError, TypeError: see `parse`.
    """
    found = build(loss_type)
    for entry, made in zip(as_list(loss_type), found, strict=True):
        if isinstance(made, RunningObjective) and isinstance(entry, str):
            raise ValueError(
                f"loss_type {entry!r} keeps a running mean between calls: make it once, "
                f"kept = objective({made.info.name!r}), and pass loss_type=kept each time (DPOLoss does that for you)"
            )
    return found


# --- checks and mixing --------------------------------------------------------------------------------------------


def _extremes(value: float | Tensor) -> tuple[float, float] | None:
    """(min, max) of a number or tensor; None where looking would synchronise, or there is nothing to see."""
    if not isinstance(value, Tensor):
        return float(value), float(value)
    if value.device.type != "cpu" or value.numel() == 0 or torch.compiler.is_compiling():
        return None
    return value.min().item(), value.max().item()


def check_smoothing(loss_type: str, label_smoothing: float | Tensor) -> None:
    """Raise ValueError if label_smoothing is illegal for the objective (text as for `parse`), naming the legal range.

    Tensors on an accelerator are not checked: that would synchronise.
    """
    name = loss_type.partition("(")[0].strip()
    legal = lookup(name).smoothing_range
    ends = _extremes(label_smoothing)
    if ends is None:
        return
    if legal is None:
        if ends != (0.0, 0.0):
            able = ", ".join(row.name for row in _ROWS if row.smoothing_range)
            raise ValueError(f"loss_type {name!r} has no label smoothing; got {label_smoothing}. These have: {able}")
    elif not legal.holds(*ends):
        raise ValueError(f"label_smoothing must lie in {legal} for loss_type {name!r}; got {label_smoothing}")


def check(
    objectives: Sequence[Objective],
    loss_weights: Sequence[float] | None,
    label_smoothing: float | Tensor,
    *,
    has_reference: bool | None = None,
) -> None:
    """Raise unless the objectives can be computed from what the call gives; user callables are not judged.

    Args:
        objectives: from `build` or `resolve`.
        has_reference: whether the call brings a reference; None if that is not known yet.

    Raises:
        ValueError: loss_weights of another length; label_smoothing out of an objective's range (the range is said), or
            given though no objective of the mix has it; an objective that needs a reference, without one.
    """
    if loss_weights is not None and len(loss_weights) != len(objectives):
        raise ValueError(f"loss_weights has {len(loss_weights)} entries for {len(objectives)} objectives in loss_type")
    named = [entry.bound if isinstance(entry, RunningObjective) else entry for entry in objectives]
    bound = [entry for entry in named if isinstance(entry, BoundObjective)]
    takers = [entry for entry in bound if entry.info.smoothing_range is not None]
    for entry in takers:
        if entry.label_smoothing is None:
            check_smoothing(entry.info.name, label_smoothing)
    if bound and not takers and len(bound) == len(named):
        check_smoothing(bound[0].info.name, label_smoothing)
    if has_reference is False:
        for entry in bound:
            if entry.info.needs_reference:
                free = ", ".join(row.name for row in _ROWS if not row.needs_reference)
                raise ValueError(
                    f"loss_type {entry.info.name!r} compares the policy with a reference, and none was given: pass the "
                    f"reference's logits (or hidden states), or ref_logps [2P] (zeros stand for a uniform reference). "
                    f"Objectives without a reference: {free}"
                )


def couples_pairs(objectives: Sequence[Objective]) -> bool:
    """Whether a pair's loss may depend on the batch's other pairs; assumed of user callables that do not deny it.

    A callable may carry the attribute `couples_pairs = False`, so that the linear path can take it in chunks.
    """
    return any(
        entry.info.couples_pairs if isinstance(entry, Named) else getattr(entry, "couples_pairs", True)
        for entry in objectives
    )


def needs_token_kl(objectives: Sequence[Objective]) -> bool:
    """Whether any named objective reads Pairs.chosen_kl."""
    return any(isinstance(entry, Named) and entry.info.needs_token_kl for entry in objectives)


def mix(
    pairs: Pairs,
    loss_type: str | Objective | Sequence[str | Objective],
    loss_weights: Sequence[float] | None = None,
) -> Tensor:
    """The weighted sum of one or several objectives, [P]. Weights default to 1 each."""
    functions = resolve(loss_type)
    weights = [1.0] * len(functions) if loss_weights is None else list(loss_weights)
    losses = [
        function(pairs) if w == 1.0 else w * function(pairs) for function, w in zip(functions, weights, strict=True)
    ]
    return losses[0] if len(losses) == 1 else torch.stack(losses).sum(0)


def rewards(pairs: Pairs, loss_type: str | Objective | Sequence[str | Objective]) -> Rewards:
    """(chosen, rejected) rewards [P] to report: the first objective's, beta times the log-ratio for a user callable."""
    first = resolve(loss_type)[0]
    return first.rewards(pairs) if isinstance(first, Named) else logratio_rewards(pairs)


# --- length desensitisation ---------------------------------------------------------------------------------------


def length_desensitized_weights(
    labels: Tensor, ld_alpha: float, *, cu_seqlens: Tensor | None = None, ignore_index: int = -100
) -> Tensor:
    """Token weights of LD-DPO: 1 up to the shorter answer's length, `ld_alpha` on what the longer one has beyond it.

    Args:
        labels: [2P, T] int64, or packed [N] with `cu_seqlens` [2P + 1]; chosen first.
        ld_alpha: in [0, 1]; 1 changes nothing, 0 drops the tail.

    Returns:
        `token_weights` for `dpo_loss`, shaped like labels, float32; 0 on ignored tokens. Objectives that divide by
        length divide by the sum of these weights.

    Raises:
        ValueError: ld_alpha outside [0, 1].

    Source: Liu et al. 2024, Length Desensitization in Direct Preference Optimization.
    """
    if not 0 <= ld_alpha <= 1:
        raise ValueError(f"ld_alpha must lie in [0, 1]; got {ld_alpha}")
    scored = labels != ignore_index
    if cu_seqlens is None:
        place = scored.cumsum(-1)
        counts = scored.sum(-1)
        common = torch.minimum(*counts.chunk(2)).repeat(2).unsqueeze(-1)
    else:
        bounds = cu_seqlens.to(torch.int64)
        running = torch.cat([scored.new_zeros(1, dtype=torch.int64), scored.cumsum(0)])
        starts = running[bounds[:-1]]
        counts = running[bounds[1:]] - starts
        position = torch.arange(labels.shape[0], device=labels.device)
        # Tokens behind the last sequence belong to nobody: any owner will do, no label there counts.
        owner = torch.bucketize(position, bounds[1:], right=True).clamp(max=counts.shape[0] - 1)
        place = running[1:] - starts[owner]
        common = torch.minimum(*counts.chunk(2)).repeat(2)[owner]
    weights = torch.where(place <= common, 1.0, ld_alpha)
    return torch.where(scored, weights, 0.0)
