"""dpo-kernels: fused kernels for Direct Preference Optimization."""

from ._version import __version__
from .backends import BackendUnavailable, use_backend
from .functional import STATISTICS, dpo_loss, linear_dpo_loss, linear_logps, sequence_logps, shift_labels
from .losses import DPOLoss, LinearDPOLoss
from .objectives import OBJECTIVES, Pairs, length_desensitized_weights, objective
from .output import DPOOutput

__all__ = [
    "OBJECTIVES",
    "STATISTICS",
    "BackendUnavailable",
    "DPOLoss",
    "DPOOutput",
    "LinearDPOLoss",
    "Pairs",
    "__version__",
    "dpo_loss",
    "length_desensitized_weights",
    "linear_dpo_loss",
    "linear_logps",
    "objective",
    "sequence_logps",
    "shift_labels",
    "use_backend",
]
