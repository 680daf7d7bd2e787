"""Loads a model and its tokenizer from a folder, a hub name or a .gguf file."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer
from transformers.utils.peft_utils import find_adapter_config_file

from ..errors import ConfigError, ModelError, did_you_mean, first_line
from .causal import check_class
from .places import source_of
from .split import unwrap_adapter
from .vision import auto_class, load_processor, takes_images


def load_model(path: str | Path, **kwargs: Any) -> Any:
    """Load a causal or vision-language model from a folder, a hub name or a .gguf file.

    The weights are float32 unless `dtype` is given, because 16-bit weights lose small updates. For 16-bit arithmetic on
    float32 weights, train with `bf16=True`. transformers dequantises a .gguf file; its quantisation attributes are then
    removed, so that the model can be trained and saved.

    Args:
        path: a folder, a hub name ("owner/name" or "name") or a .gguf file. It may hold a peft adapter. The adapter is then
            loaded, trainable, into the base model that its config names.
        **kwargs: passed to `from_pretrained`; `dtype` is a torch dtype, its name, or "auto".

    Returns:
        a transformers model, or a peft model around one for an adapter.

    Raises:
        ModelError: the path does not exist or cannot be loaded as a model, or `dtype` is unknown.
    """
    dtype = kwargs.setdefault("dtype", torch.float32)
    if isinstance(dtype, str) and dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ModelError(f"model_init_kwargs: unknown dtype '{dtype}'")
    if (base := _base_of(path)) is not None:
        return _load_adapter(path, base, **kwargs)
    gguf = Path(path).suffix == ".gguf"
    kind = AutoModelForCausalLM if gguf else auto_class(source_of(path)[0], kwargs)
    # transformers' bar of the dequantising cannot be turned off.
    with contextlib.redirect_stderr(io.StringIO()) if gguf else contextlib.nullcontext():
        model = _read(kind, path, "cannot be loaded", **kwargs)
    if gguf:
        model.hf_quantizer = None
        model.is_quantized = False
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
    return model


def load_tokenizer(path: str | Path, **kwargs: Any) -> Any:
    """Load the tokenizer of a model folder, hub name or .gguf file.

    Args:
        path: as for `load_model`. For an adapter without a tokenizer, the base model's tokenizer is loaded.
        **kwargs: passed to `from_pretrained`.

    Returns:
        a transformers tokenizer.

    Raises:
        ModelError: there is no tokenizer, or it cannot be loaded.
    """
    try:
        return _read(AutoTokenizer, path, "its tokenizer cannot be loaded", **kwargs)
    except ModelError:
        if (base := _base_of(path)) is None:
            raise
        with _of_adapter(path, base):
            return load_tokenizer(base, **kwargs)


def set_pad_token(tokenizer: Any, token: str | None) -> None:
    """Set the tokenizer's padding token.

    Args:
        tokenizer: a tokenizer, or a processor with one.
        token: a token of the vocabulary. None keeps the tokenizer's own padding token.

    Raises:
        ConfigError: the token is not in the vocabulary.
    """
    if token is None:
        return
    inner = getattr(tokenizer, "tokenizer", tokenizer)
    if token not in (known := inner.get_vocab()):
        raise ConfigError(f"pad_token: '{token}' is not in the tokenizer's vocabulary{did_you_mean(token, known)}")
    inner.pad_token = token


def check_in_reach(path: str | Path) -> None:
    """Raise ModelError for a hub name that no cache holds while the hub cannot be reached.

    The libraries would try again for minutes before they say so.
    """
    name, _ = source_of(path)
    if Path(name).is_dir():
        return
    if any(isinstance(try_to_load_from_cache(name, file), str) for file in ("config.json", "adapter_config.json")):
        return
    try:
        HfApi().model_info(name, timeout=10)
    except (HfHubHTTPError, HFValidationError):
        return  # the hub answers, or the name is none: from_pretrained says more
    except Exception as error:
        raise ModelError(
            f"model '{path}': cannot be loaded: no such folder, not in the cache, and the hub cannot be reached "
            f"({first_line(error)}); give a folder"
        ) from error


def load_processing_class(path: str | Path, *, vision: bool, **kwargs: Any) -> Any:
    """Load the processor of a vision-language model, or else the tokenizer.

    Args:
        path: as for `load_model`.
        vision: whether the model is a vision-language model. If it has no processor, its tokenizer is loaded.
        **kwargs: passed to `from_pretrained`.

    Raises:
        ModelError: there is neither a processor nor a tokenizer.
    """
    processor = load_processor(source_of(path)[0], **kwargs) if vision else None
    return processor if processor is not None else load_tokenizer(path, **kwargs)


def load_parts(model: Any, ref_model: Any, tokenizer: Any, init: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """Load model, reference and tokenizer, if they are paths or missing, and check that they fit together.

    Args:
        model: a model, or a path as for `load_model`.
        ref_model: a model, a path, or None.
        tokenizer: a tokenizer, a processor, or None for the model's own.
        init: keyword arguments for `from_pretrained`.

    Returns:
        (model, reference or None, tokenizer or processor).

    Raises:
        ModelError: a part cannot be loaded, or the parts do not fit together.
    """
    for path in (model, ref_model):
        if isinstance(path, (str, Path)):
            check_in_reach(path)
    of_tokenizer = {name: init[name] for name in ("revision", "trust_remote_code") if name in init}
    if isinstance(tokenizer, (str, Path)):
        raise ModelError(
            "processing_class: expected a tokenizer or processor, got a path; load_tokenizer(path) loads one"
        )
    if isinstance(model, (str, Path)):
        if tokenizer is None:  # loaded before the model, because an error shows sooner
            vision = auto_class(source_of(model)[0], init) is AutoModelForImageTextToText
            tokenizer = load_processing_class(model, vision=vision, **of_tokenizer)
        model = load_model(model, **init)
    if isinstance(ref_model, (str, Path)):
        ref_model = load_model(ref_model, **init)
    config = getattr(model, "config", None)
    check_class(model)
    if ref_model is not None:
        check_class(ref_model, "ref_model")
    if ref_model is model:
        raise ModelError("ref_model: is the model itself, so training would change it; pass None for a frozen copy")
    if tokenizer is None:
        if not (name := getattr(config, "_name_or_path", "")):
            raise ModelError("processing_class: no tokenizer given, and the model does not say where it came from")
        tokenizer = load_processing_class(name, vision=takes_images(unwrap_adapter(model)), **of_tokenizer)
    return model, ref_model, tokenizer


def _base_of(path: str | Path) -> str | None:
    """The base model that a peft adapter's config names; None if the path holds no adapter."""
    folder, extra = source_of(path)
    try:
        found = None if extra else find_adapter_config_file(folder)
    except OSError:
        return None  # no such hub name; loading the model reports it
    if found is None:
        return None
    try:
        config = json.loads(Path(found).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"model '{path}': its adapter_config.json cannot be read ({first_line(error)})") from error
    if not (base := config.get("base_model_name_or_path")):
        raise ModelError(
            f"model '{path}': is an adapter, but its adapter_config.json names no base model; set base_model_name_or_path in it"
        )
    return base


@contextlib.contextmanager
def _of_adapter(path: str | Path, base: str) -> Iterator[None]:
    """A context in which errors about an adapter's base model name the adapter too."""
    try:
        yield
    except ModelError as error:
        raise ModelError(
            f"model '{path}': is an adapter, whose base_model_name_or_path in adapter_config.json is '{base}': {error}"
        ) from error


def _load_adapter(path: str | Path, base: str, **kwargs: Any) -> Any:
    """Load an adapter, trainable, into its base model."""
    from peft import PeftConfig, PeftModel, load_peft_weights

    folder = str(Path(path).expanduser())
    try:
        weights = load_peft_weights(folder, device="cpu")
    except (OSError, ValueError) as error:
        raise ModelError(f"model '{path}': holds an adapter_config.json, but no weights that can be read") from error
    with _of_adapter(path, base):
        stacked = _base_of(base) is not None
    if stacked:
        raise ModelError(
            f"model '{path}': is an adapter of an adapter ('{base}'), and peft cannot stack them; merge that adapter into its "
            "model (merge_and_unload), save the result, and set base_model_name_or_path in adapter_config.json to it"
        )
    with _of_adapter(path, base):
        model = load_model(base, **kwargs)
    tokenizer = load_tokenizer(path)
    if (size := _embeddings(model, weights) or len(tokenizer)) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(size)  # the adapter was trained with added tokens
    try:
        config: Any = PeftConfig.from_pretrained(folder)
        # peft refuses to load virtual tokens as trainable, but they may be made trainable afterwards.
        model = PeftModel.from_pretrained(model, folder, is_trainable=not config.is_prompt_learning)
        if config.is_prompt_learning:
            model.prompt_encoder.requires_grad_(True)
            model.peft_config[model.active_adapter].inference_mode = False
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, IndexError) as error:
        # torch's first line only says that loading failed
        text = first_line(error).removeprefix("Error(s) in loading state_dict for PeftModelForCausalLM:")
        text = text or str(error).splitlines()[1].strip()
        raise ModelError(f"model '{path}': the adapter cannot be loaded ({text})") from error
    _check_names(path, model, weights)
    return model


def _embeddings(model: Any, weights: Mapping[str, Any]) -> int | None:
    """The number of embeddings in an adapter's file, which may exceed the tokenizer's size; None if it has no embeddings."""
    inside = model.get_input_embeddings()
    ours = next((name for name, part in model.named_modules() if part is inside), "")
    ends = (f"{ours}.weight", f"{ours}.base_layer.weight")
    return next((len(value) for name, value in weights.items() if ours and name.endswith(ends)), None)


def _check_names(path: str | Path, model: Any, weights: Mapping[str, Any]) -> None:
    """Raise ModelError if LoRA's file and config name different layers: peft silently skips weights without a layer."""
    from peft import get_peft_model_state_dict

    if model.peft_config["default"].peft_type.value != "LORA":
        return
    ours = get_peft_model_state_dict(model, save_embedding_layers=False)
    for one, other, where in ((weights, ours, "its config"), (ours, weights, "its file")):
        if odd := sorted(name for name in one if "lora_" in name and name not in other):
            raise ModelError(
                f"model '{path}': the adapter's file and config do not belong together: '{odd[0]}' is not in {where}"
            )


def _read(kind: Any, path: str | Path, failure: str, **kwargs: Any) -> Any:
    """Call `kind.from_pretrained` with a path or name. If it fails, raise a ModelError that contains `failure`."""
    folder, extra = source_of(path)
    try:
        return kind.from_pretrained(folder, **{**extra, **kwargs})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"model '{path}': {failure} ({first_line(error)})") from error
