"""A reference that follows the policy (TR-DPO): every `ref_model_sync_steps` steps its weights move towards the policy's.

Gorbatovski et al. 2024, Learn Your Reference Model for Real Good Alignment (arXiv:2404.09656), eq. 4 and 5. The soft update
is ref <- alpha policy + (1 - alpha) ref every tau steps. alpha = 1 is the hard update.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import ModelError, OutputError

FILE = "reference.safetensors"


class MovingReference(TrainerCallback):
    """Updates the reference at the end of a step, before that step's evaluation and checkpoint.

    Args:
        policy: the trained model, not wrapped.
        reference: a model of the same architecture.
        alpha: share of the policy in the new reference, in (0, 1].
        every: steps between updates (the paper's tau).

    Raises:
        ModelError: the models' parameters differ in names or shapes.
    """

    def __init__(self, policy: nn.Module, reference: nn.Module, *, alpha: float, every: int) -> None:
        self.alpha, self.every = alpha, every
        self.policy, self.reference = policy, reference
        shapes = [{name: tuple(p.shape) for name, p in model.named_parameters()} for model in (policy, reference)]
        if shapes[0] != shapes[1]:
            odd = sorted({name for name, _ in shapes[0].items() ^ shapes[1].items()})[0]
            raise ModelError(
                f"ref_model: sync_ref_model moves it towards the policy, so both must have one architecture; they differ "
                f"in '{odd}'"
            )

    @torch.no_grad()
    def update(self) -> None:
        """Update the reference once. In 16-bit weights, rounding removes the effect of a small alpha."""
        for moved, still in zip(self.policy.parameters(), self.reference.parameters(), strict=True):
            whole: Any = moved.full_tensor() if hasattr(moved, "full_tensor") else moved  # FSDP2 may shard it
            target = whole.to(device=still.device, dtype=torch.promote_types(moved.dtype, torch.float32))
            still.copy_(torch.lerp(still.to(target.dtype), target, self.alpha))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step % self.every == 0:
            self.update()

    def save(self, folder: Path) -> None:
        """Write the reference's weights into a checkpoint."""
        save_model(self.reference, str(folder / FILE))

    def load(self, folder: Path) -> None:
        """Load the reference's weights from a checkpoint.

        Raises:
            OutputError: the checkpoint is from a run without sync_ref_model, or from another model.
        """
        if not (folder / FILE).exists():
            raise OutputError(f"{folder}: holds no {FILE}; sync_ref_model was off when it was written")
        missing, _ = load_model(self.reference, folder / FILE, strict=False)
        # Older checkpoints hold only the parameters. This is enough, because buffers do not change.
        if absent := sorted(set(missing).intersection(dict(self.reference.named_parameters()))):
            raise OutputError(f"{folder / FILE}: holds no '{absent[0]}', which the reference has")

    def describe(self) -> str:
        """The reference in words."""
        how = "replaced by the policy" if self.alpha == 1 else f"moved towards the policy by {self.alpha:g}"
        return f"a model {how} every {self.every} steps (TR-DPO)"
