"""The content of summary.json: the facts of a run in one object."""

from __future__ import annotations

import contextlib
import json
import math
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from dpo_kernels.objectives import Pairs, mix

from ..model.split import unwrap_adapter
from ..run import Run
from ..settings import objective
from ..settings.config import DPOConfig
from ..settings.rows import settings_table
from .checkpoints import checkpoints
from .metrics import evaluation_records, throughput, training_records
from .records import METRICS, SETTINGS, read_object, read_records

#: Settings that transformers computes from other settings.
_DERIVED = (
    "disable_tqdm",
    "dataloader_pin_memory",
    "do_eval",
    "eval_on_start",
    "eval_steps",
    "local_rank",
    "accelerator_config",
)


def summarize(run: Run, *, finished: bool) -> dict[str, Any]:
    """Facts of a run: data, first and last figures, throughput, settings, versions. Plain JSON values."""
    records = read_records(run.args.run_folder / METRICS)
    train, evals = training_records(records), evaluation_records(records)
    tokens, seconds = throughput(train)
    model = run.policy.model
    parameters = list(model.parameters())
    return {
        "finished": finished,
        "model": getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__,
        "architecture": type(unwrap_adapter(model)).__name__,
        "parameters": sum(p.numel() for p in parameters),
        "trainable_parameters": sum(p.numel() for p in parameters if p.requires_grad),
        "reference": run.reference_kind,
        "data": [account.describe() for account in run.accounts],
        "pairs": {account.name: account.kept for account in run.accounts},
        "trained_on": {account.name: account.trained_on for account in run.accounts if account.trained_on},
        "steps": run.state.global_step,
        "initial_loss": initial_loss(run.args),
        "planned_steps": run.state.max_steps,
        # The step of the final weights, if load_best_model_at_end replaced those of the last step.
        "best_step": run.state.best_global_step if finished and run.args.load_best_model_at_end else None,
        "checkpoints": [folder.name for folder in checkpoints(run.args.run_folder)],
        "epochs": run.state.epoch,
        "seconds": round(seconds, 3),
        "tokens": int(tokens),
        "tokens_per_second": round(tokens / seconds, 2) if seconds else None,
        "peak_memory_mib": _peak_memory_mib(),
        "first": train[0] if train else {},
        "last": train[-1] if train else {},
        "eval_first": evals[0] if evals else {},
        "eval_last": evals[-1] if evals else {},
        "device": _device(run.args.device),
        "changed_settings": changed_settings(run.args),
        "settings": run.args.to_sanitized_dict(),
        "versions": _versions(),
    }


def initial_loss(args: DPOConfig) -> float | None:
    """The objective's value if policy and reference are equal (log 2 for DPO). None if it depends on the model."""
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    beta, smoothing = (torch.tensor(value, dtype=torch.float64) for value in (args.beta, args.label_smoothing))
    values = []
    for sums in (zero.repeat(2), torch.tensor([-3.0, -7.0], dtype=torch.float64)):
        pairs = Pairs.from_sums(sums, sums, 2 * one.repeat(2), beta, smoothing, kl_sums=zero.repeat(2))
        values.append(mix(pairs, objective.build(args), args.loss_weights).item())
    return values[0] if math.isclose(*values, abs_tol=1e-12) else None


def _device(device: torch.device) -> str:
    if device.type == "cpu":
        threads = torch.get_num_threads()
        return f"a CPU with {threads} thread{'s' if threads > 1 else ''}"
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def _peak_memory_mib() -> float | None:
    """The peak of this process's resident memory, in MiB."""
    # On Linux, a child process inherits ru_maxrss: it would be the peak of a large process that started the run.
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return round(next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 2**10, 1)
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if platform.system() == "Darwin" else 2**10), 1)


def changed_settings(args: DPOConfig) -> dict[str, Any]:
    """The settings that differ from their defaults, as JSON values, without those that transformers computes.

    `dpo-train` records the settings that it was given in its folder. Of such a run, only these settings are returned.
    """
    given = read_object(args.run_folder / SETTINGS)
    changed = {}
    for name, row in settings_table().items():
        value = getattr(args, name, row.default)
        value = getattr(value, "value", value)
        nothing = value in (None, [], {}, False) and row.default in (None, "none", "", [], {}, False)
        set_by_someone = name in given if given else name not in _DERIVED
        if value != row.default and not nothing and set_by_someone and name != "hub_token":
            changed[name] = value
    return json.loads(json.dumps(changed, default=str))


def _versions() -> dict[str, str]:
    shown = ("dpo-kernels", "torch", "transformers", "accelerate", "datasets", "peft", "triton")
    installed = {distribution.name: distribution.version for distribution in metadata.distributions()}
    return {
        "python": platform.python_version(),
        **{name: installed[name] for name in shown if name in installed},
        "system": f"{platform.system()} {platform.machine()}",
    }
