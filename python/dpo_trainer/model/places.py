"""Reads the place of a model: a folder, a .gguf file or a hub name. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from ..errors import ModelError, is_hub_name


def source_of(path: str | Path) -> tuple[str, dict[str, str]]:
    """Arguments of from_pretrained for a folder, a .gguf file or a hub name.

    Raises:
        ModelError: the path names none of them.
    """
    local = Path(path).expanduser()
    if local.suffix == ".gguf":
        if not local.is_file():
            raise ModelError(f"model '{path}': no such file")
        return str(local.parent), {"gguf_file": local.name}
    if local.is_dir():
        if not any((local / name).exists() for name in ("config.json", "adapter_config.json", "tokenizer_config.json")):
            raise ModelError(f"model '{path}': the folder holds no model (no config.json)")
        return str(local), {}
    if local.exists() or not is_hub_name(str(path)):
        raise ModelError(f"model '{path}': {'not a folder or .gguf file' if local.exists() else 'no such folder'}")
    return str(path), {}
