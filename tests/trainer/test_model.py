"""Backbone and head called separately give the whole model's logits, or the trainer detects it; references do not change."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from dpo_trainer import ModelError, PairCollator, load_model, load_tokenizer
from dpo_trainer.data.prepare import Preparation, prepare_dataset
from dpo_trainer.model.dropout import disable_dropout
from dpo_trainer.model.references import AdapterOffReference, FrozenReference, reference_logps
from dpo_trainer.model.split import SplitModel

from .tiny import MODELS


@pytest.fixture
def batch(tokenizer: Any, pairs: Callable[..., Any]) -> dict[str, torch.Tensor]:
    """Pairs of different lengths, so that there is padding."""
    return PairCollator(pad_token_id=0)(list(tokenized(pairs(4), tokenizer)))


def tokenized(rows: Any, tokenizer: Any) -> Any:
    return prepare_dataset(rows, tokenizer, Preparation(), name="rows")[0]


def one_by_one(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The model's own logits before each scored token, from each sequence run separately without padding."""
    found = []
    starts = (batch["positions"] % batch["input_ids"].shape[1]).split(batch["cu_seqlens"].diff().tolist())
    for ids, mask, rows in zip(batch["input_ids"], batch["attention_mask"], starts, strict=True):
        with torch.no_grad():
            found.append(model(input_ids=ids[mask.bool()][None]).logits[0, rows])
    return torch.cat(found)


@pytest.mark.parametrize("kind", MODELS)
def test_split_logits_are_the_models_own(kind: str, make_model: Callable[..., Any], batch: dict[str, Any]) -> None:
    split = SplitModel(make_model(kind).eval())
    assert split.verify(batch), "a supported architecture fell back to whole logits"
    with torch.no_grad():
        logits = split.finish(split.packed_logits(batch))
    torch.testing.assert_close(logits, one_by_one(split.model, batch), rtol=1e-4, atol=1e-5)


def test_softcap_and_scales_are_left_to_the_kernels(make_model: Callable[..., Any]) -> None:
    assert SplitModel(make_model("gemma2-softcap")).logit_softcap == 0.5
    assert SplitModel(make_model("cohere-scale")).logit_scale == 0.25
    assert SplitModel(make_model("granite-divisor")).logit_scale == 0.25


def test_a_model_that_does_more_after_its_head_falls_back(
    make_model: Callable[..., Any], batch: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    model = make_model("llama-untied").eval()
    whole = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = whole(*args, **kwargs)
        output.logits = output.logits * 1.01
        return output

    model.forward = forward
    split = SplitModel(model)
    assert not split.verify(batch)
    assert "computing the logits of all tokens" in caplog.text
    with torch.no_grad():
        torch.testing.assert_close(split.packed_logits(batch), one_by_one(model, batch), rtol=1e-4, atol=1e-5)
    assert (split.logit_scale, split.logit_softcap) == (1.0, None)


@pytest.mark.parametrize("target", [["q_proj", "v_proj"], ["q_proj", "lm_head"]])
def test_split_works_through_adapters(target: list[str], make_model: Callable[..., Any], batch: dict[str, Any]) -> None:
    model = get_peft_model(make_model("llama-untied"), LoraConfig(r=4, target_modules=target, init_lora_weights=False))
    split = SplitModel(model.eval())
    assert split.verify(batch)
    with torch.no_grad():
        torch.testing.assert_close(split.packed_logits(batch), one_by_one(model, batch), rtol=1e-4, atol=1e-5)


def test_adapter_off_is_the_base_model(make_model: Callable[..., Any], batch: dict[str, Any]) -> None:
    base = make_model("llama-untied").eval()
    expected = one_by_one(base, batch)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    model.train()
    split = SplitModel(model)
    reference = AdapterOffReference(split)
    torch.testing.assert_close(reference.packed_logits(batch), expected, rtol=1e-4, atol=1e-5)
    assert not reference.packed_logits(batch).requires_grad
    assert model.training
    assert not torch.allclose(split.packed_logits(batch), expected, atol=1e-3), "the adapter must be on again"


def test_a_frozen_copy_does_not_move(make_model: Callable[..., Any], batch: dict[str, Any]) -> None:
    model = make_model()
    reference = FrozenReference.copy_of(model)
    before = reference.packed_logits(batch)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1
    assert torch.equal(reference.packed_logits(batch), before)
    assert not any(parameter.requires_grad for parameter in reference.split.model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_reference_log_probabilities_come_in_row_order(
    batch_size: int, make_model: Callable[..., Any], tokenizer: Any, pairs: Callable[..., Any]
) -> None:
    split = SplitModel(make_model().eval())
    dataset = tokenized(pairs(8), tokenizer)
    collate = PairCollator(pad_token_id=0)
    chosen, rejected = reference_logps(split, dataset, collate, batch_size=batch_size, device=torch.device("cpu"))
    for index, row in enumerate(dataset):
        alone = collate([row])
        logps = one_by_one(split.model, alone).double().log_softmax(-1).gather(1, alone["labels"][:, None]).squeeze(1)
        end = int(alone["cu_seqlens"][1])
        assert chosen[index] == pytest.approx(logps[:end].sum().item(), rel=1e-5)
        assert rejected[index] == pytest.approx(logps[end:].sum().item(), rel=1e-5)


def test_dropout_is_disabled_everywhere(make_model: Callable[..., Any]) -> None:
    model = make_model("gpt2-learned-positions")
    assert any(module.p > 0 for module in model.modules() if isinstance(module, torch.nn.Dropout))
    disable_dropout(model)
    assert all(module.p == 0 for module in model.modules() if isinstance(module, torch.nn.Dropout))
    llama = make_model()
    llama.model.layers[0].self_attn.attention_dropout = 0.3
    disable_dropout(llama)
    assert llama.model.layers[0].self_attn.attention_dropout == 0.0


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("/nowhere/model", "no such folder"),
        ("./nowhere", "no such folder"),
        ("nowhere.gguf", "no such file"),
        ("no-such-model-on-the-hub", "cannot be loaded"),
    ],
)
def test_models_that_are_not_there_are_named(name: str, said: str) -> None:
    for load in (load_model, load_tokenizer):
        with pytest.raises(ModelError, match=said) as caught:
            load(name)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_folder_without_a_model_is_named(tmp_path: Any) -> None:
    with pytest.raises(ModelError, match="holds no model"):
        load_model(tmp_path)


def test_models_load_in_float32_unless_told(model_folder: Any) -> None:
    assert load_model(model_folder).dtype == torch.float32
    assert load_model(model_folder, dtype="bfloat16").dtype == torch.bfloat16
    with pytest.raises(ModelError, match="unknown dtype 'float33'"):
        load_model(model_folder, dtype="float33")
