"""The pair objectives: functions on vectors of length P, their mixing, and one registry that everything else iterates.

An objective sees no logits and no device: it gets the summed log-probabilities of each pair under policy and reference
(`Pairs`) and returns a loss per pair. Autograd differentiates it; the kernels take dL/dS from there.

Hyper-parameters that belong to one objective (SimPO's gamma, DPOP's penalty, ...) are bound before the call instead of
travelling through every signature of the library: `loss_type="simpo"` takes the defaults,
`loss_type=objective("simpo", gamma=1.0, beta=2.0)` sets them, and `"simpo(gamma=1.0, beta=2.0)"` is the same in the
text of a configuration file or command line. In a mix each objective so keeps its own.

    pairs         what an objective looks at
    formulas      the losses, and the rewards that each reports
    divergences   f-divergences in the log-ratio's place
    registry      one row an objective
    named         hyper-parameters bound; running means
    text          names, texts and callables to objectives
    mixing        checks of a call, the weighted sum, the rewards
    length        length desensitisation
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
