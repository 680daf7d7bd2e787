"""The collator: labels are the tokens to predict at each position, and nothing depends on token ids."""

import pytest
import torch

from dpo_trainer import PairCollator

# Token 0 is padding *and* a real token, at the start, in the middle and at the end.
ROWS = [
    {"prompt_ids": [0, 5, 6], "chosen_ids": [7, 0, 8, 0], "rejected_ids": [9]},
    {"prompt_ids": [4], "chosen_ids": [3, 0], "rejected_ids": [2, 2, 0]},
]


def test_each_position_predicts_the_next_completion_token() -> None:
    batch = PairCollator(pad_token_id=0)(ROWS)
    assert batch["labels"].tolist() == [7, 0, 8, 0, 3, 0, 9, 2, 2, 0]
    assert batch["cu_seqlens"].tolist() == [0, 4, 6, 7, 10]
    # The input token at each position is the token before the label in the text.
    assert batch["input_ids"].flatten()[batch["positions"]].tolist() == [6, 7, 0, 8, 4, 3, 6, 4, 2, 2]


@pytest.mark.parametrize("layout", ["padded", "prefix_shared", "sequences"])
def test_a_completions_last_token_is_predicted_and_not_read(layout: str) -> None:
    batch = PairCollator(layout=layout)(ROWS)
    text = 2 * (3 + 1) + 4 + 2 + 1 + 3
    assert batch["num_tokens"] == text
    read = text - 4 if layout == "padded" else text - 4 - (3 + 1)
    assert batch["attention_mask"].sum() == read
    assert batch["labels"].tolist() == [7, 0, 8, 0, 3, 0, 9, 2, 2, 0]


def test_a_sequence_of_one_token_is_read_all_the_same() -> None:
    """A row without tokens would make attention return NaN."""
    batch = PairCollator()([{"prompt_ids": [], "chosen_ids": [3], "rejected_ids": [5]}])
    assert batch["input_ids"].tolist() == [[3], [5]]
    assert batch["labels"].numel() == 0


def test_chosen_rows_come_first_and_the_mask_follows_lengths() -> None:
    batch = PairCollator(pad_token_id=0)(ROWS)
    assert batch["input_ids"].tolist() == [
        [0, 5, 6, 7, 0, 8],
        [4, 3, 0, 0, 0, 0],
        [0, 5, 6, 0, 0, 0],
        [4, 2, 2, 0, 0, 0],
    ]
    assert batch["attention_mask"].sum(1).tolist() == [6, 2, 3, 3]


@pytest.mark.parametrize("pad", [0, 1, 9])
def test_the_padding_id_changes_nothing_that_counts(pad: int) -> None:
    plain, other = PairCollator(pad_token_id=0)(ROWS), PairCollator(pad_token_id=pad)(ROWS)
    for name in ("attention_mask", "positions", "labels", "cu_seqlens"):
        assert torch.equal(plain[name], other[name]), name
    real = plain["attention_mask"].bool()
    assert torch.equal(plain["input_ids"][real], other["input_ids"][real])


def test_padding_to_a_multiple_only_adds_columns() -> None:
    plain, batch = PairCollator(pad_token_id=0)(ROWS), PairCollator(pad_token_id=0, pad_to_multiple_of=8)(ROWS)
    assert batch["input_ids"].shape == (4, 8)
    assert torch.equal(batch["input_ids"][:, :6], plain["input_ids"])
    assert not batch["attention_mask"][:, 6:].any()
    assert torch.equal(batch["labels"], plain["labels"])
    # The same positions in rows that are two tokens longer.
    assert torch.equal(batch["positions"], plain["positions"] + 2 * plain["positions"].div(6, rounding_mode="floor"))


def test_without_a_prompt_the_first_token_is_not_scored() -> None:
    batch = PairCollator()([{"prompt_ids": [], "chosen_ids": [3, 4], "rejected_ids": [5, 6, 7]}])
    assert batch["labels"].tolist() == [4, 6, 7]
    assert batch["cu_seqlens"].tolist() == [0, 1, 3]


def test_weights_and_reference_columns_are_carried_in_pair_order() -> None:
    rows = [
        {**row, "weight": 0.5 + i, "ref_chosen_logps": -1.0 - i, "ref_rejected_logps": -8.0 - i}
        for i, row in enumerate(ROWS)
    ]
    batch = PairCollator()(rows)
    assert batch["pair_weights"].tolist() == [0.5, 1.5]
    assert batch["ref_logps"].tolist() == [-1.0, -2.0, -8.0, -9.0]
    assert "pair_weights" not in PairCollator()(ROWS)
    assert "ref_logps" not in PairCollator()(ROWS)
