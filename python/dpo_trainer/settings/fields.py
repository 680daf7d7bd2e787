"""The fields of DPOConfig and of the run, each in one row with its type, default, range, help and group. Imports no torch."""

from dataclasses import dataclass
from functools import partial
from typing import Any

from dpo_kernels.names import BACKENDS, LINEAR_STATISTICS

from ..batch import LAYOUTS, STRATEGIES
from ..data import FILTERS
from .diagnoses import DIAGNOSES
from .objective import DIVERGENCES
from .reading import ReadingSettings
from .table import (
    ANY,
    FINITE_NOT_NEGATIVE,
    FINITE_POSITIVE,
    INTERVAL,
    NOT_NEGATIVE,
    POSITIVE_SHARE,
    PROBABILITY,
    SHARE,
    at_least,
    setting,
)

_run = partial(setting, group="run")
_optimizer, _objective, _data, _model, _kernels, _watch = (
    partial(setting, group=group) for group in ("optimizer", "objective", "data", "model", "kernels", "watch")
)


@dataclass
class DPOFields(ReadingSettings):
    """The fields of DPOConfig other than those of `transformers.TrainingArguments`, and those whose default differs there."""

    # Defaults that differ from TrainingArguments.
    learning_rate: float = _optimizer(
        1e-6,
        "Peak learning rate of AdamW. Try 5e-7 to 5e-6 for whole models, 1e-5 to 1e-4 with LoRA.",
        NOT_NEGATIVE,
    )
    num_train_epochs: float = _optimizer(1.0, "Passes over the training pairs. More than one to three memorises them.")
    logging_steps: float | None = _watch(
        None,
        "Optimizer steps between two log records; below 1, a fraction of the run. None: a twentieth of the run, 10 at most.",
    )
    eval_steps: float | None = _watch(
        None,
        "Steps between two evaluations; below 1, a fraction of the run. None: a twentieth of the run, or longer, so that "
        "evaluations take at most about a quarter of the training time.",
        INTERVAL,
    )
    eval_on_start: bool | None = _watch(
        None, "Evaluate before the first step. None: in a new run whose eval_strategy is not 'no'."
    )
    save_steps: float | None = _watch(
        None,
        "Steps between two checkpoints; below 1, a fraction of the run. None: a tenth of the run, 500 at most, and the two "
        "newest are kept unless save_total_limit says otherwise.",
        INTERVAL,
    )
    logging_first_step: bool = _watch(True, "Also log the first step, whose loss must be log 2.")
    logging_nan_inf_filter: bool = _watch(False, "Hide NaN losses from the log. Off: a NaN should be seen.")
    report_to: None | str | list[str] = _watch(  # noqa: RUF036 - in this order for HfArgumentParser
        "none", "Trackers to write to, in addition to the run's own files, e.g. 'tensorboard'."
    )
    train_sampling_strategy: str = _data(
        "group_by_length",
        "'group_by_length': pairs of similar length in a step; 'random'; 'sequential'.",
        choices=STRATEGIES,
    )
    remove_unused_columns: bool = _data(False, "Has no effect: tokenising keeps the columns that it needs.")

    # The objective.
    beta: float = _objective(
        0.1,
        "Strength of the pull towards the reference: rewards are beta * (log-prob - reference).",
        FINITE_POSITIVE,
    )
    loss_type: str | list[str] = _objective(
        "sigmoid",
        "The objective, or a list of them to mix; 'sigmoid' is DPO. Own settings: 'simpo(gamma=1)'.",
    )
    loss_weights: list[float] | None = _objective(
        None, "One weight for each objective of loss_type; equal weights of 1 if not given."
    )
    label_smoothing: float = _objective(0.0, "Share of pairs assumed to be labelled the wrong way round, e.g. 0.1.")
    f_divergence_type: str = _objective(
        "reverse_kl",
        "Divergence between policy and reference (f-DPO), in objectives of the difference of the log-ratios.",
        choices=DIVERGENCES,
    )
    f_alpha_divergence_coef: float = _objective(
        0.5, "Alpha of 'alpha_divergence'; 1 is reverse_kl, 0 is forward_kl.", ANY
    )
    discopop_tau: float = _objective(0.05, "loss_type discopop: its temperature.", FINITE_POSITIVE)
    ld_alpha: float | None = _objective(
        None,
        "Weight, in [0, 1], of the longer answer's tokens beyond the shorter one's length (LD-DPO). Below 1, length counts for "
        "less.",
        SHARE,
    )
    use_weighting: bool = _objective(
        False, "Weigh each pair by how likely the policy is to have written both answers (WPO): off-policy data."
    )
    kl_coef: float = _objective(
        0.0,
        "Adds kl_coef times the mean exact KL(policy || reference) of the completion tokens to the loss; needs the reference "
        "model in every step.",
        FINITE_NOT_NEGATIVE,
    )

    # The data.
    max_length: int | None = _data(
        1024,
        "Maximum number of tokens of prompt and completion; longer ones are cut. None: no limit.",
        at_least(2),
    )
    max_prompt_length: int | None = _data(
        None, "Maximum number of tokens of the prompt. None: max_length alone counts.", at_least(1)
    )
    truncation_mode: str = _data(
        "keep_end",
        "'keep_end' drops the start of a prompt that is too long, 'keep_start' the end of the completion.",
        choices=("keep_end", "keep_start"),
    )
    append_eos: bool = _data(
        True,
        "End text completions with the end-of-sequence token. Turn off for completions cut at a length limit, which do not "
        "show where to stop. Chat templates end turns themselves.",
    )
    max_tokens: int | None = _data(
        None,
        "Maximum number of tokens in a training batch: 2 sides x pairs x the longest. Replaces per_device_train_batch_size; "
        "every pair still counts the same.",
        at_least(4),
    )
    batch_layout: str = _data(
        "auto",
        "'prefix_shared': prompts once per pair, short pairs side by side in a row; 'padded': every sequence in a row of its "
        "own; 'auto': what costs least, batch by batch. Models that cannot share are noticed and padded.",
        choices=LAYOUTS,
    )
    pad_to_multiple_of: int | str | None = _data(
        None, "Round the padded length of a batch up to a multiple of this. 'auto': none.", at_least(1)
    )
    padding_free: bool = _data(False, "TRL's name of what batch_layout 'auto' does.")
    pad_token: str | None = _data(None, "The token to pad with, of the tokenizer's vocabulary. None: its own.")
    dataset_num_proc: int | None = _data(None, "Processes to tokenise with.", at_least(1))
    filters: list[str] = _data(
        list(FILTERS),
        "Pairs to leave out: 'identical' (chosen equals rejected), 'empty' (a blank completion), 'truncated' (nothing of a "
        "completion is left), 'duplicates' (of an earlier pair). []: keep all.",
        choices=FILTERS,
    )
    min_weight: float | None = _data(None, "Leave out pairs whose 'weight' (confidence) is below this.", NOT_NEGATIVE)

    # The models.
    precompute_ref_log_probs: bool = _model(
        False,
        "Compute the reference's log-probabilities once before training, then drop the reference: half the memory and faster "
        "steps, but no KL in the log.",
    )
    precompute_ref_batch_size: int | None = _model(
        None, "Pairs a batch while precomputing; the evaluation batch size if not given.", at_least(1)
    )
    ref_cache_dir: str | None = _model(
        "auto",
        "Folder in which precomputed log-probabilities are kept and found again, by weights and tokens. 'auto': in the user's "
        "cache; null: nowhere.",
    )
    sync_ref_model: bool = _model(
        False, "Let the reference follow the policy (TR-DPO): less pull back to where training began."
    )
    ref_model_mixup_alpha: float = _model(
        0.6, "sync_ref_model: share of the policy in the moved reference; 1 replaces it.", POSITIVE_SHARE
    )
    ref_model_sync_steps: int = _model(512, "sync_ref_model: optimizer steps between moves.", at_least(1))
    disable_dropout: bool = _model(
        True, "Set all dropout (LoRA's too) to 0, so that policy and reference agree at the start."
    )
    router_aux_loss_coef: float | None = _model(
        None,
        "Mixture of experts: factor of the auxiliary loss that keeps experts equally busy, added in training. None: what the "
        "model's config says; 0: none.",
        FINITE_NOT_NEGATIVE,
    )
    adapter: str | None = _model(
        None,
        "What becomes of an adapter that the model brings: 'continue' trains it, 'merge' merges it into the model. None: "
        "continue, or merge where lora asks for a new one.",
        choices=("continue", "merge"),
    )
    model_adapter_name: str | None = _model(
        None, "The adapter to train, of a model that brings several. None: the active one."
    )
    ref_adapter_name: str | None = _model(None, "The adapter with which the model is the reference.")
    model_init_kwargs: dict[str, Any] | str | None = _model(
        None, "Keyword arguments of from_pretrained when the model is given as a path."
    )
    trust_remote_code: bool = _model(
        False, "Let a model and a tokenizer that are given as paths bring Python code of their own."
    )
    activation_offloading: bool = _model(False, "Not supported; set gradient_checkpointing.")

    # The kernels, and what is watched.
    statistics: list[str] = _watch(
        ["entropy", "kl", "accuracy", "mean_logits"],
        "Statistics of the completion tokens to log: entropy, kl (exact; needs the reference's logits in the step), accuracy "
        "(as mean_token_accuracy), mean_logits (as logits/chosen, logits/rejected), grad_dropped_mass (linear path: what "
        "grad_filter left out).",
        choices=LINEAR_STATISTICS,
    )
    loss_path: str = _kernels(
        "auto",
        "'linear': loss from hidden states and LM head, logits exist a chunk at a time; 'logits': all at once; 'auto': linear "
        "wherever model and objective allow it.",
        choices=("auto", "linear", "logits"),
    )
    memory_budget: int | str | None = _kernels(
        None, "Working memory of the linear path, e.g. '64MB'. None: half of the head's gradient, or 256 MB."
    )
    grad_filter: float | str | None = _kernels(
        "auto",
        "Linear path: leave probabilities up to this out of the gradient's products. 'auto': exact in float32, below the "
        "rounding in 16 bits; None: exact.",
        PROBABILITY,
    )
    backend: str | None = _kernels(
        None, "Kernels to use: eager, cpu, triton or cuda. None: the best for the device.", choices=BACKENDS
    )
    sample_prompts: int = _watch(
        0,
        "Number of held-out prompts that the policy answers at every evaluation, always the same ones. samples.jsonl and the "
        "report show these answers and those from before training. 0: none.",
        at_least(0),
    )
    sample_max_new_tokens: int = _watch(128, "Maximum number of tokens of a sampled answer.", at_least(1))
    sample_temperature: float = _watch(
        0.0, "0: the likeliest token each time; else sampled, with the run's seed.", at_least(0)
    )
    win_rate_scorer: str | None = _watch(
        None,
        "'module:function' with (prompts, completions) -> a number each, higher is better: logs how often the policy's answers "
        "win, as eval_win_rate.",
    )
    win_rate_against: str = _watch(
        "reference",
        "What the policy's answers are compared with: 'reference', the answers before training; or 'chosen', those of the data.",
        choices=("reference", "chosen"),
    )
    diagnostics: dict[str, Any] | str | None = _watch(
        None, "Thresholds of the diagnostics, e.g. --diagnostics.kl_level 0.5; null turns one off."
    )
    stop_on: list[str] = _watch(
        [],
        "Diagnoses that stop the run, with a checkpoint, e.g. [kl_exploding, overfitting].",
        choices=DIAGNOSES,
        called="diagnosis",
    )
    write_report: bool = _watch(True, "Write report.html into output_dir at checkpoints and at the end.")


@dataclass
class RunSettings:
    """Settings of `dpo-train` that are not fields of DPOConfig."""

    model: str | None = _run(None, "The model to train: a folder, a hub name or a .gguf file.")
    ref_model: str | None = _run(
        None, "The reference, if it is not the model as it starts: a folder, a hub name or a .gguf file."
    )
    train_data: str | None = _run(
        None,
        "Training pairs: a .jsonl, .json, .parquet or .csv file with prompt, chosen, rejected, a folder saved by datasets, or "
        "a data set of the hub (owner/name:split).",
    )
    eval_data: str | None = _run(
        None,
        "Held-out pairs in the same form; evaluated at the start, at the end, and as eval_steps says. Or set val_split.",
    )
    streaming: bool = _run(False, "Read train_data while training, not before; needs max_steps.")
    output_dir: str | None = _run(
        None, "Folder for the model, checkpoints, metrics.jsonl, summary.json and report.html."
    )
    lora: dict[str, Any] | None = _run(
        None, "Train a LoRA adapter, not the whole model: fields of peft's LoraConfig, e.g. --lora.r 16."
    )
