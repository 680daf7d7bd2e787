"""Share of a real softmax's blocks that the GPU kernels' filter multiplies, and the probability mass that it drops.

    python -m benchmarks.live_blocks            print the table
    python -m benchmarks.live_blocks --write    also put it into results/live_blocks.json and docs/linear.md

The probabilities are exact, computed on a CPU from SmolLM2 on the sentiment pairs' text. Blocks are 128 tokens by 128 entries,
as in the kernels.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from .linear_problem import LinearCase, LinearProblem

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "live_blocks.json"
PAGE = ROOT / "docs" / "linear.md"
MARKS = ("<!-- live_blocks.json -->", "<!-- end of live_blocks.json -->")
BLOCK = 128
#: Thresholds 2^-k.
EXPONENTS = (8, 10, 12, 16, 20)


def measure() -> dict[str, dict[str, float]]:
    """For each threshold: share of live blocks with entries sorted by mean logit, by largest probability, and unsorted; mass
    dropped by blocks (sorted by mean logit) and by single entries. All are averages over tokens."""
    problem = LinearProblem(LinearCase("live blocks", reference="none"))
    if not problem.real:
        raise SystemExit("needs SmolLM2 (make setup): random logits differ from a trained softmax")
    scored = problem.labels.reshape(-1) != -100
    hidden = problem.hidden.detach().reshape(-1, problem.hidden.shape[-1])[scored]
    weight, labels = problem.weight.detach(), problem.labels.reshape(-1)[scored]
    p = (hidden @ weight.t()).softmax(-1)
    orders = {
        "mean logit": (weight @ hidden.mean(0)).argsort(descending=True),
        "largest probability": p.amax(0).argsort(descending=True),
        "unsorted": torch.arange(p.shape[1]),
    }
    found: dict[str, dict[str, float]] = {f"2^-{k}": {} for k in EXPONENTS}
    for name, order in orders.items():
        ordered = p[:, order]
        shape = (p.shape[0] // BLOCK, BLOCK, p.shape[1] // BLOCK, BLOCK)
        marked = ordered.scatter(-1, order.argsort()[labels].unsqueeze(-1), 1.0)
        top, mass = marked.view(shape).amax((1, 3)), ordered.view(shape).sum(3)
        for k in EXPONENTS:
            live = top > 2.0**-k
            found[f"2^-{k}"][name] = round(float(live.float().mean()), 3)
            if name == "mean logit":
                dropped = torch.where(live.unsqueeze(1), 0.0, mass).sum(-1).mean()
                found[f"2^-{k}"]["dropped by blocks"] = round(float(dropped), 6)
    for k in EXPONENTS:
        found[f"2^-{k}"]["dropped by entries"] = round(float(torch.where(p > 2.0**-k, 0.0, p).sum(-1).mean()), 6)
    return found


def table(found: dict[str, dict[str, float]]) -> str:
    """The figures as markdown."""
    lines = [
        "| eps | live blocks | in the order of the largest probability | unsorted | dropped by blocks | dropped by entries |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for eps, row in found.items():
        shares = [f"{row[name]:.0%}" for name in ("mean logit", "largest probability", "unsorted")]
        masses = [f"{row[name]:.2%}" for name in ("dropped by blocks", "dropped by entries")]
        lines.append(f"| {' | '.join([eps, *shares, *masses])} |")
    return "\n".join(lines)


def page_with(found: dict[str, dict[str, float]], page: str) -> str:
    """docs/linear.md with this table between its marks."""
    before, rest = page.split(MARKS[0])
    return f"{before}{MARKS[0]}\n{table(found)}\n{MARKS[1]}{rest.split(MARKS[1])[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="keep the results, and fill the docs")
    found = measure()
    print(table(found))
    if parser.parse_args().write:
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
        PAGE.write_text(page_with(found, PAGE.read_text()))


if __name__ == "__main__":
    main()
