"""Patches axolotl so that its DPO, ORPO, KTO, GRPO and other trainers on top of TRL compute log-probabilities with these kernels.

In axolotl's YAML file:

```yaml
plugins:
  - dpo_kernels.integrations.axolotl.Plugin
```

In a script, `apply()` does the same, before or after axolotl has patched TRL. Axolotl's trainers are subclasses of TRL's, so the
patch is that of `dpo_kernels.integrations.trl`. Axolotl also puts Triton functions of its own in the place of TRL's
`selective_log_softmax` and `entropy_from_logits`; these are replaced too. The orpo loss in axolotl's own `AxolotlTrainer` stays.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from . import trl
from .patch import Target, within

_UTILS = "axolotl.monkeypatch.trainer.utils"


def _targets() -> list[Target]:
    """Axolotl's own functions. It has none if Triton is not installed."""
    try:
        importlib.import_module(_UTILS)
    except ImportError:
        return []
    return [
        # Axolotl keeps TRL's function here, which modules of TRL may have imported before.
        Target(_UTILS, "selective_log_softmax_original", *trl.SELECTIVE),
        Target(_UTILS, "selective_log_softmax", *trl.SELECTIVE),
        Target(_UTILS, "entropy_from_logits", *trl.ENTROPY),
    ]


def apply(*, grad_filter: float | str | None = "auto", memory_budget: int | str | None = None) -> Callable[[], None]:
    """Make axolotl's trainers use these kernels in this process.

    A version of axolotl or TRL whose functions differ is not patched; a RuntimeWarning names the difference. A second call first
    undoes the previous one.

    Args:
        grad_filter: as in `dpo_kernels.integrations.trl.apply_to_trl`.
        memory_budget: as in `dpo_kernels.integrations.trl.apply_to_trl`.

    Returns:
        A function that removes the patch.

    Raises:
        ImportError: axolotl or TRL cannot be imported.
    """
    importlib.import_module("axolotl")
    return trl.PATCH.apply(grad_filter=grad_filter, memory_budget=memory_budget, others=_targets())


applied = within(apply)


def __getattr__(name: str) -> Any:
    # Made on first use, because its base class is axolotl's.
    if name != "Plugin":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    base = importlib.import_module("axolotl.integrations.base").BasePlugin

    class Plugin(base):  # type: ignore[misc, valid-type]
        """An axolotl plugin that applies the patch when a run of reinforcement learning or preferences loads its model."""

        def pre_model_load(self, cfg: Any) -> None:
            if cfg.rl:
                apply()

    globals()[name] = Plugin
    return Plugin
