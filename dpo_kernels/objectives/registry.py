"""The registry: one row per named objective. Argument checks, tests, docs and benchmarks iterate over it."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .formulas import (
    aot,
    aot_unpaired,
    apo_down,
    apo_zero,
    bco_pair,
    beta_dpo,
    cpo,
    discopop,
    dpop,
    exo_pair,
    hinge,
    ipo,
    logp_rewards,
    logratio_rewards,
    mean_logp_rewards,
    nca_pair,
    orpo,
    robust,
    rpo,
    sft,
    sigmoid,
    sigmoid_norm,
    simpo,
    sppo_hard,
    tdpo,
    tdpo2,
    token_rewards,
)
from .pairs import Pairs, Rewards


@dataclass(frozen=True)
class Range:
    """An interval of legal values; `str()` gives interval notation, such as "[0, 1)"."""

    low: float
    high: float
    closed_low: bool = True
    closed_high: bool = True

    def holds(self, low: float, high: float) -> bool:
        """Whether all of [low, high] is legal; NaN is not."""
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
        default: its default value.
        legal: the range of legal values.
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
        formula: the loss as plain text. c and r are the log-ratios log pi - log pi_ref of chosen and rejected;
            x = beta (c - r); e is label_smoothing; |.| is a length in tokens; s is the sigmoid.
        source: the paper: authors, year, title, equation.
        use: when to use it, in a sentence.
        smoothing_range: legal label_smoothing; None if the objective does not support it.
        parameters: the objective's own hyper-parameters.
        needs_reference: compares the policy with a reference, so a call without one is an error.
        needs_token_kl: reads Pairs.chosen_kl and rejected_kl, so the reference must be given as logits (or hidden states).
        couples_pairs: a pair's loss depends on the other pairs of the batch.
        divergence: accepts `divergence=`. The loss then depends on the two log-ratios only through their difference, in
            which f-DPO's unknown normalizer cancels.
        observe: for an objective with a running mean between calls: the values that enter the mean.
        reward: what is reported as rewards/chosen and rewards/rejected.
        typical_beta: a beta to start with.
        kernel: "sigmoid" or "robust" if the kernels of stage 2 compute this objective; None otherwise.
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
    kernel: str | None = None


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
        kernel="sigmoid",
    ),
    ObjectiveInfo(
        "sigmoid_norm",
        sigmoid_norm,
        "-(1 - e) log s(n) - e log s(-n), n = beta (c/|chosen| - r/|rejected|)",
        "Lambert et al. 2024, Tulu 3: Pushing Frontiers in Open Language Model Post-Training (length-normalized DPO)",
        "When training makes answers longer: the reward no longer grows with length. Needs a larger beta.",
        _SMOOTHING,
        divergence=True,
        typical_beta=5.0,
    ),
    ObjectiveInfo(
        "robust",
        robust,
        "(-(1 - e) log s(x) + e log s(-x)) / (1 - 2 e)",
        "Chowdhury et al. 2024, Provably Robust DPO: Aligning Language Models with Noisy Feedback, eq. 12",
        "When a known share e of the labels is flipped at random: unbiased, with a higher variance than smoothing.",
        Range(0, 0.5, closed_high=False),
        divergence=True,
        kernel="robust",
    ),
    ObjectiveInfo(
        "hinge",
        hinge,
        "max(0, 1 - x)",
        "Liu et al. 2023, Statistical Rejection Sampling Improves Preference Optimization (normalized hinge loss); "
        "after Zhao et al. 2023, SLiC-HF: Sequence Likelihood Calibration with Human Feedback",
        "Against over-optimization of easy pairs: a pair beyond the margin has no gradient.",
        divergence=True,
    ),
    ObjectiveInfo(
        "ipo",
        ipo,
        "(c/|chosen| - r/|rejected| - 1/(2 beta))^2",
        "Azar et al. 2023, A General Theoretical Paradigm to Understand Learning from Human Preferences, eq. 17, on "
        "mean-token log-ratios as in its authors' experiments",
        "Nearly deterministic labels, for which DPO would grow margins without limit: margins have a target.",
        divergence=True,
    ),
    ObjectiveInfo(
        "exo_pair",
        exo_pair,
        "s(x) (log s(x) - log(1 - e)) + s(-x) (log s(-x) - log e)",
        "Ji et al. 2024, Towards Efficient Exact Optimization of Language Model Alignment, eq. 16",
        "Mode-seeking variant of DPO. Needs label_smoothing (1e-3 in the paper): the target's probability of a wrong label.",
        Range(0, 1, closed_low=False, closed_high=False),
        divergence=True,
    ),
    ObjectiveInfo(
        "nca_pair",
        nca_pair,
        "-log s(beta c) - log s(-beta c) / 2 - log s(-beta r) / 2",
        "Chen et al. 2024, Noise Contrastive Alignment of Language Models with Explicit Rewards (pairwise NCA)",
        "When DPO lowers the likelihood of chosen answers: learns absolute rewards, not only their difference.",
        typical_beta=0.01,
    ),
    ObjectiveInfo(
        "bco_pair",
        bco_pair,
        "-log s(beta c) - log s(-beta r)",
        "Jung et al. 2024, Binary Classifier Optimization for Large Language Model Alignment, with reward shift 0",
        "Thumbs-up / thumbs-down data that come in pairs.",
    ),
    ObjectiveInfo(
        "bco_running",
        bco_pair,
        "-log s(beta c - d) - log s(d - beta r), d = running mean of all rewards seen",
        "Jung et al. 2024, Binary Classifier Optimization for Large Language Model Alignment (reward shift)",
        "Like bco_pair, with the paper's reward shift, which tightens the bound on DPO's loss.",
        couples_pairs=True,
        observe=lambda pairs: torch.cat(logratio_rewards(pairs)),
    ),
    ObjectiveInfo(
        "sppo_hard",
        sppo_hard,
        "(c - 1/(2 beta))^2 + (r + 1/(2 beta))^2",
        "Wu et al. 2024, Self-Play Preference Optimization for Language Model Alignment, eq. 4.7 with hard "
        "probabilities",
        "Rounds of self-play with labels from a preference model.",
        typical_beta=0.001,
    ),
    ObjectiveInfo(
        "aot",
        aot,
        "-(1 - e) log s(y) - e log s(-y), y = beta (k-th smallest policy margin - k-th smallest reference margin)",
        "Melnyk et al. 2024, Distributional Preference Alignment of LLMs via Optimal Transport (paired)",
        "Large batches: improves every quantile of the margins instead of each pair's margin.",
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
        "Chosen answers better than the model's own: raises chosen likelihoods, lowers rejected ones.",
    ),
    ObjectiveInfo(
        "apo_down",
        apo_down,
        "s(beta c) + s(-x)",
        "D'Oosterlinck et al. 2024, Anchored Preference Optimization and Contrastive Revisions, eq. 8",
        "Chosen answers worse than the model's own: lowers both likelihoods, the rejected one more.",
    ),
    ObjectiveInfo(
        "discopop",
        discopop,
        "-(1 - s(x/tau)) log s(x) + s(x/tau) exp(-x)",
        "Lu et al. 2024, Discovering Preference Optimization Algorithms with and for Large Language Models, eq. 5",
        "A loss that a language model discovered; not convex around x = 0.",
        typical_beta=0.05,
        parameters=(Parameter("tau", 0.05, POSITIVE, "temperature of the gate"),),
        divergence=True,
    ),
    ObjectiveInfo(
        "sft",
        sft,
        "-log pi(chosen) P / (tokens of all chosen)",
        "maximum likelihood",
        "A term of a mix that keeps the chosen answers likely.",
        needs_reference=False,
        couples_pairs=True,
    ),
    ObjectiveInfo(
        "simpo",
        simpo,
        "-(1 - e) log s(m) - e log s(-m), m = beta (log pi(chosen)/|chosen| - log pi(rejected)/|rejected|) - gamma",
        "Meng et al. 2024, SimPO: Simple Preference Optimization with a Reference-Free Reward, eq. 6",
        "No reference model in memory; the reward is the mean log-probability that generation uses. Needs a larger beta.",
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
        "No reference model in memory; the likelihood term replaces it.",
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
        "Instruction tuning and preferences in one stage from a base model, without a reference.",
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
        "Chosen and rejected differ in few tokens, where DPO would lower both: penalizes a lower chosen likelihood.",
        _SMOOTHING,
        (Parameter("penalty", 50.0, NON_NEGATIVE, "weight of a negative chosen log-ratio (the paper's lambda)"),),
        typical_beta=0.3,
    ),
    ObjectiveInfo(
        "rpo",
        rpo,
        "-(1 - e) log s(x) - e log s(-x) - alpha log pi(chosen)/|chosen|",
        "Pang et al. 2024, Iterative Reasoning Preference Optimization, eq. 1",
        "Reasoning chains, and other data on which DPO lowers the likelihood of chosen answers.",
        _SMOOTHING,
        (_NLL,),
    ),
    ObjectiveInfo(
        "tdpo",
        tdpo,
        "-(1 - e) log s(y) - e log s(-y), y = x - beta (K(rejected) - K(chosen)), K = sum over tokens of KL(pi_ref || pi)",
        "Zeng et al. 2024, Token-level Direct Preference Optimization (TDPO1)",
        "When the KL to the reference grows too fast on rejected answers: balances it token by token.",
        _SMOOTHING,
        needs_token_kl=True,
        reward=token_rewards,
    ),
    ObjectiveInfo(
        "tdpo2",
        tdpo2,
        "-(1 - e) log s(y) - e log s(-y), y = x - alpha beta (K(rejected) - stop-gradient K(chosen))",
        "Zeng et al. 2024, Token-level Direct Preference Optimization (TDPO2)",
        "Like tdpo, with alpha as the strength of the balance; the better variant in the paper.",
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
            Parameter("momentum", 0.9, Range(0, 1, closed_high=False), "weight of the old running mean in an update"),
        ),
        couples_pairs=True,
        observe=lambda pairs: pairs.beta * pairs.margins,
    ),
)

#: Every named objective, by its name.
OBJECTIVES: dict[str, ObjectiveInfo] = {row.name: row for row in _ROWS}


def unknown(kind: str, name: str, known: Sequence[str]) -> ValueError:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ";"
    return ValueError(f"unknown {kind} {name!r}{hint} known: {', '.join(sorted(known))}")


def lookup(name: str) -> ObjectiveInfo:
    """The registry's row for `name`.

    Raises:
        ValueError: the name is unknown; the message lists the known names and the nearest match.
    """
    if name in OBJECTIVES:
        return OBJECTIVES[name]
    raise unknown("loss_type", name, list(OBJECTIVES))
