"""Answers to fixed held-out prompts at every evaluation, beside those of the model that training began from, and who wins.

A falling loss says that chosen answers became likelier than rejected ones. What the model writes of itself is another
question, and the only one that a user of the model asks.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import ConfigError, first_line
from ..model.references import AdapterOffReference, FrozenReference
from ..run_folder.records import SAMPLES, append_record, keep_records, read_records

if TYPE_CHECKING:
    from ..trainer import DPOTrainer

logger = logging.getLogger("dpo_trainer")

#: (prompts, completions) -> one number each, higher is better.
Scorer = Callable[[list[str], list[str]], Sequence[float]]


def load_scorer(name: str) -> Scorer:
    """The callable that "module:function" names; modules in the working directory are found too.

    Raises:
        ConfigError: it is not there, or cannot be called.
    """
    module, colon, function = name.partition(":")
    if not colon or not module or not function:
        raise ConfigError(f"win_rate_scorer: expected 'module:function', got '{name}'")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        scorer = getattr(importlib.import_module(module), function)
    except Exception as error:  # whatever importing the user's module raises
        raise ConfigError(f"win_rate_scorer '{name}': cannot be imported ({first_line(error)})") from error
    if not callable(scorer):
        raise ConfigError(f"win_rate_scorer '{name}': is not callable")
    return scorer


def score(scorer: Scorer, prompts: list[str], completions: list[str]) -> list[float]:
    """The scorer's numbers. Raises ConfigError, in a line, if it fails or gives something else."""
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
    """(share of wins, its standard error); a tie is half a win.

    The standard error is that of a mean of independent values. For a single pair it is not known: NaN.
    """
    wins = torch.tensor([(a > b) + (a == b) / 2 for a, b in zip(scores, others, strict=True)], dtype=torch.float64)
    error = wins.std().item() / math.sqrt(len(wins)) if len(wins) > 1 else math.nan
    return wins.mean().item(), error


@torch.no_grad()
def generate(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, temperature: float, seed: int
) -> list[str]:
    """One answer to each prompt, as text: greedy at temperature 0, else sampled from the whole distribution.

    The caller's random numbers are as they were afterwards. Every call with one seed draws the same numbers.
    """
    device = next(model.parameters()).device
    ends = {tokenizer.eos_token_id}
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)  # chat models may have several
    ends |= set(own) if isinstance(own, (list, tuple)) else {own}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    filled = [list(prompt) or [start if start is not None else 0] for prompt in prompts]
    longest = max(map(len, filled))
    ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in filled], device=device)
    lengths = torch.tensor([[len(prompt)] for prompt in filled], device=device)
    mask = (torch.arange(longest, device=device) >= longest - lengths).long()
    how = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else {}
    config = GenerationConfig(
        **{"do_sample": False, **how},
        max_new_tokens=max_new_tokens,
        pad_token_id=pad,
        eos_token_id=sorted(end for end in ends if end is not None) or None,
    )
    was_training = model.training
    model.eval()
    devices = [device] if device.type == "cuda" else []
    try:
        # Shapes change with every token: a compiled backbone would be compiled again and again.
        with torch.random.fork_rng(devices), torch.compiler.set_stance("force_eager"):
            torch.manual_seed(seed)
            output = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    finally:
        model.train(was_training)
    return tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)


class Samples(TrainerCallback):
    """Takes the samples of a run: writes `samples.jsonl` and gives evaluations their win rate.

    The other side of the comparison is written by the reference before the first step, or by the model itself where no
    reference is in memory; a resumed run reads it from the file.

    Args:
        trainer: the trainer.
        scorer: judges answers; None: they are only shown.
    """

    def __init__(self, trainer: DPOTrainer, scorer: Scorer | None) -> None:
        self.trainer, self.scorer = trainer, scorer
        #: Prompts, and the answers of the model that training began from, by the prefix of the evaluation's metrics.
        self.initial: dict[str, tuple[list[str], list[str]]] = {}

    @property
    def path(self) -> Path:
        return Path(str(self.trainer.args.output_dir)) / SAMPLES

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.initial = {}
        if state.is_world_process_zero:
            records = keep_records(self.path, state.global_step)
        else:
            records = read_records(self.path)
        for prefix, dataset in self._evaluations().items():
            if not state.global_step:
                with self.trainer._pause():
                    self._begin(prefix, dataset)
                continue
            known = [r for r in records if r["step"] == 0 and r["evaluation"] == prefix and "policy" not in r]
            self.initial[prefix] = [r["prompt"] for r in known], [r.get("reference", "") for r in known]

    @property
    def metric_names(self) -> tuple[str, ...]:
        """What `evaluate` may return."""
        return ("score", "win_rate", "win_rate_se") if self.scorer is not None else ()

    def _evaluations(self) -> dict[str, Any]:
        dataset = self.trainer.eval_dataset
        named = dataset if isinstance(dataset, dict) else {"": dataset}
        prefixes = {f"eval_{key}" if key else "eval": value for key, value in named.items()}
        return {prefix: value for prefix, value in prefixes.items() if _has_prompts(value)}

    def _rows(self, dataset: Any) -> list[int]:
        """The prompts' places: spread evenly over the dataset, the same ones every time."""
        count = min(self.trainer.args.sample_prompts, len(dataset))
        return [index * len(dataset) // count for index in range(count)]

    def _texts(self, dataset: Any, part: str) -> list[str]:
        ids = [dataset[row][f"{part}_input_ids"] for row in self._rows(dataset)]
        tokenizer: Any = self.trainer.processing_class
        return tokenizer.batch_decode(ids, skip_special_tokens=True)

    def _begin(self, prefix: str, dataset: Any) -> None:
        """Have the answers written that the policy's will be compared with; score them, to see that the scorer works."""
        answers = self._answers(dataset, self._initial_model())
        prompts, chosen = self._texts(dataset, "prompt"), self._texts(dataset, "chosen")
        self.initial[prefix] = prompts, answers
        if self.scorer is not None:
            score(self.scorer, prompts, answers)
        columns = (self._rows(dataset), prompts, chosen, answers)
        for row, prompt, best, answer in zip(*columns, strict=True):
            self._write(prefix, {"row": row, "prompt": prompt, "chosen": best, "reference": answer})

    @contextlib.contextmanager
    def _initial_model(self) -> Any:
        reference = self.trainer.reference
        if isinstance(reference, AdapterOffReference):
            with reference._adapter_off():
                yield reference.split.model
        else:
            yield reference.split.model if isinstance(reference, FrozenReference) else self.trainer.policy.model

    def _answers(self, dataset: Any, source: contextlib.AbstractContextManager[Any]) -> list[str]:
        args = self.trainer.args
        prompts = [dataset[row]["prompt_input_ids"] for row in self._rows(dataset)]
        found: list[str] = []
        with source as model, self.trainer.accelerator.autocast():
            for start in range(0, len(prompts), args.per_device_eval_batch_size):
                found += generate(
                    model,
                    self.trainer.processing_class,
                    prompts[start : start + args.per_device_eval_batch_size],
                    max_new_tokens=args.sample_max_new_tokens,
                    temperature=args.sample_temperature,
                    seed=args.seed + start,
                )
        return found

    def evaluate(self, prefix: str, dataset: Any) -> dict[str, float]:
        """Sample and write; returns `win_rate`, `win_rate_se` (standard error) and `score` where there is a scorer."""
        if not _has_prompts(dataset):
            return {}
        if prefix not in self.initial and not self.trainer.state.global_step:
            self._begin(prefix, dataset)
        prompts, chosen = self._texts(dataset, "prompt"), self._texts(dataset, "chosen")
        known, initial = self.initial.get(prefix, ([], []))
        if known != prompts:
            initial = []  # another dataset than the run's
        reference = self.trainer.reference
        unmoved = not self.trainer.state.global_step and (reference is None or getattr(reference, "copied", False))
        if unmoved and initial:
            answers = initial
        else:
            answers = self._answers(dataset, contextlib.nullcontext(self.trainer.policy.model))
        records: list[dict[str, Any]] = [
            {"row": row, "prompt": prompt, "chosen": best, "policy": answer}
            for row, prompt, best, answer in zip(self._rows(dataset), prompts, chosen, answers, strict=True)
        ]
        for record, answer in zip(records, initial, strict=False):
            record["reference"] = answer
        metrics = {}
        if self.scorer is not None:
            against = self.trainer.args.win_rate_against
            scores = score(self.scorer, prompts, answers)
            metrics["score"] = math.fsum(scores) / len(scores)
            others = chosen if against == "chosen" else initial
            if others:
                other_scores = score(self.scorer, prompts, others)
                metrics["win_rate"], metrics["win_rate_se"] = win_rate(scores, other_scores)
                for record, mine, other in zip(records, scores, other_scores, strict=True):
                    record |= {"policy_score": mine, f"{against}_score": other}
            else:
                logger.warning("win rate of %s: no answers of the model that training began from are known", prefix)
        for record in records:
            self._write(prefix, record)
        return metrics

    def _write(self, prefix: str, record: dict[str, Any]) -> None:
        state = self.trainer.state
        if state.is_world_process_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            append_record(self.path, {"step": state.global_step, "evaluation": prefix, **record})


def _has_prompts(dataset: Any) -> bool:
    """Whether it is a dataset of tokenised pairs, not a stream: prompts are picked by their place."""
    return hasattr(dataset, "__len__") and "prompt_input_ids" in (getattr(dataset, "column_names", None) or ())
