"""The fields of DPOConfig and of the run, with type, default, range, help and group of each. Imports no torch."""

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
    """The fields that DPOConfig adds to `transformers.TrainingArguments`, or whose default it changes."""

    # Fields of TrainingArguments with another default.
    learning_rate: float = _optimizer(
        1e-6,
        "Peak learning rate of AdamW. Try 5e-7 to 5e-6 for whole models, 1e-5 to 1e-4 with LoRA.",
        NOT_NEGATIVE,
    )
    num_train_epochs: float = _optimizer(
        1.0, "Passes over the training pairs. With more than one to three, the model memorises the pairs."
    )
    logging_steps: float | None = _watch(
        None,
        "Optimizer steps between two log records. Below 1, a fraction of the run. None: a twentieth of the run, 10 at most.",
    )
    eval_steps: float | None = _watch(
        None,
        "Steps between two evaluations. Below 1, a fraction of the run. None: a twentieth of the run, or longer, so that "
        "evaluations take at most about a quarter of the training time.",
        INTERVAL,
    )
    eval_on_start: bool | None = _watch(
        None, "Evaluate before the first step. None: only in a new run whose eval_strategy is not 'no'."
    )
    save_steps: float | None = _watch(
        None,
        "Steps between two checkpoints. Below 1, a fraction of the run. None: a tenth of the run, 500 at most, and only the "
        "two newest are kept unless save_total_limit is set.",
        INTERVAL,
    )
    logging_first_step: bool = _watch(True, "Also log the first step, whose loss must be log 2.")
    logging_nan_inf_filter: bool = _watch(False, "Hide NaN losses from the log. Off, so that a NaN is seen.")
    report_to: None | str | list[str] = _watch(  # noqa: RUF036 - in this order for HfArgumentParser
        "none", "Trackers to write to, in addition to the run's own files, e.g. 'tensorboard'."
    )
    train_sampling_strategy: str = _data(
        "group_by_length",
        "'group_by_length': each step has pairs of similar length; 'random'; 'sequential'.",
        choices=STRATEGIES,
    )
    remove_unused_columns: bool = _data(False, "Has no effect: tokenising keeps the columns that it needs.")

    # The objective.
    beta: float = _objective(
        0.1,
        "How strongly the policy is kept near the reference: rewards are beta * (policy log-prob - reference log-prob).",
        FINITE_POSITIVE,
    )
    loss_type: str | list[str] = _objective(
        "sigmoid",
        "The objective, or a list of objectives to mix. 'sigmoid' is DPO. Parentheses set hyper-parameters: 'simpo(gamma=1)'.",
    )
    loss_weights: list[float] | None = _objective(
        None, "One weight for each objective of loss_type; equal weights of 1 if not given."
    )
    label_smoothing: float = _objective(0.0, "Assumed share of pairs whose labels are swapped, e.g. 0.1.")
    f_divergence_type: str = _objective(
        "reverse_kl",
        "Divergence between policy and reference (f-DPO), for objectives of the difference of the log-ratios.",
        choices=DIVERGENCES,
    )
    f_alpha_divergence_coef: float = _objective(
        0.5, "Alpha of 'alpha_divergence'; 1 is reverse_kl, 0 is forward_kl.", ANY
    )
    discopop_tau: float = _objective(0.05, "loss_type discopop: its temperature.", FINITE_POSITIVE)
    ld_alpha: float | None = _objective(
        None,
        "Weight, in [0, 1], of the longer answer's tokens beyond the length of the shorter answer (LD-DPO). Below 1, length "
        "matters less.",
        SHARE,
    )
    use_weighting: bool = _objective(
        False, "Weight each pair by how likely both answers are under the policy (WPO). For off-policy data."
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
        "Maximum number of tokens of prompt and completion together. Longer pairs are cut. None: no limit.",
        at_least(2),
    )
    max_prompt_length: int | None = _data(
        None, "Maximum number of tokens of the prompt. None: only max_length limits it.", at_least(1)
    )
    truncation_mode: str = _data(
        "keep_end",
        "How pairs longer than max_length are cut. 'keep_end' drops the start of the prompt, 'keep_start' the end of the "
        "completion.",
        choices=("keep_end", "keep_start"),
    )
    append_eos: bool = _data(
        True,
        "End text completions with the end-of-sequence token. Turn it off for completions that were cut at a length limit, "
        "which do not show where to stop. Chat templates end turns themselves.",
    )
    max_tokens: int | None = _data(
        None,
        "Maximum number of tokens in a training batch: 2 sides x pairs x longest sequence. Replaces "
        "per_device_train_batch_size. Every pair still counts the same.",
        at_least(4),
    )
    batch_layout: str = _data(
        "auto",
        "'prefix_shared': each prompt is computed once for both answers, and short pairs share a row. 'padded': every sequence "
        "has its own row. 'auto': the cheapest layout for each batch, or padded if the model cannot share prompts.",
        choices=LAYOUTS,
    )
    pad_to_multiple_of: int | str | None = _data(
        None, "Round the padded length of a batch up to a multiple of this. 'auto': none.", at_least(1)
    )
    padding_free: bool = _data(False, "TRL's name for the effect of batch_layout 'auto'.")
    pad_token: str | None = _data(
        None, "The padding token, from the tokenizer's vocabulary. None: the tokenizer's pad token."
    )
    dataset_num_proc: int | None = _data(None, "Number of processes that tokenise.", at_least(1))
    filters: list[str] = _data(
        list(FILTERS),
        "Kinds of pairs to leave out: 'identical' (chosen equals rejected), 'empty' (a blank completion), 'truncated' (nothing "
        "of a completion is left), 'duplicates' (of an earlier pair). []: keep all pairs.",
        choices=FILTERS,
    )
    min_weight: float | None = _data(None, "Leave out pairs whose 'weight' (confidence) is below this.", NOT_NEGATIVE)

    # The models.
    precompute_ref_log_probs: bool = _model(
        False,
        "Compute the reference's log-probabilities once before training, then drop the reference. Needs half the memory, and "
        "steps are faster, but the log has no KL.",
    )
    precompute_ref_batch_size: int | None = _model(
        None, "Pairs per batch for precompute_ref_log_probs. None: the evaluation batch size.", at_least(1)
    )
    ref_cache_dir: str | None = _model(
        "auto",
        "Folder in which precomputed log-probabilities are kept, so that later runs with the same weights and tokens reuse "
        "them. 'auto': in the user's cache. null: they are not kept.",
    )
    sync_ref_model: bool = _model(
        False, "Move the reference towards the policy during training (TR-DPO), so that the policy may move further."
    )
    ref_model_mixup_alpha: float = _model(
        0.6, "sync_ref_model: share of the policy in the moved reference. 1: the policy replaces it.", POSITIVE_SHARE
    )
    ref_model_sync_steps: int = _model(512, "sync_ref_model: optimizer steps between moves.", at_least(1))
    disable_dropout: bool = _model(
        True, "Set all dropout (LoRA's too) to 0, so that policy and reference agree at the start."
    )
    router_aux_loss_coef: float | None = _model(
        None,
        "Mixture of experts: factor of the auxiliary loss that balances the experts' load in training. None: the factor in "
        "the model's config. 0: no auxiliary loss.",
        FINITE_NOT_NEGATIVE,
    )
    adapter: str | None = _model(
        None,
        "Use of an adapter that the model already has: 'continue' trains it, 'merge' merges it into the model. None: merge if "
        "lora asks for a new adapter, else continue.",
        choices=("continue", "merge"),
    )
    model_adapter_name: str | None = _model(
        None, "Name of the adapter to train, if the model has several. None: the active adapter."
    )
    ref_adapter_name: str | None = _model(None, "Name of the adapter that makes the model the reference.")
    model_init_kwargs: dict[str, Any] | str | None = _model(
        None, "Keyword arguments of from_pretrained for models that are given as a path."
    )
    trust_remote_code: bool = _model(
        False, "Allow models and tokenizers that are given as paths to run their own Python code."
    )
    activation_offloading: bool = _model(False, "Not supported; set gradient_checkpointing.")

    # The kernels, and the observation of the run.
    statistics: list[str] = _watch(
        ["entropy", "kl", "accuracy", "mean_logits"],
        "Statistics of the completion tokens to log: entropy; kl (exact, needs the reference's logits in the step); accuracy "
        "(logged as mean_token_accuracy); mean_logits (logged as logits/chosen, logits/rejected); grad_dropped_mass (linear "
        "path: the probability that grad_filter left out).",
        choices=LINEAR_STATISTICS,
    )
    loss_path: str = _kernels(
        "auto",
        "'linear': the loss is computed from hidden states and LM head, with the logits of one chunk at a time. 'logits': all "
        "logits at once. 'auto': linear if model and objective allow it.",
        choices=("auto", "linear", "logits"),
    )
    memory_budget: int | str | None = _kernels(
        None, "Working memory of the linear path, e.g. '64MB'. None: half of the head's gradient, or 256 MB."
    )
    grad_filter: float | str | None = _kernels(
        "auto",
        "Linear path: probabilities up to this value are left out of the gradient's matrix products. 'auto': exact in float32; "
        "in 16 bits, a value below the rounding error. None: exact.",
        PROBABILITY,
    )
    backend: str | None = _kernels(
        None, "Kernels to use: eager, cpu, triton or cuda. None: the best for the device.", choices=BACKENDS
    )
    sample_prompts: int = _watch(
        0,
        "Number of held-out prompts that the policy answers at every evaluation, always the same. samples.jsonl and the report "
        "show the answers next to those from before training. 0: none.",
        at_least(0),
    )
    sample_max_new_tokens: int = _watch(128, "Maximum number of tokens of a sampled answer.", at_least(1))
    sample_temperature: float = _watch(
        0.0, "Temperature of sampled answers, with the run's seed. 0: always the likeliest token.", at_least(0)
    )
    win_rate_scorer: str | None = _watch(
        None,
        "'module:function', a function (prompts, completions) -> one number for each completion; higher is better. The log "
        "shows how often the policy's answers win, as eval_win_rate.",
    )
    win_rate_against: str = _watch(
        "reference",
        "Answers with which the policy's are compared: 'reference', those from before training; 'chosen', those of the data.",
        choices=("reference", "chosen"),
    )
    diagnostics: dict[str, Any] | str | None = _watch(
        None, "Thresholds of the diagnoses, e.g. --diagnostics.kl_level 0.5. null turns a diagnosis off."
    )
    stop_on: list[str] = _watch(
        [],
        "Diagnoses that end the run with a checkpoint, e.g. [kl_exploding, overfitting].",
        choices=DIAGNOSES,
        called="diagnosis",
    )
    write_report: bool = _watch(True, "Write report.html into output_dir at checkpoints and at the end.")


@dataclass
class RunSettings:
    """Settings of `dpo-train` that are not fields of DPOConfig."""

    model: str | None = _run(None, "The model to train: a folder, a hub name or a .gguf file.")
    ref_model: str | None = _run(
        None, "The reference: a folder, a hub name or a .gguf file. None: the model before training."
    )
    train_data: str | None = _run(
        None,
        "Training pairs: a .jsonl, .json, .parquet or .csv file with prompt, chosen, rejected; a folder saved by datasets; or "
        "a data set on the hub (owner/name:split).",
    )
    eval_data: str | None = _run(
        None,
        "Held-out pairs in the same form. They are evaluated at the start, every eval_steps and at the end. Or set val_split.",
    )
    streaming: bool = _run(False, "Read train_data during training, not before. Needs max_steps.")
    output_dir: str | None = _run(
        None, "Folder for the model, checkpoints, metrics.jsonl, summary.json and report.html."
    )
    lora: dict[str, Any] | None = _run(
        None, "Train a LoRA adapter instead of the whole model. Fields of peft's LoraConfig, e.g. --lora.r 16."
    )
