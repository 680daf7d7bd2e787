"""Shared prompts and packed rows change no result, and models that do not support them are detected."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_kernels import sequence_logps
from dpo_trainer import PairCollator
from dpo_trainer.batch import attention
from dpo_trainer.batch.layout import LAYOUTS, arrange, cost, visible
from dpo_trainer.model.dropout import disable_dropout
from dpo_trainer.model.split import SplitModel

VOCAB = 97
SIZE = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
COMMON = {**SIZE, **IDS, "max_position_embeddings": 256, "intermediate_size": 64}
GQA = {**COMMON, "num_key_value_heads": 2}
#: Shorter than most rows of the tests, so that a missing or wrong window changes the results.
WINDOW = {"sliding_window": 8}


def build(name: str, **config: Any) -> Callable[[], Any]:
    """A tiny random `<name>ForCausalLM`."""

    def make() -> Any:
        torch.manual_seed(0)
        suffix = "TextConfig" if name == "Gemma3" else "Config"
        kind = "LMHeadModel" if name == "GPT2" else "ForCausalLM"
        return getattr(transformers, name + kind)(getattr(transformers, name + suffix)(**config)).eval()

    return make


#: All kinds of attention and positions that these layouts must support.
ABLE = {
    "llama": build("Llama", **GQA),
    "qwen2": build("Qwen2", **GQA),
    "qwen2-mixed-window": build("Qwen2", **GQA, **WINDOW, use_sliding_window=True, max_window_layers=1),
    "qwen3": build("Qwen3", **GQA, head_dim=8),
    "gemma2": build("Gemma2", **GQA, head_dim=8),
    "gemma2-window": build("Gemma2", **GQA, **WINDOW, head_dim=8),
    "gemma3-window": build("Gemma3", **{**GQA, "num_hidden_layers": 6}, **WINDOW, head_dim=8),
    "phi": build("Phi", **COMMON),
    "phi3": build("Phi3", **GQA),
    "phi3-window": build("Phi3", **GQA, **WINDOW),
    "mistral": build("Mistral", **GQA),
    "mistral-window": build("Mistral", **GQA, **WINDOW),
    "mixtral": build("Mixtral", **GQA, num_local_experts=4),
    "gpt-neox": build("GPTNeoX", **COMMON),
    "gpt2-learned-positions": build("GPT2", vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=256),
    "opt-learned-positions": build(
        "OPT", **SIZE, **IDS, ffn_dim=64, max_position_embeddings=256, word_embed_proj_dim=32
    ),
    "gpt-oss-sinks-and-window": build("GptOss", **GQA, **WINDOW, head_dim=8, num_local_experts=4),
}
#: Models that need padded batches: positions computed from a 2-D mask, recurrence, convolutions, masks made by the model.
UNABLE = {
    "bloom-alibi": build("Bloom", vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4),
    "mpt-alibi": build("Mpt", vocab_size=VOCAB, d_model=32, n_layers=2, n_heads=4),
    "falcon-alibi": build("Falcon", **SIZE, alibi=True),
    "mamba": build("Mamba", vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=8),
    "mamba2": build("Mamba2", **SIZE | {"num_heads": 8}, state_size=8, head_dim=8, n_groups=2),
    "rwkv": build("Rwkv", vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32),
    "lfm2-convolution": build("Lfm2", **GQA, layer_types=["conv", "full_attention"]),
    "gpt-neo-local": build(
        "GPTNeo",
        vocab_size=VOCAB,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=8,
    ),
}


def rows(*lengths: tuple[int, int, int], seed: int = 0) -> list[dict[str, Any]]:
    """Pairs of random tokens with the given lengths of prompt, chosen and rejected."""
    generator = torch.Generator().manual_seed(seed)
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return [
        {name: torch.randint(VOCAB, (n,), generator=generator).tolist() for name, n in zip(names, row, strict=True)}
        for row in lengths
    ]


#: Long and short completions on both sides, prompts of one token and of none, completions of one token.
LENGTHS = ((20, 3, 14), (1, 9, 9), (5, 1, 12), (17, 12, 1), (0, 6, 4))


def logps_one_by_one(model: Any, pairs: list[dict[str, Any]]) -> torch.Tensor:
    """Log-probabilities [2P] of the completions, from the model's own forward of each sequence separately."""
    sums = []
    for side in ("chosen_ids", "rejected_ids"):
        for row in pairs:
            ids = torch.tensor([row["prompt_ids"] + row[side]])
            first = max(len(row["prompt_ids"]), 1)
            logps = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None]).squeeze(1)
            sums.append(logps[first - 1 :].double().sum())
    return torch.stack(sums)


def logps_of(split: SplitModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    logits = split.finish(split.packed_logits(batch))
    return sequence_logps(logits, batch["labels"], cu_seqlens=batch["cu_seqlens"]).double()


#: Models that cap scores or add sinks, which fused attention does not support.
EAGER_ONLY = {"gemma2", "gemma2-window", "gpt-oss-sinks-and-window"}


@pytest.mark.parametrize("implementation", ["by sequence", "sdpa", "eager"])
@pytest.mark.parametrize("name", ABLE)
def test_shared_prompts_and_rows_give_the_log_probs_of_sequences_alone(name: str, implementation: str) -> None:
    model = ABLE[name]()
    model.set_attn_implementation("eager" if implementation == "eager" or name in EAGER_ONLY else "sdpa")
    split, pairs = SplitModel(model), rows(*LENGTHS)
    if implementation == "by sequence":
        assert (split.attend_by_sequence() is None) == (name in EAGER_ONLY)
    padded = PairCollator()(pairs)
    split.verify(padded)
    with torch.no_grad():
        expected = logps_one_by_one(model, pairs)
        # All pairs in one row, one pair per row, and the choice of "auto".
        tried = [("prefix_shared", 0.0), ("prefix_shared", 10.0), ("auto", 0.01)]
        if implementation == "by sequence" and name not in EAGER_ONLY:
            tried.append(("sequences", 0.0))
        for layout, attention_cost in tried:
            batch = PairCollator(layout=layout, attention_cost=attention_cost)(pairs)
            assert split.obstacle_to_layout(batch, padded) is None
            torch.testing.assert_close(logps_of(split, batch), expected, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("name", "by_sequence"),
    [
        ("llama", False),
        ("gemma2-window", False),
        ("llama", True),
        ("gpt2-learned-positions", True),
        ("mistral-window", True),
    ],
)
def test_gradients_are_those_of_the_padded_layout(name: str, by_sequence: bool, checkpointing: bool) -> None:
    model = ABLE[name]().train()
    disable_dropout(model)
    split, pairs = SplitModel(model), rows(*LENGTHS)
    if checkpointing:
        model.gradient_checkpointing_enable()
    gradients = []
    for layout in ("padded", "prefix_shared"):
        model.zero_grad()
        if by_sequence and layout == "prefix_shared":
            assert split.attend_by_sequence() is not None
            layout = "sequences"
        # Rounded up, so that there is also padding after the last sequence of the row.
        batch = PairCollator(layout=layout, attention_cost=0.0, pad_to_multiple_of=8)(pairs)
        (logps_of(split, batch) * torch.arange(10).sin()).sum().backward()
        gradients.append(
            {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
        )
    assert gradients[0].keys() == gradients[1].keys()
    for key, wanted in gradients[0].items():
        assert (gradients[1][key] - wanted).norm() <= 1e-4 * wanted.norm() + 1e-6, key


@pytest.mark.parametrize("device", ["cpu", "meta"])  # other devices handle shared key heads in a different branch
@pytest.mark.parametrize("window", [None, 4])
def test_sides_may_be_empty_and_heads_shared(device: str, window: int | None) -> None:
    lengths = torch.tensor([[0, 0, 5], [3, 0, 4], [6, 2, 0], [0, 0, 0], [5, 6, 7]])
    query = torch.randn(1, 4, 40, 8, device=device)
    key, value = (torch.randn(1, 2, 40, 8, device=device) for _ in range(2))
    found, _ = attention.attend(torch.nn.Module(), query, key, value, attention.as_mask(lengths), sliding_window=window)
    assert found.shape == (1, 40, 4, 8)
    if device == "meta":
        return
    segments, positions = ([], [])
    for number, parts in enumerate(lengths.tolist()):
        for kind, length in enumerate(parts):
            segments += [3 * number + kind] * length
            positions += range(parts[0] * (kind > 0), parts[0] * (kind > 0) + length)
    count, places = len(segments), torch.tensor(positions)
    mask = visible(torch.tensor([segments]))[0]
    if window is not None:
        mask &= places[:, None] - places < window
    scores = (query.double() @ key.double().repeat_interleave(2, 1).mT / 8**0.5)[:, :, :count, :count]
    expected = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ value.double().repeat_interleave(2, 1)[:, :, :count]
    torch.testing.assert_close(found[:, :count].double(), expected.transpose(1, 2), rtol=1e-5, atol=1e-6)
    assert not found[:, count:].any()


@pytest.mark.parametrize("name", UNABLE)
def test_a_model_that_cannot_share_is_noticed(name: str) -> None:
    split, pairs = SplitModel(UNABLE[name]()), rows((20, 13, 14), (9, 9, 9))
    batch = PairCollator(layout="prefix_shared", attention_cost=0.0)(pairs)
    assert batch["input_ids"].shape[0] == 1
    assert split.obstacle_to_layout(batch, PairCollator()(pairs))


@pytest.mark.parametrize("leak", ["segments", "sequences", "position_ids"])
def test_a_wrong_mask_or_position_is_noticed(leak: str) -> None:
    """Tests the check itself, with a deliberate leak that it must detect."""
    split, pairs = SplitModel(ABLE["llama"]()), rows((20, 13, 14), (9, 9, 9))
    batch = PairCollator(layout="sequences" if leak == "sequences" else "prefix_shared", attention_cost=0.0)(pairs)
    if leak == "position_ids":
        batch[leak] = batch[leak] + (batch["segments"] % 3 == 2)
    elif leak == "segments":
        batch[leak] = torch.zeros_like(batch[leak])
    else:
        split.attend_by_sequence()
        batch[leak] = torch.tensor([[0, 32, 13], [9, 8, 8]])  # the prompt is hidden from the rejected side
    assert "differ by" in str(split.obstacle_to_layout(batch, PairCollator()(pairs)))


# --- the collator --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("attention_cost", [0.0, 0.01, 10.0])
def test_what_is_scored_does_not_depend_on_the_layout(layout: str, attention_cost: float) -> None:
    pairs = rows(*LENGTHS)
    plain, batch = PairCollator()(pairs), PairCollator(layout=layout, attention_cost=attention_cost)(pairs)
    for name in ("labels", "cu_seqlens", "num_tokens"):
        assert torch.equal(batch[name], plain[name]), name
    real = batch["attention_mask"].bool()
    if layout == "prefix_shared":
        assert real.sum() == sum(map(sum, LENGTHS)) - 2 * len(LENGTHS), "every prompt once, and no last token"
    # The input token at each position is the token before the label in the pair's own text.
    before = [batch["input_ids"].flatten()[batch["positions"]], plain["input_ids"].flatten()[plain["positions"]]]
    assert torch.equal(*before)


def test_the_mask_lets_completions_see_their_prompt_and_themselves_only() -> None:
    segments = torch.tensor([[0, 0, 1, 2, 2, 3, 4, 5, -1]])
    seen = [[j for j in range(9) if row[j]] for row in visible(segments)[0].tolist()]
    assert seen == [[0], [0, 1], [0, 1, 2], [0, 1, 3], [0, 1, 3, 4], [5], [5, 6], [5, 7], [8]]


def test_auto_shares_long_prompts_packs_short_pairs_and_pads_where_neither_pays() -> None:
    shared = arrange([(200, 50, 50)] * 2, "auto", 1e-3)
    assert [[piece.sides for piece in row] for row in shared] == [[(0, 1)], [(0, 1)]]
    # With a prompt of one token and quadratic attention, two rows of 500 cost less than one of 1,001.
    assert all(len(row) == 1 and len(row[0].sides) == 1 for row in arrange([(1, 500, 500)], "auto", 1e-3))
    packed = arrange([(4, 60, 5), (4, 5, 50), (4, 6, 7), (3, 8, 40)], "auto", 1e-4)
    assert len(packed) < 4


PARTS = st.tuples(st.integers(0, 40), st.integers(1, 30), st.integers(1, 30))


@settings(max_examples=60, deadline=None)
@given(st.lists(PARTS, min_size=1, max_size=6), st.sampled_from(LAYOUTS), st.sampled_from([0.0, 1e-3, 1.0]))
def test_every_side_stands_once_and_auto_never_costs_more(
    lengths: list[tuple[int, int, int]], layout: str, attention_cost: float
) -> None:
    rows = arrange(lengths, layout, attention_cost)
    sides = sorted((piece.pair, side) for row in rows for piece in row for side in piece.sides)
    assert sides == [(pair, side) for pair in range(len(lengths)) for side in (0, 1)]
    for other in LAYOUTS:
        assert cost(arrange(lengths, "auto", attention_cost), attention_cost) <= cost(
            arrange(lengths, other, attention_cost), attention_cost
        )


# --- in the trainer ------------------------------------------------------------------------------------------------


def test_every_layout_gives_the_same_run(make_trainer: Any, make_model: Any) -> None:
    curves = {}
    for layout in LAYOUTS:
        trainer = make_trainer(model=make_model(), batch_layout=layout, max_steps=5, learning_rate=3e-4)
        assert trainer.data_collator.layout == layout
        trainer.train()
        curves[layout] = [
            [record[name] for record in trainer.state.log_history if name in record]
            for name in ("loss", "kl", "rewards/margins", "tokens")
        ]
    for layout in ("auto", "prefix_shared"):
        for found, expected in zip(curves[layout], curves["padded"], strict=True):
            assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    ("settings", "implementation"),
    [({}, attention.NAME), ({"torch_compile": True}, "sdpa"), ({"batch_layout": "padded"}, "sdpa")],
)
def test_rows_are_attended_to_by_sequence_where_nothing_speaks_against_it(
    make_trainer: Any, make_model: Any, settings: dict[str, Any], implementation: str
) -> None:
    trainer = make_trainer(model=make_model(), **settings)
    assert trainer.model.config._attn_implementation == implementation
    assert trainer.reference.split.model.config._attn_implementation == implementation
    assert trainer.data_collator.by_sequence == (implementation == attention.NAME)


def test_batches_are_attended_to_by_sequence_where_that_is_cheaper() -> None:
    collate = PairCollator(layout="auto", attention_cost=1e-3, by_sequence=True)
    uneven = rows((93, 163, 163), (55, 201, 201), (61, 195, 195), (29, 13, 27))
    batch = collate(uneven)
    # All tokens of a completion except the last, which is only predicted.
    assert batch["sequences"].tolist() == [[93, 162, 162], [55, 200, 200], [61, 194, 194], [29, 12, 26]]
    # No padding, and every prompt once.
    assert batch["input_ids"].shape == (1, batch["sequences"].sum())
    assert batch["attention_mask"].all()
    # For short pairs of equal length, eight attention calls per layer cost more than a mask over the whole row.
    assert "sequences" not in collate(rows(*[(8, 14, 14)] * 8))
    assert "sequences" not in replace(collate, by_sequence=False)(uneven)
    assert "sequences" not in replace(collate, layout="padded")(uneven)


def test_models_keep_their_attention_where_lengths_are_not_understood(
    make_trainer: Any, make_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        attention, "as_mask", lambda sequences: sequences.new_tensor([[[[0, int(sequences.sum()), 0]]]])
    )
    trainer = make_trainer(model=make_model())
    assert trainer.model.config._attn_implementation == "sdpa"
    assert trainer.data_collator.layout == "auto"
    assert not trainer.data_collator.by_sequence


def test_a_saved_model_does_not_ask_for_our_attention(make_trainer: Any, make_model: Any, tmp_path: Path) -> None:
    trainer = make_trainer(model=make_model())
    trainer.save_model(str(tmp_path / "saved"))
    assert attention.NAME not in (tmp_path / "saved" / "config.json").read_text(encoding="utf-8")


def test_a_model_that_cannot_share_trains_on_padded_batches(
    make_trainer: Any, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    config = transformers.BloomConfig(vocab_size=len(tokenizer), hidden_size=32, n_layer=2, n_head=4)
    trainer = make_trainer(model=transformers.BloomForCausalLM(config), max_steps=1)
    assert trainer.data_collator.layout == "padded"
    assert "BloomForCausalLM: prompts cannot be shared, " in caplog.text
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0.6931472, abs=1e-6)


def test_a_reference_that_cannot_share_makes_both_pad(make_trainer: Any, make_model: Any, tokenizer: Any) -> None:
    config = transformers.BloomConfig(vocab_size=len(tokenizer), hidden_size=32, n_layer=2, n_head=4)
    trainer = make_trainer(model=make_model(), ref_model=transformers.BloomForCausalLM(config))
    assert trainer.data_collator.layout == "padded"
