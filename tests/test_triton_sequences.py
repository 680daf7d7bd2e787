"""Stage 2 in Triton: long sequences computed by several programs, and invalid bounds."""

import itertools
import sys

import pytest
import torch

from dpo_kernels import backends

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
triton_backend = backends.load("triton", DEVICE)
stage = sys.modules["dpo_kernels.backends.triton.preference_loss"]

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

#: More than four chunks, exactly two chunks, one chunk and a token, less than a chunk, no token, exactly one chunk.
LENGTHS = (4500, 2048, 1025, 70, 0, 1024)


@pytest.fixture
def packed():
    generator = torch.Generator().manual_seed(5)
    total = sum(LENGTHS)
    values, refs, weights = (torch.rand(1, total, generator=generator, dtype=torch.float64) - 0.5 for _ in range(3))
    weights[0, ::7] = 0.0
    values[0, ::7] = float("nan")  # never read
    bounds = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()])
    return tuple(tensor.to(DEVICE) for tensor in (values, refs, weights, bounds))


def losses(packed, ref=True):
    values, refs, weights, bounds = packed
    pairs = torch.full(((bounds.numel() - 1) // 2,), 0.1, dtype=torch.float64, device=DEVICE)
    return triton_backend.preference_loss(values, refs if ref else None, weights, bounds, None, pairs, pairs, False)


@pytest.mark.parametrize("ref", [True, False])
def test_long_sequences_give_the_bits_of_short_ones(packed, ref, monkeypatch):
    """One program per sequence and one per chunk write the same scratch memory, from which the sums are computed."""
    monkeypatch.setattr(stage, "LONG", 1 << 20)
    alone = losses(packed, ref)
    values, _, weights, bounds = packed
    sums = triton_backend.sequence_sums(values, weights, bounds)
    launches = []
    monkeypatch.setattr(stage, "LONG", 1024)
    monkeypatch.setattr(
        stage.Launch, "run", lambda self, like, run=stage.Launch.run: launches.append(self) or run(self, like)
    )
    for mine, expected in zip(losses(packed, ref), alone, strict=True):
        assert torch.equal(mine, expected)
    assert torch.equal(triton_backend.sequence_sums(values, weights, bounds), sums)
    assert [launch.grid for launch in launches] == [(6, 9), (3,), (6, 9), (6,)]
    truth = torch.stack(
        [(values[0, a:b] * weights[0, a:b])[weights[0, a:b] != 0].sum() for a, b in itertools.pairwise(bounds)]
    )
    torch.testing.assert_close(sums, truth, rtol=1e-12, atol=1e-12)


def test_padded_rows_longer_than_a_program_takes_alone(monkeypatch):
    monkeypatch.setattr(stage, "LONG", 1024)
    values = torch.arange(2.0 * 3000, dtype=torch.float64, device=DEVICE).reshape(2, 3000)
    weights = (torch.arange(3000, device=DEVICE) % 3 == 1).double().expand(2, 3000).contiguous()
    sums = triton_backend.sequence_sums(values, weights, None)
    assert torch.equal(sums, (values * weights).sum(-1))
