"""The fused Triton kernels of the LM head equal the float64 reference: log-probabilities, statistics, filtered gradient.

Without a GPU they run in Triton's interpreter. On a GPU the tests use the interpreter's tile sizes too: 16 tokens by 32
entries, segments of 64 entries and 32 columns of H. The problem sizes are around these boundaries. One test uses the
compiled sizes. With logits of standard deviation 4, some blocks of the softmax are empty.
"""

import logging
import math
import sys

import pytest
import torch
import torch.nn.functional as F
from test_linear import BY_NAME, Case, check_rows, make_inputs, textbook
from test_the_tests import FAULTS

from dpo_kernels import backends, linear_dpo_loss, linear_logps, reference, use_backend

from checks import BUDGET, check_gradient

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
triton_backend = backends.load("triton", DEVICE)
grad = triton_backend.linear_grad
launch = sys.modules["dpo_kernels.backends.triton.launch"]

forward_module = sys.modules["dpo_kernels.backends.triton.linear_logps"]


def cut(monkeypatch, narrow, tile, segment, width):
    """Set the tiles of 16-bit types and of float32, the entries of a segment and the columns of a product."""
    for name, value in (("_FLOAT32", narrow), ("_TILE", tile), ("_WIDE", tile)):
        monkeypatch.setattr(launch, name, value)
    monkeypatch.setattr(forward_module, "SEGMENT", segment)
    monkeypatch.setattr(grad, "WIDTH", width)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Use the interpreter's tile sizes, on a GPU too."""
    small = launch.Tile(16, 32, 16, 4, 1)
    cut(monkeypatch, small, small, 64, 32)


# numpy, which the interpreter uses, warns about the NaN that the tests make the kernels produce.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

STATISTICS = frozenset(("entropy", "log_sum_sq", "accuracy", "mean_logits"))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PLAIN = {"logit_scale": 1.0, "logit_softcap": 0.0}


def make(tokens, hidden_size, vocab, dtype=torch.float32, seed=0, spread=4.0):
    """(hidden [N, H], weight [V, H], bias [V], labels [N], upstream [N]); labels are likely, the last token has no gradient."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, hidden_size, generator=g, dtype=torch.float64)
    weight = torch.randn(vocab, hidden_size, generator=g, dtype=torch.float64) * spread / hidden_size**0.5
    bias = torch.randn(vocab, generator=g, dtype=torch.float64)
    probabilities = F.linear(hidden, weight, bias).softmax(-1)
    labels = torch.multinomial(probabilities, 1, generator=g).squeeze(-1) if tokens else torch.zeros(0).long()
    upstream = torch.randn(tokens, generator=g, dtype=torch.float64)
    upstream[2:3] = 0.0
    tensors = [t.to(dtype).to(DEVICE) for t in (hidden, weight, bias)]
    return (*tensors, labels.to(DEVICE), upstream.to(DEVICE))


def forward(hidden, weight, bias, labels, names=STATISTICS, **options):
    return triton_backend.linear_logps(hidden, weight, bias, labels, names, **(PLAIN | options))


def truth_of(hidden, weight, bias, labels, dtype, logit_scale=1.0, logit_softcap=0.0):
    """Every statistic by its definition, from logits in `dtype`."""
    logits = F.linear(hidden.to(dtype), weight.to(dtype), bias.to(dtype))
    found = reference.token_statistics(logits, labels, logit_scale=logit_scale, logit_softcap=logit_softcap)
    return found, reference.transform_logits(logits, logit_scale, logit_softcap)


def check_forward(found, hidden, weight, bias, labels, **settings):
    """Compare with float64. The error may be at most BUDGET times eager float32's, or the rounding of one logit."""
    truth, z = truth_of(hidden, weight, bias, labels, torch.float64, **settings)
    eager, _ = truth_of(hidden, weight, bias, labels, torch.float32, **settings)
    unit = 2.0 ** (math.frexp(float(z.abs().max()))[1] - 24)
    for name, values in found.items():
        error = float((values - truth[name]).abs().max())
        allowed = BUDGET * max(float((eager[name].double() - truth[name]).abs().max()), unit)
        assert error <= allowed, f"{name}: {error:.3g} > {allowed:.3g}"


# One token and one entry; below a tile in every dimension; H odd and past a step, V one past a tile and a segment; past a tile.
SIZES = [(1, 16, 1), (5, 7, 31), (17, 35, 65), (33, 16, 128)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_forward_equals_the_float64_truth(size, dtype):
    hidden, weight, bias, labels, _ = make(*size, dtype)
    check_forward(forward(hidden, weight, bias, labels), hidden, weight, bias, labels)


@pytest.mark.parametrize(("scale", "cap"), [(0.5, 0.0), (-1.0, 0.0), (0.7, 5.0)])
def test_scale_and_softcap(scale, cap):
    settings = {"logit_scale": scale, "logit_softcap": cap}
    hidden, weight, bias, labels, _ = make(6, 24, 97)
    check_forward(forward(hidden, weight, bias, labels, **settings), hidden, weight, bias, labels, **settings)


def test_no_bit_depends_on_the_batch_and_none_of_the_logits_on_their_order():
    hidden, weight, bias, labels, _ = make(20, 16, 97, torch.bfloat16)
    together = forward(hidden, weight, bias, labels)
    alone = forward(hidden[17:], weight, bias, labels[17:])
    for name, values in alone.items():
        assert torch.equal(values, together[name][17:]), name
    order = grad.Order.descending(torch.randn(97, device=DEVICE))
    pitch = grad.padded(97, torch.bfloat16)
    stored, sorted_ = (torch.zeros(20, pitch, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    plain = forward(hidden, weight, bias, labels, logits=stored)
    moved = forward(hidden, weight, bias, labels, logits=sorted_, order=order)
    assert torch.equal(stored[:, order.entries.long()], sorted_[:, :97])
    assert torch.equal(order.entries[order.places.long()], torch.arange(97, dtype=torch.int32, device=DEVICE))
    for name in moved:
        torch.testing.assert_close(moved[name], plain[name], rtol=1e-6, atol=1e-6)
    # The stored logits are those of which the statistics were computed.
    truth = reference.token_statistics(stored[:, :97].double(), labels)
    torch.testing.assert_close(plain["max"], truth["max"], rtol=0, atol=0)
    torch.testing.assert_close(plain["log_sum"], truth["log_sum"], rtol=1e-6, atol=1e-6)


def _softmax(found):
    return [found[name] for name in ("logps", "max", "log_sum")]


def test_ties_go_to_the_first_entry_in_any_order():
    hidden, weight = torch.ones(6, 4, device=DEVICE), torch.zeros(130, 4, device=DEVICE)
    weight[40] = weight[100] = 1.0
    labels = torch.tensor([40, 100, 39, 101, 0, 129], device=DEVICE)
    bias = torch.zeros(130, device=DEVICE)
    for order in (None, grad.Order.descending(torch.arange(130.0, device=DEVICE))):
        words = {} if order is None else {"logits": torch.zeros(6, 160, device=DEVICE), "order": order}
        hits = forward(hidden, weight, bias, labels, frozenset(("accuracy",)), **words)["accuracy"]
        assert hits.tolist() == [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]


def test_hostile_values_stay_in_their_row():
    hidden, weight, bias, labels, upstream = make(5, 16, 70)
    clean = forward(hidden, weight, bias, labels)
    hidden[1] = math.nan
    bias[69] = -math.inf
    labels[2], labels[3], labels[4] = 70, -1, 5
    found = forward(hidden, weight, bias, labels)
    for name, values in found.items():
        assert values[1:4].isnan().all(), name
        assert values[[0, 4]].isfinite().all() or name == "mean_logits", name
    # An entry of probability 0 changes little except the mean.
    assert float((found["log_sum"][0] - clean["log_sum"][0]).abs()) < 1.0
    call = grad.HeadCall(weight, bias, None, 1.0, 0.0, 2.0**-30)
    memory = torch.empty(5, grad.padded(70, torch.float32), device=DEVICE)
    upstream[:] = 1.0
    upstream[1] = 0.0
    block = grad.logits_block_grad(call, hidden, labels, *_softmax(found), upstream, out=memory)
    assert block.dz[:, :70].isnan().all(-1).tolist() == [False, False, True, True, False]
    assert bool((block.dz[1] == 0).all())


def test_a_nearly_certain_label_keeps_its_relative_precision():
    hidden, weight = torch.eye(4, device=DEVICE) * 20, torch.eye(64, 4, device=DEVICE)
    labels = torch.arange(4, device=DEVICE)
    bias = torch.zeros(64, device=DEVICE)
    found = forward(hidden, weight, bias, labels, frozenset())
    truth = -torch.log1p(63 * torch.exp(torch.tensor(-20.0, dtype=torch.float64, device=DEVICE)))
    torch.testing.assert_close(found["logps"], truth.expand(4), rtol=1e-6, atol=0.0)
    call = grad.HeadCall(weight, bias, None, 1.0, 0.0, 2.0**-20)
    memory = torch.empty(4, 64, device=DEVICE)
    ones = torch.ones(4, dtype=torch.float64, device=DEVICE)
    block = grad.logits_block_grad(call, hidden, labels, *_softmax(found), ones, out=memory)
    at_label = block.dz.gather(-1, labels.unsqueeze(-1)).squeeze(-1).double()
    torch.testing.assert_close(at_label, -torch.expm1(found["logps"]), rtol=1e-6, atol=0.0)


def backward(inputs, eps, sort=True, stored=False, **settings):
    """(call, forward's results, BlockGrad, dH, dW, dbias) of one chunk."""
    hidden, weight, bias, labels, upstream = inputs
    settings = PLAIN | settings
    order = grad.order_by_mean_logit(weight, bias, hidden.float().mean(0), settings["logit_scale"]) if sort else None
    call = grad.HeadCall(weight, bias, order, settings["logit_scale"], settings["logit_softcap"], eps)
    # The previous content of the memory must not matter.
    memory = torch.full((hidden.shape[0], grad.padded(weight.shape[0], hidden.dtype)), math.nan).to(hidden)
    words = {"order": order, "logits": memory} if stored else {}
    found = forward(hidden, weight, bias, labels, frozenset(), **words, **settings)
    words = {"logits": memory} if stored else {"out": memory}
    block = grad.logits_block_grad(call, hidden, labels, *_softmax(found), upstream, **words)
    grad_hidden = grad.hidden_grad(call, block, upstream, weight.mean(0, dtype=torch.float32))
    grad_weight = torch.empty(weight.shape, dtype=torch.float32, device=DEVICE)
    tail = grad.tail_of(call, block, upstream, hidden)
    grad.weight_grad(call, block, hidden, grad_weight, accumulate=False, tail_row=tail)
    back = (upstream * block.tail).sum() / weight.shape[0]
    return call, found, block, grad_hidden, grad_weight, grad.bias_grad(call, block) - back


def live_entries(call, block, tokens, vocab):
    """Which entries are in live blocks: bool [N, V], in the vocabulary's original order."""
    tile = launch.tile_of(block.dz.dtype)
    live = block.live.bool().repeat_interleave(tile.n, 0)[:tokens].repeat_interleave(tile.v, 1)[:, :vocab]
    return live if call.order is None else live[:, call.order.places.long()]


def definition(inputs, kept, scale=1.0, cap=0.0):
    """(dz [N, V] before the tail, dH, dW, dbias, dropped mass) in float64, from dense matrices."""
    hidden, weight, bias, labels, upstream = (t.double() if t.is_floating_point() else t for t in inputs)
    z = reference.transform_logits(F.linear(hidden, weight, bias), scale, cap)
    slope = scale * (1 - (z / cap) ** 2 if cap else torch.ones_like(z))
    p = z.softmax(-1)
    onehot = torch.zeros_like(p).scatter_(-1, labels.unsqueeze(-1), 1.0)
    dropped = torch.where(kept, 0.0, p)
    dz = upstream.unsqueeze(-1) * torch.where(kept, (onehot - p) * slope, 0.0)
    full = dz - upstream.unsqueeze(-1) * (dropped * slope).sum(-1, keepdim=True) / p.shape[-1]
    return dz, full @ weight, full.t() @ hidden, full.sum(0), dropped.sum(-1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dz_of_live_blocks_passes_the_check_that_catches_planted_faults(dtype):
    """Label entries and other entries are compared separately, row by row, with a multiple of eager's error as limit."""
    inputs = make(16, 24, 97, dtype)
    inputs[3].clamp_(max=95)
    hidden, weight, bias, labels, upstream = inputs
    call, _, block, *_ = backward(inputs, 2.0**-40)
    assert bool(block.live.all())
    mine = block.dz[:, call.order.places.long()]
    truth = definition(inputs, torch.ones(16, 97, dtype=torch.bool, device=DEVICE))[0]
    logits = F.linear(hidden.float(), weight.float(), bias.float()).requires_grad_()
    (upstream.float() * logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)).sum().backward()
    eager = logits.grad.to(dtype)
    check_gradient(mine, truth, eager, labels)
    assert bool((mine[upstream == 0] == 0).all())
    shape = (4, 4, 97)
    marked = labels.view(4, 4).clone()
    marked[1, 0] = -100  # the leak fault writes here, so the token must be ignored
    for tensor in (mine, truth, eager):
        tensor.view(shape)[1, 0] = 0
    for fault in FAULTS if dtype != torch.float16 else FAULTS[:-1]:  # the last one's leak is below float16's range
        broken = fault(mine.view(shape), marked)
        assert not torch.equal(broken, mine.view(shape)), fault.__name__
        with pytest.raises(AssertionError):
            check_gradient(broken, truth.view(shape), eager.view(shape), marked)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("size", [(5, 7, 31), (18, 40, 203)], ids=str)
def test_filtered_gradients_equal_their_definition(size, stored, dtype):
    inputs = make(*size, dtype=dtype)
    eps = 2.0**-6
    call, _, block, *gradients = backward(inputs, eps, stored=stored)
    kept = live_entries(call, block, size[0], size[2])
    truth = definition(inputs, kept)
    assert not kept.all() or size[2] < 32
    # float32: rounding of float32. bfloat16: dz is rounded, and stored logits are rounded before.
    tolerance = 3e-6 if dtype == torch.float32 else 2e-2 if stored else 5e-3
    for mine, true in zip(gradients, truth[1:4], strict=True):
        assert float((mine.double() - true).norm() / true.norm()) < tolerance
    if dtype == torch.float32:
        torch.testing.assert_close(block.dropped, truth[4], rtol=1e-4, atol=1e-7)
    assert float(gradients[0][2].abs().max()) == 0.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)], ids=str)
def test_compiled_sizes_agree(dtype, monkeypatch):
    """The tile sizes of GPUs, with a problem past a block of tokens, a tile, a segment, a product step and a width of H."""
    compiled = launch.Tile(128, 128, 64, 8, 3)
    cut(monkeypatch, launch.Tile(64, 128, 16, 8, 3), compiled, 2048, 128)
    inputs = make(129, 136, 2100, dtype)
    inputs[3][:] %= 900  # no label among the unlikely entries
    inputs[2][1000:] -= 12.0
    hidden, weight, bias, labels, _ = inputs
    check_forward(forward(hidden, weight, bias, labels), hidden, weight, bias, labels)
    call, _, block, *gradients = backward(inputs, 2.0**-5)
    kept = live_entries(call, block, 129, 2100)
    assert not kept.all()
    for mine, true in zip(gradients, definition(inputs, kept)[1:4], strict=True):
        assert float((mine.double() - true).norm() / true.norm()) < (3e-6 if dtype == torch.float32 else 5e-3)


def test_a_block_is_dead_only_where_nothing_exceeds_eps_and_no_label_lies():
    inputs = make(40, 16, 250)
    eps = 2.0**-4
    call, _, block, *_ = backward(inputs, eps)
    kept = live_entries(call, block, 40, 250)
    p = F.linear(*(t.double() for t in inputs[:3])).softmax(-1)
    assert not kept.all()
    assert bool((p[~kept] <= eps * (1 + 1e-5)).all())
    assert bool(kept.gather(-1, inputs[3].unsqueeze(-1)).all())
    # Every live block must contain a label or an entry above eps.
    tile = launch.tile_of(torch.float32)
    ordered = p.scatter(-1, inputs[3].unsqueeze(-1), 1.0)[:, call.order.entries.long()]
    blocks = F.pad(ordered, (0, -250 % tile.v, 0, -40 % tile.n)).unfold(0, tile.n, tile.n).unfold(1, tile.v, tile.v)
    assert torch.equal(block.live.bool(), blocks.amax((-1, -2)) > eps)


def test_the_error_stays_inside_the_documented_bound():
    inputs = make(40, 16, 250)
    hidden, weight, _, _, upstream = inputs
    call, _, block, grad_hidden, grad_weight, grad_bias = backward(inputs, 2.0**-4)
    exact = definition(inputs, torch.ones(40, 250, dtype=torch.bool, device=DEVICE))
    reach = (weight - weight.mean(0)).double().norm(dim=-1).max()
    limit = upstream.abs() * block.dropped * reach
    error = (grad_hidden - exact[1]).norm(dim=-1)
    assert bool((error <= limit + 1e-5).all())
    assert bool((error > limit / 100)[(block.dropped > 1e-3) & (upstream != 0)].any())
    per_token = torch.maximum(torch.full_like(block.dropped, call.eps), block.dropped / 250)
    limit = (upstream.abs() * per_token * hidden.double().norm(dim=-1)).sum()
    assert float((grad_weight - exact[2]).norm(dim=-1).max()) <= float(limit)
    # With the uniform tail, every row's gradient sums to 0.
    assert float(block.dropped.max()) > 1e-3
    assert abs(float(grad_bias.double().sum())) < 1e-5


def test_order_by_mean_logit_gathers_what_is_likely():
    """Entries that are likely for every token are scattered over the vocabulary. After sorting they are adjacent."""
    hidden, weight, bias, _, upstream = make(16, 16, 480, spread=0.5)
    bias.fill_(-12.0)
    bias[::20] = 0.0
    inputs = (hidden, weight, bias, torch.zeros(16, dtype=torch.int64, device=DEVICE), upstream)
    share = {sort: float(backward(inputs, 2.0**-9, sort=sort)[2].live.float().mean()) for sort in (False, True)}
    assert share[False] == 1.0
    assert share[True] <= 0.2


@pytest.mark.parametrize("shape", [(0, 16, 50), (3, 16, 1)], ids=str)
def test_empty_chunks_and_a_vocabulary_of_one(shape):
    _, found, _, grad_hidden, grad_weight, _ = backward(make(*shape), 2.0**-6, sort=False)
    assert found["logps"].shape == shape[:1]
    assert not found["logps"].any()
    assert not grad_hidden.any()
    assert not grad_weight.any()


# --- through the public functions ---------------------------------------------------------------------------------

#: Every strategy that filters: whole pairs in one chunk, in groups, and larger than the budget; two passes in chunks.
FILTERED = [
    "whole_pairs_in_groups",
    "bfloat16_in_groups_packed",
    "pairs_beyond_the_budget",
    "coupled_two_pass_bfloat16",
]


@pytest.mark.parametrize("name", FILTERED)
def test_with_every_block_live_rows_equal_the_float64_reference(name):
    """With a threshold that drops nothing, every strategy must give the exact path's gradients, row by row."""
    case = Case(**{**BY_NAME[name].__dict__, "rows": 8 if BY_NAME[name].rows else None})
    inputs = make_inputs(case, DEVICE)
    truth, true_gradients = textbook(inputs.cast(torch.float64))
    eager, eager_gradients = textbook(inputs)
    with use_backend("triton"):
        out = inputs.loss(grad_filter=1e-30, statistics=("grad_dropped_mass",))
        gradients = torch.autograd.grad(out.loss.sum(), inputs.trained)
    assert not out.grad_dropped_mass.any()
    allowance = BUDGET * float((eager.double() - truth).abs().max()) + 4e-7 * float(truth.abs().max())
    assert float((out.loss.detach().double() - truth).abs().max()) <= allowance
    for mine, true, theirs in zip(gradients, true_gradients, eager_gradients, strict=True):
        check_rows(mine, true, theirs)


def test_the_reported_mass_is_what_the_gradient_lacks():
    """With two passes in chunks, the forward reports the mass that the backward will drop."""
    hidden, weight, bias, labels, upstream = make(20, 16, 203)
    leaf = bias.clone().requires_grad_()
    with use_backend("triton"):
        logps, found = linear_logps(
            hidden, weight, labels, bias=leaf, grad_filter=2.0**-5, statistics=("grad_dropped_mass",)
        )
        (mine,) = torch.autograd.grad(logps, leaf, upstream.float())
    dropped = found["grad_dropped_mass"].double()
    assert float(dropped.max()) > 1e-3
    exact = definition((hidden, weight, bias, labels, upstream), torch.ones(20, 203, dtype=torch.bool, device=DEVICE))[
        3
    ]
    # The column sums differ, in absolute terms, by at most the dropped mass and its tail.
    assert float((mine - exact).abs().sum()) <= 2 * float((upstream.abs() * dropped).sum()) + 1e-5
    assert float((mine - exact).abs().sum()) > 0.01 * float((upstream.abs() * dropped).sum())


@pytest.mark.parametrize("options", [{}, {"loss_type": "aot"}], ids=["whole_pairs", "two_pass"])
def test_a_graph_runs_twice_and_adds_to_main_grad(options):
    case = Case("twice", vocab=130, pairs=2, length=4, bias=True, options=options)
    inputs, buffered = make_inputs(case, DEVICE), make_inputs(case, DEVICE)
    buffered.weight.main_grad = torch.ones_like(buffered.weight)
    with use_backend("triton"):
        loss = inputs.loss(grad_filter=2.0**-5).loss
        first = torch.autograd.grad(loss, inputs.trained, retain_graph=True)
        once = [g.clone() for g in first]
        again = torch.autograd.grad(3 * loss, inputs.trained)
        buffered.loss(grad_filter=2.0**-5).loss.backward()
    for a, b in zip(again, once, strict=True):
        torch.testing.assert_close(a, 3 * b, rtol=1e-5, atol=1e-7)
    assert buffered.weight.grad is None
    torch.testing.assert_close(buffered.weight.main_grad - 1, once[1], rtol=1e-4, atol=3e-7)
    assert torch.equal(buffered.hidden.grad, once[0])


@pytest.mark.parametrize("eps", [None, 2.0**-6])
def test_loss_is_exactly_log_2_when_policy_equals_reference(eps):
    inputs = make_inputs(Case("log2", dtype=torch.bfloat16, pairs=2, length=3), DEVICE)
    inputs.keywords["ref_hidden"] = inputs.hidden.detach().clone()
    with use_backend("triton"), torch.set_grad_enabled(eps is not None):
        out = inputs.loss(grad_filter=eps, statistics=("entropy",))
    assert torch.equal(out.losses.detach(), torch.full_like(out.losses, 2.0).log())


@pytest.mark.parametrize(
    ("options", "grad_mode", "said"),
    [
        ({}, False, "forward: .*nothing needs a gradient$"),
        ({"grad_filter": 2.0**-9}, True, "whole_pairs: .*blocks of the gradient"),
        ({"grad_filter": 2.0**-9, "loss_type": "aot"}, True, "two_pass: .*blocks of the gradient"),
        ({}, True, "whole_pairs: .*the gradient is exact$"),
        ({"grad_filter": None}, True, "whole_pairs: .*the gradient is exact$"),
        ({"statistics": ("kl",)}, False, "forward: .*nothing needs a gradient$"),
    ],
    ids=str,
)
def test_the_plan_says_which_kernels_multiply(options, grad_mode, said, caplog):
    import re

    inputs = make_inputs(Case("plan", dtype=torch.bfloat16, pairs=1, length=2), DEVICE)
    with use_backend("triton"), torch.set_grad_enabled(grad_mode), caplog.at_level(logging.DEBUG, "dpo_kernels.linear"):
        inputs.loss(**options)
    assert re.search(said, caplog.records[-1].getMessage()), caplog.records[-1].getMessage()


def test_gradients_are_deterministic():
    inputs = make(20, 16, 130, torch.bfloat16)
    for a, b in zip(backward(inputs, 2.0**-6)[3:], backward(inputs, 2.0**-6)[3:], strict=True):
        assert torch.equal(a, b)


def test_prompts_and_padding_are_never_read_and_get_exact_zeros():
    case = Case("padding", vocab=130, pairs=2, length=4)
    inputs = make_inputs(case, DEVICE)
    with use_backend("triton"):
        plain = inputs.loss(grad_filter=2.0**-5).loss
        with torch.no_grad():
            inputs.hidden[inputs.labels == -100] = math.nan
            inputs.keywords["ref_hidden"][inputs.labels == -100] = math.nan
        out = linear_dpo_loss(inputs.hidden, inputs.weight, inputs.labels, grad_filter=2.0**-5, **inputs.keywords)
        hidden, weight = torch.autograd.grad(out.loss, inputs.trained)
    assert torch.equal(out.loss, plain)
    assert bool((hidden[inputs.labels == -100] == 0).all())
    assert bool(weight.isfinite().all())


def test_autocast_multiplies_in_16_bits_and_keeps_the_weights_gradient_in_float32():
    inputs = make_inputs(Case("autocast", pairs=1, length=3), DEVICE)
    narrow = inputs.cast(torch.bfloat16)
    with use_backend("triton"):
        truth = torch.autograd.grad(narrow.loss(grad_filter=1e-30).loss, narrow.trained)
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            out = inputs.loss(grad_filter=1e-30)
        hidden, weight = torch.autograd.grad(out.loss, inputs.trained)
    assert hidden.dtype == weight.dtype == torch.float32
    assert torch.equal(hidden.bfloat16(), truth[0])
    assert torch.equal(weight.bfloat16(), truth[1])
    assert not torch.equal(weight, weight.bfloat16().float())


def peak_of(run):
    """Peak of allocated bytes, from the allocator's events."""
    with torch.profiler.profile(profile_memory=True) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@pytest.mark.skipif(DEVICE != "cpu", reason="counts allocations of the CPU's allocator")
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="whole_pairs"),
        pytest.param({"loss_type": "aot"}, id="two_pass", marks=pytest.mark.slow),
        pytest.param(None, id="forward", marks=pytest.mark.slow),
    ],
)
def test_memory_stays_within_the_budget(options, monkeypatch):
    compiled = launch.Tile(128, 128, 64, 8, 3)
    cut(monkeypatch, compiled, compiled, 2048, 128)
    case = Case("memory", vocab=6000, hidden_size=32, pairs=2, length=40, dtype=torch.bfloat16)
    inputs = make_inputs(case)
    inputs.keywords |= options or {}
    budget = 3 << 18  # each model has 1.4 MB of logits
    gradients = (
        0 if options is None else 4 * inputs.weight.numel() + 2 * inputs.weight.numel() + 2 * inputs.hidden.numel()
    )

    def run():
        with use_backend("triton"), torch.set_grad_enabled(options is not None):
            out = inputs.loss(grad_filter=2.0**-9, memory_budget=budget)
            if options is not None:
                torch.autograd.grad(out.loss, inputs.trained)

    # Other memory: 40 bytes per entry while the vocabulary is sorted, and float64 tables of 160 tokens.
    assert peak_of(run) - gradients <= budget + 40 * case.vocab + (1 << 17)
