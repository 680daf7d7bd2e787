"""The command `dpo-train`: trains a model on a preference file, and writes the model and a report.

Modules that import torch, transformers, datasets, matplotlib or pandas are imported only where they are used, so that
help, error messages and tables appear at once.
"""

from __future__ import annotations

import contextlib
import functools
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from ..errors import ConfigError, UsageError
from ..run_folder.records import EVENTS, METRICS, SAMPLES, SUMMARY, json_line
from ..watch import signals as guard
from . import packages


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        the exit code: 0; 2 after one line about an error; 130 after Ctrl-C. SIGTERM raises SystemExit with the code 143.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        with guard.listening(lambda signum: guard.end(signum, "stopped before training; nothing was lost")):
            return _command(arguments)
    except UsageError as error:
        return _complain(" ".join(str(error).split()))
    except ImportError as error:
        if (error.name or "").startswith(("dpo_kernels", "dpo_trainer")):
            raise
        return _complain(packages.line_of_error(error))
    except OSError as error:
        if error.strerror is None:
            raise
        return _complain(f"{error.filename}: {error.strerror}" if error.filename else error.strerror)
    except KeyboardInterrupt:
        return 130


def _command(arguments: list[str]) -> int:
    """Run the command that the arguments name. Returns the exit code. Raises UsageError."""
    first = arguments[0] if arguments else ""
    if first == "doctor" and "--help" not in arguments and "-h" not in arguments:
        from .doctor import doctor

        return doctor(arguments[1:])
    if first != "--version":
        packages.check_trainer(but=("matplotlib",) if first == "compare" else ())  # its table needs no charts
    from . import help as words  # imports packages that check_trainer has found

    if not arguments:
        print(words.START, file=sys.stderr)
        return 2
    if "--version" in arguments:
        print(words.versions())
        return 0
    if first == "help" or not {"--help", "-h", "--help-all"}.isdisjoint(arguments):
        if first in words.COMMANDS:
            print(words.about(first))
        else:
            print(words.help_parser(everything="--help-all" in arguments).format_help(), end="")
        return 0
    words.check_command(first)
    if first == "compare":
        compare_runs(arguments[1:])
    elif first == "inspect":
        inspect_run(arguments[1:])
    elif first == "init":
        from .init import init

        print(init(*_output_of(arguments[1:])))
    else:
        run(arguments[1:] if first == "train" and not Path(first).exists() else arguments)
    return 0


def _complain(text: str) -> int:
    """Print an error line, in red on a terminal. Returns the exit code."""
    line = f"dpo-train: {text}"
    if sys.stderr.isatty():
        from rich.console import Console

        Console(stderr=True).print(line, style="red", markup=False, highlight=False, emoji=False, soft_wrap=True)
    else:
        print(line, file=sys.stderr)
    return 2


def _output_of(arguments: Sequence[str]) -> tuple[list[str], Path | None]:
    """The words without `--output FILE`, and the file. Raises ConfigError where its name is missing."""
    rest = [part for word in arguments for part in (word.split("=", 1) if word.startswith("--output=") else [word])]
    if "--output" not in rest:
        return rest, None
    place = rest.index("--output")
    if place + 1 == len(rest):
        raise ConfigError("--output: a value is missing")
    output = rest.pop(place + 1)
    rest.pop(place)
    return rest, Path(output).expanduser()


def compare_runs(arguments: Sequence[str]) -> None:
    """`dpo-train compare RUN RUN ... [--output FILE]`: print a table and write a page that overlays the runs' curves.

    Raises:
        UsageError: there is an unknown option, or a folder without a run.
    """
    from ..report.compare import compare
    from .help import COMPARE

    folders, output = _output_of(arguments)
    for word in folders:
        if word.startswith("-"):
            raise ConfigError(f"compare: unknown option '{word}'; usage: {COMPARE}")
    if not folders:
        raise ConfigError(f"compare: no runs given; usage: {COMPARE}")
    print(f"\npage: {compare(folders, output, functools.partial(print, flush=True))}")


def inspect_run(arguments: Sequence[str]) -> None:
    """`dpo-train inspect CONFIG.yaml --key value ...`: print a run's data and its expected memory and time. Writes nothing.

    Raises:
        UsageError: as in `run`.
    """
    from .early import REQUIRED, set_up_logging, settings_of, tell_loading

    settings, switches = settings_of(arguments, REQUIRED[:-1])
    stream = sys.stdout
    tell_loading(switches)
    from .build import build_trainer
    from .inspect import Inspector, render

    with tempfile.TemporaryDirectory() as nowhere, contextlib.redirect_stdout(sys.stderr):
        set_up_logging(quiet="--quiet" in switches)
        # a temporary output_dir, because transformers creates it
        found = build_trainer(Inspector, {**settings, "output_dir": nowhere}, switches).inspect()
    print(json.dumps(found) if "--json" in switches else render(found), file=stream)


def run(arguments: Sequence[str]) -> None:
    """Read and check the settings, the model and the data, then train.

    Raises:
        UsageError: one line about an error, before anything is written.
    """
    from ..run_folder.lock import run_lock
    from ..run_folder.output_dir import check_output, check_place, clear_run, data_digests, record_run
    from .early import set_up_logging, settings_of, tell_loading

    settings, switches = settings_of(arguments)
    output_dir = Path(str(settings["output_dir"])).expanduser()
    check_place(output_dir)
    json_lines = JsonLines(sys.stdout)
    with contextlib.ExitStack() as stack:
        if "--json" in switches:
            # Output of libraries and scorers must not mix with the JSON objects.
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        stack.enter_context(run_lock(output_dir, first=guard.is_first()))
        set_up_logging(quiet="--quiet" in switches or not guard.is_first())
        digests = data_digests(settings)
        resume, overwrite = "--resume" in switches, "--overwrite" in switches
        resumes = check_output(output_dir, settings, digests, resume=resume, overwrite=overwrite)
        tell_loading(switches)
        from ..trainer import DPOTrainer
        from ..watch.callbacks import SaveAtTheEnd
        from .build import build_trainer

        trainer = build_trainer(DPOTrainer, settings, switches, resumes=resumes)
        trainer.callback_handler.callbacks.insert(0, SaveAtTheEnd(trainer))
        if "--json" in switches:
            trainer.journal.listeners.append(json_lines)
        first = trainer.is_world_process_zero()
        tells = first and "--quiet" not in switches
        if tells:
            for account in trainer.accounts:
                if not account.dropped and not account.streamed:  # the trainer has logged the others
                    print(account.describe(), file=sys.stderr)
        if first:
            if overwrite:
                clear_run(output_dir)
            record_run(output_dir, settings, digests)
        trainer.accelerator.wait_for_everyone()  # other processes must not write before this one has cleared the folder
        trainer.train(resume_from_checkpoint=resumes or trainer.args.resume_from_checkpoint or False)
        if first and "--json" in switches:
            json_lines(SUMMARY, json.loads((output_dir / SUMMARY).read_text(encoding="utf-8")))
        if tells:
            for account in trainer.accounts:
                if account.streamed:
                    print(account.describe(), file=sys.stderr)
            print(f"model and report.html are in {output_dir}", file=sys.stderr)


#: Value of `type` in the JSON lines, by the file with the same records.
JSON_TYPES = {METRICS: "log", EVENTS: "event", SAMPLES: "sample", SUMMARY: "summary"}


class JsonLines:
    """Prints every record at once as a line with its type, except samples: they follow the log of their evaluation."""

    def __init__(self, stream: IO[str]) -> None:
        self.stream = stream
        self.samples: list[dict[str, Any]] = []

    def __call__(self, name: str, record: dict[str, Any]) -> None:
        if name == SAMPLES:
            self.samples.append(record)
            return
        self._print(name, record)
        if name == METRICS:
            for sample in self.samples:
                self._print(SAMPLES, sample)
            self.samples.clear()

    def _print(self, name: str, record: dict[str, Any]) -> None:
        print(json_line({"type": JSON_TYPES[name], **record}), end="", file=self.stream, flush=True)
