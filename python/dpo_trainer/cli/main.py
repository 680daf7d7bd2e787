"""`dpo-train`: a preference file and a model in, an aligned model and a report out."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import json
import logging
import os
import re
import shutil
import sys
import types
import typing
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any

from ..errors import ConfigError, OutputError, UsageError, did_you_mean, first_line
from ..run_folder.checkpoints import checkpoints, discard_half
from ..run_folder.lock import run_lock
from ..run_folder.records import EVENTS, METRICS, SAMPLES, SUMMARY, json_line, sha256, write_aside
from ..settings.config import RunSettings
from ..watch import signals as guard

#: The settings of the run that a folder holds, by which the same command is known again.
SETTINGS = "settings.json"
#: Its entry with the digests of the data files.
DIGESTS = "data_sha256"
USAGE = "dpo-train [CONFIG.yaml] [--key value ...] [--resume | --overwrite]"
COMPARE = "dpo-train compare RUN RUN ... [--output FILE]"
INSPECT = "dpo-train inspect [CONFIG.yaml] [--key value ...]"

#: Keys of a run besides the fields of DPOConfig, and their help.
RUN_KEYS = {field.name: field.metadata["help"] for field in dataclasses.fields(RunSettings)}
REQUIRED = ("model", "train_data", "output_dir")
SWITCHES = {
    "--resume": "Go on from the last checkpoint in output_dir, also with other settings or other data than before.",
    "--overwrite": "Throw away the run that output_dir holds.",
    "--quiet": "Print nothing but errors.",
    "--json": "Print one JSON object a line on standard output for every log, diagnosis, sample and the summary.",
    "--help": "Show this text.",
    "--help-all": "Also list the settings inherited from transformers.TrainingArguments.",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    0; 2 after one line about what is wrong; 130 after Ctrl-C, 143 after SIGTERM.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or "--help" in arguments or "-h" in arguments or "--help-all" in arguments:
        print(help_text(everything="--help-all" in arguments))
        return 0
    try:
        with guard.listening(lambda signum: guard.end(signum, "stopped before training; nothing was lost")):
            if arguments[0] == "compare":
                compare_runs(arguments[1:])
            elif arguments[0] == "inspect":
                inspect_run(arguments[1:])
            else:
                run(arguments)
    except UsageError as error:
        print(f"dpo-train: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.strerror is None:
            raise
        place = f"{error.filename}: " if error.filename else ""
        print(f"dpo-train: {place}{error.strerror}", file=sys.stderr)
        return 2
    except (guard.Interrupted, guard.Terminated) as ended:
        return int(ended.code or 0)
    return 0


def compare_runs(arguments: Sequence[str]) -> None:
    """`dpo-train compare RUN RUN ... [--output FILE]`: print a table and write a page that overlays the runs.

    Raises:
        UsageError: an unknown word, or a folder without a run.
    """
    from ..report.compare import OUTPUT, compare

    folders, output = list(arguments), Path(OUTPUT)
    if "--output" in folders:
        place = folders.index("--output")
        if place + 1 == len(folders):
            raise ConfigError("--output: a value is missing")
        output = Path(folders.pop(place + 1)).expanduser()
        folders.pop(place)
    for word in folders:
        if word.startswith("-"):
            raise ConfigError(f"compare: unknown option '{word}'; usage: {COMPARE}")
    print(compare(folders, output))
    print(f"\n{output}")


def inspect_run(arguments: Sequence[str]) -> None:
    """`dpo-train inspect CONFIG.yaml --key value ...`: print what a run would see and take; write nothing.

    Raises:
        UsageError: as `run`.
    """
    import tempfile

    settings, switches = read_settings(arguments, required=REQUIRED[:-1])
    stream = sys.stdout
    with tempfile.TemporaryDirectory() as nowhere, contextlib.redirect_stdout(sys.stderr):
        # transformers makes the output folder before anything is known
        found = _run({**settings, "output_dir": nowhere}, switches, None, inspecting=True)
    from .inspect import render

    print(json.dumps(found) if "--json" in switches else render(found), file=stream)


def run(arguments: Sequence[str]) -> None:
    """Read the settings, check everything that can be checked, then train.

    Raises:
        UsageError: in one line, before anything is written.
    """
    settings, switches = read_settings(arguments)
    output_dir = Path(str(settings["output_dir"])).expanduser()
    check_place(output_dir)
    stream = sys.stdout if "--json" in switches else None
    with contextlib.ExitStack() as stack:
        if stream is not None:
            # Whatever a library or a scorer prints must not stand between the objects.
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        stack.enter_context(run_lock(output_dir, first=guard.is_first()))
        _run(settings, switches, stream)


def _run(
    settings: dict[str, Any], switches: set[str], json_stream: IO[str] | None, *, inspecting: bool = False
) -> dict[str, Any]:
    """Train, and return nothing; or, inspecting, return what was found."""
    quiet = "--quiet" in switches
    logging.basicConfig(level=logging.ERROR if quiet else logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("accelerate", "datasets", "httpx", "huggingface_hub", "matplotlib", "torch"):
        logging.getLogger(noisy).setLevel(logging.ERROR)

    output_dir = Path(str(settings["output_dir"])).expanduser()
    digests = {} if inspecting else data_digests(settings)
    checkpoint: bool | str = check_output(
        output_dir, settings, digests, resume="--resume" in switches, overwrite="--overwrite" in switches
    )

    import datasets
    import transformers

    warnings.simplefilter("ignore")  # of libraries, to their developers; ours go through logging
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    from ..data.files import load_pairs, stream_pairs
    from ..model.loading import load_model, load_tokenizer
    from ..settings.config import DPOConfig
    from ..trainer import DPOTrainer
    from ..watch.callbacks import SaveAtTheEnd
    from .inspect import Inspector

    fields = {key: value for key, value in settings.items() if key not in RUN_KEYS or key == "output_dir"}
    fields.setdefault("log_level", "error")
    if settings.get("eval_data") is not None:
        if "eval_strategy" not in fields:
            fields["eval_strategy"] = "steps"
            fields.setdefault("eval_steps", 0.25)
        fields.setdefault("eval_on_start", not checkpoint)
    fields.setdefault("disable_tqdm", quiet or json_stream is not None)
    try:
        config = DPOConfig(**fields)
    except UsageError:
        raise
    except (ValueError, ImportError) as error:
        raise _setting_error(error, fields) from error
    if not checkpoint and config.resume_from_checkpoint:
        checkpoint = _given_checkpoint(config.resume_from_checkpoint)
    peft_config = lora_config(settings["lora"]) if settings.get("lora") is not None else None

    if settings.get("streaming") and config.max_steps <= 0:
        raise ConfigError("max_steps: must be given with streaming, which does not tell how many pairs there are")
    train_data = (stream_pairs if settings.get("streaming") else load_pairs)(settings["train_data"])
    eval_data = load_pairs(settings["eval_data"]) if settings.get("eval_data") is not None else None
    tokenizer = load_tokenizer(settings["model"])
    init_kwargs = config.model_init_kwargs if isinstance(config.model_init_kwargs, dict) else {}
    model = load_model(settings["model"], **init_kwargs)
    with _setting_up(fields):
        trainer = (Inspector if inspecting else DPOTrainer)(
            model,
            settings.get("ref_model"),
            args=config,
            train_dataset=train_data,
            eval_dataset=eval_data,
            processing_class=tokenizer,
            peft_config=peft_config,
        )
    if isinstance(trainer, Inspector):
        return trainer.inspect()
    trainer.callback_handler.callbacks.insert(0, SaveAtTheEnd(trainer))
    if json_stream is not None:
        trainer.journal.listeners.append(partial(_print_json, json_stream))
    first = trainer.is_world_process_zero()
    if not quiet and first:
        for account in trainer.accounts:
            if not account.dropped and not account.streamed:  # the trainer has told about the others
                print(account.describe(), file=sys.stderr)
    if first:
        if "--overwrite" in switches:
            clear_run(output_dir)
        write_aside(output_dir / SETTINGS, json.dumps({**_plain(settings), DIGESTS: digests}, indent=2) + "\n")
    trainer.accelerator.wait_for_everyone()  # before another process writes what this one clears
    trainer.train(resume_from_checkpoint=checkpoint)
    if json_stream is not None and first:
        _print_json(json_stream, SUMMARY, json.loads((output_dir / SUMMARY).read_text(encoding="utf-8")))
    if not quiet and first:
        for account in trainer.accounts:
            if account.streamed:
                print(account.describe(), file=sys.stderr)
        print(f"model and report.html are in {output_dir}", file=sys.stderr)
    return {}


#: `type` of the JSON lines, by the files that have the same records.
JSON_TYPES = {METRICS: "log", EVENTS: "event", SAMPLES: "sample", SUMMARY: "summary"}


def _print_json(stream: IO[str], name: str, record: dict[str, Any]) -> None:
    """Print a record of a file as one line with its type, at once."""
    stream.write(json_line({"type": JSON_TYPES[name], **record}))
    stream.flush()


@contextlib.contextmanager
def _setting_up(settings: dict[str, Any]) -> Iterator[None]:
    """Where a run cannot be set up, the reason is one line. transformers raises ValueErrors of its own."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        if isinstance(error, UsageError):
            raise
        raise _setting_error(error, settings) from error


def _setting_error(error: Exception, settings: dict[str, Any]) -> ConfigError:
    """What a library says of a setting, in one line that names it, with the nearest value that it would take."""
    text = first_line(error)
    for key, value in settings.items():
        if isinstance(value, str) and re.match(rf"'?{re.escape(value)}\b", text, re.IGNORECASE):
            near = did_you_mean(value, re.findall(r"[\w.-]+", text[len(value) + 1 :]))
            return ConfigError(f"{key}: {text}{near}")
    return ConfigError(text)


# --- settings ------------------------------------------------------------------------------------------------------


def read_settings(arguments: Sequence[str], required: Sequence[str] = REQUIRED) -> tuple[dict[str, Any], set[str]]:
    """Merge the YAML file and the command line into checked settings; also returns the switches given.

    Raises:
        ConfigError: an unknown key (with the nearest known one), a value of the wrong type, an unreadable file.
    """
    settings: dict[str, Any] = {}
    switches: set[str] = set()
    rest = list(arguments)
    if rest and not rest[0].startswith("-"):
        settings = read_yaml(rest.pop(0))
    hints = _hints()
    while rest:
        word = rest.pop(0)
        if word in SWITCHES:
            switches.add(word)
            continue
        if not word.startswith("--"):
            raise ConfigError(f"'{word}': expected --key value (usage: {USAGE})")
        key, equals, text = word[2:].partition("=")
        key = key.replace("-", "_")
        if not equals:
            if rest and not re.match(r"--[a-zA-Z]", rest[0]):
                text = rest.pop(0)
            elif hints.get(key.split(".")[0]) is bool:
                text = "true"
            else:
                raise ConfigError(f"--{key}: a value is missing")
        _set(settings, key, _parse(text))
    for key in list(settings):
        settings[key] = check_setting(key, settings[key], hints)
    for key in required:
        if settings.get(key) is None:
            raise ConfigError(f"{key}: not given; {RUN_KEYS[key][0].lower()}{RUN_KEYS[key][1:]}")
    return settings, switches


def read_yaml(path: str) -> dict[str, Any]:
    """The top-level mapping of a YAML file. Raises ConfigError naming file and line."""
    import yaml

    try:
        value = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f":{mark.line + 1}" if mark is not None else ""
        raise ConfigError(f"{path}{place}: not YAML: {getattr(error, 'problem', None) or first_line(error)}") from error
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: expected 'key: value' lines, found {type(value).__name__}")
    return {str(key): item for key, item in value.items()}


def _parse(text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _set(settings: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    place = settings
    for parent in parents:
        inner = place.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"--{key}: '{parent}' is already set to {inner!r}")
        place = inner
    place[last] = value


def _hints() -> dict[str, Any]:
    """Type of every key that may be set."""
    from ..settings.config import DPOConfig

    types_of = typing.get_type_hints(DPOConfig)
    fields = {item.name: types_of[item.name] for item in dataclasses.fields(DPOConfig) if item.init}
    return {**fields, **dict.fromkeys(RUN_KEYS, str | None), "lora": dict[str, Any] | None, "streaming": bool}


def check_setting(key: str, value: Any, hints: dict[str, Any]) -> Any:
    """The value in the type that the key wants. Raises ConfigError for an unknown key or a value that does not fit."""
    if key not in hints:
        raise ConfigError(f"unknown setting '{key}'{did_you_mean(key, hints)}")
    fitted, fits = _fit(value, hints[key])
    if not fits:
        raise ConfigError(f"{key}: expected {_describe(hints[key])}, got {value!r}")
    return fitted


def _fit(value: Any, hint: Any) -> tuple[Any, bool]:
    """(value in the hinted type, whether it fits). YAML reads 1e-5 as text: numbers may come as text."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        choices = typing.get_args(hint)
        # The exact type wins over a conversion, and text, which takes anything, comes last.
        for choice in sorted(choices, key=lambda choice: (type(value) is not choice, choice is str)):
            fitted, fits = _fit(value, choice)
            if fits:
                return fitted, True
        return value, False
    if hint is Any:
        return value, True
    if hint is type(None):
        return value, value is None
    if origin is typing.Literal:
        return value, value in typing.get_args(hint)
    if hint is bool:
        return value, isinstance(value, bool)
    if hint is int:
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            return value, False
        try:
            number = float(value)
        except ValueError:
            return value, False
        return (int(number), True) if number.is_integer() else (value, False)
    if hint is float:
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            return value, False
        try:
            return float(value), True
        except ValueError:
            return value, False
    if hint is str:
        simple = isinstance(value, (str, int, float)) and not isinstance(value, bool)
        return (str(value), True) if simple else (value, False)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        value = "no" if value is False else value  # YAML reads no as false, and save_strategy: no is common
        return value, value in [member.value for member in hint]
    if hint is list or origin is list:
        inner = (typing.get_args(hint) or (Any,))[0]
        items = value if isinstance(value, list) else [value]
        if value is None or isinstance(value, dict):
            return value, False
        pairs = [_fit(item, inner) for item in items]
        return [item for item, _ in pairs], all(fits for _, fits in pairs)
    if hint is dict or origin is dict:
        return value, isinstance(value, dict)
    return value, False


def _describe(hint: Any) -> str:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        choices = typing.get_args(hint)
        enums = [choice for choice in choices if isinstance(choice, type) and issubclass(choice, enum.Enum)]
        shown = enums or [choice for choice in choices if choice is not type(None)]
        words = list(dict.fromkeys(_describe(choice) for choice in shown))
        return " or ".join(words + (["null"] if type(None) in choices else []))
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return "one of " + ", ".join(str(member.value) for member in hint)
    if origin is typing.Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    if hint is list or origin is list:
        return f"a list of {_describe((typing.get_args(hint) or (Any,))[0])}"
    names = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "text",
        dict: "a mapping",
        Any: "anything",
    }
    return names.get(origin or hint, getattr(hint, "__name__", str(hint)))


def lora_config(values: dict[str, Any]) -> Any:
    """peft's LoraConfig from the `lora` mapping. Raises ConfigError for keys and values it does not take."""
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ConfigError("lora: needs the package 'peft', which is not installed") from error
    types_of = typing.get_type_hints(LoraConfig)
    hints = {f"lora.{item.name}": types_of[item.name] for item in dataclasses.fields(LoraConfig) if item.init}
    fitted = {key: check_setting(f"lora.{key}", value, hints) for key, value in values.items()}
    try:
        return LoraConfig(**{"task_type": "CAUSAL_LM", **fitted})
    except (ValueError, TypeError) as error:
        raise ConfigError(f"lora: {first_line(error)}") from error


# --- the output folder ---------------------------------------------------------------------------------------------


def check_place(folder: Path) -> None:
    """Raise OutputError where the folder cannot be made or written to."""
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"output_dir '{folder}': is a file")
    parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        obstacle = "not writable" if parent.is_dir() else "a file"
        raise OutputError(f"output_dir '{folder}': cannot be made, '{parent}' is {obstacle}")


def check_output(
    folder: Path, settings: dict[str, Any], digests: dict[str, str], *, resume: bool, overwrite: bool
) -> bool:
    """Whether a run may use the folder; returns whether it goes on from a checkpoint there.

    An unfinished run goes on when the same command is given again: its settings, and the digests of its data files, are
    recorded in the folder. With other settings or other data it goes on only if asked to.

    Args:
        digests: of `data_digests`.

    Raises:
        OutputError: it holds a run and neither --resume nor --overwrite was given, or there is nothing to resume.
    """
    if resume and overwrite:
        raise ConfigError("--resume and --overwrite contradict each other")
    found = checkpoints(folder)
    recorded = _recorded(folder)
    known = (recorded or {}).pop(DIGESTS, None) or {}
    changed = [key for key in digests if key in known and known[key] != digests[key]]
    what = f"{' and '.join(changed)} changed since the run began"
    if resume:
        if not found:
            raise OutputError(f"output_dir '{folder}': holds no checkpoint to resume from")
        if changed:
            logging.getLogger("dpo_trainer").warning("%s; going on with the new contents", what)
        return True
    if overwrite:
        return False
    if (folder / SUMMARY).exists():
        raise OutputError(f"output_dir '{folder}': holds a finished run; choose another folder, or --overwrite it")
    if recorded == _plain(settings):
        if found and changed:
            raise OutputError(
                f"output_dir '{folder}': {what} (last checkpoint: {found[-1].name}); --resume goes on with the new "
                "contents, --overwrite starts anew"
            )
        return bool(found)
    if found:
        others = [
            key for key in {**(recorded or {}), **settings} if (recorded or {}).get(key) != _plain(settings).get(key)
        ]
        with_others = f" with other settings ({', '.join(others)})" if recorded else ""
        raise OutputError(
            f"output_dir '{folder}': holds an unfinished run{with_others} (last checkpoint: {found[-1].name}); "
            "--resume or --overwrite it"
        )
    for name in ("config.json", "adapter_config.json"):
        if (folder / name).exists():
            raise OutputError(f"output_dir '{folder}': holds a model; choose another folder, or --overwrite it")
    return False


def data_digests(settings: dict[str, Any]) -> dict[str, str]:
    """The SHA-256 digests of the data files, by the words that name them: the setting and its path.

    Of a stream, which may be too large to be read twice, it is the size. Data of the hub have none.
    """
    found = {}
    for key in ("train_data", "eval_data"):
        path = Path(str(settings.get(key))).expanduser()
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        with contextlib.suppress(OSError):  # reading the data says what is wrong with them
            parts = [
                str(file.stat().st_size) if key == "train_data" and settings.get("streaming") else sha256(file)
                for file in files
                if file.is_file()
            ]
            if parts:
                found[f"{key} '{settings[key]}'"] = " ".join(parts)
    return found


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(settings, default=str))


def _recorded(folder: Path) -> dict[str, Any] | None:
    """The settings of the run that the folder holds."""
    try:
        found = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def clear_run(folder: Path) -> None:
    """Remove what a run left: checkpoints, settings, metrics, events, summary, report. Nothing else is touched."""
    discard_half(folder)
    for checkpoint in checkpoints(folder):
        shutil.rmtree(checkpoint, ignore_errors=True)
    for name in (SETTINGS, METRICS, EVENTS, SAMPLES, SUMMARY, "report.html"):
        (folder / name).unlink(missing_ok=True)


def _given_checkpoint(path: str) -> str:
    if not (Path(path) / "trainer_state.json").exists():
        raise OutputError(f"resume_from_checkpoint '{path}': not a checkpoint")
    return path


# --- help ----------------------------------------------------------------------------------------------------------


def help_text(*, everything: bool = False) -> str:
    """The text of --help."""
    import textwrap

    from ..settings.config import DPOConfig

    width = min(shutil.get_terminal_size((100, 24)).columns, 110)

    def entry(name: str, text: str) -> str:
        return textwrap.fill(
            " ".join(text.split()),
            width,
            initial_indent=f"  {name:<26} ",
            subsequent_indent=" " * 29,
            break_on_hyphens=False,
        )

    def setting(item: Any) -> str:
        default = item.default_factory() if item.default_factory is not dataclasses.MISSING else item.default
        default = getattr(default, "value", default)
        shown = "" if default is None else f" [{json.dumps(default, default=str)}]"
        return entry(item.name, f"{item.metadata.get('help', '')}{shown}")

    own = [item for item in dataclasses.fields(DPOConfig) if item.name in DPOConfig.__annotations__]
    common = [
        "per_device_train_batch_size",
        "per_device_eval_batch_size",
        "gradient_accumulation_steps",
        "max_steps",
        "lr_scheduler_type",
        "warmup_steps",
        "bf16",
        "eval_strategy",
        "eval_steps",
        "save_strategy",
        "save_steps",
        "save_total_limit",
        "seed",
    ]
    inherited = [
        item
        for item in dataclasses.fields(DPOConfig)
        if item.init and item.name not in {own_item.name for own_item in own}
    ]
    parts = [
        f"usage: {USAGE}\n       {INSPECT}\n       {COMPARE}",
        "Trains a language model on preference pairs with Direct Preference Optimization. Settings come from the YAML\n"
        "file and from the command line, which wins; nested ones are written with dots. Example:",
        "  dpo-train --model ./my-model --train_data pairs.jsonl --output_dir runs/first --learning_rate 5e-6",
        "\n".join(["Run:", *(entry(key, text) for key, text in RUN_KEYS.items())]),
        "\n".join(["Settings [default]:", *(setting(item) for item in own)]),
    ]
    if everything:
        parts.append(
            "\n".join(["Settings of transformers.TrainingArguments [default]:", *(setting(item) for item in inherited)])
        )
    else:
        picked = {item.name: item for item in inherited}
        parts.append(
            "\n".join(
                [
                    "Some settings of transformers.TrainingArguments; all may be given (--help-all lists them):",
                    *(entry(name, _short(picked[name])) for name in common if name in picked),
                ]
            )
        )
    parts.append("\n".join(["Switches:", *(entry(name, text) for name, text in SWITCHES.items())]))
    return "\n\n".join(parts)


def _short(item: Any) -> str:
    text = " ".join(str(item.metadata.get("help", "")).split())
    default = getattr(item.default, "value", item.default)
    head = re.split(r"(?<=[.;])\s", text)[0]
    return head + ("" if default is None else f" [{default}]")
