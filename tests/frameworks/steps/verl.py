"""verl's PPO step: its actor's update on one batch, with entropy bonus and KL to a reference. verl has no DPO trainer.

Up to 0.7 the step is `DataParallelPPOActor.update_policy`, with logits of padded responses. From 0.8 on it is
`FSDPEngineWithLMHead.forward_backward_batch` with verl's `ppo_loss`, on rows without padding. The reference's log-probabilities
come from the same classes. The two completions of a pair are the responses, with positive and negative advantages.

verl imports ray when it is imported. ray is a stub here: no function of it is called. The process group has one process (gloo),
and FSDP wraps nothing. Autocast, which verl always turns on in older versions, is off: the step is float32.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from importlib import metadata
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import transformers
from omegaconf import OmegaConf
from torch import Tensor

from ..compare import Size, Step
from ..material import gradients, model_of, pairs_of, tokenizer_of
from . import stubs

for _name in (
    "ray",
    "ray.actor",
    "ray.experimental",
    "ray.experimental.state",
    "ray.experimental.state.api",
    "ray.util",
):
    stubs.stub(_name, mock.MagicMock(name=_name))
stubs.flash_attn()

# verl up to 0.5 logs the memory of the device, also on a CPU.
vars(torch.cpu).setdefault("memory_allocated", lambda: 0)
vars(torch.cpu).setdefault("memory_reserved", lambda: 0)
vars(torch.cpu).setdefault("mem_get_info", lambda: (0, 0))

import verl  # noqa: E402
from verl.utils import torch_functional  # noqa: E402, F401

TEMPERATURE = 0.9
SETTINGS = {
    "entropy_coeff": 0.1,
    "use_kl_loss": True,
    "kl_loss_coef": 0.1,
    "kl_loss_type": "low_var_kl",
    "use_dynamic_bsz": False,
    "ppo_epochs": 1,
    "use_torch_compile": False,
    "loss_agg_mode": "token-mean",
}
#: Of `DataParallelPPOActor`, whose dataclass of settings has another place in each version.
MORE_SETTINGS = {
    "ulysses_sequence_parallel_size": 1,
    "entropy_from_logits_with_chunking": False,
    "entropy_checkpointing": False,
    "grad_clip": 1.0,
    "clip_ratio": 0.2,
    "clip_ratio_low": 0.2,
    "clip_ratio_high": 0.2,
    "policy_loss": {"loss_mode": "vanilla"},
    "calculate_entropy": False,
    "use_rollout_log_probs": True,
    "fsdp_config": {"dtype": "float32"},
    "global_batch_info": {},
}


def _batch(size: Size) -> dict[str, Tensor]:
    """verl's padded batch of 2P responses: prompts padded on the left, responses on the right."""
    tokenizer, pairs = tokenizer_of(size), pairs_of(size)
    rows = [(pair["prompt"], pair[side]) for side in ("chosen", "rejected") for pair in pairs]
    prompts, responses = ([tokenizer(text)["input_ids"] for text in texts] for texts in zip(*rows, strict=True))
    left, right = max(map(len, prompts)), max(map(len, responses))
    ids = torch.zeros(len(rows), left + right, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        span = slice(left - len(prompt), left + len(response))
        ids[row, span], mask[row, span] = torch.tensor([*prompt, *response]), 1
    sign = torch.ones(len(rows), 1)
    sign[size.pairs :] = -1
    generator = torch.Generator().manual_seed(0)
    return {
        "prompts": ids[:, :left],
        "responses": ids[:, left:],
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": (mask.cumsum(-1) - 1).clamp(min=0),
        "response_mask": mask[:, left:],
        "advantages": sign + 0.1 * torch.randn(len(rows), right, generator=generator),
        "noise": 0.1 * torch.randn(len(rows), right, generator=generator),
    }


@contextmanager
def _losses() -> Iterator[list[float]]:
    """A list that grows with every loss whose `backward` is called; verl does not return the whole loss."""
    seen: list[float] = []
    whole = Tensor.backward

    def backward(self: Tensor, *arguments: Any, **named: Any) -> None:
        seen.append(self.item())
        whole(self, *arguments, **named)

    with mock.patch.object(Tensor, "backward", backward):
        yield seen


def _actors(size: Size, batch: dict[str, Tensor]) -> tuple[Callable[[], Tensor], Callable[[Tensor, Tensor], Any], Any]:
    """(the reference's log-probabilities, the update for old and reference log-probabilities, the policy); verl up to 0.7."""
    dp_actor = importlib.import_module("verl.workers.actor.dp_actor")
    rows = 2 * size.pairs
    config = OmegaConf.create(
        {**SETTINGS, **MORE_SETTINGS, "ppo_mini_batch_size": rows, "ppo_micro_batch_size_per_gpu": rows}
    )
    keep = SimpleNamespace(zero_grad=lambda: None)
    policy, reference = (
        dp_actor.DataParallelPPOActor(config, model_of(size, seed), optimizer)
        for seed, optimizer in ((0, keep), (1, None))
    )
    # The step ends before the optimizer changes the parameters.
    policy._optimizer_step = lambda: torch.zeros(())
    meta = {"temperature": TEMPERATURE, "micro_batch_size": rows, "use_dynamic_bsz": False}

    def log_probs(actor: Any) -> Tensor:
        data = verl.DataProto.from_single_dict(dict(batch), meta_info=meta)
        with mock.patch.object(torch, "autocast", return_value=nullcontext()):
            found = actor.compute_log_prob(data)
        return found["log_probs"] if isinstance(found, dict) else found[0] if isinstance(found, tuple) else found

    def update(old: Tensor, ref: Tensor) -> None:
        data = verl.DataProto.from_single_dict({**batch, "old_log_probs": old, "ref_log_prob": ref}, meta_info=meta)
        policy.actor_module.zero_grad()
        with mock.patch.object(torch, "autocast", return_value=nullcontext()):
            policy.update_policy(data)

    old = log_probs(policy) + batch["noise"]
    return lambda: log_probs(reference), lambda ref: update(old, ref), policy.actor_module


def _engines(size: Size, batch: dict[str, Tensor], fused: bool) -> tuple[Any, Any, Any]:
    """As `_actors`, for verl from 0.8 on."""
    with contextlib.suppress(ModuleNotFoundError):  # 0.9 knows GPUs only, where 0.8 falls back to the CPU
        platform = importlib.import_module("verl.plugin.platform.platform_cuda").PlatformCUDA
        platform.device_name = property(lambda self: "cpu")
        platform.current_device = lambda self: "cpu"
    fsdp = importlib.import_module("verl.workers.engine.fsdp.transformer_impl")
    losses = importlib.import_module("verl.workers.utils.losses")
    padding = importlib.import_module("verl.workers.utils.padding")
    tu = importlib.import_module("verl.utils.tensordict_utils")
    config_of = importlib.import_module("verl.workers.config")
    rows = 2 * size.pairs
    engine_config = config_of.FSDPEngineConfig(
        strategy="fsdp", use_torch_compile=False, mixed_precision={"param_dtype": "float32"}, forward_only=False
    )
    actor_config = config_of.ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=rows, **SETTINGS)

    def engine_of(seed: int) -> Any:
        model_config = SimpleNamespace(use_remove_padding=True, lora_rank=0)
        engine = fsdp.FSDPEngineWithLMHead(model_config, engine_config, None, None)
        engine.module, engine._autocast_dtype = model_of(size, seed), torch.float32
        if fused:
            patch = importlib.import_module("verl.models.transformers.monkey_patch")
            patch.patch_forward_with_backends(engine.module, use_fused_kernels=True, fused_kernels_backend="torch")
        return engine

    policy, reference = engine_of(0), engine_of(1)

    def data_of(**more: Tensor) -> Any:
        data = tu.get_tensordict({**batch, **more}, {"temperature": TEMPERATURE, "calculate_entropy": True})
        data = padding.left_right_2_no_padding(data)
        tu.assign_non_tensor(
            data,
            use_dynamic_bsz=False,
            micro_batch_size_per_gpu=rows,
            global_batch_size=rows,
            use_fused_kernels=fused,
        )
        return data

    def log_probs(engine: Any) -> Tensor:
        data = data_of()
        output = engine.forward_backward_batch(data, loss_function=None, forward_only=True)
        return padding.no_padding_2_padding(output["model_output"]["log_probs"], data).detach()

    def update(old: Tensor, ref: Tensor) -> None:
        policy.module.zero_grad()
        loss = partial(losses.ppo_loss, actor_config)
        policy.forward_backward_batch(data_of(old_log_probs=old, ref_log_prob=ref), loss_function=loss)

    old = log_probs(policy) + batch["noise"]
    return lambda: log_probs(reference), lambda ref: update(old, ref), policy.module


def step_of(size: Size, fused: bool = False) -> Step:
    """See compare.py. With `fused` the step computes from hidden states, as with `use_fused_kernels` (verl from 0.8 on)."""
    if not torch.distributed.is_initialized():
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    batch = _batch(size)
    try:
        importlib.import_module("verl.workers.actor.dp_actor")
    except ModuleNotFoundError:
        reference, update, policy = _engines(size, batch, fused)
    else:
        reference, update, policy = _actors(size, batch)

    def step() -> tuple[float, dict[str, Tensor]]:
        ref = reference()
        with _losses() as seen:
            update(ref)
        return sum(seen), gradients(policy)

    return step


def versions() -> dict[str, str]:
    return {"verl": metadata.version("verl"), "transformers": transformers.__version__}
