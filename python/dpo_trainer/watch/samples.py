"""Answers to fixed held-out prompts at every evaluation, next to the answers before training, with a win rate.

A falling loss only says that chosen answers became likelier than rejected ones. Users of the model care about the answers
that it generates.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..batch.images import ImageInputs
from ..data.images import has_images
from ..data.prepare import by_name
from ..data.processor import tokenizer_of
from ..data.rows import images_of
from ..errors import ConfigError, first_line
from ..model.split import evaluating
from ..progress import Phase, line_of
from ..run import Run
from ..run_folder.journal import Journal
from ..run_folder.records import SAMPLES
from .diagnostics import spread

logger = logging.getLogger("dpo_trainer")

#: (prompts, completions) -> one number each, higher is better.
Scorer = Callable[[list[str], list[str]], Sequence[float]]


def load_scorer(name: str) -> Scorer:
    """The callable that "module:function" names. The module may be in the working directory.

    Raises:
        ConfigError: it cannot be imported, or is not callable.
    """
    module, _, function = name.partition(":")
    if not module or not function:
        raise ConfigError(f"win_rate_scorer: expected 'module:function', got '{name}'")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        scorer = getattr(importlib.import_module(module), function)
    except Exception as error:  # the user's module may raise any error
        raise ConfigError(f"win_rate_scorer '{name}': cannot be imported ({first_line(error)})") from error
    if not callable(scorer):
        raise ConfigError(f"win_rate_scorer '{name}': is not callable")
    return scorer


def score(scorer: Scorer, prompts: list[str], completions: list[str]) -> list[float]:
    """The scorer's numbers. Raises a ConfigError of one line if it fails or returns something else."""
    try:
        given = [float(value) for value in scorer(prompts, completions)]
    except Exception as error:  # the user's own code
        raise ConfigError(f"scorer: failed ({type(error).__name__}: {first_line(error)})") from error
    if len(given) != len(completions):
        raise ConfigError(f"scorer: gave {len(given)} scores for {len(completions)} completions")
    if any(math.isnan(value) for value in given):
        raise ConfigError("scorer: gave a score that is not a number")
    return given


def win_rate(scores: Sequence[float], others: Sequence[float]) -> tuple[float, float]:
    """(share of wins, its standard error). A tie is half a win.

    The standard error is that of a mean of independent values. It is NaN for a single pair.
    """
    wins = torch.tensor([(a > b) + (a == b) / 2 for a, b in zip(scores, others, strict=True)], dtype=torch.float64)
    error = wins.std().item() / math.sqrt(len(wins)) if len(wins) > 1 else math.nan
    return wins.mean().item(), error


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    beside: Callable[[Tensor], dict[str, Tensor]] = lambda _: {},
) -> list[str]:
    """One answer to each prompt, as text: greedy at temperature 0, else sampled from the whole distribution.

    `beside` gives what the model reads in addition to its token ids [prompts, T], by name: its inputs for images.
    The caller's random numbers are as they were afterwards. Every call with one seed draws the same numbers.
    """
    device = next(model.parameters()).device
    own = model.generation_config.eos_token_id  # chat models may have several
    ends = {tokenizer.eos_token_id, *(own if isinstance(own, (list, tuple)) else [own])}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    filled = [torch.tensor(list(prompt) or [start if start is not None else 0]) for prompt in prompts]
    ids = pad_sequence(filled, batch_first=True, padding_value=pad, padding_side="left").to(device)
    dtype = next(value.dtype for value in model.parameters() if value.is_floating_point())
    inputs = {
        name: value.to(device, dtype if value.is_floating_point() else value.dtype)
        for name, value in beside(ids.cpu()).items()
    }
    mask = pad_sequence([torch.ones_like(row) for row in filled], batch_first=True, padding_side="left").to(device)
    how = {"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else {}
    config = GenerationConfig(
        **how,
        do_sample=temperature > 0,
        max_new_tokens=max_new_tokens,
        pad_token_id=pad,
        eos_token_id=sorted(ends - {None}) or None,
    )
    devices = [device] if device.type == "cuda" else []
    # Shapes change with every token, so a compiled backbone would be compiled again for each.
    with evaluating(model), torch.random.fork_rng(devices), torch.compiler.set_stance("force_eager"):
        torch.manual_seed(seed)
        output = model.generate(input_ids=ids, attention_mask=mask, **inputs, generation_config=config)
    return tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)


class Samples(TrainerCallback):
    """Samples answers of a run: writes `samples.jsonl` and computes the win rate of evaluations.

    The answers for comparison come from the reference before the first step, or from the model itself if no reference is in
    memory. A resumed run reads them from the file.

    Args:
        run: the run.
        journal: writes the samples.
        scorer: scores answers. None: there is no win rate.
    """

    def __init__(self, run: Run, journal: Journal, scorer: Scorer | None) -> None:
        self.run, self.journal, self.scorer = run, journal, scorer
        #: By the prefix of the evaluation's metrics: the prompts, and their answers from before training.
        self.initial: dict[str, tuple[list[str], list[str]]] = {}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.initial = {}
        records = self.journal.keep(SAMPLES, state.global_step)
        for key, dataset in by_name(self.run.eval_dataset).items():
            prefix = f"eval_{key}" if key else "eval"
            if state.global_step:
                known = [r for r in records if r["step"] == 0 and r["evaluation"] == prefix and "policy" not in r]
                self.initial[prefix] = [r["prompt"] for r in known], [r.get("reference", "") for r in known]
            else:
                with self.run.pause():
                    self._begin(prefix, dataset)

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Names of the metrics that `evaluate` may return."""
        return ("score", "win_rate", "win_rate_se") if self.scorer is not None else ()

    def _begin(self, prefix: str, dataset: Any) -> None:
        """Generate the answers with which the policy's are compared. Scores them, to find errors of the scorer early."""
        records = self._asked(prefix, dataset)
        reference = self.run.reference
        source = contextlib.nullcontext(self.run.policy.model) if reference is None else reference.whole_model()
        answers, prompts = self._answers(dataset, source), [record["prompt"] for record in records]
        self.initial[prefix] = prompts, answers
        if self.scorer is not None:
            score(self.scorer, prompts, answers)
        for record, answer in zip(records, answers, strict=True):
            self.journal.append(SAMPLES, {**record, "reference": answer})

    def _asked(self, prefix: str, dataset: Any) -> list[dict[str, Any]]:
        """A record without an answer for each sampled row. The rows are the same every time, spread evenly over the dataset."""
        places = spread(len(dataset), self.run.args.sample_prompts)
        rows = dataset.select(places)
        decode = partial(tokenizer_of(self.run.processing_class).batch_decode, skip_special_tokens=True)
        prompts, answers = decode(list(rows["prompt_ids"])), decode(list(rows["chosen_ids"]))
        return [
            {"step": self.run.state.global_step, "evaluation": prefix, "row": row, "prompt": prompt, "chosen": chosen}
            for row, prompt, chosen in zip(places, prompts, answers, strict=True)
        ]

    def _answers(self, dataset: Any, source: contextlib.AbstractContextManager[Any]) -> list[str]:
        args, size, processing_class = (
            self.run.args,
            self.run.args.per_device_eval_batch_size,
            self.run.processing_class,
        )
        rows = dataset.select(spread(len(dataset), args.sample_prompts))
        prompts = list(rows["prompt_ids"])
        images = [images_of(row) or [] for row in rows] if has_images(dataset) else []
        found: list[str] = []
        phase = Phase(line_of(args), "sampling answers", len(prompts), "prompts")
        with source as model, self.run.accelerator.autocast(), phase:
            for start in range(0, len(prompts), size):
                found += generate(
                    model,
                    tokenizer_of(processing_class),
                    prompts[start : start + size],
                    max_new_tokens=args.sample_max_new_tokens,
                    temperature=args.sample_temperature,
                    seed=args.seed + start,
                    beside=partial(ImageInputs(processing_class), images[start : start + size]),
                )
                phase.reach(len(found))
        return found

    def evaluate(self, prefix: str, dataset: Any) -> dict[str, float]:
        """Sample and write answers. With a scorer, returns `win_rate`, `win_rate_se` (standard error) and `score`."""
        begun = self.run.state.global_step > 0
        if prefix not in self.initial and not begun:
            self._begin(prefix, dataset)
        records = self._asked(prefix, dataset)
        known, initial = self.initial.get(prefix, ([], []))
        if known != [record["prompt"] for record in records]:
            initial = []  # not the run's evaluation dataset
        reference = self.run.reference
        unmoved = initial and not begun and (reference is None or reference.copied)
        answers = initial if unmoved else self._answers(dataset, contextlib.nullcontext(self.run.policy.model))
        for record, answer in zip(records, answers, strict=True):
            record["policy"] = answer
        for record, answer in zip(records, initial, strict=False):
            record["reference"] = answer
        metrics = self._scored(records, initial)
        for record in records:
            self.journal.append(SAMPLES, record)
        return metrics

    def _scored(self, records: list[dict[str, Any]], initial: list[str]) -> dict[str, float]:
        """The mean score and the win rate; empty without a scorer. Adds the scores to the records."""
        if self.scorer is None:
            return {}
        against, prompts = self.run.args.win_rate_against, [record["prompt"] for record in records]
        scores = score(self.scorer, prompts, [record["policy"] for record in records])
        metrics = {"score": math.fsum(scores) / len(scores)}
        others = [record["chosen"] for record in records] if against == "chosen" else initial
        if not others:
            prefix = records[0]["evaluation"]
            logger.warning("win rate of %s: not computed, since no answers from before training are known", prefix)
            return metrics
        other_scores = score(self.scorer, prompts, others)
        metrics["win_rate"], metrics["win_rate_se"] = win_rate(scores, other_scores)
        for record, mine, other in zip(records, scores, other_scores, strict=True):
            record |= {"policy_score": mine, f"{against}_score": other}
        return metrics
