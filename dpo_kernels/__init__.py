"""dpo-kernels: fused kernels for Direct Preference Optimization."""

from ._version import __version__
from .backends import BackendUnavailable, use_backend
from .functional import STATISTICS, dpo_loss, sequence_logps, shift_labels
from .losses import DPOLoss
from .objectives import OBJECTIVES, Pairs, length_desensitized_weights, objective
from .output import DPOOutput

__all__ = [
    "OBJECTIVES",
    "STATISTICS",
    "BackendUnavailable",
    "DPOLoss",
    "DPOOutput",
    "Pairs",
    "__version__",
    "dpo_loss",
    "length_desensitized_weights",
    "objective",
    "sequence_logps",
    "shift_labels",
    "use_backend",
]
