"""Splits a causal language model into backbone and head, so that logits are computed for scored tokens only."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..batch import attention
from ..batch.images import model_inputs
from ..batch.layout import attention_inputs
from ..errors import first_line
from .adapter_kinds import moved, needs_task, own_forward
from .vision import takes_images

logger = logging.getLogger("dpo_trainer")

Batch = Mapping[str, Tensor]


class SplitModel:
    """Computes the packed logits `[N, V]` of a batch's scored tokens: backbone, then selection, then head.

    Prompts, padding and last tokens are dropped between backbone and head, because projecting them onto the vocabulary is
    expensive and useless. The head is called as a module, so tied weights, biases, LoRA on the head and distributed hooks
    work.

    A scale or softcap that the model applies after its head is read from the config and left to the kernels, as
    `logit_scale` and `logit_softcap` of `dpo_loss`. A model may do something else after its head, so `verify` compares the
    result with the model's own logits. If they differ, `split` becomes False: the whole model computes the logits of all
    tokens, and the scored ones are selected.

    Args:
        model: a `transformers` causal language model or a peft model around one.

    Attributes:
        split: whether backbone and head are called separately.
        around: what an adapter does outside the model's layers, in words, so that only the whole model is right; or None.
        collect_routers: whether forward passes with gradient store their router logits in `router_logits` (see `auxiliary`).
    """

    collect_routers = False
    router_logits: Any = None

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        base = unwrap_adapter(model)
        self.head: Any = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
        self.backbone: Any = _backbone(base, self.head)
        self.around = own_forward(model)
        self.split = self.backbone is not None and self.head is not None and self.around is None
        config: Any = getattr(base, "config", None)
        self._config = config.get_text_config() if hasattr(config, "get_text_config") else config
        self._scale, self._softcap = _after_head(self._config)

    @property
    def logit_scale(self) -> float:
        """Factor that is not yet applied to `packed_logits`."""
        return self._scale if self.split else 1.0

    @property
    def logit_softcap(self) -> float | None:
        """Softcap that is not yet applied to `packed_logits`. It follows the scale."""
        return self._softcap if self.split else None

    @property
    def after_head(self) -> dict[str, Any]:
        """`logit_scale` and `logit_softcap` as keyword arguments of the losses."""
        return {"logit_scale": self.logit_scale, "logit_softcap": self.logit_softcap}

    def packed_hidden(self, batch: Batch) -> Tensor:
        """Hidden states `[N, H]` at the batch's `positions`. Requires that `split` is True."""
        output = self._call(self.backbone, batch)
        return output.last_hidden_state.flatten(0, 1).index_select(0, batch["positions"])

    def packed_logits(self, batch: Batch) -> Tensor:
        """Logits `[N, V]` at the batch's `positions`, before `logit_scale` and `logit_softcap`."""
        if self.split:
            return self.head(self.packed_hidden(batch))
        return self.whole_logits(batch).flatten(0, 1).index_select(0, batch["positions"])

    def whole_logits(self, batch: Batch) -> Any:
        """The whole model's own logits `[B, T, V]` of every token; None if it returns none."""
        rows, length = batch["input_ids"].shape
        task = {"task_ids": batch["input_ids"].new_zeros(rows)} if needs_task(self.model) else {}
        logits = getattr(self._call(self.model, batch, **task), "logits", None)
        # Drop the logits of an adapter's virtual tokens, which come first.
        return logits[:, -length:] if self.around and logits is not None else logits

    def _call(self, module: nn.Module, batch: Batch, **more: Any) -> Any:
        collect = self.collect_routers and torch.is_grad_enabled()
        if collect:
            more["output_router_logits"] = True
        output = module(**self._inputs(batch), **more)
        if collect:
            self.router_logits = getattr(output, "router_logits", None)
        return output

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        dtype = next((value.dtype for value in self.model.parameters() if value.is_floating_point()), torch.float32)
        given = {**attention_inputs(batch, self._config, dtype), **model_inputs(batch, dtype)}
        return {"input_ids": batch["input_ids"], **given, "use_cache": False, "return_dict": True}

    @property
    def obstacle_to_linear(self) -> str | None:
        """Why the loss cannot be computed from hidden states and the head's weight; None if it can."""
        if not self.split:
            return self.around or "the model's logits are not head(backbone(x))"
        # With an adapter, quantisation or an offloading hook, the head computes more than one matrix product.
        if type(self.head).forward is not nn.Linear.forward or "forward" in self.head.__dict__:
            return f"the head is not a plain nn.Linear but {type(self.head).__name__}"
        if self.head.weight.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            return f"the head's weight is quantised ({self.head.weight.dtype})"
        return None

    def through_head(self, function: Callable[..., Any], hidden: Tensor) -> Any:
        """Run `function(hidden, weight, bias)` as the forward of the head, with the head's weight and bias.

        So the head's hooks run, such as those that gather its sharded weight.
        """
        head = self.head
        return call_through(head, head, lambda hidden: function(hidden, head.weight, head.bias), hidden)

    def finish(self, logits: Tensor) -> Tensor:
        """Apply the remaining scale and softcap to `packed_logits`, for use without the kernels."""
        if self.logit_scale != 1.0:
            logits = logits * self.logit_scale
        if self.logit_softcap is not None:
            logits = self.logit_softcap * torch.tanh(logits / self.logit_softcap)
        return logits

    @torch.no_grad()
    def verify(self, batch: Batch) -> bool:
        """Compare the logits of the split and the whole model on a small batch. If they differ, warn and turn `split` off.

        Both have the same hidden states, so they may differ only by the rounding of one matrix product. The tolerance is 4
        units in the last place of the largest logit, and at least 1e-4 of it.

        Returns:
            whether the split is used.
        """
        name = type(self.model).__name__
        if self.around:
            logger.info("%s: %s; computing the logits of all tokens, in padded batches", name, self.around)
            return False
        if not self.split:
            logger.warning("%s: no separable head found; computing the logits of all tokens", name)
            return False
        reason = ""
        with evaluating(self.model), moved(self.model):
            try:
                logits = self.packed_logits(batch)
            except Exception as error:  # a head or a backbone may take other inputs
                logits, reason = torch.empty(0), f"cannot be compared ({type(error).__name__}: {first_line(error)})"
            values = self.finish(logits.double())
            self.split = False
            whole = self.packed_logits(batch).double()
        if not reason and values.shape != whole.shape:
            reason = f"have shape {tuple(values.shape)} instead of {tuple(whole.shape)}"
        elif not reason:
            gap = (values - whole).abs().max().item()
            limit = max(4 * torch.finfo(logits.dtype).eps, 1e-4) * max(whole.abs().max().item(), 1e-30)
            self.split = gap <= limit
            reason = f"differ by {gap:.2g} (limit {limit:.2g})"
        if not self.split:
            logger.warning(
                "%s: logits of head(backbone(x)) and the model's own %s; computing the logits of all tokens, which is slower",
                name,
                reason,
            )
        return self.split

    @torch.no_grad()
    def obstacle_to_layout(self, batch: Batch, padded: Batch) -> str | None:
        """Why the model's results in a batch's layout differ from those in the padded layout; None if they are the same.

        The causes are recurrent layers, models that count positions themselves, and attention that ignores our mask. The
        hidden state (without a split, the logits) of every scored token is compared, relative to its norm. In float32,
        rounding changes it by 1e-7 to 1e-5. A leak from one sequence into another changes it by more than the limit of
        1e-4, even in models with random weights. With 16-bit weights or reduced matrix precision the limit is 0.05.

        Args:
            batch: some pairs in the layout to try.
            padded: the same pairs in the padded layout.
        """
        if self.collect_routers and not self.split:
            return "the whole model computes its auxiliary loss for padded batches only"
        answer = self.packed_hidden if self.split else self.packed_logits
        try:
            with evaluating(self.model), moved(self.model):
                expected, found = answer(padded), answer(batch)
        except Exception as error:  # a model that does not support such inputs may raise anything
            return f"it refuses the batch ({type(error).__name__}: {first_line(error)})"
        if found.shape != expected.shape:
            return f"its answers have shape {tuple(found.shape)} instead of {tuple(expected.shape)}"
        exact = torch.finfo(found.dtype).bits >= 32 and torch.get_float32_matmul_precision() == "highest"
        limit = 1e-4 if exact else 0.05
        found, expected = found.double(), expected.double()
        differ = ((found - expected).norm(dim=-1) / expected.norm(dim=-1).clamp(min=1e-30)).max().item()
        return None if differ <= limit else f"its answers differ by {differ:.2g} (limit {limit:.2g})"

    def attend_by_sequence(self) -> Callable[[], None] | None:
        """Switch the model to attention by sequence, see `attention`.

        Returns:
            a function that switches back; None if the model does not use `sdpa` attention, and nothing was switched.
        """
        base: Any = unwrap_adapter(self.model)
        before = getattr(self._config, "_attn_implementation", None)
        # Tested first, because transformers warns about models whose attention cannot be chosen.
        if before != "sdpa" or not getattr(base, "_can_set_attn_implementation", lambda: False)():
            return None
        base.set_attn_implementation(attention.NAME)
        return lambda: base.set_attn_implementation(before)

    def attention_cost(self) -> float:
        """Cost of comparing a token with one key, relative to the token's matrix products in the backbone.

        In each layer, a token needs two products for every key: the score and the weighted value. Attention kernels reach
        about a third of the rate of large matrix products, as measured (see docs/trainer.md).
        """
        backbone, config = self.backbone if self.backbone is not None else self.model, self._config
        parameters = sum(value.numel() for value in backbone.parameters())
        parameters -= sum(module.weight.numel() for module in backbone.modules() if isinstance(module, nn.Embedding))
        heads = getattr(config, "num_attention_heads", None) or 1
        try:
            head_dim = getattr(config, "head_dim", None)
        except Exception:  # a config may raise if its layers have heads of different sizes
            head_dim = None
        head_dim = head_dim or getattr(config, "hidden_size", 0) // heads
        return 3 * 2 * getattr(config, "num_hidden_layers", 0) * heads * head_dim / max(parameters, 1)


def unwrap_adapter(model: Any) -> Any:
    """The transformers model inside a peft model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _backbone(base: Any, head: Any) -> nn.Module | None:
    if takes_images(base):  # the decoder alone would not see the images
        whole = getattr(base, "base_model", None)
        return whole if whole is not base and takes_images(whole) else None
    decoder = None
    with contextlib.suppress(Exception):  # some models inherit a get_decoder that fails
        decoder = base.get_decoder()
    candidates = (decoder, getattr(base, "base_model", None))
    # For ModernBERT, get_decoder returns the head, because the head's attribute is named `decoder`.
    found = (part for part in candidates if isinstance(part, nn.Module) and part is not base and part is not head)
    return next(found, None)


def _after_head(config: Any) -> tuple[float, float | None]:
    """(scale, softcap) that the model applies to its logits, read from its config under the names of several models."""
    scale = 1.0
    if isinstance(value := getattr(config, "logit_scale", None), (int, float)):  # Cohere
        scale = float(value)
    elif isinstance(value := getattr(config, "logits_scaling", None), (int, float)):  # Granite divides
        scale = 1.0 / float(value)
    elif isinstance(value := getattr(config, "lm_head_multiplier", None), (int, float)):  # Falcon-H1
        scale = float(value)
    softcap = getattr(config, "final_logit_softcapping", None)  # Gemma
    return scale, float(softcap) if softcap else None


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A context in which the model is in evaluation mode. Its mode is restored afterwards."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def call_through(wrapper: nn.Module, module: nn.Module, function: Callable[..., Any], *args: Any) -> Any:
    """Run `function(*args)` as the forward of `module` inside `wrapper`, its distributed wrapper.

    DDP and FSDP prepare gradients and shards in hooks of the wrapper's forward. Calling parts of the module directly would
    silently skip the hooks.
    """
    own = module.__dict__.get("forward")

    def restore() -> None:
        if own is None:
            module.__dict__.pop("forward", None)
        else:
            module.forward = own

    def forward(*inner: Any, **_: Any) -> Any:
        restore()
        return function(*inner)

    module.forward = forward  # type: ignore[assignment]
    try:
        return wrapper(*args)
    finally:
        restore()
