"""What does `apply_to_trl()`, one line in a TRL user's script, bring to TRL's own DPO training step?

Two of TRL's trainers stand side by side, each with a SmolLM2-135M and an optimizer of its own and one reference between
them. They take the same steps on the same pairs, in turns: one as it is, one with our kernels under its fused LM head. A
step is forward, backward and optimizer. Their losses must agree.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from . import method
from .conftest import Settings, wanted
from .linear_problem import NO_MODEL, TEXT, model_folder
from .method import Contender, Samples
from .peers.base import PEERS_EXTRA
from .report import BEST_PEER, EXTRA, SPREAD, TIME, Column, Result, counted
from .test_trainer import LOSS_TOLERANCE, MAX_LENGTH
from .trainer_run import build_trl, common_arguments, pick, token_counts

#: Pairs a step, timed steps of each.
SIZES = {"small": (1, 2), "default": (4, 2), "full": (8, 7)}
TITLES = {"stock": "TRL 1.16's DPOTrainer", "patched": "the same after apply_to_trl()"}
#: At least so many times as fast.
BAR = 1.5

COLUMNS = [
    Column("title", "trainer"),
    Column("tokens_per_second", "tokens/s", "count"),
    TIME,
    SPREAD,
    Column("vs_best", "vs unpatched", "ratio"),
    BEST_PEER,
    EXTRA,
    Column("loss_difference", "losses differ by", "error"),
    Column("verdict", "losses"),
]


def summary(rows: list[dict[str, Any]]) -> str:
    """How much faster the patched step is."""
    row = next((row for row in rows if row.get("vs_best")), None)
    if row is None:
        return ""
    return (
        f"`apply_to_trl()` makes the training step of {row['best_peer']} {row['vs_best']:.2f} times as fast (SmolLM2-135M, "
        f"{counted(row['pairs'], 'pair')}, {row['tokens']:.0f} tokens), its losses the same to {row['loss_difference']:.0e}."
    )


class Side:
    """One of the trainers: a step at a time, with the patch on while it runs if it is the patched one."""

    def __init__(
        self, name: str, model: Any, ref_model: Any, rows: list[dict[str, Any]], common: dict[str, Any]
    ) -> None:
        self.trainer = build_trl(model, rows, common, ref_model=ref_model)
        self.patched = name == "patched"
        self.optimizer = self.trainer.create_optimizer()
        self.batches = iter(self.trainer.get_train_dataloader())
        # What `train()` sets before its loop; a step here is one batch.
        self.trainer.current_gradient_accumulation_steps = 1
        self.losses: list[float] = []

    def prepare(self) -> None:
        """The next batch, and no gradients."""
        self.batch = next(self.batches)
        self.optimizer.zero_grad()

    def step(self) -> None:
        from dpo_kernels.integrations.trl import apply_to_trl

        undo = apply_to_trl() if self.patched else lambda: None
        try:
            loss = self.trainer.training_step(self.trainer.model, self.batch)
        finally:
            undo()
        self.optimizer.step()
        self.losses.append(loss.item())


@pytest.fixture(scope="module")
def measured(
    settings: Settings, publish: Callable[[Result], Result], request: pytest.FixtureRequest
) -> dict[str, dict[str, Any]]:
    """The rows, by contender."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    for module in ("transformers", "trl"):
        pytest.importorskip(module, reason=f"{module} is not installed ({PEERS_EXTRA})")
    if (folder := model_folder()) is None:
        pytest.skip(NO_MODEL)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    names = wanted(request, "test_trl_patch", "name")
    pairs, steps = SIZES[settings.sizes]
    calls = steps + 2  # the first call of each, and the one whose memory is watched
    path = Path(request.config.getoption("--pairs") or TEXT)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    rows = pick(path, tokenizer, calls * pairs, MAX_LENGTH)

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)

    with tempfile.TemporaryDirectory() as scratch:
        common = common_arguments(scratch, calls, pairs, MAX_LENGTH, settings.device)
        common["model_init_kwargs"] = None
        ref_model = load()
        sides = {name: Side(name, load(), ref_model, rows, common) for name in names}
        contenders = [Contender(name, side.step, side.prepare) for name, side in sides.items()]
        found = method.interleave(contenders, steps, warmup=0, device=settings.device)
        tokens = statistics.mean(token_counts(next(iter(sides.values())).trainer.train_dataset, pairs, MAX_LENGTH))
    question = "TRL's training step: without and with our kernels under its LM head"
    result = Result("trl_patch", question, COLUMNS, summary=summary)
    case = f"float32: {path.name}, {counted(pairs, 'pair')} a step, at most {MAX_LENGTH} tokens"
    for name, side in sides.items():
        row: dict[str, Any] = {"case": case, "peer": name, "title": TITLES[name], "ours": name == "patched"}
        row |= {"pairs": pairs, "tokens": tokens, "tokens_per_second": tokens / found[name].median}
        row |= {"median_s": found[name].median, "samples_s": found[name].seconds, "spread": found[name].spread}
        row |= {"extra_bytes": found[name].extra_bytes, "losses": side.losses, "select": f"test_trl_patch[{name}]"}
        if name == "patched" and (best := method.best_ratio(found, name, ["stock"])):
            row |= best.row(TITLES["stock"])
            row["select"] += " or test_trl_patch[stock]"
            row["loss_difference"] = max(abs(a - b) for a, b in zip(side.losses, sides["stock"].losses, strict=True))
            row["verdict"] = "agree" if row["loss_difference"] <= LOSS_TOLERANCE else "WRONG"
            bar = {"what": "TRL's step, patched against not", "bar": BAR, "measured": best.ratio}
            if settings.sizes == "full":
                result.extra["bars"] = [bar | {"met": best.ratio >= BAR}]
                verdict = "met" if best.ratio >= BAR else "MISSED"
                result.notes.append(f"Bar: {bar['what']}: {best.ratio:.2f} (bar {BAR:g}) {verdict}")
        result.rows.append(row)
    result.notes.insert(
        0,
        f"{tokens:.0f} real tokens a step, prompts included; extra memory is what a step needs beside weights and optimizer; "
        f"{calls} steps each, {steps} of them timed, AdamW at {common['learning_rate']:g}.",
    )
    publish(result)
    return {row["peer"]: row for row in result.rows}


@pytest.mark.parametrize("name", TITLES)
def test_trl_patch(measured: dict[str, dict[str, Any]], name: str, replay: Callable[[Samples], None]) -> None:
    row = measured[name]
    assert row.get("verdict") != "WRONG", f"losses differ from unpatched TRL's by {row['loss_difference']:.2g}"
    replay(Samples(row["samples_s"]))
