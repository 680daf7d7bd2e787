"""Patches the trainers that Unsloth compiles from TRL's, so that they compute log-probabilities with these kernels.

```python
from unsloth import FastLanguageModel, PatchDPOTrainer

from dpo_kernels.integrations.unsloth import apply

apply()  # after the import of Unsloth
```

Unsloth copies the source of TRL's trainers into modules of its own, which call TRL's functions by name. The patch is that of
`dpo_kernels.integrations.trl`, in TRL's modules and in these copies. It leaves Unsloth's own functions as they are: the
log-probabilities of GRPO (`unsloth_zoo.rl_replacements`), which keep a gradient for tokens of probability 1 and truncated
distributions, the losses from hidden states (`UNSLOTH_FUSED_PREFERENCE_LOSS=1`), and the cross entropy of its models.
"""

from __future__ import annotations

import importlib
import sys
import types
import warnings
from collections.abc import Callable

from . import trl
from .patch import Target, within


def _compiled() -> list[Target]:
    """The methods of Unsloth's copies of DPOTrainer, whose prompts need no log-probabilities."""
    return [
        Target(module, f"_UnslothDPOTrainer.{method}", (), trl.mask_first)
        for module in ("UnslothDPOTrainer", "unsloth_compiled_cache.UnslothDPOTrainer")
        if isinstance(sys.modules.get(module), types.ModuleType)
        for method in trl.DPO_METHODS
    ]


def apply(*, grad_filter: float | str | None = "auto", memory_budget: int | str | None = None) -> Callable[[], None]:
    """Make the trainers that Unsloth compiled from TRL's use these kernels in this process.

    Call it after the import of Unsloth, which must come before TRL's. If Unsloth is not imported, a RuntimeWarning says so, and
    nothing is changed. A TRL whose functions differ is not patched; a RuntimeWarning names the difference. A second call first
    undoes the previous one.

    Args:
        grad_filter: as in `dpo_kernels.integrations.trl.apply_to_trl`.
        memory_budget: as in `dpo_kernels.integrations.trl.apply_to_trl`.

    Returns:
        A function that removes the patch.

    Raises:
        ImportError: TRL cannot be imported.
    """
    trl.PATCH.undo()
    if "unsloth" not in sys.modules:
        warnings.warn(
            "dpo_kernels: import unsloth before this call; its trainers were left as they are",
            RuntimeWarning,
            stacklevel=2,
        )
        return lambda: None
    # Unsloth compiles TRL's trainers when this module is imported.
    importlib.import_module("unsloth.models.rl")
    return trl.PATCH.apply(grad_filter=grad_filter, memory_budget=memory_budget, others=_compiled())


applied = within(apply)
