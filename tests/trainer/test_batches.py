"""Batches: every pair once per epoch, steps independent of the number of processes, budgets, exact means, bitwise resume."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import TrainingArguments

from dpo_trainer import ConfigError, DPOConfig, DPOTrainer, PairCollator
from dpo_trainer.batch.layout import LAYOUTS
from dpo_trainer.batch.sampler import STRATEGIES, Batching, PairBatchSampler, PairStream, divided

from .test_trainer import curve

Make = Callable[..., DPOTrainer]

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=60)
# Budgets of 80 tokens or more hold every pair of LENGTHS.
RULES = st.builds(
    Batching,
    pairs=st.integers(1, 7),
    max_tokens=st.none() | st.integers(80, 400),
    strategy=st.sampled_from(STRATEGIES),
    accumulation=st.integers(1, 3),
    num_processes=st.integers(1, 5),
    seed=st.integers(0, 2**32 - 1),
)


#: Few steps per pool, so that an epoch of these lengths has several pools.
small_pools = patch("dpo_trainer.batch.sampler.POOL", 2)


def epoch_of(lengths: list[int], rule: Batching, epoch: int = 0, **options: Any) -> list[list[list[int]]]:
    """The batches of an epoch, for every process."""
    found = []
    for index in range(rule.num_processes):
        sampler = PairBatchSampler(lengths, rule, process_index=index, **options)
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert len(sampler) == len(batches)
        found.append(batches)
    return found


def steps_of(lengths: list[int], rule: Batching, epoch: int = 0) -> list[set[int]]:
    """The pairs of every optimizer step, over all processes and accumulated batches."""
    processes = epoch_of(lengths, rule, epoch)
    starts = range(0, len(processes[0]), rule.accumulation)
    return [
        {index for batches in processes for batch in batches[start : start + rule.accumulation] for index in batch}
        for start in starts
    ]


# --- the sampler ---------------------------------------------------------------------------------------------------


@small_pools
@given(LENGTHS, RULES, st.integers(0, 3))
def test_every_pair_is_seen_once_an_epoch_and_every_process_gets_as_many_batches(
    lengths: list[int], rule: Batching, epoch: int
) -> None:
    processes = epoch_of(lengths, rule, epoch)
    assert sorted(i for batches in processes for batch in batches for i in batch) == list(range(len(lengths)))
    assert len({len(batches) for batches in processes}) == 1
    assert len(processes[0]) == len(epoch_of(lengths, rule, 0)[0]), "every epoch has as many steps"
    for batches in processes:
        for batch in batches:
            if rule.max_tokens is None:
                assert len(batch) <= rule.pairs
            elif batch:
                assert 2 * len(batch) * max(lengths[i] for i in batch) <= rule.max_tokens


@small_pools
@given(LENGTHS, RULES, st.integers(0, 2))
def test_drop_last_leaves_out_less_than_a_step_and_fills_every_batch(
    lengths: list[int], rule: Batching, epoch: int
) -> None:
    processes = epoch_of(lengths, rule, epoch, drop_last=True)
    seen = [i for batches in processes for batch in batches for i in batch]
    assert len(set(seen)) == len(seen)
    assert len({len(batches) for batches in processes}) == 1
    if rule.max_tokens is None:
        assert all(len(batch) == rule.pairs for batches in processes for batch in batches)
        assert len(lengths) - len(seen) < rule.pairs * rule.num_processes
    else:
        assert all(batch for batches in processes for batch in batches)


@small_pools
@given(
    LENGTHS,
    st.sampled_from(STRATEGIES),
    st.none() | st.integers(80, 400),
    st.integers(1, 3),
    st.integers(0, 2),
    st.booleans(),
)
def test_a_step_holds_the_same_pairs_however_it_is_divided(
    lengths: list[int], strategy: str, max_tokens: int | None, pairs: int, epoch: int, larger: bool
) -> None:
    """Six batches per step on 1, 2, 3 or 6 processes, or without a token budget one batch with six times as many pairs."""
    divisions = [(pairs, 6, 1), (pairs, 3, 2), (pairs, 2, 3), (pairs, 1, 6)]
    if max_tokens is None and larger:
        divisions += [(6 * pairs, 1, 1), (2 * pairs, 1, 3)]
    found = [
        steps_of(lengths, Batching(size, max_tokens, None, strategy, accumulation, processes, seed=7), epoch)
        for size, accumulation, processes in divisions
    ]
    assert all(steps == found[0] for steps in found)


def test_orders_are_those_of_the_seed_and_the_epoch() -> None:
    lengths = [1 + i % 37 for i in range(200)]
    for strategy in ("random", "group_by_length"):
        rule = Batching(4, strategy=strategy, seed=3)
        assert epoch_of(lengths, rule, 2) == epoch_of(lengths, rule, 2)
        assert epoch_of(lengths, rule, 2) != epoch_of(lengths, rule, 1)
        assert epoch_of(lengths, rule, 2) != epoch_of(lengths, Batching(4, strategy=strategy, seed=4), 2)
        partners = [{frozenset(batch) for batch in epoch_of(lengths * 5, rule, epoch)[0]} for epoch in range(2)]
        assert len(partners[0] & partners[1]) < 5, "pairs meet others in the next epoch"
    rule = Batching(4, strategy="sequential")
    assert epoch_of(lengths, rule, 0) == epoch_of(lengths, rule, 5) == [[[*range(i, i + 4)] for i in range(0, 200, 4)]]
    budget = Batching(4, max_tokens=300, seed=3)
    first, second = epoch_of(lengths, budget, 1)[0], epoch_of(lengths, budget, 2)[0]
    assert first != second
    assert {frozenset(batch) for batch in first} == {frozenset(batch) for batch in second}


def test_groups_of_similar_length_waste_little_and_the_longest_come_first() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = (torch.rand(2000, generator=generator).mul(5).exp().int() + 5).tolist()  # 5 to 153, most of them short

    def padded(rule: Batching) -> float:
        return sum(len(batch) * max(lengths[i] for i in batch) for batch in epoch_of(lengths, rule, 1)[0]) / sum(
            lengths
        )

    assert padded(Batching(8, strategy="random")) > 1.8
    assert padded(Batching(8)) < 1.1
    assert padded(Batching(8, max_tokens=2000)) < 1.1
    for rule in (Batching(8), Batching(8, max_tokens=2000)):
        first, second = epoch_of(lengths, rule, 0)[0][0], epoch_of(lengths, rule, 1)[0][0]
        assert max(lengths[i] for i in first) == max(lengths)
        assert max(lengths[i] for i in second) < max(lengths)
    # Steps are shuffled, so lengths do not decrease during the epoch.
    heads = [lengths[batch[0]] for batch in epoch_of(lengths, Batching(8), 1)[0]]
    assert heads != sorted(heads, reverse=True)


@given(st.lists(st.lists(st.integers(), max_size=6), min_size=1, max_size=9), st.integers(1, 9))
def test_dividing_keeps_all_pairs_in_order(step: list[list[int]], multiple: int) -> None:
    found = divided(step, multiple)
    assert len(found) % multiple == 0
    assert len(found) - len(step) < multiple
    assert [i for batch in found for i in batch] == [i for batch in step for i in batch]


def test_fewer_pairs_than_processes_leave_some_without() -> None:
    assert sorted(epoch_of([3, 4], Batching(4, num_processes=5))) == [[[]], [[]], [[]], [[0]], [[1]]]
    assert epoch_of([], Batching(4, num_processes=2)) == [[], []]


def test_a_pair_beyond_the_budget_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"max_tokens: 50 is less than the 60 tokens of a single pair .*2 x 30"):
        PairBatchSampler([4, 30, 7], Batching(1, max_tokens=50))


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=20))
def test_no_layout_exceeds_the_budget(shapes: list[tuple[int, int, int]]) -> None:
    rows = [{"prompt_ids": [1] * p, "chosen_ids": [2] * c, "rejected_ids": [3] * r} for p, c, r in shapes]
    for multiple in (1, 8):
        lengths = [p + max(c, r) for p, c, r in shapes]
        for batch in epoch_of(lengths, Batching(1, max_tokens=100, pad_to_multiple_of=multiple))[0]:
            for layout in LAYOUTS:
                collated = PairCollator(layout=layout, pad_to_multiple_of=multiple)([rows[i] for i in batch])
                assert collated["input_ids"].numel() <= 100 or not max(lengths[i] for i in batch)


# --- streams -------------------------------------------------------------------------------------------------------


def stream_of(count: int, rule: Batching) -> list[Any]:
    def rows(number: int) -> Any:
        return ({"row": i, "pass": number, "length": 1 + i * 7 % 31} for i in range(count))

    return [iter(PairStream(rows, rule, process_index=index)) for index in range(rule.num_processes)]


@pytest.mark.parametrize("max_tokens", [None, 90])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_stream_repeats_and_loses_nothing(strategy: str, max_tokens: int | None) -> None:
    """With three processes and two batches each, over 5 passes, no row is lost or repeated and all steps are full."""
    rule = Batching(2, max_tokens, strategy=strategy, accumulation=2, num_processes=3)
    processes = stream_of(700, rule)
    wanted = {(number, row) for number in range(5) for row in range(700)}
    seen: list[tuple[int, int]] = []
    while not wanted <= set(seen):
        assert len(seen) < 20 * 700
        for _ in range(100):
            step = [next(process) for _ in range(2) for process in processes]
            assert all(step)
            if max_tokens is None:
                assert [len(batch) for batch in step] == [2] * 6
            else:
                assert all(2 * len(batch) * max(row["length"] for row in batch) <= max_tokens for batch in step)
            seen += [(row["pass"], row["row"]) for batch in step for row in batch]
    assert len(set(seen)) == len(seen)
    assert (seen == sorted(seen)) == (strategy == "sequential")


def test_a_step_of_a_stream_is_the_same_on_any_number_of_processes() -> None:
    found = []
    for accumulation, processes in ((6, 1), (3, 2), (1, 6)):
        streams = stream_of(333, Batching(2, accumulation=accumulation, num_processes=processes, seed=1))
        found.append(
            [
                {(row["pass"], row["row"]) for s in streams for _ in range(accumulation) for row in next(s)}
                for _ in range(100)
            ]
        )
    assert found[0] == found[1] == found[2]


# --- training ------------------------------------------------------------------------------------------------------

COMPARED = ("loss", "rewards/margins", "entropy", "kl")


def test_our_strategies_are_transformers_except_what_has_no_meaning_here(tmp_path: Path) -> None:
    known = {item.name: item for item in TrainingArguments.__dataclass_fields__.values()}["train_sampling_strategy"]
    assert set(STRATEGIES) <= set(known.metadata["choices"])
    with pytest.raises(
        ConfigError, match=r"unknown 'by_length' \(did you mean 'group_by_length'\?\); known are random"
    ):
        DPOConfig(output_dir=str(tmp_path), train_sampling_strategy="by_length")
    with pytest.raises(ConfigError, match="max_tokens: must be at least 4"):
        DPOConfig(output_dir=str(tmp_path), max_tokens=3)


def test_an_empty_batch_has_no_loss_no_gradient_and_no_say(make_trainer: Make) -> None:
    """The batch of a process without pairs in a step. Every parameter must get a gradient, otherwise DDP would wait."""
    for loss_path in ("linear", "logits"):
        trainer = make_trainer(loss_path=loss_path, statistics=["entropy", "kl", "accuracy", "mean_logits"])
        trainer.model.train()
        loss = trainer.compute_loss(
            trainer.model, trainer._prepare_inputs(trainer.data_collator([])), num_items_in_batch=torch.tensor(5.0)
        )
        loss.backward()
        assert loss.item() == 0
        for name, parameter in trainer.model.named_parameters():
            assert parameter.grad is not None, name
            assert not parameter.grad.any(), name
        full = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[i] for i in range(3)]))
        trainer.compute_loss(trainer.model, full)
        with_empty = trainer._drain("train")
        trainer.compute_loss(trainer.model, full)
        assert trainer._drain("train") == with_empty


def test_a_token_budget_gives_the_exact_mean_over_pairs(make_trainer: Make, make_model: Any, pairs: Any) -> None:
    """Accumulating weighted pairs in batches of several sizes gives the gradient of one batch of all pairs."""
    rows = [{**row, "weight": 0.2 + index % 5} for index, row in enumerate(pairs(20, seed=6))]
    gradients: list[dict[str, torch.Tensor]] = []
    for settings in (
        {"max_tokens": 80, "gradient_accumulation_steps": 100, "train_sampling_strategy": "random"},
        {"per_device_train_batch_size": 20},
    ):
        trainer = make_trainer(
            model=make_model(),
            ref_model=make_model(seed=5),  # another model, because otherwise every pair would have the same coefficient
            train_dataset=rows,
            num_train_epochs=1,
            max_grad_norm=0.0,
            **settings,
        )
        sizes = [len(batch) for batch in trainer.get_train_dataloader().batch_sampler]
        assert sum(sizes) == 20
        assert len(set(sizes)) > 2 or "max_tokens" not in settings
        trainer.add_callback(grads_to(gradients, trainer))
        trainer.train()
    assert len(gradients) == 2, "one step each"
    for name, whole in gradients[1].items():
        error = (gradients[0][name] - whole).norm() / whole.norm()
        assert error < 1e-5, (name, error)


def grads_to(found: list[dict[str, torch.Tensor]], trainer: DPOTrainer) -> Any:
    from transformers import TrainerCallback

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            found.append({name: value.grad.clone() for name, value in trainer.model.named_parameters()})

    return Keep()


@pytest.mark.parametrize("max_tokens", [None, 100], ids=["pairs", "tokens"])
def test_resuming_finds_its_place(
    max_tokens: int | None, make_trainer: Make, make_model: Any, tmp_path: Path, pairs: Any
) -> None:
    """Resumes in the first epoch, right after it, and in the second, with accumulation and a last step of another size."""
    settings = {
        "train_dataset": pairs(27),
        "gradient_accumulation_steps": 2,
        "max_tokens": max_tokens,
        "num_train_epochs": 2,
        "save_strategy": "steps",
        "save_steps": 1,
    }
    whole = make_trainer(model=make_model(), **settings)
    steps = -(-len(whole.get_train_dataloader()) // 2)
    whole.train()
    assert whole.state.global_step == 2 * steps
    for stop in (steps - 2, steps, steps + 1):
        resumed = make_trainer(model=make_model(), **{**settings, "save_strategy": "no"})
        resumed.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{stop}"))
        assert resumed.state.global_step == 2 * steps
        for name in COMPARED:
            assert curve(resumed, name) == curve(whole, name), (stop, name)


def test_evaluation_keeps_rows_in_order(make_trainer: Make, pairs: Any) -> None:
    trainer = make_trainer(eval_dataset=pairs(7, seed=1), max_tokens=200, per_device_eval_batch_size=3)
    batches = list(trainer.get_eval_dataloader())
    assert [(len(batch["cu_seqlens"]) - 1) // 2 for batch in batches] == [3, 3, 1]
    labels = [label for batch in batches for label in batch["labels"].tolist()]
    collate, rows = trainer.data_collator, list(trainer.eval_dataset)
    assert labels == [x for start in (0, 3, 6) for x in collate(rows[start : start + 3])["labels"].tolist()]


def test_workers_bring_the_same_batches(make_trainer: Make, pairs: Any) -> None:
    found = []
    for workers in (0, 2):
        loader = make_trainer(train_dataset=pairs(11), dataloader_num_workers=workers).get_train_dataloader()
        found.append([batch["labels"].tolist() for batch in loader])
    assert len(found[0]) == 3
    assert found[0] == found[1]
