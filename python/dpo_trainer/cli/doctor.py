"""`dpo-train doctor`: whether this machine can train, what it would train with, and how to fix what is missing."""

from __future__ import annotations

import importlib
import logging
import platform
import sys
import warnings
from collections.abc import Sequence
from importlib import metadata
from importlib.util import find_spec

from ..errors import ConfigError, first_line
from .packages import EXTRA, TRAINER

#: Names of distributions, by the name of the module if that differs.
_DISTRIBUTIONS = {"yaml": "pyyaml", "PIL": "pillow", "flash_attn": "flash-attn", "liger_kernel": "liger-kernel"}
#: Optional packages, with their use.
OPTIONAL = {
    "triton": "kernels on GPUs",
    "torchvision": "images of some vision-language models",
    "PIL": "images",
    "bitsandbytes": "4- and 8-bit models and optimizers",
    "deepspeed": "the setting deepspeed",
    "flash_attn": "attn_implementation flash_attention_2",
    "gguf": ".gguf models",
    "tensorboard": "report_to tensorboard",
    "wandb": "report_to wandb",
    "trl": "dpo_kernels.integrations.trl",
    "liger_kernel": "dpo_kernels.integrations.liger",
}


def doctor(words: Sequence[str]) -> int:
    """Print the report. Returns the exit code: 0 if a run can start, else 1. Raises ConfigError for arguments."""
    if words:
        raise ConfigError(f"doctor: unknown word '{words[0]}'; usage: dpo-train doctor")
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    print(f"Python {platform.python_version()}, {sys.executable}")
    faults: list[tuple[str, str]] = []
    _show("packages that a run needs", [_line(module, faults) for module in ("torch", "numpy", *TRAINER)])
    here = {module: what for module, what in OPTIONAL.items() if find_spec(module) is not None}
    _show("optional packages", [f"{module:<14}{_version(module):<14}{what}" for module, what in here.items()])
    _show("not installed", [f"{module:<28}{what}" for module, what in OPTIONAL.items() if module not in here])
    if not any(what.startswith("torch ") for what, _ in faults):
        from dpo_kernels import __main__ as library

        print()
        library.report()
        if not any(what.startswith(("transformers ", "accelerate ", "datasets ", "peft ")) for what, _ in faults):
            _caches()
    if not faults:
        print("\ndpo-train can run")
        return 0
    _show("dpo-train cannot run", [f"{what}; {fix}" for what, fix in faults])
    return 1


def _show(title: str, lines: Sequence[str]) -> None:
    if lines:
        print("\n".join([f"\n{title}", *(f"  {line}" for line in lines)]))


def _line(module: str, faults: list[tuple[str, str]]) -> str:
    """A package's line in the report. Its faults are added to `faults`."""
    fix = "pip install dpo-kernels" if module in ("torch", "numpy") else EXTRA
    if find_spec(module) is None:
        faults.append((f"{module} is not installed", fix))
        return f"{module:<14}not installed"
    version = _version(module)
    if wanted := _too_old(module, version):
        faults.append((f"{module} {version} is too old, {wanted} is needed", fix))
    try:
        importlib.import_module(module)
    except Exception as error:  # whatever a broken installation raises
        absent = error.name if isinstance(error, ModuleNotFoundError) else None
        again = f"--force-reinstall --no-deps {_DISTRIBUTIONS.get(module, module)}"
        faults.append(
            (f"{module} {version} cannot be imported ({first_line(error)})", f"pip install {absent or again}")
        )
        return f"{module:<14}{version:<14}broken"
    return f"{module:<14}{version}"


def _version(module: str) -> str:
    try:
        return metadata.version(_DISTRIBUTIONS.get(module, module))
    except metadata.PackageNotFoundError:
        return "version not known"


def _too_old(module: str, version: str) -> str:
    """The versions that dpo-kernels requires if the installed version is not one of them, else ""."""
    if find_spec("packaging") is None:
        return ""
    from packaging.requirements import Requirement
    from packaging.version import InvalidVersion

    try:
        texts = metadata.requires("dpo-kernels") or []
    except metadata.PackageNotFoundError:
        return ""
    name = _DISTRIBUTIONS.get(module, module)
    for wanted in map(Requirement, texts):
        extra = wanted.marker is None or wanted.marker.evaluate({"extra": "trainer"})
        if wanted.name.lower() == name and extra:
            try:
                return "" if wanted.specifier.contains(version, prereleases=True) else str(wanted.specifier)
            except InvalidVersion:
                return ""
    return ""


def _caches() -> None:
    """Print the folders in which models, data and reference log-probabilities are kept."""
    import datasets
    from huggingface_hub.constants import HF_HUB_CACHE

    from ..model.reference_cache import folder_of

    kept = {
        "models": HF_HUB_CACHE,
        "tokenised data": datasets.config.HF_DATASETS_CACHE,
        "references": folder_of("auto"),
    }
    _show("caches of the trainer", [f"{what:<16}{place}" for what, place in kept.items()])
