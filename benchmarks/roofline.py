"""The least cost of each path on a GPU, whatever the kernel: bytes, flops, and the floor time that follows from them.

    python -m benchmarks.roofline [--measured results.json] [--json FILE]

The floor is max(bytes / bandwidth, flops / matmul rate). Bytes count each input once and each output once. Small per-token
vectors (a few float64 per row) are left out: they are below 0.1 % of any row here. A GPU session fills the measured column
(`benchmarks/gpu_session.py` writes the file); until then it says "not measured".
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Ceiling:
    """Speeds of a card: memory in bytes/s, bfloat16 matrix products in flop/s."""

    bandwidth: float
    matmul: float


#: H100: bandwidth of the data sheet, measured matmul rate. H200: measured copy bandwidth, and the H100's matmul rate, because
#: the compute chip is the same.
CEILINGS = {"H100": Ceiling(3.35e12, 798e12), "H200": Ceiling(4.3e12, 798e12)}


@dataclass(frozen=True)
class Work:
    """One path at one shape: the bytes that it must move and the flops of its products."""

    path: str
    tokens: int
    vocab: int
    hidden: int | None
    dtype_bytes: int
    bytes: int
    flops: int

    @property
    def key(self) -> str:
        """Name of the row in a results file."""
        hidden = "" if self.hidden is None else f"x{self.hidden}"
        return f"{self.path} [{self.tokens}x{self.vocab}{hidden}]"

    def floor(self, ceiling: Ceiling) -> float:
        """Least possible time of the path in seconds."""
        return max(self.bytes / ceiling.bandwidth, self.flops / ceiling.matmul)


#: Traffic per logit, in units of a logit's size: reads of the policy and of the reference, writes of the gradient.
LOGITS_PATHS = {
    "token_logps": 1,
    "token_logps with statistics": 1,
    "token_logps with reference": 2,
    "token_logps with reference and kl": 2,
    "forward of a call with reference": 2,
    "single-launch forward with reference": 2,  # in results from before the loss had a launch of its own
    "logits_grad": 2,
    "logits_grad with kl": 3,
    "step: policy, reference, gradient": 4,
}

#: Live share of the blocks of a real softmax at eps = 2^-10 (benchmarks/live_blocks.py).
LIVE_SHARE = json.loads((Path(__file__).parent / "results" / "live_blocks.json").read_text())["2^-10"]["mean logit"]

#: Matrix products in units of N H V flops, and logits traffic in bytes per 16-bit logit if chunks do not stay in L2.
#: exact: policy projection, dH, dW (6) and the reference's projection (2). The policy's logits are written, read for the
#: statistics, read and written for the gradient, and read by two products (12); the reference's are written and read (4).
LINEAR_PATHS = {
    "linear exact": (8.0, 16),
    # Two projections, and the live share of the gradient's blocks at 2^-10 (results/live_blocks.json). The policy's logits are
    # stored and read once (4), live blocks of dz are written and read twice, the reference's logits are stored too (2).
    "linear filtered": (4 + 4 * LIVE_SHARE, 6 + 6 * LIVE_SHARE),
    "linear frozen head": (6.0, 14),
    "linear log-probs only": (2.0, 4),
}

LOGITS_SHAPES = ((1024, 49152), (4096, 50257), (16384, 32000), (8192, 128256), (4096, 151669), (4096, 262144))
LINEAR_SHAPES = ((4096, 49152, 576), (8192, 128256, 2048), (8192, 128256, 4096), (16384, 151669, 5120))


def works(dtype_bytes: int = 2) -> Iterator[Work]:
    """Every row of the table."""
    for tokens, vocab in LOGITS_SHAPES:
        for path, units in LOGITS_PATHS.items():
            # Only flops of matrix products count: the five operations per logit do not run on the matmul units.
            yield Work(path, tokens, vocab, None, dtype_bytes, units * dtype_bytes * tokens * vocab, 0)
    for tokens, vocab, hidden in LINEAR_SHAPES:
        for path, (products, traffic) in LINEAR_PATHS.items():
            operands = dtype_bytes * hidden * (2 * tokens + 2 * vocab)
            yield Work(
                path, tokens, vocab, hidden, dtype_bytes,
                traffic * tokens * vocab + operands, int(products * tokens * hidden * vocab),
            )  # fmt: skip


def table(rows: list[Work], measured: dict[str, float]) -> str:
    """The rows as markdown. measured: seconds by Work.key."""
    names = list(CEILINGS)
    lines = [
        "| path | tokens x vocabulary (x hidden) | bytes | flops |"
        + "".join(f" floor {n} |" for n in names)
        + " measured |"
    ]
    lines.append("|---|---|---:|---:|" + "---:|" * (len(names) + 1))
    for row in rows:
        shape = " x ".join(f"{n:,}" for n in (row.tokens, row.vocab, row.hidden) if n is not None)
        floors = "".join(f" {1e3 * row.floor(CEILINGS[n]):.3f} ms |" for n in names)
        seconds = measured.get(row.key)
        seen = "not measured" if seconds is None else f"{1e3 * seconds:.3f} ms"
        flops = f"{row.flops / 1e12:.2f} T" if row.flops else "-"
        lines.append(f"| {row.path} | {shape} | {row.bytes / 1e9:.2f} GB | {flops} |{floors} {seen} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--measured", type=Path, help="results.json of a GPU session")
    parser.add_argument("--json", type=Path, help="write the rows here")
    arguments = parser.parse_args()
    rows = list(works())
    measured = {}
    if arguments.measured:
        measured = json.loads(arguments.measured.read_text()).get("seconds", {})
    print(table(rows, measured))
    if arguments.json:
        report = [dict(asdict(row), key=row.key, floor={n: row.floor(c) for n, c in CEILINGS.items()}) for row in rows]
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
