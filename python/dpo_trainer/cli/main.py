"""`dpo-train`: a preference file and a model in, an aligned model and a report out.

Modules that import torch, transformers, datasets, matplotlib or pandas are imported where they are used: help, mistakes
and tables are then there at once.
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
    """Run the command line; returns the exit code.

    0; 2 after one line about what is wrong; 130 after Ctrl-C. SIGTERM raises SystemExit with the code 143.
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
    """Run the command that the words name; returns the exit code. Raises UsageError."""
    first = arguments[0] if arguments else ""
    if first == "doctor" and "--help" not in arguments and "-h" not in arguments:
        from .doctor import doctor

        return doctor(arguments[1:])
    if first != "--version":
        packages.check_trainer(but=("matplotlib",) if first == "compare" else ())  # its table needs no charts
    from . import help as words  # imports what check_trainer has looked for

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
    """Print the line, in red on a terminal; returns the exit code."""
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
    """`dpo-train compare RUN RUN ... [--output FILE]`: print a table and write a page that overlays the runs.

    Raises:
        UsageError: an unknown word, or a folder without a run.
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
    """`dpo-train inspect CONFIG.yaml --key value ...`: print what a run would see and take; write nothing.

    Raises:
        UsageError: as `run`.
    """
    from .early import REQUIRED, set_up_logging, settings_of, tell_loading

    settings, switches = settings_of(arguments, REQUIRED[:-1])
    stream = sys.stdout
    tell_loading(switches)
    from .build import build_trainer
    from .inspect import Inspector, render

    with tempfile.TemporaryDirectory() as nowhere, contextlib.redirect_stdout(sys.stderr):
        set_up_logging(quiet="--quiet" in switches)
        # transformers makes the output folder before anything is known
        found = build_trainer(Inspector, {**settings, "output_dir": nowhere}, switches).inspect()
    print(json.dumps(found) if "--json" in switches else render(found), file=stream)


def run(arguments: Sequence[str]) -> None:
    """Read the settings, check everything that can be checked, then train.

    Raises:
        UsageError: in one line, before anything is written.
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
            # Whatever a library or a scorer prints must not stand between the objects.
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
                if not account.dropped and not account.streamed:  # the trainer has told about the others
                    print(account.describe(), file=sys.stderr)
        if first:
            if overwrite:
                clear_run(output_dir)
            record_run(output_dir, settings, digests)
        trainer.accelerator.wait_for_everyone()  # before another process writes what this one clears
        trainer.train(resume_from_checkpoint=resumes or trainer.args.resume_from_checkpoint or False)
        if first and "--json" in switches:
            json_lines(SUMMARY, json.loads((output_dir / SUMMARY).read_text(encoding="utf-8")))
        if tells:
            for account in trainer.accounts:
                if account.streamed:
                    print(account.describe(), file=sys.stderr)
            print(f"model and report.html are in {output_dir}", file=sys.stderr)


#: `type` of the JSON lines, by the files that have the same records.
JSON_TYPES = {METRICS: "log", EVENTS: "event", SAMPLES: "sample", SUMMARY: "summary"}


class JsonLines:
    """Prints records as lines with their type, at once; samples after the log of their evaluation, which comes later."""

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
