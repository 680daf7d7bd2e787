"""The linear path equals the float64 reference for every strategy, dtype, layout and kind of reference.

Gradients are compared row by row. The vocabulary is 97 (odd, unaligned rows) or 203, the hidden size 16 to 24, prompts come
first and one sequence is empty. These sizes are small enough for gradcheck and the interpreter, and large enough for several
chunks and for pairs that exceed the budget.
"""

import subprocess
import sys
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from dpo_kernels import LinearDPOLoss, dpo_loss, linear_dpo_loss, linear_logps, objective, reference, use_backend
from dpo_kernels.linear.chunk import logits_buffer
from dpo_kernels.linear.gpu import row_stride
from dpo_kernels.linear.planner import Head

from checks import BUDGET
from conftest import BACKENDS, DEVICE

_F32, _F64, _BF16, _F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


@dataclass(frozen=True)
class Case:
    """One row of the table; `rows` is the memory budget as a number of logit rows (None: the default)."""

    name: str
    dtype: torch.dtype = _F32
    vocab: int = 97
    hidden_size: int = 16
    pairs: int = 3
    length: int = 6
    packed: bool = False
    bias: bool = False
    reference: str | None = "shared"
    rows: int | None = None
    weighted: bool = False
    train_head: bool = True
    train_hidden: bool = True
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


CASES = [
    Case("whole_pairs"),
    Case("whole_pairs_in_groups", rows=9),
    Case("pairs_beyond_the_budget", rows=3),
    Case("one_row_at_a_time", rows=1, pairs=2, length=3),
    Case("float64", dtype=_F64, bias=True),
    Case("bfloat16", dtype=_BF16),
    Case("bfloat16_in_groups_packed", dtype=_BF16, rows=9, packed=True, bias=True),
    Case("float16", dtype=_F16, rows=5),
    Case("packed", packed=True, bias=True),
    Case("packed_in_groups", packed=True, rows=8),
    Case("bias", bias=True, rows=10),
    Case("own_reference_head", reference="own", bias=True),
    Case("own_reference_head_kl", reference="own", rows=10, options={"statistics": ("kl",)}),
    Case("ref_logps", reference="logps", rows=7),
    Case("reference_free", reference=None, options={"loss_type": "simpo"}),
    Case("softcap_and_scale", options={"logit_scale": 0.7, "logit_softcap": 4.0}),
    Case("weights_everywhere", weighted=True, rows=9),
    Case("weights_everywhere_packed", weighted=True, packed=True),
    Case("sum", options={"reduction": "sum"}),
    Case("robust", options={"loss_type": "robust", "label_smoothing": 0.2}),
    Case("ipo_in_groups", rows=9, options={"loss_type": "ipo"}),
    Case("mixed", rows=9, options={"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3]}),
    Case("frozen_head", train_head=False, bias=True),
    Case("frozen_head_in_chunks", train_head=False, rows=4),
    Case("frozen_head_bfloat16", train_head=False, dtype=_BF16),
    Case("frozen_hidden", train_hidden=False),
    Case("coupled", options={"loss_type": "aot"}),
    Case("coupled_two_pass", rows=5, options={"loss_type": "aot"}),
    Case("coupled_two_pass_bfloat16", rows=5, dtype=_BF16, bias=True, options={"loss_type": "aot"}),
    Case("per_pair_losses", rows=5, options={"reduction": "none"}),
    Case("per_pair_losses_kept", bias=True, options={"reduction": "none"}),
    Case("kl_term", bias=True, rows=9, options={"kl_coef": 0.3}),
    Case("kl_term_frozen_head", train_head=False, rows=9, options={"kl_coef": 0.1, "reduction": "sum"}),
    Case("kl_term_coupled", reference="own", rows=9, options={"kl_coef": 0.3, "loss_type": "aot"}),
    Case("tdpo", reference="own", bias=True, options={"loss_type": "tdpo"}),
    Case("tdpo_packed_in_groups", packed=True, weighted=True, rows=16, options={"loss_type": "tdpo2", "kl_coef": 0.2}),
    Case("tdpo_beyond_the_budget", rows=4, options={"loss_type": "tdpo", "kl_coef": 0.2, "logit_softcap": 4.0}),
    Case("tdpo_per_pair", rows=9, weighted=True, options={"loss_type": "tdpo", "kl_coef": 0.2, "reduction": "none"}),
    Case("tdpo_bfloat16", dtype=_BF16, options={"loss_type": "tdpo", "kl_coef": 0.2}),
    Case("wpo", rows=9, weighted=True, options={"use_weighting": True, "logit_softcap": 5.0, "logit_scale": 0.8}),
    Case("wpo_packed_mix", packed=True, bias=True, options={"use_weighting": True, "loss_type": ["sigmoid", "ipo"]}),
    Case("wpo_frozen_head", train_head=False, options={"use_weighting": True, "kl_coef": 0.1}),
    Case(
        "wpo_reference_free",
        reference=None,
        rows=5,
        options={"use_weighting": True, "loss_type": "simpo", "reduction": "none"},
    ),
    Case("callable", rows=5, options={"loss_type": lambda pairs: F.softplus(-pairs.margins)}),
]
BY_NAME = {case.name: case for case in CASES}


@dataclass
class Inputs:
    """A case's tensors. hidden, weight and bias are leaves, with requires_grad if the case trains them."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    labels: torch.Tensor
    keywords: dict[str, Any]

    @property
    def trained(self) -> list[torch.Tensor]:
        return [t for t in (self.hidden, self.weight, self.bias) if t is not None and t.requires_grad]

    def cast(self, dtype: torch.dtype) -> "Inputs":
        """The same numbers in another dtype."""

        def leaf(t):
            return None if t is None else t.detach().to(dtype).requires_grad_(t.requires_grad)

        words = {
            k: v.to(dtype) if isinstance(v, torch.Tensor) and k.startswith("ref_") else v
            for k, v in self.keywords.items()
        }
        return Inputs(leaf(self.hidden), leaf(self.weight), leaf(self.bias), self.labels, words)

    def loss(self, **more):
        return linear_dpo_loss(self.hidden, self.weight, self.labels, bias=self.bias, **{**self.keywords, **more})


def row_budget(case: Case, rows: int, device_type: str = "cpu") -> int:
    """Bytes that hold exactly `rows` rows of logits."""
    widens = case.dtype.itemsize == 2 and device_type == "cpu"
    named = str(case.options.get("loss_type"))
    kl = "kl" in case.options.get("statistics", ()) or "kl_coef" in case.options or "tdpo" in named
    head = Head(
        case.hidden_size,
        case.vocab,
        case.dtype.itemsize,
        case.train_hidden,
        case.train_head,
        case.reference in ("shared", "own"),
        kl,
        widens,
        device_type=device_type,
    )
    return head.row_bytes * rows


def make_inputs(case: Case, device="cpu", seed: int = 0) -> Inputs:
    """Random inputs of a case: prompts ignored, sequence 4 empty."""
    g = torch.Generator().manual_seed(seed)
    sequences, length, width = 2 * case.pairs, case.length, case.hidden_size
    lengths = torch.randint(1, length + 1, (sequences,), generator=g)
    lengths[0] = length
    if sequences > 4:
        lengths[4] = 0
    prompt = torch.randint(0, 2, (sequences,), generator=g)
    position = torch.arange(length)
    scored = (position >= prompt[:, None]) & (position < lengths[:, None])
    labels = torch.where(scored, torch.randint(0, case.vocab, (sequences, length), generator=g), -100)
    labels[0, -1] = case.vocab - 1

    def random(*shape, scale=1.0):
        # Logits of standard deviation about 2: peaked enough for a realistic softmax, small enough for bfloat16's precision.
        return (torch.randn(*shape, generator=g, dtype=_F64) * scale).to(case.dtype)

    hidden, ref_hidden = random(sequences, length, width), random(sequences, length, width)
    weight, ref_weight = (
        random(case.vocab, width, scale=2 / width**0.5),
        random(case.vocab, width, scale=2 / width**0.5),
    )
    bias, ref_bias = random(case.vocab), random(case.vocab)
    weights = torch.rand(sequences, length, generator=g) + 0.5
    keywords: dict[str, Any] = dict(case.options)
    if case.packed:
        keep = position < lengths[:, None]
        hidden, ref_hidden, labels, weights = hidden[keep], ref_hidden[keep], labels[keep], weights[keep]
        keywords["cu_seqlens"] = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(device)
    if case.weighted:
        keywords["token_weights"] = weights.to(device)
        keywords["pair_weights"] = (torch.rand(case.pairs, generator=g) + 0.5).to(device)
        keywords["beta"] = (torch.rand(case.pairs, generator=g) * 0.3 + 0.05).to(device)
        keywords["label_smoothing"] = (torch.rand(case.pairs, generator=g) * 0.3).to(device)
    if case.reference in ("shared", "own"):
        keywords["ref_hidden"] = ref_hidden.to(device)
    if case.reference == "own":
        keywords["ref_weight"] = ref_weight.to(device)
        keywords["ref_bias"] = ref_bias.to(device)
    if case.reference == "logps":
        keywords["ref_logps"] = torch.randn(sequences, generator=g).mul(5).sub(20).to(device)
    if case.rows is not None:
        keywords["memory_budget"] = row_budget(case, case.rows, torch.device(device).type)
    return Inputs(
        hidden.to(device).requires_grad_(case.train_hidden),
        weight.to(device).requires_grad_(case.train_head),
        bias.to(device).requires_grad_(case.train_head) if case.bias else None,
        labels.to(device),
        keywords,
    )


def textbook(inputs: Inputs):
    """(loss, gradients) with all logits in memory: products in the inputs' dtype, the loss in float32 or float64."""
    words = {k: v for k, v in inputs.keywords.items() if k not in ("memory_budget", "statistics", "grad_filter")}
    ref_hidden, ref_weight, ref_bias = (words.pop(name, None) for name in ("ref_hidden", "ref_weight", "ref_bias"))
    up = _F64 if inputs.hidden.dtype == _F64 else _F32
    if ref_hidden is not None:
        own = ref_weight is not None
        head = (ref_weight, ref_bias) if own else (inputs.weight, inputs.bias)
        words["ref_logits"] = F.linear(ref_hidden, *head).detach().to(up)
    loss = reference.dpo_loss(F.linear(inputs.hidden, inputs.weight, inputs.bias).to(up), inputs.labels, **words)
    return loss.detach(), torch.autograd.grad(loss.sum(), inputs.trained)


def row_errors(gradient, truth):
    """Relative error of every row that has a true gradient; the other rows must be exactly zero."""
    gradient, truth = (t.reshape(-1, t.shape[-1]).double() for t in (gradient, truth))
    dead = (truth == 0).all(-1)
    assert bool((gradient[dead] == 0).all()), "a row without weight received gradient"
    return (gradient - truth)[~dead].norm(dim=-1) / truth[~dead].norm(dim=-1)


def check_rows(gradient, truth, eager):
    """Assert that no row has more than BUDGET times the error of eager's worst row in the same dtype."""
    assert gradient.shape == truth.shape
    assert gradient.dtype == eager.dtype
    ours, theirs = row_errors(gradient, truth), row_errors(eager, truth)
    if ours.numel() == 0:
        return
    floor = 1e-13 if gradient.dtype == _F64 else torch.finfo(gradient.dtype).eps
    # A gradient scaled by five per cent must never fit into the budget.
    budget = min(BUDGET * max(float(theirs.max()), floor), 0.04)
    assert float(ours.max()) <= budget, f"row {int(ours.argmax())}: {float(ours.max()):.3g} of at most {budget:.3g}"


#: Cases for Triton's interpreter, one per strategy: each takes seconds, and test_operators.py tests Triton's stages anyway.
INTERPRETED = {
    "whole_pairs_in_groups",
    "pairs_beyond_the_budget",
    "bfloat16_in_groups_packed",
    "frozen_head",
    "coupled",
    "coupled_two_pass_bfloat16",
    "kl_term",
    "tdpo_packed_in_groups",
    "wpo",
}


def each_backend(case: Case) -> list[Any]:
    """The case on every available backend."""
    slow = DEVICE == "cpu" and case.name not in INTERPRETED
    # The Triton kernels serve up to float32; float64 always runs on eager.
    names = [name for name in BACKENDS if name != "triton" or case.dtype != _F64]
    marks = {name: [pytest.mark.slow] if slow and name == "triton" else [] for name in names}
    return [pytest.param(case, name, id=f"{name}-{case}", marks=marks[name]) for name in names]


@pytest.mark.parametrize(("case", "kernels"), [param for case in CASES for param in each_backend(case)])
def test_loss_and_gradient_rows_equal_the_float64_reference(case, kernels, device):
    inputs = make_inputs(case, device)
    truth, true_gradients = textbook(inputs.cast(_F64))
    eager, eager_gradients = textbook(inputs)
    with use_backend(kernels):
        out = inputs.loss(grad_filter=None)
        gradients = torch.autograd.grad(out.loss.sum(), inputs.trained)
    allowance = BUDGET * float((eager.double() - truth).abs().max()) + 4e-7 * float(truth.abs().max())
    assert float((out.loss.detach().double() - truth).abs().max()) <= allowance
    for mine, true, theirs in zip(gradients, true_gradients, eager_gradients, strict=True):
        check_rows(mine, true, theirs)


@pytest.mark.parametrize("rows", [None, 9, 2])
@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": "sigmoid"},
        {"loss_type": "ipo"},
        {"loss_type": "aot"},
        {"loss_type": "tdpo", "kl_coef": 0.2, "use_weighting": True},
        {"loss_type": "aot", "kl_coef": 0.2, "use_weighting": True},
    ],
    ids=["sigmoid", "ipo", "aot", "tdpo_kl_wpo", "aot_kl_wpo"],
)
def test_every_statistic_equals_that_of_the_logits_path(options, rows, device):
    names = ("entropy", "kl", "accuracy", "mean_logits")
    case = Case("statistics", rows=rows, bias=True, weighted=False, options={"statistics": names, **options})
    inputs = make_inputs(case, device)
    pair_weights = torch.tensor([0.5, 2.0, 1.5], device=device)
    out = inputs.loss(statistics=(*names, "grad_dropped_mass"), pair_weights=pair_weights)
    exact = inputs.cast(_F64)
    logits, ref_logits = (F.linear(h, exact.weight, exact.bias) for h in (exact.hidden, exact.keywords["ref_hidden"]))
    truth = dpo_loss(
        logits, exact.labels, ref_logits=ref_logits, statistics=names, pair_weights=pair_weights, **options
    )
    vectors = ("loss", "losses", "chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps")
    for name in (*names, *vectors, "chosen_rewards", "rejected_rewards", "token_counts"):
        torch.testing.assert_close(getattr(out, name).double(), getattr(truth, name).double(), rtol=2e-5, atol=2e-5)
    assert bool((out.grad_dropped_mass == 0).all())
    assert out.metrics().keys() - truth.metrics().keys() == {"grad_dropped_mass"}


@pytest.mark.parametrize(
    "name",
    [
        "float64",
        "whole_pairs_in_groups",
        "pairs_beyond_the_budget",
        "coupled_two_pass",
        "frozen_head",
        "kl_term",
        "kl_term_coupled",
        "tdpo_beyond_the_budget",
    ],
)
def test_gradcheck_in_float64(name):
    case = BY_NAME[name]
    case = Case(**{**case.__dict__, "dtype": _F64, "vocab": 11, "hidden_size": 3, "pairs": 2, "length": 3})
    inputs = make_inputs(case)
    # The default reference head is the policy's head, detached. A numerical derivative would change it too.
    inputs.keywords.update(ref_weight=inputs.weight.detach().clone(), ref_bias=None)

    def loss(*leaves):
        leaves = iter(leaves)
        hidden, weight, bias = (
            next(leaves) if t is not None and t.requires_grad else t
            for t in (inputs.hidden, inputs.weight, inputs.bias)
        )
        return linear_dpo_loss(hidden, weight, inputs.labels, bias=bias, **inputs.keywords).loss

    # A second backward of the same graph uses other chunks, which changes the last bits.
    assert torch.autograd.gradcheck(loss, inputs.trained, nondet_tol=1e-12)


@pytest.mark.parametrize("rows", [None, 4])
def test_linear_logps_take_any_upstream_gradient(rows):
    case = Case("logps", dtype=_F64, bias=True, vocab=11, hidden_size=3, pairs=1, length=4, reference=None, rows=rows)
    inputs = make_inputs(case)
    words = {k: v for k, v in inputs.keywords.items() if k == "memory_budget"}
    truth = reference.token_statistics(F.linear(inputs.hidden, inputs.weight, inputs.bias), inputs.labels)["logps"]

    def logps(hidden, weight, bias):
        return linear_logps(hidden, weight, inputs.labels, bias=bias, **words)

    torch.testing.assert_close(logps(inputs.hidden, inputs.weight, inputs.bias), truth)
    assert torch.autograd.gradcheck(logps, inputs.trained)


def test_linear_logps_keep_the_shape_of_the_labels_and_give_statistics_on_request():
    hidden, weight = torch.randn(2, 3, 4, 8), torch.randn(19, 8)
    labels = torch.randint(0, 19, (2, 3, 4))
    labels[0, 0, 0] = -100
    names = ("entropy", "accuracy", "grad_dropped_mass", "log_sum_sq")
    logps, found = linear_logps(hidden, weight, labels, statistics=names)
    truth = reference.token_statistics(F.linear(hidden, weight).double(), labels)
    torch.testing.assert_close(logps, truth["logps"].float(), rtol=1e-5, atol=1e-5)
    for name in ("entropy", "log_sum_sq"):
        torch.testing.assert_close(found[name], truth[name].float(), rtol=1e-5, atol=1e-5)
    assert torch.equal(found["accuracy"], truth["accuracy"].float())
    assert logps.shape == found["grad_dropped_mass"].shape == labels.shape
    assert logps[0, 0, 0] == 0
    # With another chunk shape, only the rounding of the GEMM library may differ.
    torch.testing.assert_close(linear_logps(hidden[0, 0], weight, labels[0, 0]), logps[0, 0], rtol=1e-6, atol=1e-6)


def test_strided_hidden_states_are_read_in_place():
    inputs = make_inputs(BY_NAME["whole_pairs"])
    wide = torch.cat(
        [inputs.hidden.detach(), torch.full_like(inputs.hidden[:, :1], float("nan"))], dim=1
    ).requires_grad_()
    out = linear_dpo_loss(wide[:, :-1], inputs.weight, inputs.labels, **inputs.keywords)
    assert torch.equal(out.loss, inputs.loss().loss)
    out.loss.backward()
    assert torch.equal(wide.grad[:, -1], torch.zeros_like(wide.grad[:, -1]))


def test_chunking_changes_the_loss_by_rounding_only():
    case = Case("chunking", pairs=6, length=12, hidden_size=24, vocab=203)
    inputs = make_inputs(case)
    whole = inputs.loss().loss
    for rows in (1, 5, 17, 40):
        torch.testing.assert_close(inputs.loss(memory_budget=row_budget(case, rows)).loss, whole, rtol=2e-6, atol=0)


@pytest.mark.parametrize("statistics", [(), ("kl",)])
def test_loss_is_exactly_log_2_when_policy_equals_reference(statistics, backend, device):
    inputs = make_inputs(BY_NAME["whole_pairs_in_groups"], device)
    inputs.keywords["ref_hidden"] = inputs.hidden.detach().clone()
    with use_backend(backend):
        out = inputs.loss(statistics=statistics)
    assert torch.equal(out.losses, torch.full_like(out.losses, 2.0).log())
    assert bool((out.chosen_rewards == 0).all())
    if statistics:
        assert float(out.kl.abs().max()) < 1e-6


def test_padding_and_prompts_are_never_projected_and_get_exact_zeros():
    case = BY_NAME["whole_pairs_in_groups"]
    inputs = make_inputs(case)
    plain = inputs.loss()
    with torch.no_grad():
        inputs.hidden[inputs.labels == -100] = float("nan")
        inputs.keywords["ref_hidden"][inputs.labels == -100] = float("nan")
    out = inputs.loss()
    assert torch.equal(out.loss, plain.loss)
    hidden, weight = torch.autograd.grad(out.loss, inputs.trained)
    assert bool((hidden[inputs.labels == -100] == 0).all())
    assert bool(weight.isfinite().all())


def test_nan_stays_in_its_own_pair():
    inputs = make_inputs(BY_NAME["whole_pairs_in_groups"])
    plain = inputs.loss().losses
    token = (inputs.labels[1] != -100).nonzero()[0]
    with torch.no_grad():
        inputs.hidden[1, token] = float("nan")
    losses = inputs.loss().losses
    assert bool(losses[1].isnan())
    torch.testing.assert_close(losses[[0, 2]], plain[[0, 2]])


@pytest.mark.parametrize("name", ["whole_pairs", "coupled", "coupled_two_pass", "frozen_head", "tdpo_packed_in_groups"])
def test_a_retained_graph_can_run_backward_twice_with_other_factors(name):
    inputs = make_inputs(BY_NAME[name])
    loss = inputs.loss().loss
    loss.backward(retain_graph=True)
    first = [t.grad.clone() for t in inputs.trained]
    for t in inputs.trained:
        t.grad.zero_()  # this memory was returned by the first backward
    (3 * loss).backward()
    for t, once in zip(inputs.trained, first, strict=True):
        torch.testing.assert_close(t.grad, 3 * once, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("factor", [1.0, -0.125, 0.0])
def test_the_upstream_gradient_scales_exactly_once(factor):
    inputs = make_inputs(BY_NAME["bias"])
    plain = torch.autograd.grad(inputs.loss().loss, inputs.trained)
    scaled = torch.autograd.grad(inputs.loss().loss * factor, inputs.trained)
    for a, b in zip(scaled, plain, strict=True):
        assert torch.equal(a, b * factor)


@pytest.mark.parametrize("name", ["whole_pairs", "coupled_two_pass", "coupled"])
@pytest.mark.parametrize("dtype", [_F32, _BF16])
def test_the_gradient_goes_straight_into_main_grad(name, dtype):
    case = Case(**{**BY_NAME[name].__dict__, "dtype": dtype, "rows": None})
    inputs = make_inputs(case)
    plain = make_inputs(case)
    (plain.loss(grad_filter=None).loss * 0.5).backward()
    inputs.weight.main_grad = torch.ones(inputs.weight.shape, dtype=_F32)
    (inputs.loss(grad_filter=None).loss * 0.5).backward()
    assert inputs.weight.grad is None
    wide = plain.weight.grad.float()
    torch.testing.assert_close(inputs.weight.main_grad - 1, wide, rtol=2 * torch.finfo(dtype).eps, atol=3e-7)
    assert torch.equal(inputs.hidden.grad, plain.hidden.grad)


def test_a_tied_head_adds_its_gradient_to_the_embedding():
    inputs = make_inputs(BY_NAME["whole_pairs"])
    tokens = inputs.labels.clamp(min=0)

    def gradient(loss_of_hidden):
        weight = inputs.weight.detach().clone().requires_grad_()
        loss_of_hidden(F.embedding(tokens, weight), weight).backward()
        return weight.grad

    words = inputs.keywords
    ours = gradient(lambda hidden, weight: linear_dpo_loss(hidden, weight, inputs.labels, **words).loss)
    theirs = gradient(lambda hidden, weight: reference.linear_dpo_loss(hidden, weight, inputs.labels, **words))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_gradient_checkpointing_changes_nothing():
    inputs = make_inputs(BY_NAME["whole_pairs_in_groups"])
    plain = torch.autograd.grad(inputs.loss().loss, inputs.trained)

    def loss(hidden, weight):
        return linear_dpo_loss(hidden * 1.0, weight, inputs.labels, **inputs.keywords).loss

    again = torch.utils.checkpoint.checkpoint(loss, inputs.hidden, inputs.weight, use_reentrant=False)
    for a, b in zip(torch.autograd.grad(again, inputs.trained), plain, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("options", [{}, {"loss_type": "aot"}], ids=["whole_pairs", "coupled"])
def test_autocast_multiplies_in_16_bits_and_keeps_the_weights_gradient_in_float32(options):
    inputs = make_inputs(Case("autocast", options=options))
    narrow = inputs.cast(_BF16)
    truth = torch.autograd.grad(narrow.loss(grad_filter=None).loss, narrow.trained)
    with torch.autocast("cpu", dtype=_BF16):
        out = inputs.loss(grad_filter=None)
    hidden, weight = torch.autograd.grad(out.loss, inputs.trained)
    assert hidden.dtype == weight.dtype == _F32
    assert torch.equal(hidden.bfloat16(), truth[0])
    assert torch.equal(weight.bfloat16(), truth[1])
    # The float32 sum has more bits than bfloat16, so it was never rounded to bfloat16.
    assert not torch.equal(weight, weight.bfloat16().float())


def test_mixed_dtypes_without_autocast_are_an_error_that_says_so():
    inputs = make_inputs(BY_NAME["whole_pairs"])
    with pytest.raises(TypeError, match="autocast"):
        linear_dpo_loss(inputs.hidden.bfloat16(), inputs.weight, inputs.labels, **inputs.keywords)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_only_the_forward_runs(mode):
    inputs = make_inputs(BY_NAME["whole_pairs"])
    with mode():
        out = inputs.loss()
    torch.testing.assert_close(out.loss, inputs.loss().loss.detach(), rtol=2e-6, atol=0)


def test_empty_batches_give_zero_and_zero_gradients():
    inputs = make_inputs(BY_NAME["bias"])
    inputs.labels.fill_(-100)
    out = inputs.loss()
    torch.testing.assert_close(out.losses, torch.full_like(out.losses, 2.0).log())
    for gradient in torch.autograd.grad(out.loss, inputs.trained):
        assert not gradient.any()
    nothing = linear_dpo_loss(
        torch.zeros(0, 4, 16), inputs.weight, torch.zeros(0, 4, dtype=torch.int64), ref_logps=torch.zeros(0)
    )
    assert nothing.loss == 0
    nothing.loss.backward()


@pytest.mark.parametrize("options", [{}, {"loss_type": "aot"}, {"reduction": "none"}], ids=str)
def test_a_label_outside_the_vocabulary_is_named_with_row_and_position(options):
    inputs = make_inputs(Case("labels", options=options))
    inputs.labels[2, 3] = 97
    with pytest.raises(ValueError, match="label 97 at row 2, position 3"):
        inputs.loss()


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "name", ["bias", "own_reference_head_kl", "coupled", "frozen_head", "packed", "tdpo", "wpo_packed_mix"]
)
def test_compiled_without_graph_breaks_it_equals_eager(fresh_dynamo, name):
    case = BY_NAME[name]
    inputs, others = make_inputs(case), make_inputs(case)

    def step(hidden, weight, bias):
        return linear_dpo_loss(hidden, weight, inputs.labels, bias=bias, **inputs.keywords).loss

    loss = torch.compile(step, fullgraph=True, backend="aot_eager")(inputs.hidden, inputs.weight, inputs.bias)
    plain = others.loss().loss
    torch.testing.assert_close(loss, plain, rtol=2e-6, atol=0)
    compiled_gradients = torch.autograd.grad(loss, inputs.trained)
    for a, b in zip(compiled_gradients, torch.autograd.grad(plain, others.trained), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_opcheck_passes_for_the_operators():
    inputs = make_inputs(BY_NAME["bias"])
    ref = inputs.keywords["ref_hidden"]
    shared = (inputs.labels, ref, inputs.weight.detach(), None, -100, 1.0, 0.0, ["kl", "entropy", "log_sum_sq"])
    shared = (*shared, ["kl", "forward_kl"], _F32, 2**20, "cpu")
    ops = torch.ops.dpo_kernels
    torch.library.opcheck(ops.linear_logps.default, (inputs.hidden, inputs.weight, inputs.bias, *shared))
    leaves = tuple(t.detach() for t in (inputs.hidden, inputs.weight, inputs.bias))
    found = ops.linear_logps(*leaves, *shared)
    alone = (inputs.labels, None, None, None, *shared[4:7], [], [], *shared[9:])
    for needs, call in (((True, True, True), shared), ((True, False, False), alone)):
        upstream = [torch.rand_like(found[0]) for _ in range(1 + len(call[8]))] + [None] * (2 - len(call[8]))
        torch.library.opcheck(ops.linear_logps_grad.default, (*leaves, *call, found, *upstream, *needs))
    scored = (inputs.labels != -100).double()
    each = torch.full((len(inputs.labels) // 2,), 0.1, dtype=torch.float64)
    pairs = (scored, scored, None, each, each, None, None, "sigmoid", 0.3, True, "mean", True, True, True)
    shared = (*shared[:8], ["kl"], *shared[9:])
    torch.library.opcheck(ops.linear_whole_pairs.default, (inputs.hidden, inputs.weight, inputs.bias, *shared, *pairs))


def test_a_compiled_graph_projects_no_token_twice(fresh_dynamo, monkeypatch):
    from dpo_kernels.linear import chunk

    project, rows = chunk.Projection.project, []

    def counted(self, hidden, tokens=None):
        rows.append(hidden.shape[0])
        return project(self, hidden, tokens)

    monkeypatch.setattr(chunk.Projection, "project", counted)
    inputs = make_inputs(BY_NAME["bias"])

    def step(hidden, weight, bias):
        return linear_dpo_loss(hidden, weight, inputs.labels, bias=bias, **inputs.keywords).loss

    loss = torch.compile(step, fullgraph=True, backend="aot_eager")(inputs.hidden, inputs.weight, inputs.bias)
    torch.autograd.grad(loss, inputs.trained)
    assert sum(rows) == int((inputs.labels != -100).sum())


def test_the_module_equals_the_function_and_follows_its_hyper_parameters():
    inputs = make_inputs(BY_NAME["whole_pairs"])
    module = LinearDPOLoss(0.3, objective("simpo", gamma=0.7), statistics=("kl", "entropy"), memory_budget="1MB")
    out = module(inputs.hidden, inputs.weight, inputs.labels)
    plain = linear_dpo_loss(
        inputs.hidden,
        inputs.weight,
        inputs.labels,
        beta=0.3,
        loss_type=objective("simpo", gamma=0.7),
        statistics=("entropy",),
    )
    assert torch.equal(out.loss, plain.loss)
    assert torch.equal(out.entropy, plain.entropy)
    assert out.kl is None  # there is no reference


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": torch.zeros(97)}, "weight must be the LM head's weight"),
        ({"weight": torch.zeros(97, 15)}, r"\[97, 16\]"),
        ({"bias": torch.zeros(5)}, "bias"),
        ({"ref_logps": torch.zeros(6)}, "not both"),
        ({"ref_hidden": None, "ref_logps": torch.zeros(6), "statistics": ("kl",)}, "needs ref_hidden"),
        ({"ref_hidden": None, "ref_logps": torch.zeros(6), "ref_weight": torch.zeros(97, 16)}, "need ref_hidden"),
        ({"ref_hidden": torch.zeros(6, 5, 16)}, "ref_hidden"),
        ({"ref_weight": torch.zeros(96, 16)}, "ref_weight"),
        ({"statistics": ("speed",)}, "grad_dropped_mass"),
        ({"grad_filter": "some"}, "grad_filter"),
        ({"grad_filter": 2.0}, "grad_filter"),
        ({"memory_budget": 100}, "at least"),
        ({"reduction": "median"}, "reduction"),
        ({"ref_hidden": None, "ref_logps": torch.zeros(6), "loss_type": "tdpo"}, "needs ref_hidden"),
        ({"ref_hidden": None, "ref_logps": torch.zeros(6), "kl_coef": 0.1}, "needs ref_hidden"),
        ({"kl_coef": -0.1}, "must not be negative"),
        ({"hidden": torch.zeros(5, 6, 16)}, "hidden|labels"),
    ],
)
def test_wrong_arguments_raise_and_say_what_was_expected(options, message):
    inputs = make_inputs(BY_NAME["whole_pairs"])
    words = {"hidden": inputs.hidden, "weight": inputs.weight, "labels": inputs.labels, **inputs.keywords, **options}
    with pytest.raises((ValueError, TypeError), match=message):
        linear_dpo_loss(words.pop("hidden"), words.pop("weight"), words.pop("labels"), **words)


def test_sharded_heads_are_gathered_and_their_gradients_sharded(tmp_path):
    distributed = pytest.importorskip("torch.distributed")
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    distributed.init_process_group(
        "gloo", store=distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    try:
        mesh = distributed.init_device_mesh("cpu", (1,))
        inputs, plain = make_inputs(BY_NAME["whole_pairs"]), make_inputs(BY_NAME["whole_pairs"])
        sharded = distribute_tensor(inputs.weight.detach(), mesh, [Shard(0)]).requires_grad_()
        linear_dpo_loss(inputs.hidden, sharded, inputs.labels, **inputs.keywords).loss.backward()
        plain.loss().loss.backward()
        assert isinstance(sharded.grad, DTensor)
        assert torch.equal(sharded.grad.to_local(), plain.weight.grad)

        grads = []
        for shard in (lambda tensor: tensor, lambda tensor: distribute_tensor(tensor, mesh, [Shard(0)])):
            vocab, inputs = plain.weight.shape[0], make_inputs(BY_NAME["whole_pairs"])
            weight, bias = shard(inputs.weight.detach()), shard(torch.linspace(-1, 1, vocab)).requires_grad_()
            words = inputs.keywords | {"ref_bias": bias.detach() * 1.0}
            if words.get("ref_weight") is not None:
                words["ref_weight"] = shard(words["ref_weight"])
            linear_dpo_loss(inputs.hidden, weight, inputs.labels, bias=bias, **words).loss.backward()
            grads.append(bias.grad)
        assert isinstance(grads[1], DTensor)
        torch.testing.assert_close(grads[1].to_local(), grads[0])
    finally:
        distributed.destroy_process_group()


_PEAK = """
import torch
from dpo_kernels import linear_dpo_loss
P, T, H, V, budget = 4, 128, 64, 16384, 6 * 2**20
hidden, ref = (torch.randn(2 * P, T, H, requires_grad=need) for need in (True, False))
labels = torch.randint(0, V, (2 * P, T))

def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

def step(weight, options):
    leaves = [t for t in (hidden, weight) if t.requires_grad]
    out = linear_dpo_loss(hidden, weight, labels, ref_hidden=ref, memory_budget=budget, **options)
    torch.autograd.grad(out.loss.sum(), leaves)

for options in ({}, {"loss_type": "aot"}, {"frozen": True}, {"statistics": ("kl",)}, {"reduction": "none"}):
    weight = torch.randn(V, H).requires_grad_(not options.pop("frozen", False))
    step(weight, options)  # libraries allocate their scratch once
    open("/proc/self/clear_refs", "w").write("5")
    before = status("VmRSS")
    step(weight, options)
    print(status("VmHWM") - before - weight.numel() * 4 * weight.requires_grad - hidden.numel() * 4)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the kernel's peak of resident memory")
@pytest.mark.parametrize("dtype", [_F32, _BF16, _F64])
def test_rows_of_the_logits_buffer_lie_apart_on_a_cpu(dtype):
    """Without padding, V = 4,096 would map a column of the logits to one set of the cache (`gpu.row_stride`)."""
    buffer = logits_buffer(5, 4096, dtype, torch.device("cpu"))
    assert buffer.shape == (5, 4096)
    assert buffer.stride() == (row_stride(4096, dtype.itemsize), 1)


def test_peak_memory_stays_within_the_budget():
    """Logits of 64 MiB per model with a budget of 6 MiB, checked by the process's peak of resident memory."""
    done = subprocess.run(
        [sys.executable, "-c", _PEAK], capture_output=True, text=True, check=True, env={"OMP_NUM_THREADS": "1"}
    )
    peaks = [int(line) for line in done.stdout.split()]
    assert len(peaks) == 5
    # Other tensors (float64 tables of 1,024 tokens) and the allocator's overhead take less than half a MiB.
    assert max(peaks) <= 6.5 * 2**20, peaks
