"""What does it save to run a pair's prompt only once, followed by both answers, through a real backbone?"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from . import method
from .conftest import Settings, wanted
from .linear_problem import NO_MODEL, model_folder, tiny_model
from .method import Contender, Samples
from .report import SPREAD, TIME, Column, Result, counted, listed

#: By size: (pairs, tokens of prompt + answer); and the prompt's percentage of these tokens.
SIZES = {"small": (1, 32), "default": (1, 64), "full": (4, 256)}
SHARES = {"small": (50,), "default": (50,), "full": (25, 50, 75)}
#: Both layouts as in the trainer: attention over shared rows runs by sequence.
LAYOUTS = {"padded": "each side with its own prompt", "shared": "prompt once a pair"}
NAMES = {sizes: [f"{layout}-{share}" for share in shares for layout in LAYOUTS] for sizes, shares in SHARES.items()}
#: The goal for sharing alone, with prompts as half of the tokens.
BAR = 1.2
#: Hidden states of the two layouts may differ by this share of the largest, since their sums have another order.
TOLERANCE = 1e-4

COLUMNS = [
    Column("title", "layout"),
    Column("tokens", "tokens in the batch", "count"),
    TIME,
    SPREAD,
    Column("vs_best", "faster than padded by", "ratio"),
    Column("difference", "hidden states differ by", "error"),
]


def summary(rows: list[dict[str, Any]]) -> str:
    """The speed-up from sharing, by the prompt's share."""
    gains = [f"{row['vs_best']:.2f} times as fast where prompts are {row['share']} % of the tokens"
             for row in rows if row.get("vs_best")]  # fmt: skip
    return f"Running a prompt once for both answers makes the backbone {listed(gains)}." if gains else ""


RESULT = partial(
    Result,
    "prefix_sharing",
    "Prefix sharing: forward and backward of SmolLM2-135M's backbone",
    COLUMNS,
    summary=summary,
)


@pytest.fixture(scope="module")
def samples(
    settings: Settings, publish: Callable[[Result], Result], request: pytest.FixtureRequest
) -> dict[str, Samples]:
    transformers = pytest.importorskip(
        "transformers", reason="transformers is not installed (pip install -e .[trainer])"
    )
    small = settings.sizes == "small"
    folder = tiny_model(request.getfixturevalue("tmp_path_factory").mktemp("tiny")) if small else model_folder()
    if folder is None:
        pytest.skip(NO_MODEL)
    from dpo_trainer.batch.collator import PairCollator
    from dpo_trainer.model.split import SplitModel

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    split = SplitModel(model.to(settings.device))
    assert split.attend_by_sequence() is not None
    weights = [weight for weight in split.backbone.parameters() if weight.requires_grad]  # type: ignore[union-attr]
    pairs, length = SIZES[settings.sizes]
    generator = torch.Generator().manual_seed(0)
    contenders, facts, answers = [], {}, {}
    names = wanted(request, "test_prefix_sharing", "name")
    for name in names:
        layout, share = name.split("-")
        prompt = length * int(share) // 100
        generator.manual_seed(int(share))
        rows = [
            {
                key: torch.randint(model.config.vocab_size, (count,), generator=generator).tolist()
                for key, count in (
                    ("prompt_ids", prompt),
                    ("chosen_ids", length - prompt),
                    ("rejected_ids", length - prompt),
                )
            }
            for _ in range(pairs)
        ]
        batch = PairCollator(layout="sequences" if layout == "shared" else layout)(rows)
        batch = {key: value.to(settings.device) for key, value in batch.items()}

        def step(batch: dict[str, torch.Tensor] = batch) -> Any:
            return torch.autograd.grad(split.packed_hidden(batch).square().mean(), weights)

        with torch.no_grad():
            answers[name] = split.packed_hidden(batch)
        facts[name] = {"tokens": batch["input_ids"].numel()}
        contenders.append(Contender(name, step))
    rounds = 2 if settings.sizes != "full" else 7
    contenders[0].run()  # libraries initialise
    found = method.interleave(contenders, rounds, warmup=0, device=settings.device, called=True)
    result = RESULT()
    for name in names:
        layout, share = name.split("-")
        row: dict[str, Any] = {"case": f"float32, {counted(pairs, 'pair')} x {length} tokens a side, {share} % prompt"}
        row |= {"title": LAYOUTS[layout], "ours": layout == "shared", "share": int(share), **facts[name]}
        row |= {"median_s": found[name].median, "spread": found[name].spread}
        row["select"] = f"test_prefix_sharing[{name}]"
        other = f"padded-{share}"
        if layout == "shared" and other in found:
            row |= {"vs_best": method.ratio(found[other], found[name]), "best_peer": LAYOUTS["padded"]}
            row["select"] += f" or test_prefix_sharing[{other}]"
            row["difference"] = float((answers[name] - answers[other]).abs().max() / answers[other].abs().max())
            assert row["difference"] <= TOLERANCE, f"{name}: hidden states differ by {row['difference']:.1e}"
        result.rows.append(row)
    half = next((row for row in result.rows if row["share"] == 50 and "vs_best" in row), None)
    if half and settings.sizes != "small":
        met = half["vs_best"] >= BAR
        what = "shared prompts where they are half of the tokens, times as fast as padded rows"
        result.extra["bars"] = [{"what": what, "bar": BAR, "measured": half["vs_best"], "met": met}]
    publish(result)
    return found


def test_prefix_sharing(samples: dict[str, Samples], name: str, replay: Callable[[Samples], None]) -> None:
    replay(samples[name])
