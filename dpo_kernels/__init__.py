"""dpo-kernels: fused kernels for Direct Preference Optimization."""

from typing import TYPE_CHECKING

from ._lazy import names_of
from ._version import __version__

if TYPE_CHECKING:
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

if not TYPE_CHECKING:  # with __getattr__ defined, a type checker would accept any name
    __getattr__, __dir__ = names_of(
        __name__,
        {
            **dict.fromkeys(("BackendUnavailable", "use_backend"), "backends"),
            **dict.fromkeys(
                ("STATISTICS", "dpo_loss", "linear_dpo_loss", "linear_logps", "sequence_logps", "shift_labels"),
                "functional",
            ),
            **dict.fromkeys(("DPOLoss", "LinearDPOLoss"), "losses"),
            **dict.fromkeys(("OBJECTIVES", "Pairs", "length_desensitized_weights", "objective"), "objectives"),
            "DPOOutput": "output",
        },
    )
