"""Names that are legal values of settings, in a module that does not import torch; tests compare them with the code."""

#: `backends.NAMES`.
BACKENDS = ("eager", "cpu", "triton", "cuda")
#: `functional.LINEAR_STATISTICS`.
LINEAR_STATISTICS = ("entropy", "kl", "accuracy", "mean_logits", "grad_dropped_mass")
#: The keys of `objectives.OBJECTIVES`.
OBJECTIVES = (
    "sigmoid",
    "sigmoid_norm",
    "robust",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "bco_pair",
    "bco_running",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "simpo",
    "cpo",
    "orpo",
    "dpop",
    "rpo",
    "tdpo",
    "tdpo2",
    "beta_dpo",
)
