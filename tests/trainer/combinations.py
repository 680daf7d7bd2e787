"""What combines with what in a run: the values of each dimension, how they are tried, and the pairs that are exceptions.

`tried` runs a combination on a tiny model and classifies it. The first loss and every gradient are compared with plain
float64 forwards of one sequence at a time, and every value must show that it is at work. A pair that is not in
`EXCEPTIONS` works.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from dpo_kernels import dpo_loss, length_desensitized_weights, use_backend
from dpo_kernels.names import OBJECTIVES
from dpo_kernels.objectives import OBJECTIVES as INFO
from dpo_trainer import DPOTrainer
from dpo_trainer.errors import ConfigError, DataError, ModelError
from dpo_trainer.model.adapters import keep_trainable
from dpo_trainer.settings import objective

from .tiny import LLAMA, build_model, build_pairs, build_tokenizer, build_trainer

VOCAB = len(build_tokenizer())
PAIRS = build_pairs(3, seed=4)
GIVEN = {"ref_chosen_logps": (-9.0, -20.0, -14.0), "ref_rejected_logps": (-11.0, -13.0, -17.0)}


@dataclass(frozen=True)
class Value:
    """A value of a dimension.

    Attributes:
        settings: fields of DPOConfig, or arguments of DPOTrainer, that make it.
        shows: whether a trainer, a batch and the gradients show that the value is at work.
        adapter: makes the config of an adapter.
        comes_with: the model has the adapter before the run.
        trains: tried by `train`, because a single step does not use it.
        rounds: the arithmetic has 16 bits.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    shows: Callable[[Run], bool] = lambda run: True
    adapter: Callable[[], peft.PeftConfig] | None = None
    comes_with: bool = False
    trains: bool = False
    rounds: bool = False


@dataclass
class Run:
    """A trainer after its first step: the loss, the gradients by parameter, and the batch."""

    trainer: DPOTrainer
    loss: float
    gradients: dict[str, Tensor]
    batch: dict[str, Tensor]


def _lora(**more: Any) -> Callable[[], peft.PeftConfig]:
    given = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **more}
    return lambda: peft.LoraConfig(**given)


def _prompt() -> peft.PeftConfig:
    return peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)


def _only(*parts: str) -> Callable[[Run], bool]:
    """Whether the parameters that train are those with one of these parts in their name."""
    return lambda run: all(any(part in name for part in parts) for name in run.gradients)


def _objective(name: str) -> Value:
    smoothing = {"label_smoothing": 0.1} if name == "exo_pair" else {}
    return Value({"loss_type": name, **smoothing}, lambda run: run.trainer.loss_types[0] == name)


def _packed(run: Run) -> bool:
    return "segments" in run.batch


#: By dimension, the values that are not the default. The default of each: DPO's loss, float32, one process, and so on.
DIMENSIONS: dict[str, dict[str, Value]] = {
    "loss": {
        **{name: _objective(name) for name in OBJECTIVES},
        "sigmoid + sft": Value({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}),
    },
    "loss setting": {
        "beta": Value({"beta": 0.4}),
        "label_smoothing": Value({"label_smoothing": 0.2}),
        "f_divergence_type": Value({"f_divergence_type": "js_divergence"}),
        "use_weighting": Value({"use_weighting": True}),
        "ld_alpha": Value({"ld_alpha": 0.5}),
        "kl_coef": Value({"kl_coef": 0.3}),
    },
    "reference": {
        "before training": Value(shows=lambda run: run.trainer.ref_model is not run.trainer.model),
        "ref_model": Value({"ref_model": 5}, lambda run: run.trainer.ref_model is not None),
        "precomputed": Value(
            {"precompute_ref_log_probs": True, "ref_model": 5},
            lambda run: run.trainer.reference is None and "ref_logps" in run.batch,
        ),
        "columns": Value({"train_dataset": GIVEN}, lambda run: "ref_logps" in run.batch),
        "sync_ref_model": Value(
            {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model": 5},
            lambda run: run.trainer.moving is not None,
            trains=True,
        ),
    },
    "adapter": {
        "LoRA": Value(adapter=_lora(), shows=_only("lora_")),
        "DoRA": Value(adapter=_lora(use_dora=True), shows=_only("lora_")),
        "LoRA on the head": Value(adapter=_lora(target_modules=["q_proj", "lm_head"]), shows=_only("lora_")),
        "LoRA, whole modules": Value(
            adapter=_lora(modules_to_save=["gate_proj"]), shows=_only("lora_", "modules_to_save")
        ),
        "trained LoRA": Value(adapter=_lora(init_lora_weights=False), comes_with=True, shows=_only("lora_")),
        "prompt tuning": Value(adapter=_prompt, shows=_only("prompt_encoder")),
    },
    "layout": {
        "auto": Value({"batch_layout": "auto"}, lambda run: _packed(run) or run.trainer.policy.around is not None),
        "prefix_shared": Value({"batch_layout": "prefix_shared"}, _packed),
        "padded": Value({"batch_layout": "padded"}, lambda run: "segments" not in run.batch),
    },
    "loss path": {
        "linear": Value({"loss_path": "linear"}, lambda run: run.trainer.loss_path == "linear"),
        "logits": Value({"loss_path": "logits"}, lambda run: run.trainer.loss_path == "logits"),
    },
    "data": {
        "weights": Value({"train_dataset": {"weight": (0.5, 2.0, 1.0)}}, lambda run: "pair_weights" in run.batch),
    },
    "precision": {
        "bf16": Value({"bf16": True}, lambda run: run.trainer.accelerator.mixed_precision == "bf16", rounds=True),
        "fp16": Value({"fp16": True}),
        "16-bit weights": Value(
            {"dtype": torch.bfloat16}, lambda run: run.trainer.model.dtype == torch.bfloat16, rounds=True
        ),
    },
    "torch.compile": {
        "torch_compile": Value(
            {"torch_compile": True, "torch_compile_backend": "eager"},  # the tests' own; inductor takes a minute
            lambda run: bool(torch._dynamo.utils.counters["frames"]["ok"]),
        ),
    },
    "memory": {
        "gradient_checkpointing": Value(
            {"gradient_checkpointing": True}, lambda run: run.trainer.model.is_gradient_checkpointing, trains=True
        ),
    },
}
#: How a combination may turn out.
WORKS, SLOWER, NO_EFFECT, REFUSED = "works", "slower", "no effect", "refused"
_FREE = tuple(name for name, info in INFO.items() if not info.needs_reference)
_STEP = "needs the reference model in every step, not only precomputed log-probabilities"
#: The combinations that do not simply work: values, values of another dimension (none: the first ones alone), how each pair
#: of them turns out, and how the trainer's line begins, in which {0} and {1} are the pair's values.
EXCEPTIONS: tuple[tuple[tuple[str, ...], tuple[str, ...], str, str], ...] = (
    (("fp16",), (), REFUSED, "fp16: needs an accelerator; a CPU would ignore it without a message. Use bf16 there"),
    (("LoRA on the head",), (), SLOWER, "loss path: logits, because the head is not a plain nn.Linear but Linear"),
    (
        ("prompt tuning",),
        (),
        SLOWER,
        "PeftModelForCausalLM: PROMPT_TUNING puts 2 virtual tokens in front of every row; computing the logits of all tokens",
    ),
    (
        ("LoRA on the head", "prompt tuning"),
        ("linear",),
        REFUSED,
        "loss_path: 'linear' is not possible here: ",
    ),
    (
        tuple(name for name, info in INFO.items() if info.smoothing_range is None),
        ("label_smoothing",),
        REFUSED,
        "label_smoothing: loss_type '{0}' has no label smoothing",
    ),
    (
        tuple(name for name, info in INFO.items() if not info.divergence and name != "sft"),
        ("f_divergence_type",),
        REFUSED,
        "f_divergence_type: objective '{0}' does not support divergence='js'",
    ),
    (("sft",), ("beta", "f_divergence_type"), NO_EFFECT, "{1}: has no effect here; it counts only with an objective"),
    (_FREE, ("kl_coef",), REFUSED, "kl_coef: needs a reference, and loss_type {0} has none; give a ref_model"),
    (
        _FREE,
        ("precomputed",),
        REFUSED,
        "precompute_ref_log_probs: loss_type {0} uses no reference; leave the setting off",
    ),
    (_FREE, ("sync_ref_model",), REFUSED, "sync_ref_model: loss_type {0} uses no reference; leave the setting off"),
    (("tdpo", "tdpo2"), ("precomputed", "columns"), REFUSED, f"loss_type {{0}}: {_STEP}"),
    (("ld_alpha", "kl_coef"), ("precomputed", "columns"), REFUSED, f"{{0}}: {_STEP}"),
    (
        ("quanto int8",),
        ("bf16",),
        REFUSED,
        "model: LlamaForCausalLM cannot be run on a batch of tokens (RuntimeError: expected",
    ),
    (
        ("bitsandbytes int8",),
        ("DoRA",),
        REFUSED,
        "model: LlamaForCausalLM cannot be run on a batch of tokens (AttributeError: ",
    ),
    (("bitsandbytes nf4", "bitsandbytes int8", "quanto int8"), ("LoRA, whole modules",), REFUSED, "peft_config: "),
    (
        ("torchao int8",),
        ("LoRA, whole modules",),
        REFUSED,
        "model: LlamaForCausalLM cannot be run on a batch of tokens (NotImpl",
    ),
    (
        tuple(DIMENSIONS["adapter"]),
        ("sync_ref_model",),
        REFUSED,
        "sync_ref_model: moves a whole model's weights; it cannot move the reference of an adapter",
    ),
)


def _bitsandbytes(**bits: Any) -> Callable[[], Any]:
    return lambda: transformers.BitsAndBytesConfig(**bits)


def _torchao() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig

    return transformers.TorchAoConfig(Int8WeightOnlyConfig())


#: Quantised models by the package that they need. They are tried with LoRA, since their own weights do not train.
QUANTISED: dict[str, tuple[str, Value]] = {
    "bitsandbytes nf4": (
        "bitsandbytes",
        Value(
            {"quantised": _bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="float32")}
        ),
    ),
    "bitsandbytes int8": ("bitsandbytes", Value({"quantised": _bitsandbytes(load_in_8bit=True)}, rounds=True)),
    "quanto int8": ("optimum.quanto", Value({"quantised": lambda: transformers.QuantoConfig(weights="int8")})),
    "torchao int8": ("torchao", Value({"quantised": _torchao})),
}
VALUES = {name: value for values in DIMENSIONS.values() for name, value in values.items()}
VALUES |= {name: value for name, (_, value) in QUANTISED.items()}


class _Kept(TrainerCallback):
    """Keeps the gradients of the first update."""

    def __init__(self) -> None:
        self.gradients: dict[str, Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.gradients = self.gradients or gradients_of(kwargs["model"])


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the gradient of each parameter that trains, by the parameter's name."""
    return {
        name: value.grad.detach().double().clone()
        for name, value in model.named_parameters()
        if value.requires_grad and value.grad is not None
    }


#: Settings of values that are not the trainer's.
OF_THE_MODEL = ("train_dataset", "dtype", "quantised")


@cache
def _folder_to_quantise(seed: int) -> tempfile.TemporaryDirectory[str]:
    """A folder with a model that is wide enough for 4-bit weights, whose blocks have 64 numbers."""
    folder = tempfile.TemporaryDirectory()
    torch.manual_seed(seed)
    wide = {**LLAMA, "hidden_size": 128, "num_attention_heads": 2, "intermediate_size": 128}
    LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, tie_word_embeddings=True, **wide)).save_pretrained(folder.name)
    return folder


def settings_of(names: Iterable[str]) -> dict[str, Any]:
    """The settings of a combination, with its data and models made."""
    found: dict[str, Any] = {}
    columns: dict[str, Any] = {}
    for value in map(VALUES.__getitem__, names):
        columns |= value.settings.get("train_dataset", {})
        found |= {name: given for name, given in value.settings.items() if name not in OF_THE_MODEL}
        if value.adapter is not None and not value.comes_with:
            found["peft_config"] = value.adapter()
    rows = [{**row, **{name: given[index] for name, given in columns.items()}} for index, row in enumerate(PAIRS)]
    return {
        "train_dataset": rows,
        "per_device_train_batch_size": len(rows),
        "max_grad_norm": 0.0,
        "max_steps": 1,
        **found,
    }


def model_of(names: Iterable[str], *, seed: int = 0, dressed: bool = False) -> Any:
    """The tiny model of a combination. An adapter that the run adds itself is on it only if `dressed` is True."""
    values = [VALUES[name] for name in names]
    config = next((value.settings["quantised"] for value in values if "quantised" in value.settings), None)
    if config is None:
        model = build_model("llama-tied", VOCAB, seed)
    else:
        folder = _folder_to_quantise(seed).name
        model = LlamaForCausalLM.from_pretrained(folder, quantization_config=config(), dtype=torch.float32)
    torch.manual_seed(1)
    for value in values:
        if value.adapter is not None and seed == 0 and (dressed or value.comes_with):
            model = peft.get_peft_model(model, value.adapter())
    dtype = next((value.settings["dtype"] for value in values if "dtype" in value.settings), torch.float32)
    return model if config is not None else model.to(dtype)


def exact(model: Any) -> Any:
    """The model in float64, or, since that is not possible, a quantised model as it is."""
    return model.eval() if getattr(model, "is_quantized", False) else model.double().eval()


def expected(names: Iterable[str], trainer: DPOTrainer) -> tuple[float, dict[str, Tensor]]:
    """The first loss and its gradients, from plain float64 forwards of one sequence at a time.

    Those of a quantised model are float32 forwards.
    """
    args, names = trainer.args, list(names)
    policy = model_of(names, dressed=True)
    own = dict(trainer.policy.model.named_parameters())
    for name, value in policy.named_parameters():
        if value.requires_grad and hasattr(policy, "peft_config"):  # a new adapter starts at random
            value.data = own[name].detach().clone()
    policy = exact(policy)
    if "ref_model" in settings_of(names):
        reference = exact(model_of(names, seed=5))
    else:
        reference = policy if "trained LoRA" in names else exact(model_of(names))
    keep_trainable(policy)
    rows = [trainer.train_dataset[index] for index in range(len(PAIRS))]
    texts = [(row["prompt_ids"], row[side]) for side in ("chosen_ids", "rejected_ids") for row in rows]

    def logits_of(model: Any) -> Tensor:
        found = []
        for prompt, answer in texts:
            logits = model(input_ids=torch.tensor([prompt + answer]), use_cache=False).logits[0]
            found.append(logits[-len(answer) - 1 : -1])
        return torch.cat(found)

    labels = torch.tensor([token for _, answer in texts for token in answer])
    bounds = torch.tensor([0, *(len(answer) for _, answer in texts)]).cumsum(0)
    weights = torch.tensor([row.get("weight", 1.0) for row in rows], dtype=torch.float64)
    logits = logits_of(policy)
    with torch.no_grad():
        ref_logits = logits_of(reference)
    given: dict[str, Any] = {"ref_logits": ref_logits}
    if "columns" in names:
        given = {"ref_logps": torch.tensor([*GIVEN["ref_chosen_logps"], *GIVEN["ref_rejected_logps"]]).double()}
    token_weights = (
        None if args.ld_alpha is None else length_desensitized_weights(labels, args.ld_alpha, cu_seqlens=bounds)
    )
    with use_backend("eager"):
        loss = dpo_loss(
            logits,
            labels,
            beta=args.beta,
            loss_type=objective.build(args),
            loss_weights=args.loss_weights,
            label_smoothing=args.label_smoothing,
            cu_seqlens=bounds,
            token_weights=token_weights,
            pair_weights=weights / weights.sum(),
            use_weighting=args.use_weighting,
            reduction="sum",
            **given,
        ).loss
    if args.kl_coef:
        logps = logits.log_softmax(-1)
        loss = loss + args.kl_coef * (logps.exp() * (logps - ref_logits.log_softmax(-1))).sum(-1).mean()
    loss.backward()
    return loss.item(), gradients_of(policy)


class _Lines(logging.Handler):
    """Keeps the level and the text of the lines that are logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[int, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append((record.levelno, record.getMessage()))


@contextlib.contextmanager
def _listening() -> Iterator[list[tuple[int, str]]]:
    handler, logger = _Lines(), logging.getLogger("dpo_trainer")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield handler.lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def build(names: Sequence[str], folder: Path) -> tuple[DPOTrainer, _Kept]:
    """The trainer of a combination, and the callback that keeps the gradients of its first update.

    Raises:
        ConfigError, DataError, ModelError: the trainer refuses the combination.
    """
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    settings = settings_of(names)
    if "ref_model" in settings:
        settings["ref_model"] = model_of(names, seed=settings["ref_model"])
    kept = _Kept()
    return build_trainer(folder, model=model_of(names), callbacks=[kept], **settings), kept


def first_step(names: Sequence[str], trainer: DPOTrainer, kept: _Kept) -> Run:
    """Take the first step of a combination."""
    batch = trainer._prepare_inputs(
        trainer.data_collator([trainer.train_dataset[index] for index in range(len(PAIRS))])
    )
    if any(VALUES[name].trains for name in names):
        trainer.train()
        return Run(trainer, trainer.state.log_history[0]["loss"], kept.gradients, batch)
    total = trainer._get_num_items_in_batch([batch], trainer.args.device)
    loss = trainer.training_step(trainer.model, batch, total).item()
    return Run(trainer, loss, gradients_of(trainer.policy.model), batch)


def tried(names: Sequence[str], folder: Path) -> tuple[str, str]:
    """(how a combination turns out, the trainer's line about it).

    Raises:
        AssertionError: the loss or a gradient is wrong, or a value is not at work and the trainer does not say why.
    """
    with _listening() as said:
        try:
            trainer, kept = build(names, folder)
        except (ConfigError, DataError, ModelError) as error:
            return REFUSED, str(error)
        loss, gradients = expected(names, trainer)
        run = first_step(names, trainer, kept)
    tolerance = 0.1 if any(VALUES[name].rounds for name in names) else 2e-4
    assert abs(run.loss - loss) <= tolerance * (1 + abs(loss)) / 2, f"loss {run.loss}, plain {loss}"
    norm = sum(value.square().sum() for value in gradients.values()) ** 0.5
    for name, value in gradients.items():
        gap = (run.gradients.get(name, torch.zeros_like(value)) - value).norm()
        assert gap <= tolerance * norm, f"gradient of {name} is {gap / norm:.2g} of the norm away"
    assert run.gradients.keys() <= gradients.keys()
    useless = [line for level, line in said if level == logging.WARNING and "has no effect" in line]
    if useless:
        return NO_EFFECT, useless[0]
    hidden = [name for name in names if not VALUES[name].shows(run)]
    reasons = {
        level: [
            line
            for at, line in said
            if at >= level and any(word in line for word in ("slower", "loss path:", "padded batches"))
        ]
        for level in (logging.INFO, logging.WARNING)
    }
    assert not hidden or reasons[logging.WARNING], f"{hidden} without effect and without a warning; logged: {said}"
    if (trainer.loss_path == "logits" and "logits" not in names) or (
        trainer.data_collator.layout == "padded" and "padded" not in names
    ):
        return SLOWER, reasons[logging.INFO][0]
    return WORKS, ""


def stated(names: Iterable[str]) -> tuple[str, str]:
    """(how a combination turns out, how the line about it begins), by EXCEPTIONS. What is refused comes first."""
    names, found = set(names), [(WORKS, "")]
    for ones, others, kind, line in EXCEPTIONS:
        if line.startswith("loss path: logits") and "logits" in names:
            continue  # that is what was asked for
        for one in names.intersection(ones):
            found += [(kind, line.format(one, other)) for other in (names.intersection(others) if others else ("",))]
    return max(found, key=lambda entry: (WORKS, SLOWER, NO_EFFECT, REFUSED).index(entry[0]))


def pairs(first: str, second: str) -> list[tuple[str, str]]:
    """The pairs of values of two dimensions. A value that is refused alone is in none."""
    return [
        (one, other)
        for one in DIMENSIONS[first]
        for other in DIMENSIONS[second]
        if REFUSED not in (stated([one])[0], stated([other])[0])
    ]


def covering(dimensions: Mapping[str, Sequence[str]]) -> list[tuple[str, ...]]:
    """Combinations of one value of each dimension in which every pair of values without an exception occurs."""

    def fits(names: Iterable[str]) -> bool:
        return stated(names)[0] in (WORKS, SLOWER)

    missing = {
        (one, other)
        for first, second in itertools.combinations(dimensions, 2)
        for one in dimensions[first]
        for other in dimensions[second]
        if fits((one, other))
    }
    found = []
    while missing:
        row = list(min(missing))
        for values in dimensions.values():
            if not set(row).intersection(values):
                gains = {value: sum(bool({(one, value), (value, one)} & missing) for one in row) for value in values}
                row += sorted((value for value in values if fits([*row, value])), key=gains.__getitem__)[-1:]
        missing -= {(one, other) for one in row for other in row}
        found.append(tuple(sorted(row, key=list(VALUES).index)))
    return found
