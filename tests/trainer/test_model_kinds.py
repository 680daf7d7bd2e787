"""Dropout is turned off in every model, and models that cannot be trained on pairs are refused with a one-line error."""

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import BOFTConfig, LoKrConfig, PolyConfig, get_peft_model
from torch import Tensor, nn

from dpo_trainer import ModelError
from dpo_trainer.model.adapter_kinds import moved
from dpo_trainer.model.dropout import disable_dropout, what_draws

from .tiny import LLAMA, build_model, build_tokenizer, build_trainer

VOCAB = len(build_tokenizer())
LAYERS = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": VOCAB}
POSITIONS = {"max_position_embeddings": 128}
BART = {"vocab_size": VOCAB, "d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 64}
EXPERTS = {**LLAMA, "vocab_size": VOCAB, "num_local_experts": 4}
BERT = {**LAYERS, **POSITIONS, "intermediate_size": 64}
BLOOM = {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 4}
#: Class and arguments of its config. Each class keeps dropout in a different place.
DROPS: dict[str, tuple[str, dict[str, Any]]] = {
    "OPT": ("OPTForCausalLM", {**LAYERS, **POSITIONS, "ffn_dim": 64, "word_embed_proj_dim": 32, "layerdrop": 0.3}),
    "GPT2": ("GPT2LMHeadModel", {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4}),
    "Bart": ("BartForCausalLM", {**BART, **POSITIONS, "decoder_layerdrop": 0.3, "is_encoder_decoder": False}),
    "Bloom": ("BloomForCausalLM", {**BLOOM, "hidden_dropout": 0.2, "attention_dropout": 0.2}),
    "Mixtral": ("MixtralForCausalLM", {**EXPERTS, "router_jitter_noise": 0.3, "attention_dropout": 0.2}),
    "Bert": ("BertLMHeadModel", {**BERT, "is_decoder": True}),
    # These read dropout from their config at every forward pass.
    "Falcon": ("FalconForCausalLM", {**LAYERS, "hidden_dropout": 0.2, "attention_dropout": 0.2}),
    "Persimmon": ("PersimmonForCausalLM", {**LAYERS, "intermediate_size": 64, "attention_dropout": 0.2}),
}


def built(name: str) -> Any:
    kind, arguments = DROPS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**arguments)
    model = getattr(transformers, kind)(config)
    with torch.no_grad():
        for value in model.parameters():
            value.mul_(3)  # so that dropout changes the loss
    return model


def losses(trainer: Any) -> list[float]:
    trainer.train()
    return [record["loss"] for record in trainer.state.log_history if "loss" in record]


@pytest.mark.parametrize("name", DROPS)
def test_without_dropout_every_loss_is_log_2(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = {"learning_rate": 0.0, "max_steps": 3, "beta": 1.0}
    found = losses(build_trainer(tmp_path / "off", model=built(name), **settings))
    assert found == pytest.approx([math.log(2)] * 3, abs=1e-5)
    assert "disable_dropout" not in caplog.text
    found = losses(build_trainer(tmp_path / "on", model=built(name), disable_dropout=False, **settings))
    assert max(abs(loss - math.log(2)) for loss in found) > 1e-3, "dropout must stay on"


def test_dropout_in_a_config_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="dpo_trainer")
    model = built("Falcon")
    build_trainer(tmp_path, model=model)
    assert "FalconForCausalLM: reads dropout from its config; set to 0 there, and saved as 0: " in caplog.text
    assert model.config.hidden_dropout == 0.0
    other = built("OPT")
    build_trainer(tmp_path, model=other)
    assert other.config.dropout == 0.1, "a config that is not read stays as it is"


@pytest.mark.parametrize(
    "adapter",
    [
        LoKrConfig(r=4, rank_dropout=0.3, module_dropout=0.3, target_modules=["q_proj"], init_weights=False),
        BOFTConfig(boft_block_size=4, boft_dropout=0.3, target_modules=["q_proj"], init_weights=False),
    ],
    ids=["lokr", "boft"],
)
def test_the_dropout_of_adapters_is_off(adapter: Any) -> None:
    model = get_peft_model(build_model("llama-tied", VOCAB), adapter)
    ids = torch.arange(2, 12)[None]
    with moved(model):
        assert what_draws(model, lambda: model(input_ids=ids).logits) is not None
        disable_dropout(model)
        assert what_draws(model, lambda: model(input_ids=ids).logits) is None


class Noisy(nn.Module):
    """A layer whose dropout has an unknown name and which counts its calls in a buffer."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.surprise = inner, 0.1
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        self.calls += 1
        output = self.inner(*args, **kwargs)
        return output * (1 + self.surprise * torch.rand_like(output)) if self.training else output


def test_what_still_draws_is_named_and_nothing_is_disturbed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = build_model("llama-untied", VOCAB)
    model.model.layers[1].mlp.down_proj = Noisy(model.model.layers[1].mlp.down_proj)
    model.eval()
    calls = []
    model.lm_head.register_full_backward_hook(lambda *_: calls.append(1))
    ids = torch.arange(2, 12)[None]
    before = torch.get_rng_state(), random.getstate()
    found = what_draws(model, lambda: model(input_ids=ids).logits)
    assert found == "it draws at random, first in 'model.layers.1.mlp.down_proj' (Noisy)"
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert model.model.layers[1].mlp.down_proj.calls == 0
    assert not calls
    assert not any(module.training for module in model.modules())
    build_trainer(tmp_path, model=model)
    assert caplog.text.count("PeftModel") == 0
    assert "LlamaForCausalLM: in training, although disable_dropout is on, it draws at random, first in" in caplog.text
    caplog.clear()
    build_trainer(tmp_path, model=model, disable_dropout=False)
    assert "draws" not in caplog.text


def test_a_model_that_only_answers_otherwise_in_training_is_named() -> None:
    model = build_model("llama-untied", VOCAB)
    norm = model.model.norm

    def forward(hidden: Tensor) -> Tensor:
        return type(norm).forward(norm, hidden) * (2 if norm.training else 1)

    norm.forward = forward
    found = what_draws(model, lambda: model(input_ids=torch.arange(2, 12)[None]).logits)
    assert found == "its output differs from that in evaluation, first in 'model.norm' (LlamaRMSNorm)"


def test_an_adapter_that_draws_by_itself_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = PolyConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    build_trainer(tmp_path, peft_config=config)
    assert "it draws at random, first in 'base_model.model.model.layers.0.self_attn.q_proj" in caplog.text


# --- models that are not causal ------------------------------------------------------------------------------------

WANTED = "a causal language model is needed"
LLAMA_CONFIG = {**LLAMA, "vocab_size": VOCAB}
NOT_CAUSAL: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "masked": ("Bert", "BertForMaskedLM", BERT, "is a masked language model"),
    "encoder": ("Bert", "BertLMHeadModel", BERT, "looks ahead: a later token changes the logits before it"),
    "classifier": ("Llama", "LlamaForSequenceClassification", {**LLAMA_CONFIG, "pad_token_id": 0}, "is a classifier"),
    "tokens": ("Bert", "BertForTokenClassification", BERT, "is a classifier of tokens"),
    "backbone": ("Llama", "LlamaModel", LLAMA_CONFIG, "is a backbone without a head for tokens"),
    "questions": ("Llama", "LlamaForQuestionAnswering", LLAMA_CONFIG, "marks answers"),
    "speech": (
        "Wav2Vec2",
        "Wav2Vec2ForCTC",
        {**{key: value for key, value in BERT.items() if key != "max_position_embeddings"}, "conv_dim": [8] * 7},
        "is a speech model",
    ),
    "encoder-decoder": (
        "T5",
        "T5ForConditionalGeneration",
        {"vocab_size": VOCAB, "d_model": 32, "num_layers": 1},
        "enc",
    ),
}


@pytest.mark.parametrize("case", NOT_CAUSAL)
def test_models_that_are_not_causal_are_refused(case: str, tmp_path: Path) -> None:
    family, kind, arguments, said = NOT_CAUSAL[case]
    model = getattr(transformers, kind)(getattr(transformers, f"{family}Config")(**arguments))
    with pytest.raises(ModelError, match=said) as caught:
        build_trainer(tmp_path, model=model)
    assert str(caught.value).startswith(f"model: {kind} ")
    assert "\n" not in str(caught.value)


def test_a_causal_class_that_attends_to_both_sides_is_refused(tmp_path: Path) -> None:
    config = transformers.Gemma3TextConfig(
        **LLAMA_CONFIG, head_dim=8, pad_token_id=0, use_bidirectional_attention=True, sliding_window=64
    )
    with pytest.raises(ModelError, match="Gemma3ForCausalLM looks ahead"):
        build_trainer(tmp_path, model=transformers.Gemma3ForCausalLM(config))


def test_references_are_looked_at_as_well(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="ref_model: BertForMaskedLM is a masked"):
        build_trainer(tmp_path, ref_model=transformers.BertForMaskedLM(transformers.BertConfig(**BERT)))
    with pytest.raises(ModelError, match="ref_model: BertLMHeadModel looks ahead"):
        build_trainer(tmp_path, ref_model=transformers.BertLMHeadModel(transformers.BertConfig(**BERT)))


def test_a_model_of_ones_own_without_logits_is_refused(tmp_path: Path) -> None:
    class Own(transformers.LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            return transformers.modeling_outputs.BaseModelOutput(last_hidden_state=output.logits)

    with pytest.raises(ModelError, match="model: Own gives no logits for tokens"):
        build_trainer(tmp_path, model=Own(transformers.LlamaConfig(**LLAMA_CONFIG)))


def test_rows_that_depend_on_each_other_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = build_model("llama-untied", VOCAB)

    def mixed(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return torch.cat([output[:1], output[1:] + output[:1].mean(dim=1, keepdim=True)])

    model.model.norm.register_forward_hook(mixed)
    build_trainer(tmp_path, model=model, batch_layout="padded")
    assert "LlamaForCausalLM: the logits of a row depend on the other rows of its batch" in caplog.text


# --- quantised heads -----------------------------------------------------------------------------------------------


class Packed(nn.Module):
    """A head like GPTQ's and AWQ's, with integers and scales but without `weight`."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scales = linear.weight.detach().abs().amax(dim=1, keepdim=True) / 127
        self.register_buffer("qweight", (linear.weight.detach() / scales).round().to(torch.int8))
        self.register_buffer("scales", scales)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden @ (self.qweight.to(hidden.dtype) * self.scales).T


class FourBit(nn.Linear):
    """A head like bitsandbytes': a Linear whose weight is bytes of another shape."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.inner = Packed(linear)
        self.weight = nn.Parameter(torch.zeros(linear.weight.numel() // 2, 1, dtype=torch.uint8), requires_grad=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.inner(hidden)


def dynamic(linear: nn.Linear) -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(nn.Sequential(linear), {nn.Linear}, dtype=torch.qint8)[0]


def test_a_head_that_lets_no_gradient_through_is_one_line(tmp_path: Path) -> None:
    model = build_model("llama-untied", VOCAB)
    model.lm_head = dynamic(model.lm_head)
    with pytest.raises(ModelError, match="model: LlamaForCausalLM's head Linear has no gradient"):
        build_trainer(tmp_path, model=model)
    trainer = build_trainer(tmp_path, ref_model=model, max_steps=1)
    trainer.train()
    assert trainer.loss_path == "logits"


@pytest.mark.parametrize("quantise", [Packed, FourBit])
@pytest.mark.parametrize("with_reference", [False, True])
def test_a_quantised_head_goes_by_logits(
    quantise: Callable[[nn.Linear], nn.Module], with_reference: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="dpo_trainer")
    model = build_model("llama-untied", VOCAB)
    model.lm_head = quantise(model.lm_head)
    other = {"ref_model": build_model("llama-untied", VOCAB)} if with_reference else {}
    trainer = build_trainer(tmp_path, model=model, max_steps=2, **other)
    assert trainer.loss_path == "logits"
    assert "loss path: logits, because" in caplog.text
    found = losses(trainer)
    assert with_reference or found[0] == pytest.approx(math.log(2), abs=1e-5)
    with pytest.raises(
        ValueError, match=r"loss_path: 'linear' is not possible here: the head is not a plain nn\.Linear"
    ):
        build_trainer(tmp_path, model=model, loss_path="linear")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_a_head_of_numbers_that_do_not_multiply_is_one_line(dtype: torch.dtype, tmp_path: Path) -> None:
    model = build_model("llama-untied", VOCAB)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().to(dtype), requires_grad=False)
    with pytest.raises(ModelError, match="model: LlamaForCausalLM cannot be run on a batch of tokens") as caught:
        build_trainer(tmp_path, model=model)
    assert "\n" not in str(caught.value)
