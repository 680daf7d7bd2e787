"""The DPO step of every framework is the same with our kernels as without them, in float32.

Each entry of tests/frameworks/matrix.py is one version of a framework, which runs its own code in a process of its own.
"""

import importlib

import pytest
import torch
from frameworks import compare, matrix
from trainer.docs_scripts import load_script

from dpo_kernels import logps


@pytest.mark.parametrize(
    "entry",
    [pytest.param(entry, id=entry.name, marks=() if entry.sample else pytest.mark.slow) for entry in matrix.ENTRIES],
)
def test_the_step_is_the_same(entry):
    missing = [package for package in entry.packages if not matrix.folder(package).is_dir()]
    assert not missing, f"run: python tests/frameworks/matrix.py install {entry.name}"
    found = matrix.run(entry)
    check(found)
    versions = {name.replace("_", "-"): version for name, version in found["versions"].items()}
    wanted = {name.replace("_", "-"): version for name, version in (text.split("==") for text in entry.packages)}
    assert not wanted or next(iter(wanted)) in versions
    assert {name: wanted.get(name, version) for name, version in versions.items()} == versions


def check(found):
    """Whether the kernels computed the policy's part of the step, and the step is the same."""
    assert found["kernels_used"]
    assert found["same_parameters"]
    assert found["grad_norm"] > 0
    assert found["loss_difference"] < 1e-5 * max(1, abs(found["loss"]))
    assert found["grad_difference"] < 1e-4
    assert found["undone"]
    assert found["kernels_used_after_undo"] == 0


def test_an_unknown_entry_is_an_error(monkeypatch):
    monkeypatch.setattr("sys.argv", ["matrix.py", "run", "trl-0.0.0"])
    with pytest.raises(SystemExit, match=r"no entry has the name trl-0\.0\.0"):
        matrix.main()


class Planted:
    """A DPO step on logits of a linear layer, and a replacement for its log-probabilities with a fault."""

    def __init__(self, fault):
        self.fault, self.logps = fault, self.plain
        self.states, self.labels = torch.randn(4, 3, 5), torch.randint(7, (4, 3))
        self.layers = torch.nn.ModuleDict({"first": torch.nn.Linear(5, 5), "last": torch.nn.Linear(5, 7)})

    def plain(self, logits):
        return logits.log_softmax(-1).gather(-1, self.labels.unsqueeze(-1)).squeeze(-1)

    def ours(self, logits):
        if self.fault == "only the reference" and logits.requires_grad:
            return self.plain(logits)
        return logps.token_logps(logits, self.labels)

    def step(self):
        self.layers.zero_grad()
        logits = self.layers["last"](self.layers["first"](self.states))
        if self.logps == self.ours and self.fault == "gradients":
            logits.register_hook(lambda grad: 1.01 * grad)
        chosen, rejected = (self.logps(logits) - self.logps(logits.detach() * 0.5)).sum(-1).chunk(2)
        loss = -torch.nn.functional.logsigmoid(chosen - rejected).mean()
        loss.backward()
        grads = {name: parameter.grad.clone() for name, parameter in self.layers.named_parameters()}
        if self.logps == self.ours and self.fault == "NaN":
            grads["last.bias"] *= float("nan")
        return loss.item(), grads

    def apply(self):
        self.logps = self.ours

        def undo():
            self.logps = self.ours if self.fault == "undo" else self.plain

        return undo


@pytest.mark.parametrize("fault", ["none", "gradients", "NaN", "only the reference", "undo"])
def test_the_comparison_sees_planted_faults(fault):
    planted = Planted(fault)
    found = compare.compare(planted.step, planted.apply)
    if fault == "none":
        check(found)
    else:
        with pytest.raises(AssertionError):
            check(found)


def test_the_tables_show_the_results():
    for path, text in load_script("frameworks_tables").wanted().items():
        assert path.read_text(encoding="utf-8") == text, "run: python docs/frameworks_tables.py"


def test_every_framework_has_its_integration_page_version_and_result():
    tables = load_script("frameworks_tables")
    found = tables.results()
    assert {entry.framework for entry in matrix.ENTRIES} == set(tables.FRAMEWORKS)
    for name in tables.FRAMEWORKS:
        integration = importlib.import_module(f"dpo_kernels.integrations.{name}")
        assert callable(integration.apply)
        assert callable(integration.applied)
        assert (tables.ROOT / "docs" / "migration" / f"{name}.md").is_file()
        assert any("measured" in entry for entry in found[name]), f"run: tests/frameworks/matrix.py write {name}"
    names = [entry["name"] for entries in found.values() for entry in entries]
    assert sorted(names) == sorted(entry.name for entry in matrix.ENTRIES)
    for entries in found.values():
        for entry in entries:
            check(entry)
