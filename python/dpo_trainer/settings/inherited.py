"""The fields of `transformers.TrainingArguments`, read from its installed source, since an import takes seconds."""

from __future__ import annotations

import ast
import builtins
import dataclasses
import enum
import importlib.util
import typing
from pathlib import Path
from typing import Any

from ..errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Inherited:
    """A field: its type, default and help. Enumerations among the types have transformers' names and values."""

    hint: Any
    default: Any
    help: str


def training_arguments() -> dict[str, Inherited]:
    """Every field that TrainingArguments accepts, by name and in its order.

    Raises:
        ConfigError: transformers is not installed.
    """
    found = importlib.util.find_spec("transformers")
    if found is None or found.origin is None:
        raise ConfigError("transformers is not installed; pip install 'dpo-kernels[trainer]'")
    try:
        return _read(Path(found.origin).parent)
    except (OSError, SyntaxError, ValueError, KeyError, AttributeError, TypeError):
        return _imported()  # there is no source, or its form is unknown


def lora_fields() -> set[str]:
    """Names of the fields of peft's LoraConfig; empty if its source has another form."""
    found = importlib.util.find_spec("peft")
    if found is None or found.origin is None:
        return set()
    folder, names = Path(found.origin).parent, set()
    classes = (("config.py", "PeftConfigMixin"), ("config.py", "PeftConfig"), ("tuners/lora/config.py", "LoraConfig"))
    try:
        for file, name in classes:
            body = _class(ast.parse((folder / file).read_text(encoding="utf-8")), name).body
            names |= {n.target.id for n in body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
    except (OSError, SyntaxError, ValueError):
        return set()
    return names


def _imported() -> dict[str, Inherited]:
    """The fields from the imported class."""
    from transformers import TrainingArguments

    hints = typing.get_type_hints(TrainingArguments)
    rows = {}
    for field in dataclasses.fields(TrainingArguments):
        default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        if field.init:
            rows[field.name] = Inherited(hints[field.name], default, field.metadata.get("help", ""))
    return rows


def _read(folder: Path) -> dict[str, Inherited]:
    """The fields from the files in transformers' folder."""
    module = ast.parse((folder / "training_args.py").read_text(encoding="utf-8"))
    body = _class(module, "TrainingArguments").body
    types = _Types(folder, module)
    # The class's constants, which some defaults name. The last one counts: earlier ones are for older versions of torch.
    constants = {
        target.id: node.value
        for statement in body
        if isinstance(statement, ast.Assign | ast.If)
        for node in ast.walk(statement)
        if isinstance(node, ast.Assign) and isinstance(target := node.targets[0], ast.Name)
    }
    rows = {}
    for node in body:
        if not (
            isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and isinstance(node.value, ast.Call)
        ):
            continue
        words = {word.arg: word.value for word in node.value.keywords}
        if "init" in words and not ast.literal_eval(words["init"]):
            continue
        if "default_factory" in words:
            default = _evaluated(words["default_factory"], vars(builtins))()
        elif isinstance(given := words["default"], ast.Name):
            default = ast.literal_eval(constants[given.id])
        else:
            default = ast.literal_eval(given)
        rows[node.target.id] = Inherited(_evaluated(node.annotation, types), default, _help(words.get("metadata")))
    return rows


def _help(metadata: ast.expr | None) -> str:
    """The text "help" of a field's metadata. Other entries are ignored."""
    if metadata is None:
        return ""
    if not isinstance(metadata, ast.Dict):
        raise ValueError("metadata that is not written as a dict")
    for key, text in zip(metadata.keys, metadata.values, strict=True):
        if isinstance(key, ast.Constant) and key.value == "help":
            return ast.literal_eval(text)
    return ""


def _evaluated(expression: ast.expr, names: Any) -> Any:
    # The globals of eval must be a dict, while its locals may be any mapping.
    return eval(compile(ast.Expression(expression), "training_args.py", "eval"), {"__builtins__": {}}, names)


def _class(module: ast.Module, name: str) -> ast.ClassDef:
    """A class of a module. Raises ValueError if there is none of this name."""
    for node in module.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return node
    raise ValueError(f"no class {name}")


class _Types(dict[str, Any]):
    """Types by the names that annotations in training_args.py use."""

    def __init__(self, folder: Path, module: ast.Module) -> None:
        self.folder, self.module = folder, module
        self.files = {
            alias.name: node.module
            for node in module.body
            if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module
            for alias in node.names
        }

    def __missing__(self, name: str) -> Any:
        if hasattr(builtins, name) or hasattr(typing, name):
            self[name] = getattr(builtins, name, None) or getattr(typing, name)
        elif name in self.files:
            path = self.folder / f"{self.files[name].replace('.', '/')}.py"
            self[name] = _enum(_class(ast.parse(path.read_text(encoding="utf-8")), name))
        elif any(isinstance(node, ast.ClassDef) and node.name == name for node in self.module.body):
            self[name] = _enum(_class(self.module, name))
        else:
            self[name] = type(name, (), {})  # a type of another library, of which a YAML file has no values
        return self[name]


def _enum(node: ast.ClassDef) -> Any:
    members = {
        statement.targets[0].id: ast.literal_eval(statement.value)
        for statement in node.body
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name)
    }
    return enum.Enum(node.name, members, type=str)  # type: ignore[call-overload]
