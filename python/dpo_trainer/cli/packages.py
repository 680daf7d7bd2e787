"""The check for packages that a run needs, before anything is loaded. Errors name the pip command."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import UsageError, first_line

EXTRA = "pip install 'dpo-kernels[trainer]'"
#: Modules of the packages that the extra `trainer` in pyproject.toml installs.
TRAINER = ("transformers", "accelerate", "datasets", "peft", "jinja2", "matplotlib", "pydantic", "yaml", "rich")
#: Trackers of transformers: their modules, and the packages that contain them.
TRACKERS = {
    "azure_ml": ("azureml", "azureml-core"),
    "clearml": ("clearml", "clearml"),
    "codecarbon": ("codecarbon", "codecarbon"),
    "comet_ml": ("comet_ml", "comet-ml"),
    "dagshub": ("dagshub", "dagshub"),
    "dvclive": ("dvclive", "dvclive"),
    "flyte": ("flytekit", "flytekit"),
    "kubeflow": ("kubeflow", "kubeflow"),
    "mlflow": ("mlflow", "mlflow"),
    "neptune": ("neptune", "neptune"),
    "swanlab": ("swanlab", "swanlab"),
    "tensorboard": ("tensorboard", "tensorboard"),
    "trackio": ("trackio", "trackio"),
    "wandb": ("wandb", "wandb"),
}
#: Optimizers of transformers by a part of their name: their modules, and the packages that contain them.
OPTIMIZERS = {
    "adamw_torch_4bit": ("torchao", "torchao"),
    "adamw_torch_8bit": ("torchao", "torchao"),
    "galore": ("galore_torch", "galore-torch"),
    "apollo": ("apollo_torch", "apollo-torch"),
    "lomo": ("lomo_optim", "lomo-optim"),
    "grokadamw": ("grokadamw", "grokadamw"),
    "stable_adamw": ("optimi", "torch-optimi"),
    "schedule_free": ("schedulefree", "schedulefree"),
    "anyprecision": ("torchdistx", "torchdistx"),
    "8bit": ("bitsandbytes", "bitsandbytes"),
    "bnb": ("bitsandbytes", "bitsandbytes"),
    "paged": ("bitsandbytes", "bitsandbytes"),
    "ademamix": ("bitsandbytes", "bitsandbytes"),
    "lion": ("bitsandbytes", "bitsandbytes"),
}


def missing(module: str) -> bool:
    """Whether a module cannot be imported. Does not import it."""
    return find_spec(module) is None


def line_of(what: str, package: str) -> str:
    """The error line for a missing package."""
    return f"{what}: needs the package '{package}', which is not installed; pip install {package}"


#: Packages by the words with which libraries' error messages ask for them.
_ASKED_FOR = {
    "torchvision": "torchvision",
    "pillow": "pillow",
    "sentencepiece": "sentencepiece",
    "tiktoken": "tiktoken",
}


def line_of_error(error: ImportError) -> str:
    """One line with the pip command for a package that a library did not find."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        name = error.name.partition(".")[0]
        return (
            f"needs the package '{name}', which is not installed; {EXTRA if name in TRAINER else f'pip install {name}'}"
        )
    text = first_line(error)
    if "pip install" in text:
        return text
    wanted = [package for word, package in _ASKED_FOR.items() if word in str(error).lower()]
    return f"{text}; " + (f"pip install {' '.join(wanted)}" if wanted else "dpo-train doctor looks at every package")


def check_trainer(*, but: Sequence[str] = ()) -> None:
    """Raise UsageError if a package of the extra `trainer` is not installed. Modules in `but` are not checked."""
    if absent := [module for module in TRAINER if module not in but and missing(module)]:
        raise UsageError(f"the trainer needs packages that are not installed ({', '.join(absent)}); {EXTRA}")


def check_packages(settings: Mapping[str, Any]) -> None:
    """Raise UsageError for the first setting that needs a package that is not installed."""
    for what, module, package in _needed(settings):
        if missing(module):
            raise UsageError(line_of(what, package))


def _needed(settings: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """(setting, module, package) of every package that the settings need besides the extra `trainer`."""
    trackers = settings.get("report_to") or ()
    for tracker in [trackers] if isinstance(trackers, str) else trackers:
        if tracker in TRACKERS and not (tracker == "tensorboard" and not missing("tensorboardX")):
            yield (f"report_to {tracker}", *TRACKERS[tracker])
    if settings.get("deepspeed") is not None:
        yield "deepspeed", "deepspeed", "deepspeed"
    optimizer = str(settings.get("optim") or "")
    for part, found in OPTIMIZERS.items():
        if part in optimizer:
            yield (f"optim {optimizer}", *found)
            break
    if settings.get("use_liger_kernel"):
        yield "use_liger_kernel", "liger_kernel", "liger-kernel"
    init = settings.get("model_init_kwargs")
    init = init if isinstance(init, dict) else {}
    if str(init.get("attn_implementation")) == "flash_attention_2":
        yield "attn_implementation flash_attention_2", "flash_attn", "flash-attn"
    quantization = init.get("quantization_config")
    if isinstance(quantization, dict) and (quantization.get("load_in_4bit") or quantization.get("load_in_8bit")):
        yield "quantization_config", "bitsandbytes", "bitsandbytes"
    for key in ("model", "ref_model"):
        if settings.get(key) is not None:
            yield from _needed_by_model(f"{key} '{settings[key]}'", Path(str(settings[key])).expanduser())


def _needed_by_model(what: str, path: Path) -> Iterator[tuple[str, str, str]]:
    """(setting, module, package) of every package that a model needs, by its file or its config."""
    if path.suffix == ".gguf":
        yield what, "gguf", "gguf"
    try:
        config = json.loads((path / "config.json").read_bytes())
        method = config["quantization_config"]["quant_method"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    if str(method).startswith("bitsandbytes"):
        yield what, "bitsandbytes", "bitsandbytes"
