"""Compares the speed of two revisions, with confidence intervals. Their calls are interleaved.

    python -m benchmarks.compare REF                  the working tree against a git revision
    python -m benchmarks.compare REF --to OTHER       one revision against another

Each revision has its own folder, its own CPU library built from its own sources, and its own process, which stays alive.
The two processes take turns, call by call, so other load on the machine slows both. They share only this file and the
virtual environment. The reported change is the median over rounds of the ratio within a round, with its 95 % bootstrap
interval (Efron 1979).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

#: What is timed, by name: [2P, T, V], dtype, and a hidden size if the inputs are hidden states. SMALL is for tests.
CASES: dict[str, dict[str, Any]] = {
    "logits float32": {"shape": (8, 64, 49152), "dtype": "float32"},
    "logits bfloat16": {"shape": (8, 64, 49152), "dtype": "bfloat16"},
    "logits float32, statistics": {
        "shape": (8, 64, 49152), "dtype": "float32", "statistics": ("entropy", "kl", "accuracy"),
    },
    "linear float32": {"shape": (4, 32, 49152), "dtype": "float32", "hidden": 576},
}  # fmt: skip
SMALL: dict[str, dict[str, Any]] = {"logits float32": {"shape": (2, 8, 512), "dtype": "float32"}}


# --- in the process of a revision ----------------------------------------------------------------------------------


def prepare(case: dict[str, Any]) -> Callable[[], float]:
    """A function that runs loss and gradient once and returns its seconds. Imports the package of this process."""
    import time

    import torch

    from dpo_kernels import dpo_loss, linear_dpo_loss

    generator = torch.Generator().manual_seed(0)
    dtype, (batch, tokens, vocab) = getattr(torch, case["dtype"]), case["shape"]
    labels = torch.randint(vocab, (batch, tokens), generator=generator)
    statistics = tuple(case.get("statistics", ()))
    if hidden := case.get("hidden"):
        states = torch.randn(batch, tokens, hidden, generator=generator).to(dtype).requires_grad_()
        head = (torch.randn(vocab, hidden, generator=generator) * hidden**-0.5).to(dtype).requires_grad_()
        ref_logps = torch.full((batch,), -float(tokens))

        def run() -> float:
            begin = time.perf_counter()
            out = linear_dpo_loss(states, head, labels, ref_logps=ref_logps, statistics=statistics)
            torch.autograd.grad(out.loss, (states, head))
            return time.perf_counter() - begin

        return run
    pristine = torch.randn(batch, tokens, vocab, generator=generator).to(dtype)
    reference = (pristine.float() + 0.1 * torch.randn(batch, tokens, vocab, generator=generator)).to(dtype)
    logits = pristine.clone().requires_grad_()

    def run_logits() -> float:
        with torch.no_grad():
            logits.copy_(pristine)
        begin = time.perf_counter()
        out = dpo_loss(logits, labels, ref_logits=reference, statistics=statistics, inplace_backward=True)
        torch.autograd.grad(out.loss, logits)
        return time.perf_counter() - begin

    return run_logits


def serve() -> None:
    """Read one case per line, or an empty line for one more call of the last case; print the seconds of each call."""
    import dpo_kernels

    print(json.dumps(str(Path(dpo_kernels.__file__).parent)), flush=True)
    call: Callable[[], float] | None = None
    for line in sys.stdin:
        if line.strip():
            call = prepare(json.loads(line))
            call()  # the first call loads libraries and touches memory
        assert call is not None
        print(json.dumps(call()), flush=True)


# --- in the process that compares ----------------------------------------------------------------------------------


class Revision:
    """One side: a tree of sources, and the process that runs them."""

    def __init__(self, name: str, tree: Path, cache: Path) -> None:
        self.name = name
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(tree), str(tree / "python")]),
            # The library is compiled from the tree's own sources at first use.
            "DPO_KERNELS_CACHE": str(cache),
        }
        # Not run as a script: its folder would come first on the path, and its profile.py would hide the standard library's.
        start = f"import runpy; runpy.run_path({str(Path(__file__).resolve())!r}, run_name='__serve__')"
        command = [sys.executable, "-c", start]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=tree
        )
        package = Path(self._answer())
        if package.parent.resolve() != tree.resolve():
            self.close()
            raise RuntimeError(f"{name}: dpo_kernels was imported from {package}, not from {tree}")

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name}: the run ended with exit code {self._process.wait()}; see above")
        return json.loads(line)

    def call(self, case: dict[str, Any] | None = None) -> float:
        """Seconds of one call. If a case is given, it is built first."""
        assert self._process.stdin is not None
        self._process.stdin.write((json.dumps(case) if case else "") + "\n")
        self._process.stdin.flush()
        return float(self._answer())

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def interval(ratios: Sequence[float], seed: int = 0, draws: int = 2000) -> tuple[float, float, float]:
    """(median, lower, upper): the median of the ratios and its 95 % bootstrap interval."""
    lot = random.Random(seed)
    medians = sorted(statistics.median(lot.choices(ratios, k=len(ratios))) for _ in range(draws))
    return statistics.median(ratios), medians[int(0.025 * draws)], medians[int(0.975 * draws) - 1]


def compare(
    before: Revision, after: Revision, cases: dict[str, dict[str, Any]], rounds: int
) -> dict[str, dict[str, Any]]:
    """For each case: seconds of both sides, and the ratio after / before with its interval."""
    found = {}
    for name, case in cases.items():
        seconds: dict[Revision, list[float]] = {before: [], after: []}
        for side in seconds:
            side.call(case)
        for index in range(rounds):
            for side in (before, after) if index % 2 else (after, before):
                seconds[side].append(side.call())
        ratios = [b / a for a, b in zip(seconds[before], seconds[after], strict=True)]
        ratio, low, high = interval(ratios)
        found[name] = {
            "before_s": statistics.median(seconds[before]),
            "after_s": statistics.median(seconds[after]),
            "ratio": ratio,
            "low": low,
            "high": high,
            "verdict": "faster" if high < 1 else "slower" if low > 1 else "no change seen",
        }
    return found


def checked_out(revision: str, folder: Path) -> Path:
    """Check the revision out into a folder of its own (a detached worktree). Raises SystemExit if git does not know it."""
    done = subprocess.run(
        ["git", "-C", str(ROOT), "worktree", "add", "--detach", "--quiet", str(folder), revision],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise SystemExit(f"{revision}: {done.stderr.strip().splitlines()[-1]}")
    return folder


def _remove(folder: Path) -> None:
    subprocess.run(["git", "-C", str(ROOT), "worktree", "remove", "--force", str(folder)], check=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("revision", help="the git revision to compare with")
    parser.add_argument("--to", help="the other revision; default: the working tree")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--small", action="store_true", help="a tiny case, to test the comparison itself")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        sides = []
        for name in (arguments.revision, arguments.to):
            tree = ROOT
            if name is not None:
                tree = Path(scratch) / f"tree{len(sides)}"
                checked_out(name, tree)
                stack.callback(_remove, tree)
            side = Revision(name or "the working tree", tree, Path(scratch) / f"cache{len(sides)}")
            stack.callback(side.close)
            sides.append(side)
        before, after = sides
        found = compare(before, after, SMALL if arguments.small else CASES, arguments.rounds)
    print(f"{after.name} against {before.name}, {arguments.rounds} rounds, interleaved")
    for name, row in found.items():
        print(
            f"{name:28s} {1e3 * row['before_s']:9.3f} ms -> {1e3 * row['after_s']:9.3f} ms   "
            f"{row['ratio'] - 1:+7.1%}  [{row['low'] - 1:+.1%}, {row['high'] - 1:+.1%}]  {row['verdict']}"
        )


if __name__ == "__serve__":
    serve()
elif __name__ == "__main__":
    main()
