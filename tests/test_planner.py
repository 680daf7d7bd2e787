"""The planner chooses the right strategy, its chunks cover every token once, and its budgets hold."""

import dataclasses
import json

import pytest

from dpo_kernels.linear.gpu import CPU, Device, fuse, row_stride
from dpo_kernels.linear.planner import (
    Head,
    budget_of,
    choose_strategy,
    default_budget,
    parse_budget,
    plan_pairs,
    plan_tokens,
    step_budget,
)

HEAD = Head(hidden_size=64, vocab=1000, item_size=4, projects_reference=True)


def with_(**changes):
    return dataclasses.replace(HEAD, **changes)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((1, 1, True, False, False), "whole_pairs"),
        ((1, 1, False, False, False), "two_pass"),
        ((1, 1, True, True, False), "two_pass"),
        ((1, 1, True, False, True), "filtered"),
        ((1, 1, True, True, True), "filtered"),
        ((0, 1, True, False, False), "whole_pairs"),
        ((1, 0, True, False, False), "frozen_head"),
        ((1, 0, False, True, False), "frozen_head"),
        ((1, 0, True, False, True), "frozen_head"),
        ((0, 0, True, False, False), "forward"),
        ((0, 0, False, True, True), "forward"),
    ],
)
def test_the_strategy_follows_from_what_needs_gradients_and_when_they_are_known(given, expected):
    hidden, weight, scalar, couples, filtered = map(bool, given)
    strategy, reason = choose_strategy(
        with_(needs_hidden=hidden, needs_weight=weight), scalar_loss=scalar, couples_pairs=couples, filtered=filtered
    )
    assert strategy == expected
    assert reason


@pytest.mark.parametrize(("scalar", "couples"), [(True, False), (True, True), (False, False)])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("filtered", [False, True])
def test_a_differentiated_kl_keeps_both_models_logits_together(scalar, couples, frozen, filtered):
    head = with_(kl=True, kl_gradient=True, needs_weight=not frozen)
    strategy, reason = choose_strategy(head, scalar_loss=scalar, couples_pairs=couples, filtered=filtered)
    assert strategy == ("whole_pairs" if scalar and not couples else "two_pass")
    assert "KL" in reason
    unit, rows = head.product * 100, head.row_bytes * 30
    assert plan_tokens(head, "two_pass", 100, rows).flops == (6 - frozen) * unit  # both models twice, then dH, dW
    assert plan_pairs(head, [50, 50], rows).flops == (4 - frozen) * unit + 2 * head.product * 70


# Pairs that fit together, alone, exactly, or not at all, including empty sequences and empty pairs.
COUNTS = [
    [],
    [0, 0],
    [3, 0],
    [5, 7, 5, 3],
    [10, 0, 3, 10, 0, 2],
    [100, 1, 1, 1, 100, 1, 1, 1],
    [1] * 40,
    [33, 20, 9, 50, 33, 21, 10, 2],
]


@pytest.mark.parametrize("rows", [1, 2, 7, 20, 64, 1000])
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_pair_plans_cover_each_token_once_within_the_budget(counts, rows):
    budget = HEAD.row_bytes * rows
    plan = plan_pairs(HEAD, counts, budget)
    pairs = len(counts) // 2
    assert [p for group in plan.groups for p in range(group.first, group.last)] == list(range(pairs))
    spans = [chunk for group in plan.groups for chunk in group.chunks]
    assert [t for begin, end in spans for t in range(begin, end)] == list(range(sum(counts)))
    for group in plan.groups:
        tokens = sum(counts[p] + counts[pairs + p] for p in range(group.first, group.last))
        assert group.bounds[-1] - group.bounds[0] == tokens
        # Several chunks only if a single pair exceeds the budget. Then the last chunk, which is projected once, is full.
        if len(group.chunks) > 1:
            assert group.last - group.first == 1
            assert group.chunks[-1][1] - group.chunks[-1][0] == rows
    assert plan.rows <= rows
    assert plan.bytes <= budget
    once = HEAD.product * sum(counts) * 4
    again = sum(chunk[1] - chunk[0] for group in plan.groups for chunk in group.chunks[:-1])
    assert plan.flops == once + HEAD.product * again


@pytest.mark.parametrize("rows", [1, 3, 50, 1000])
@pytest.mark.parametrize("tokens", [0, 1, 49, 50, 51, 1001])
@pytest.mark.parametrize("strategy", ["forward", "frozen_head", "filtered", "two_pass"])
def test_token_plans_cover_each_token_once_within_the_budget(strategy, tokens, rows):
    budget = HEAD.row_bytes * rows + 5
    plan = plan_tokens(HEAD, strategy, tokens, budget)
    (group,) = plan.groups
    sizes = [end - begin for begin, end in group.chunks]
    assert sum(sizes) == tokens
    assert max(sizes) - min(sizes) <= 1
    assert len(sizes) == max(1, -(-tokens // rows))
    assert plan.bytes <= budget
    kept = strategy == "two_pass" and tokens <= rows
    assert plan.strategy == ("kept_logits" if kept else strategy)


def test_logits_are_not_kept_where_nothing_of_unknown_size_may_be_saved():
    assert plan_tokens(HEAD, "two_pass", 10, 2**30, may_keep=False).strategy == "two_pass"


def test_flops_follow_the_strategy():
    head = with_(projects_reference=False)
    unit = head.product * 100
    enough, little = head.row_bytes * 100, head.row_bytes * 10
    assert plan_tokens(head, "forward", 100, enough).flops == unit
    assert plan_tokens(head, "frozen_head", 100, enough).flops == 2 * unit
    assert plan_tokens(head, "filtered", 100, enough).flops == unit
    assert plan_tokens(head, "two_pass", 100, enough).flops == 3 * unit
    assert plan_tokens(head, "two_pass", 100, little).flops == 4 * unit
    assert plan_pairs(head, [50, 50], enough).flops == 3 * unit
    assert plan_pairs(head, [50, 50], little).flops == 3 * unit + head.product * 90
    assert plan_pairs(HEAD, [50, 50], HEAD.row_bytes * 100).flops == 4 * unit


def test_a_kl_doubles_the_logits_in_memory_only_beside_a_projected_reference():
    assert with_(kl=True).row_bytes - HEAD.row_bytes == row_stride(HEAD.vocab, HEAD.item_size) * HEAD.item_size
    assert with_(kl=True, projects_reference=False).row_bytes == with_(projects_reference=False).row_bytes


def test_a_budget_below_one_token_is_an_error_that_names_the_need():
    with pytest.raises(ValueError, match=f"at least {HEAD.row_bytes} bytes"):
        plan_tokens(HEAD, "forward", 5, HEAD.row_bytes - 1)
    with pytest.raises(ValueError, match="vocabulary of 1000"):
        plan_pairs(HEAD, [1, 1], 1)


@pytest.mark.parametrize(
    ("given", "expected"),
    [(12345, 12345), ("256MB", 256 * 2**20), ("1.5 GB", 3 * 2**29), ("64mib", 64 * 2**20), ("100", 100), ("2kb", 2048)],
)
def test_budgets_are_bytes_or_texts(given, expected):
    assert parse_budget(given, 1, 1) == expected


@pytest.mark.parametrize("given", ["a lot", "5 parsecs", "", "-3MB", 0, -1, "0"])
def test_a_budget_that_makes_no_sense_is_a_value_error(given):
    with pytest.raises(ValueError, match="memory_budget"):
        parse_budget(given, 1, 1)


@pytest.mark.parametrize("given", [1.5, True])
def test_a_budget_of_another_type_is_a_type_error(given):
    with pytest.raises(TypeError, match="memory_budget"):
        parse_budget(given, 1, 1)


def test_the_default_budget_is_half_a_head_gradient_and_at_least_64_mib():
    assert default_budget(576, 49152) == 64 * 2**20
    assert default_budget(4096, 128256) == 2 * 4096 * 128256
    assert parse_budget(None, 4096, 128256) == 2 * 4096 * 128256


def test_a_trainers_step_takes_more_where_the_default_is_lean():
    assert step_budget(576, 49152) == 256 * 2**20
    assert step_budget(4096, 128256) == default_budget(4096, 128256)
    # TRL's head on SmolLM2: the logits of 1,250 scored tokens are kept for the backward instead of being computed again.
    head = Head(hidden_size=576, vocab=49152, item_size=4)
    plans = [plan_tokens(head, "two_pass", 1250, budget(576, 49152)) for budget in (default_budget, step_budget)]
    assert [plan.strategy for plan in plans] == ["two_pass", "kept_logits"]
    assert plans[0].flops - plans[1].flops == 1250 * head.product


def test_chunks_without_a_head_gradient_beside_them_default_to_its_room():
    head = with_(hidden_size=576, vocab=49152, needs_weight=False)
    gradient = 4 * 576 * 49152
    for strategy in ("whole_pairs", "kept_logits", "two_pass"):
        assert budget_of(None, head, strategy) == 64 * 2**20 > gradient // 2
    for strategy in ("forward", "frozen_head", "filtered"):
        assert budget_of(None, head, strategy) == 512 * head.row_bytes < gradient
        # At most a small head's gradient and at least half of a large head's. A requested budget is used as it is.
        assert budget_of(None, with_(hidden_size=200, vocab=150_000), strategy) == 4 * 200 * 150_000
        assert budget_of(None, with_(hidden_size=4096, vocab=128256), strategy) == 2 * 4096 * 128256
        assert budget_of("64MB", head, strategy) == 64 * 2**20


@pytest.mark.parametrize("item_size", [2, 4, 8])
@pytest.mark.parametrize("vocab", [1, 31, 32, 1000, 32000, 49152, 50257, 128256, 262144])
def test_rows_of_logits_never_share_a_set_of_the_cache(vocab, item_size):
    stride = row_stride(vocab, item_size)
    lines, rest = divmod(stride * item_size, 64)
    assert rest == 0
    assert 0 <= (stride - vocab) * item_size < 2 * 64
    # A first-level cache has 64 sets of 64-byte lines, so 64 consecutive rows use each set once.
    assert len({row * lines % 64 for row in range(64)}) == 64


def test_a_plan_explains_itself():
    strategy, reason = choose_strategy(HEAD, scalar_loss=True, couples_pairs=False, filtered=False)
    text = plan_pairs(HEAD, [50, 50], HEAD.row_bytes * 60, reason).describe()
    for word in (strategy, "100 scored tokens", "2 chunks", "40 tokens", "projected twice", "MiB", "GFLOP"):
        assert word in text


# --- GPUs -----------------------------------------------------------------------------------------------------------

#: Bytes that torch reports for cards that are sold as 80 GB and 24 GB.
CARD, SMALL_CARD = 85_000_000_000, 25_300_000_000
LARGE = Head(hidden_size=4096, vocab=128256, item_size=2, device_type="cuda")
STRATEGIES = ("forward", "whole_pairs", "two_pass", "frozen_head")


def test_a_card_lends_a_share_of_its_memory_and_no_less_than_a_cpu():
    assert default_budget(4096, 128256, memory=CARD) == int(0.03 * CARD) > 2 * 2**30
    assert step_budget(576, 49152, CARD) == budget_of(None, LARGE, "two_pass", CARD) == int(0.03 * CARD)
    assert budget_of("64MB", LARGE, "two_pass", CARD) == 64 * 2**20
    # On a small card, half of a large head's gradient exceeds the card's share; on a tiny card, 256 MiB exceeds it.
    assert default_budget(4096, 128256, memory=SMALL_CARD) == default_budget(4096, 128256) > 0.03 * SMALL_CARD
    assert step_budget(576, 49152, 2 * 2**30) == 256 * 2**20


def test_a_step_of_8192_scored_tokens_projects_once_on_an_80_gb_card():
    """H = 4,096, V = 128k, TRL's head. With half of the head's gradient (1 GiB) as budget, it would project twice."""
    plans = [plan_tokens(LARGE, "two_pass", 8192, step_budget(4096, 128256, memory)) for memory in (0, CARD)]
    assert [plan.strategy for plan in plans] == ["two_pass", "kept_logits"]
    assert plans[1].flops == 3 * 8192 * LARGE.product == plans[0].flops * 3 / 4
    assert f"{plans[1].budget / 2**20:.1f} MiB" in plans[1].describe()
    assert plan_pairs(LARGE, [512] * 16, step_budget(4096, 128256, CARD)).groups[0].chunks == [(0, 8192)]


@pytest.mark.parametrize("tokens", [9000, 16384, 40000, 100_000])
def test_a_cards_chunks_are_of_4096_rows_or_more(tokens):
    """Each chunk reads and writes the float32 dW once. For 4,096 rows this takes a fourteenth of the time of the products."""
    budget = budget_of(None, LARGE, "whole_pairs", CARD)
    counts = [500] * (tokens // 1000 * 2)
    plans = plan_tokens(LARGE, "two_pass", tokens, budget), plan_pairs(LARGE, counts, budget)
    for plan in plans:
        sizes = [end - begin for group in plan.groups for begin, end in group.chunks]
        assert min(sizes[:-1], default=sizes[-1]) >= 4096
    # Pairs are not divided, so the last group takes the rest.
    assert min(end - begin for group in plans[0].groups for begin, end in group.chunks) >= 4096


@pytest.mark.parametrize("vocab", [1, 63, 64, 65, 32000, 50257, 128256, 151669])
def test_rows_of_a_gpus_logits_begin_at_128_bytes(vocab):
    stride = row_stride(vocab, 2, "cuda")
    assert stride % 64 == 0
    assert 0 <= stride - vocab < 64
    head = dataclasses.replace(LARGE, vocab=vocab)
    assert head.row_bytes - dataclasses.replace(head, vocab=64).row_bytes == 2 * (stride - 64)


def test_the_docs_show_the_measured_blocks():
    from benchmarks import live_blocks

    page = live_blocks.PAGE.read_text()
    assert live_blocks.page_with(json.loads(live_blocks.RESULTS.read_text()), page) == page


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("eps", [0.0, 2.0**-12])
@pytest.mark.parametrize("kl", [False, True])
@pytest.mark.parametrize("device", [CPU, Device("cuda", CARD), Device("cuda", CARD, True), Device("cpu", fused=True)])
def test_the_block_filter_serves_where_it_is_asked_for_and_can(strategy, eps, kl, device):
    fused, why = fuse(dataclasses.replace(LARGE, kl=kl), strategy, device, eps)
    trains_the_head = strategy in ("whole_pairs", "two_pass")
    assert fused == (trains_the_head and device.fused and not kl and eps > 0)
    if trains_the_head and device != CPU:
        assert why.startswith("blocks of the gradient" if fused else "the gradient is exact")
    else:
        assert why == ""


@pytest.mark.parametrize("rows", [1, 5, 127, 128, 1000])
def test_fused_chunks_hold_the_budget_in_whole_blocks(rows):
    head = dataclasses.replace(LARGE, fused=True)
    budget = head.row_bytes * rows + 5
    plan = plan_tokens(head, "two_pass", 10_000, budget)
    assert plan.strategy == "two_pass"  # fused kernels do not store logits
    assert plan.bytes <= budget
    assert plan.rows <= (rows if rows <= 128 else rows - rows % 128)
