"""Names of our settings in other tools: TRL's scripts, the alignment handbook, axolotl, LLaMA-Factory and ms-swift.

Settings of TRL's DPOConfig that our DPOConfig does not accept are in trl.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from dpo_kernels import names

from ..errors import ConfigError
from . import trl

#: By our setting: names with the same meaning, which `dpo-train` accepts.
SAME: dict[str, tuple[str, ...]] = {
    "model": (
        "model_name_or_path",
        "base_model",
        "model_name",
        "model_path",
        "model_id",
        "pretrained_model_name_or_path",
    ),
    "ref_model": ("ref_model_name_or_path", "reference_model", "ref_model_path"),
    "train_data": ("dataset_name", "dataset", "data_path", "train_file", "train_path", "dataset_path", "train_dataset"),
    "eval_data": (
        "eval_dataset",
        "eval_file",
        "val_dataset",
        "validation_file",
        "eval_path",
        "eval_data_path",
        "test_file",
    ),
    "val_split": ("val_set_size", "val_size", "split_dataset_ratio"),
    "streaming": ("dataset_streaming",),
    "output_dir": ("output", "out", "out_dir", "output_path", "save_dir"),
    "learning_rate": ("lr",),
    "num_train_epochs": ("epochs", "num_epochs", "n_epochs", "train_epochs"),
    "max_steps": ("max_train_steps", "num_train_steps", "num_steps", "train_steps"),
    "per_device_train_batch_size": (
        "micro_batch_size",
        "train_batch_size",
        "per_device_batch_size",
        "per_gpu_train_batch_size",
        "train_micro_batch_size_per_gpu",
    ),
    "per_device_eval_batch_size": ("eval_batch_size", "per_gpu_eval_batch_size"),
    "gradient_accumulation_steps": (
        "grad_accum",
        "grad_accumulation_steps",
        "gradient_accumulation",
        "grad_accum_steps",
    ),
    "weight_decay": ("wd",),
    "max_grad_norm": ("gradient_clipping", "grad_clip", "clip_grad", "grad_norm_clip"),
    "optim": ("optimizer",),
    "lr_scheduler_type": ("scheduler", "lr_scheduler", "lr_schedule"),
    "warmup_steps": ("warmup", "num_warmup_steps", "warmup_ratio"),
    "gradient_checkpointing": ("grad_checkpointing", "use_gradient_checkpointing"),
    "neftune_noise_alpha": ("neftune_alpha",),
    "beta": ("pref_beta", "dpo_beta", "rl_beta"),
    "loss_type": ("pref_loss", "dpo_loss_type", "dpo_loss"),
    "label_smoothing": ("dpo_label_smoothing",),
    "max_length": ("max_seq_length", "max_seq_len", "cutoff_len", "sequence_len", "max_sequence_length", "seq_length"),
    "dataset_num_proc": ("preprocessing_num_workers", "dataset_processes", "num_proc"),
    "chat_template_path": ("chat_template_file", "chat_template_jinja"),
    "precompute_ref_log_probs": ("precompute_ref_logps",),
    "save_total_limit": ("max_checkpoints",),
    "lora.r": ("lora_r", "lora_rank"),
    "lora.lora_alpha": ("lora_alpha",),
    "lora.lora_dropout": ("lora_dropout",),
    "lora.target_modules": ("lora_target_modules", "target_modules"),
    "lora.target_parameters": ("lora_target_parameters",),
    "lora.modules_to_save": ("lora_modules_to_save", "modules_to_save", "additional_target"),
    "lora.use_rslora": ("use_rslora", "lora_use_rslora", "peft_use_rslora"),
    "lora.use_dora": ("use_dora", "lora_use_dora", "peft_use_dora"),
    "lora.task_type": ("lora_task_type",),
    "lora.fan_in_fan_out": ("lora_fan_in_fan_out",),
    "eval_strategy": ("evaluation_strategy",),
    "use_cpu": ("no_cuda",),
    "model_init_kwargs.dtype": ("torch_dtype", "dtype", "model_dtype"),
    "model_init_kwargs.attn_implementation": ("attn_implementation", "attn_impl"),
    "model_init_kwargs.revision": ("model_revision",),
    "model_init_kwargs.quantization_config.load_in_8bit": ("load_in_8bit",),
}
ALIASES = {name: setting for setting, names in SAME.items() for name in names}

_QUANTIZED = (
    "model_init_kwargs: {quantization_config: {load_in_4bit: true, bnb_4bit_quant_type: nf4, "
    "bnb_4bit_compute_dtype: bfloat16}}"
)
_ONE_FILE = "is not supported; give one file, folder or data set as train_data"
_LORA = "is not needed; lora trains an adapter (--lora.r 16), and without it the whole model trains"
_BATCH = (
    "may mean several things; per_device_train_batch_size is the number of pairs in a batch on each device, and "
    "gradient_accumulation_steps the number of batches in a step"
)
#: Names without a single counterpart, with the text that follows the name and a colon in the error message.
ANSWERS = {
    **dict.fromkeys(("batch_size", "global_batch_size", "effective_batch_size", "total_batch_size"), _BATCH),
    **dict.fromkeys(
        ("use_peft", "use_lora", "finetuning_type", "train_type", "tuner_type", "peft_type", "peft_method"), _LORA
    ),
    "lora_target": "is called lora.target_modules, a list such as [q_proj, v_proj]; 'all' is all-linear there",
    "lora_target_linear": "is not a setting; set lora.target_modules to all-linear",
    "lora_path": "is not a setting; give the adapter's folder as model",
    "adapter_name_or_path": "is not a setting; give the adapter's folder as model",
    "lora_model_dir": "is not a setting; give the adapter's folder as model",
    "load_in_4bit": f"is not a setting of its own; set {_QUANTIZED}",
    "qlora": f"is lora on a quantised model; set lora and {_QUANTIZED}",
    "quantization_bit": f"is not a setting of its own; set {_QUANTIZED}",
    "quant_bits": f"is not a setting of its own; set {_QUANTIZED}",
    "quantization": f"is not a setting of its own; set {_QUANTIZED}",
    "quantization_method": "is not a setting of its own; set model_init_kwargs.quantization_config",
    "quant_method": "is not a setting of its own; set model_init_kwargs.quantization_config",
    "bnb_4bit_quant_type": "is part of model_init_kwargs.quantization_config",
    "bnb_4bit_quant_storage": "is part of model_init_kwargs.quantization_config",
    "bnb_4bit_compute_dtype": "is part of model_init_kwargs.quantization_config",
    "bnb_4bit_use_double_quant": "is part of model_init_kwargs.quantization_config",
    "use_bnb_nested_quant": "is bnb_4bit_use_double_quant in model_init_kwargs.quantization_config",
    **dict.fromkeys(
        (
            "flash_attention",
            "flash_attn",
            "use_flash_attention",
            "use_flash_attention_2",
            "use_flash_attn",
            "xformers_attention",
            "sdp_attention",
            "flex_attention",
        ),
        "is not needed: no attention is computed for padding. "
        "model_init_kwargs.attn_implementation chooses another implementation",
    ),
    **dict.fromkeys(
        ("precision", "mixed_precision"), "is not a setting; set bf16: true, or fp16: true on a GPU without bfloat16"
    ),
    "bfloat16": "is called bf16",
    "pure_bf16": "is not a setting; set model_init_kwargs.dtype: bfloat16",
    "float16": "is called fp16",
    "datasets": _ONE_FILE,
    "dataset_mixer": _ONE_FILE,
    "dataset_mixture": _ONE_FILE,
    "test_datasets": "is not supported; give one file, folder or data set as eval_data",
    **dict.fromkeys(
        ("dataset_train_split", "train_split", "split", "dataset_splits"),
        "is part of train_data: owner/name:split on the hub, or the folder of a saved data set",
    ),
    **dict.fromkeys(
        ("dataset_test_split", "eval_split", "test_split"),
        "is part of eval_data: owner/name:split on the hub, or the folder of a saved data set",
    ),
    "dataset_config": "is not supported; save the data set to a folder or a file, and give its path as train_data",
    "dataset_dir": "is not supported; give the path of the file as train_data",
    "max_samples": "is not supported; cut the file, or set max_steps",
    "max_train_samples": "is not supported; cut the file, or set max_steps",
    "template": "is not needed; the chat template is the tokenizer's (chat_template_path gives another)",
    "chat_template": "is not needed; the chat template is the tokenizer's (chat_template_path gives another)",
    "system": "is not a setting; give the data a column 'system', or a system message",
    **dict.fromkeys(
        ("stage", "rl", "rlhf_type", "method"),
        "is not needed; dpo-train trains on preference pairs, and loss_type chooses the objective",
    ),
    "pref_ftx": "is not a setting; set loss_type: rpo(alpha=that number)",
    "pref_bco_weight": "is not a setting; set loss_type: [sigmoid, bco_running] and loss_weights: [1 / (1 + w), w / (1 + w)]",
    "simpo_gamma": "is part of loss_type, such as 'simpo(gamma=0.5)'",
    "cpo_alpha": "is part of loss_type, such as 'cpo(alpha=1)'",
    "orpo_beta": "is called beta",
    **dict.fromkeys(
        ("overwrite_output_dir", "overwrite"),
        "is not a setting; give --overwrite on the command line, which deletes the old run",
    ),
    "resume": "is not a setting; give --resume on the command line, or nothing: the same command resumes its run",
    "auto_resume_from_checkpoints": "is not needed; the same command resumes its run",
    "overwrite_cache": "is not needed; the cache notices changed data and settings",
    **dict.fromkeys(
        ("wandb_project", "wandb_name", "wandb_entity", "wandb_watch", "wandb_log_model", "use_wandb", "with_tracking"),
        "is not a setting; set report_to: wandb, and run_name or WANDB_PROJECT as you like",
    ),
    "sample_packing": "is not needed; short pairs share a row already (batch_layout)",
    "packing": "is not needed; short pairs share a row already (batch_layout)",
    "pad_to_sequence_len": "is not needed; batches have little padding (batch_layout)",
    "group_by_length": "is called train_sampling_strategy, and group_by_length is its default",
    "evals_per_epoch": "is not a setting; eval_steps below 1 is a fraction of the run",
    "saves_per_epoch": "is not a setting; save_steps below 1 is a fraction of the run",
    "early_stopping_patience": "is not supported; set stop_on: [overfitting], or load_best_model_at_end",
    "eval_table_size": "is not supported; set sample_prompts",
    **dict.fromkeys(("model_type", "tokenizer_type"), "is not needed; the model's folder contains it"),
    "strict": "is not needed; unknown settings are always refused",
    **dict.fromkeys(
        ("dataset_prepared_path", "load_from_cache_file"), "is not needed; HF_DATASETS_CACHE moves the cache of tokens"
    ),
    "train_on_inputs": "is not needed; only completions are scored",
    **dict.fromkeys(("use_ray", "device_groups"), "is not supported; start several processes with torchrun"),
    "plot_loss": "is not needed; report.html shows the curves",
    "special_tokens": "is not supported; change the tokenizer in the model's folder",
    "enable_liger_kernel": "is called use_liger_kernel",
    "external_plugins": "is not needed; the trainer uses the kernels already",
    "use_unsloth": "is not supported; the loss is fused already",
    "ignore_bias_buffers": "is not needed",
    "unsloth": "is not supported; the loss is fused already",
    "adam8bit": "is optim: adamw_bnb_8bit",
    "device": "is not a setting; set use_cpu: true, or CUDA_VISIBLE_DEVICES",
    "gpus": "is not a setting; set CUDA_VISIBLE_DEVICES, and start several processes with torchrun",
    "num_gpus": "is not a setting; start several processes with torchrun",
}
#: Values that only other tools accept for one of our settings, with the error message.
VALUES = {
    (
        "adapter",
        word,
    ): "is trained if lora is set (--lora.r 16); adapter is for a model that already has an adapter"
    for word in ("lora", "qlora")
}
#: Names of objectives in other tools, with our name.
OBJECTIVES = {
    "dpo": "sigmoid",
    "logistic": "sigmoid",
    "robust_dpo": "robust",
    "slic": "hinge",
    "slic_hf": "hinge",
    "exo": "exo_pair",
    "nca": "nca_pair",
    "bco": "bco_pair",
    "sppo": "sppo_hard",
    "dpo_positive": "dpop",
    "dpo_norm": "sigmoid_norm",
    "nll": "sft",
}
#: Names of methods that are not one of our objectives, with the error message.
METHODS = {
    "cdpo": "is sigmoid with label_smoothing, such as 0.1",
    "rdpo": "is not supported; sigmoid_norm normalises by length, and ld_alpha below 1 counts length less",
    "ld_dpo": "is sigmoid with ld_alpha below 1",
    "wpo": "is sigmoid with use_weighting: true",
    "tr_dpo": "is sigmoid with sync_ref_model: true",
    "f_dpo": "is sigmoid with f_divergence_type",
    "apo": "is apo_zero, or apo_down if even the chosen answers are worse than the model's own",
    "kto": "is not supported; unpaired rows are read as pairs, and bco_pair is the nearest objective",
    "kto_pair": "is not supported; bco_pair is the nearest objective",
    **dict.fromkeys(
        ("ppo", "grpo", "rloo", "reinforce", "online_dpo"),
        "needs answers that are generated during training; dpo-train trains on existing pairs",
    ),
}


def setting_of(name: str, value: Any, known: Iterable[str]) -> str | None:
    """The setting that a name means. A name in `known`, or a name that no tool uses, is returned unchanged.

    None if the name has no single counterpart and its value turns nothing on: null or false.

    Raises:
        ConfigError: the name, or its value, is another tool's and has no single counterpart here. The message says what to
            set.
    """
    if isinstance(value, str) and (name, value) in VALUES:
        raise ConfigError(f"{name}: '{value}' {VALUES[name, value]}")
    if name in known:
        return name
    if name in ALIASES:
        setting = ALIASES[name]
        if setting == "val_split" and value == 0:
            return None  # 0 holds out nothing
        if "." in setting and (value is None or value is False):
            return None  # the default of what the key belongs to; set, it would ask for an adapter or for quantisation
        if name == "warmup_ratio" and isinstance(value, int | float) and value >= 1:
            raise ConfigError(f"warmup_ratio: must lie in [0, 1), got {value}; warmup_steps takes a number of steps")
        return setting
    if answer := ANSWERS.get(name) or trl.ANSWERS.get(name):
        # group_by_length: false would turn our default off, so it is answered too.
        if value is None or (value is False and name != "group_by_length"):
            return None
        raise ConfigError(f"{name}: {answer}")
    return name


def objective_of(text: str) -> str:
    """An entry of loss_type with our name of the objective instead of another tool's name or another case.

    Raises:
        ConfigError: the entry is a method that is not one of our objectives. The message says what to set.
    """
    name, bracket, rest = text.partition("(")
    word = name.strip().lower().replace("-", "_")
    if word in METHODS:
        raise ConfigError(f"loss_type: '{name}' {METHODS[word]}")
    return OBJECTIVES.get(word, word if word in names.OBJECTIVES else name) + bracket + rest
