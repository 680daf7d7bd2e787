"""DPOConfig: every setting of a run, with its help text, its default and the checks that need no data."""

import dataclasses
import json
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments

from dpo_kernels import objectives
from dpo_kernels.backends import NAMES as BACKENDS
from dpo_kernels.functional import LINEAR_STATISTICS as STATISTICS
from dpo_kernels.linear.planner import parse_budget
from dpo_kernels.objectives import OBJECTIVES

from ..batch.layout import LAYOUTS
from ..batch.sampler import STRATEGIES
from ..data.prepare import FILTERS
from ..errors import ConfigError, did_you_mean
from ..model.fit import check_ranges
from ..watch.diagnostics import DIAGNOSES, Limits

LOSS_PATHS = ("auto", "linear", "logits")
OPPONENTS = ("reference", "chosen")
TRUNCATION_MODES = ("keep_end", "keep_start")


@dataclass
class DPOConfig(TrainingArguments):
    """Settings of a DPO run: those of `transformers.TrainingArguments` and the ones below.

    Names are TRL's where TRL has the setting. Some defaults of TrainingArguments are changed to what preference
    training wants (see the fields); `label_smoothing` here is DPO's, `label_smoothing_factor` has no effect.

    Raises:
        ConfigError: a value is out of range or unknown; the message lists what is known.
    """

    _VALID_DICT_FIELDS = [  # noqa: RUF012 - as in the base class
        *TrainingArguments._VALID_DICT_FIELDS,
        "model_init_kwargs",
        "diagnostics",
    ]

    # Defaults that differ from TrainingArguments.
    learning_rate: float = field(
        default=1e-6,
        metadata={"help": "Peak learning rate of AdamW. Try 5e-7 to 5e-6 for whole models, 1e-5 to 1e-4 with LoRA."},
    )
    num_train_epochs: float = field(
        default=1.0, metadata={"help": "Passes over the training pairs. More than one to three memorises them."}
    )
    logging_steps: float = field(
        default=10, metadata={"help": "Log every so many optimizer steps; a fraction below 1 is of the run."}
    )
    logging_first_step: bool = field(
        default=True, metadata={"help": "Also log the first step, whose loss must be log 2."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Hide NaN losses from the log. Off: a NaN should be seen."}
    )
    report_to: str | list[str] | None = field(
        default="none", metadata={"help": "Trackers to write to besides the run's own files, e.g. 'tensorboard'."}
    )
    train_sampling_strategy: str = field(
        default="group_by_length",
        metadata={"help": "'group_by_length': pairs of similar length in a step; 'random'; 'sequential'."},
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay off: the collator chooses its columns."}
    )

    # The objective.
    beta: float = field(
        default=0.1,
        metadata={"help": "Strength of the pull towards the reference: rewards are beta * (log-prob - reference)."},
    )
    loss_type: str | list[str] = field(
        default="sigmoid",
        metadata={"help": "The objective, or a list of them to mix; 'sigmoid' is DPO. Own settings: 'simpo(gamma=1)'."},
    )
    loss_weights: list[float] | None = field(
        default=None, metadata={"help": "One weight for each objective of loss_type; equal weights of 1 if not given."}
    )
    label_smoothing: float = field(
        default=0.0, metadata={"help": "Share of pairs assumed to be labelled the wrong way round, e.g. 0.1."}
    )
    ld_alpha: float | None = field(
        default=None,
        metadata={
            "help": "Weight, in [0, 1], of the longer answer's tokens beyond the shorter one's length (LD-DPO): below 1, "
            "length tells less."
        },
    )
    use_weighting: bool = field(
        default=False,
        metadata={
            "help": "Weigh each pair by how likely the policy is to have written both answers (WPO): off-policy data."
        },
    )
    kl_coef: float = field(
        default=0.0,
        metadata={
            "help": "Adds kl_coef times the mean exact KL(policy || reference) of the completion tokens to the loss; needs "
            "the reference model in every step."
        },
    )

    # The data.
    max_length: int | None = field(
        default=1024, metadata={"help": "Most tokens of prompt + completion; longer ones are cut. None: no limit."}
    )
    max_prompt_length: int | None = field(
        default=None, metadata={"help": "Most tokens of the prompt. None: only max_length counts."}
    )
    truncation_mode: str = field(
        default="keep_end",
        metadata={"help": "'keep_end' drops the start of a too long prompt, 'keep_start' the end of the completion."},
    )
    append_eos: bool = field(
        default=True,
        metadata={
            "help": "End text completions with the end-of-sequence token. Turn off for completions cut at a length "
            "limit, which do not show where to stop. Chat templates end turns themselves."
        },
    )
    max_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Most tokens in a training batch, counted as 2 sides x pairs x the longest. Replaces "
            "per_device_train_batch_size; every pair still counts the same."
        },
    )
    batch_layout: str = field(
        default="auto",
        metadata={
            "help": "'prefix_shared': prompts once per pair, short pairs side by side in a row; 'padded': every sequence in "
            "a row of its own; 'auto': what costs least, batch by batch. Models that cannot share are noticed and padded."
        },
    )
    pad_to_multiple_of: int | None = field(
        default=None, metadata={"help": "Round the padded length of a batch up to a multiple of this."}
    )
    dataset_num_proc: int | None = field(default=None, metadata={"help": "Processes to tokenise with."})
    filters: list[str] = field(
        default_factory=lambda: list(FILTERS),
        metadata={
            "help": "Pairs to leave out: 'identical' (chosen equals rejected), 'empty' (a blank completion), 'truncated' "
            "(nothing of a completion is left), 'duplicates' (of an earlier pair). []: keep all."
        },
    )
    min_weight: float | None = field(
        default=None, metadata={"help": "Leave out pairs whose 'weight' (confidence) is below this."}
    )

    # The models.
    precompute_ref_log_probs: bool = field(
        default=False,
        metadata={
            "help": "Compute the reference's log-probabilities once before training, then drop the reference: "
            "half the memory and faster steps, but no KL in the log."
        },
    )
    precompute_ref_batch_size: int | None = field(
        default=None, metadata={"help": "Pairs a batch while precomputing; the evaluation batch size if not given."}
    )
    ref_cache_dir: str | None = field(
        default="auto",
        metadata={
            "help": "Folder in which precomputed log-probabilities are kept and found again, by weights and tokens. "
            "'auto': in the user's cache; null: nowhere."
        },
    )
    sync_ref_model: bool = field(
        default=False,
        metadata={"help": "Let the reference follow the policy (TR-DPO): less pull back to where training began."},
    )
    ref_model_mixup_alpha: float = field(
        default=0.6, metadata={"help": "sync_ref_model: share of the policy in the moved reference; 1 replaces it."}
    )
    ref_model_sync_steps: int = field(default=512, metadata={"help": "sync_ref_model: optimizer steps between moves."})
    disable_dropout: bool = field(
        default=True,
        metadata={"help": "Set all dropout (LoRA's too) to 0, so that policy and reference agree at the start."},
    )
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Keyword arguments of from_pretrained when the model is given as a path."}
    )

    # The kernels, and what is watched.
    statistics: list[str] = field(
        default_factory=lambda: ["entropy", "kl", "accuracy"],
        metadata={
            "help": "Statistics of the completion tokens to log: entropy, kl (exact; needs the reference's "
            "logits in the step), accuracy (as mean_token_accuracy), mean_logits (as logits/chosen, logits/rejected), "
            "grad_dropped_mass (linear path: what grad_filter left out)."
        },
    )
    loss_path: str = field(
        default="auto",
        metadata={
            "help": "'linear': loss from hidden states and LM head, logits exist a chunk at a time; 'logits': all at once; "
            "'auto': linear wherever model and objective allow it."
        },
    )
    memory_budget: int | str | None = field(
        default=None,
        metadata={
            "help": "Working memory of the linear path, e.g. '64MB'. None: half of the head's gradient, or 256 MB."
        },
    )
    grad_filter: float | str | None = field(
        default="auto",
        metadata={
            "help": "Linear path: leave probabilities up to this out of the gradient's products. 'auto': exact in float32, "
            "below the rounding in 16 bits; None: exact."
        },
    )
    backend: str | None = field(
        default=None, metadata={"help": "Kernels to use: eager, cpu, triton or cuda. None: the best for the device."}
    )
    sample_prompts: int = field(
        default=0,
        metadata={
            "help": "Held-out prompts that the policy answers at every evaluation, the same ones each time, beside the "
            "answers it began with: in samples.jsonl and the report. 0: none."
        },
    )
    sample_max_new_tokens: int = field(default=128, metadata={"help": "Most tokens of such an answer."})
    sample_temperature: float = field(
        default=0.0, metadata={"help": "0: the likeliest token each time; else sampled, with the run's seed."}
    )
    win_rate_scorer: str | None = field(
        default=None,
        metadata={
            "help": "'module:function' with (prompts, completions) -> a number each, higher is better: logs how often the "
            "policy's answers win, as eval_win_rate."
        },
    )
    win_rate_against: str = field(
        default="reference",
        metadata={
            "help": "Whom they must beat: 'reference', the answers before training; or 'chosen', those of the data."
        },
    )
    diagnostics: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Thresholds of the diagnostics, e.g. --diagnostics.kl_level 0.5; null turns one off."},
    )
    stop_on: list[str] = field(
        default_factory=list,
        metadata={"help": "Diagnoses that stop the run, with a checkpoint, e.g. [kl_exploding, overfitting]."},
    )
    write_report: bool = field(
        default=True, metadata={"help": "Write report.html into output_dir at checkpoints and at the end."}
    )

    def __post_init__(self) -> None:
        self._check_dpo_fields()
        if not torch.accelerator.is_available():
            self.use_cpu = True  # transformers refuses 16-bit autocast on a CPU that was not asked for
        super().__post_init__()
        if self.device.type == "cpu" and self.fp16:
            raise ConfigError("fp16: needs an accelerator; on a CPU it would be ignored without a word. Use bf16 there")
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False  # nothing to copy to; PyTorch would warn at every loader

    def _check_dpo_fields(self) -> None:
        if not (math.isfinite(self.beta) and self.beta > 0):
            raise ConfigError(f"beta: must be a positive number, got {self.beta}")
        names = [self.loss_type] if isinstance(self.loss_type, str) else list(self.loss_type)
        if not names:
            raise ConfigError("loss_type: at least one objective is needed")
        for name in names:
            # "simpo(gamma=1)" names simpo, with a hyper-parameter of its own.
            plain = name.partition("(")[0].strip()
            if plain not in OBJECTIVES:
                raise ConfigError(
                    f"loss_type: unknown objective '{plain}'{did_you_mean(plain, OBJECTIVES)}; "
                    f"known are {', '.join(OBJECTIVES)}"
                )
        if self.loss_weights is not None and len(self.loss_weights) != len(names):
            raise ConfigError(
                f"loss_weights: {len(self.loss_weights)} weights for {len(names)} objectives in loss_type"
            )
        try:
            built = objectives.build(self.loss_type)
        except ValueError as error:
            raise ConfigError(f"loss_type: {error}") from error
        try:
            objectives.check(built, self.loss_weights, self.label_smoothing)
        except ValueError as error:
            raise ConfigError(f"label_smoothing: {error}") from error
        self._check_reference(objectives.needs_reference(built))
        if not 0 <= self.kl_coef < math.inf:
            raise ConfigError(f"kl_coef: must not be negative, got {self.kl_coef}")
        if self.ld_alpha is not None and not 0 <= self.ld_alpha <= 1:
            raise ConfigError(f"ld_alpha: must lie in [0, 1], got {self.ld_alpha}")
        if self.truncation_mode not in TRUNCATION_MODES:
            raise ConfigError(
                f"truncation_mode: unknown '{self.truncation_mode}'; known are {', '.join(TRUNCATION_MODES)}"
            )
        for name, least in (
            ("max_length", 2),
            ("max_prompt_length", 1),
            ("max_tokens", 4),
            ("pad_to_multiple_of", 1),
            ("dataset_num_proc", 1),
            ("precompute_ref_batch_size", 1),
            ("per_device_train_batch_size", 1),
            ("per_device_eval_batch_size", 1),
            ("gradient_accumulation_steps", 1),
            ("ref_model_sync_steps", 1),
            ("sample_prompts", 0),
            ("sample_max_new_tokens", 1),
            ("sample_temperature", 0),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name}: must be at least {least}, got {value}")
        if (
            self.max_length is not None
            and self.max_prompt_length is not None
            and self.max_prompt_length >= self.max_length
        ):
            raise ConfigError(
                f"max_prompt_length: {self.max_prompt_length} leaves no room for a completion "
                f"within max_length {self.max_length}"
            )
        check_ranges(self)
        for name in self.statistics:
            if name not in STATISTICS:
                raise ConfigError(
                    f"statistics: unknown '{name}'{did_you_mean(name, STATISTICS)}; known are {', '.join(STATISTICS)}"
                )
        for name in self.filters:
            if name not in FILTERS:
                raise ConfigError(
                    f"filters: unknown '{name}'{did_you_mean(name, FILTERS)}; known are {', '.join(FILTERS)}"
                )
        if self.min_weight is not None and not self.min_weight >= 0:
            raise ConfigError(f"min_weight: must not be negative, got {self.min_weight}")
        if self.train_sampling_strategy not in STRATEGIES:
            raise ConfigError(
                f"train_sampling_strategy: unknown '{self.train_sampling_strategy}'"
                f"{did_you_mean(self.train_sampling_strategy, STRATEGIES)}; known are {', '.join(STRATEGIES)}"
            )
        if self.batch_layout not in LAYOUTS:
            raise ConfigError(
                f"batch_layout: unknown '{self.batch_layout}'{did_you_mean(self.batch_layout, LAYOUTS)}; "
                f"known are {', '.join(LAYOUTS)}"
            )
        if self.win_rate_against not in OPPONENTS:
            raise ConfigError(
                f"win_rate_against: unknown '{self.win_rate_against}'"
                f"{did_you_mean(self.win_rate_against, OPPONENTS)}; known are {', '.join(OPPONENTS)}"
            )
        if self.win_rate_scorer is not None and not self.sample_prompts:
            raise ConfigError("win_rate_scorer: there is nothing to score; set sample_prompts, e.g. to 32")
        if self.loss_path not in LOSS_PATHS:
            raise ConfigError(
                f"loss_path: unknown '{self.loss_path}'{did_you_mean(self.loss_path, LOSS_PATHS)}; "
                f"known are {', '.join(LOSS_PATHS)}"
            )
        try:
            parse_budget(self.memory_budget, 1, 1)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"memory_budget: {error}") from error
        if isinstance(self.grad_filter, str) and self.grad_filter != "auto":
            raise ConfigError(f"grad_filter: must be 'auto', None or a probability, got '{self.grad_filter}'")
        if isinstance(self.grad_filter, float | int) and not 0 < self.grad_filter < 1:
            raise ConfigError(f"grad_filter: a probability lies in (0, 1), got {self.grad_filter}")
        self.diagnostics = as_mapping("diagnostics", self.diagnostics)
        self.model_init_kwargs = as_mapping("model_init_kwargs", self.model_init_kwargs)
        Limits.of(self.diagnostics)
        for name in self.stop_on:
            if name not in DIAGNOSES:
                raise ConfigError(
                    f"stop_on: unknown diagnosis '{name}'{did_you_mean(name, DIAGNOSES)}; known are {', '.join(DIAGNOSES)}"
                )
        if self.backend is not None and self.backend not in BACKENDS:
            raise ConfigError(
                f"backend: unknown '{self.backend}'{did_you_mean(self.backend, BACKENDS)}; "
                f"known are {', '.join(BACKENDS)}"
            )

    def _check_reference(self, needed: bool) -> None:
        if not 0 < self.ref_model_mixup_alpha <= 1:
            raise ConfigError(f"ref_model_mixup_alpha: must lie in (0, 1], got {self.ref_model_mixup_alpha}")
        for name in ("precompute_ref_log_probs", "sync_ref_model"):
            if getattr(self, name) and not needed:
                raise ConfigError(f"{name}: loss_type {self.loss_type} compares with no reference; leave it off")
        if self.sync_ref_model and self.precompute_ref_log_probs:
            raise ConfigError(
                "sync_ref_model: the reference moves during training, so its log-probabilities cannot be precomputed; "
                "leave precompute_ref_log_probs off"
            )


def as_mapping(name: str, value: dict[str, Any] | str | None) -> dict[str, Any] | None:
    """A mapping, or its JSON text, as transformers also takes it. Raises ConfigError for anything else."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ConfigError(f"{name}: expected a mapping, got {value!r}") from error
    if value is not None and not isinstance(value, dict):
        raise ConfigError(f"{name}: expected a mapping, got {value!r}")
    return value


def own_fields() -> list[Any]:
    """The dataclass fields that DPOConfig adds to, or changes in, TrainingArguments, in order."""
    return [item for item in dataclasses.fields(DPOConfig) if item.name in DPOConfig.__annotations__]
