"""dpo-kernels: fused kernels for Direct Preference Optimization."""

from typing import TYPE_CHECKING

from ._lazy import names_of
from ._version import __version__

if TYPE_CHECKING:
    from .arguments import STATISTICS
    from .backends import BackendUnavailable, use_backend
    from .functional import dpo_loss, linear_dpo_loss
    from .logps import linear_logps, selective_log_softmax, sequence_logps, shift_labels, token_logps
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
    "selective_log_softmax",
    "sequence_logps",
    "shift_labels",
    "token_logps",
    "use_backend",
]

if not TYPE_CHECKING:  # with __getattr__ defined, a type checker would accept any name
    __getattr__, __dir__ = names_of(
        __name__,
        {
            **dict.fromkeys(("BackendUnavailable", "use_backend"), "backends"),
            "STATISTICS": "arguments",
            **dict.fromkeys(("dpo_loss", "linear_dpo_loss"), "functional"),
            **dict.fromkeys(
                ("linear_logps", "selective_log_softmax", "sequence_logps", "shift_labels", "token_logps"), "logps"
            ),
            **dict.fromkeys(("DPOLoss", "LinearDPOLoss"), "losses"),
            **dict.fromkeys(("OBJECTIVES", "Pairs", "length_desensitized_weights", "objective"), "objectives"),
            "DPOOutput": "output",
        },
    )
