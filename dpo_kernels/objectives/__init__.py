"""The pair objectives: functions from vectors of length P to a loss per pair, and the registry of the named ones.

An objective receives the summed log-probabilities of each pair under the policy and the reference (`Pairs`) and returns
one loss per pair. Autograd differentiates it, and the kernels continue from its gradient with respect to the sums.

Hyper-parameters of a single objective (SimPO's gamma, DPOP's penalty) are bound to it before the call, so each objective of
a mix has its own values:

    loss_type="simpo"                                      default hyper-parameters
    loss_type=objective("simpo", gamma=1.0, beta=2.0)      chosen hyper-parameters
    loss_type="simpo(gamma=1.0, beta=2.0)"                 the same as text, for configuration files and command lines

Modules:

    pairs         the input and output types of an objective
    formulas      the losses, and the rewards that each objective reports
    divergences   f-divergences that can replace the log-ratio
    registry      one row per named objective
    named         objectives with bound hyper-parameters, and objectives with a running mean
    text          conversion of names, texts and callables to objectives
    mixing        checks of a call, weighted sums of objectives, reported rewards
    length        token weights for length desensitization
"""

from .divergences import DIVERGENCE_FORMULAS, DIVERGENCES
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
from .length import length_desensitized_weights
from .mixing import check, couples_pairs, mix, needs_reference, needs_token_kl, rewards
from .named import BoundObjective, Named, RunningObjective, check_smoothing, objective
from .pairs import Objective, Pairs, Rewards
from .registry import NON_NEGATIVE, OBJECTIVES, POSITIVE, ObjectiveInfo, Parameter, Range, lookup
from .text import as_list, build, parse, resolve

__all__ = [
    "DIVERGENCES",
    "DIVERGENCE_FORMULAS",
    "NON_NEGATIVE",
    "OBJECTIVES",
    "POSITIVE",
    "BoundObjective",
    "Named",
    "Objective",
    "ObjectiveInfo",
    "Pairs",
    "Parameter",
    "Range",
    "Rewards",
    "RunningObjective",
    "aot",
    "aot_unpaired",
    "apo_down",
    "apo_zero",
    "as_list",
    "bco_pair",
    "beta_dpo",
    "build",
    "check",
    "check_smoothing",
    "couples_pairs",
    "cpo",
    "discopop",
    "dpop",
    "exo_pair",
    "hinge",
    "ipo",
    "length_desensitized_weights",
    "logp_rewards",
    "logratio_rewards",
    "lookup",
    "mean_logp_rewards",
    "mix",
    "nca_pair",
    "needs_reference",
    "needs_token_kl",
    "objective",
    "orpo",
    "parse",
    "resolve",
    "rewards",
    "robust",
    "rpo",
    "sft",
    "sigmoid",
    "sigmoid_norm",
    "simpo",
    "sppo_hard",
    "tdpo",
    "tdpo2",
    "token_rewards",
]
