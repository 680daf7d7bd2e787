"""ms-swift's functions and our replacements compute the same.

ms-swift and TRL are stand-ins here: modules with their names and contracts, whose functions are written out below. The true
versions run in tests/test_frameworks.py, which applies the same patch and so compares every example with the true functions.
"""

import importlib
import json
import shlex
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from frameworks import matrix

from dpo_kernels.integrations import ms_swift

import docs_pages

UTILS = """
def selective_log_softmax(logits, index):
    return logits.log_softmax(-1).gather(-1, index.unsqueeze(-1)).squeeze(-1)

def entropy_from_logits(logits, chunk_size=128):
    logps = logits.log_softmax(-1)
    return -(logps.exp() * logps).sum(-1)
"""
MIXIN = """
import torch
from trl.trainer.utils import selective_log_softmax

class RLHFTrainerMixin:
    def get_per_token_logps(self, logits, labels, label_pad_token_id=-100, reduction="mean"):
        if logits.shape[:-1] != labels.shape:
            raise ValueError("same shape")
        if reduction not in ("mean", "sum"):
            raise ValueError(f"Invalid reduction: {reduction}")
        mask = labels != label_pad_token_id
        reduced = logits.mean(-1) if reduction == "mean" else logits.sum(-1)
        logps = selective_log_softmax(logits, torch.where(mask, labels, 0))
        if self.template.sequence_parallel_size > 1:
            return "gathered", logps, mask
        return torch.where(mask, logps, 0), torch.where(mask, reduced, 0), mask
"""
PLACES = {3: "swift.trainers.rlhf_trainer.rlhf_mixin", 4: "swift.rlhf_trainers.rlhf_mixin"}


def install(folder, monkeypatch, version=4, **changed):
    """Write the stand-ins to a folder and put it on the path; returns (the mixin's module, TRL's)."""
    sources = {"trl.trainer.utils": changed.get("utils", UTILS), PLACES[version]: changed.get("mixin", MIXIN)}
    for name, source in sources.items():
        path = folder.joinpath(*name.split(".")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
        for package in list(path.parents)[: name.count(".")]:
            (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(folder)
    return importlib.import_module(PLACES[version]), importlib.import_module("trl.trainer.utils")


def loaded():
    return {name: module for name, module in sys.modules.items() if name.partition(".")[0] in ("swift", "trl")}


@pytest.fixture(autouse=True)
def only_the_stand_ins():
    """The true TRL, which other tests have perhaps imported, comes back after the test."""
    true = loaded()
    for name in true:
        del sys.modules[name]
    yield
    ms_swift._PATCH.undo()
    for name in loaded():
        del sys.modules[name]
    sys.modules.update(true)


@pytest.fixture(params=[3, 4], ids=["3.12", "4.x"])
def modules(request, tmp_path, monkeypatch):
    return install(tmp_path, monkeypatch, request.param)


def trainer_of(module, parallel=1):
    trainer = module.RLHFTrainerMixin()
    trainer.template = SimpleNamespace(sequence_parallel_size=parallel)
    return trainer


def batch(dtype=torch.float32, pad=-100, rows=4, tokens=9, vocab=23):
    """Logits and labels, which are shifted already; the last sequence has no label that counts, and one has a gap."""
    g = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(rows, tokens, vocab, generator=g, dtype=torch.float64)).to(dtype)
    labels = torch.randint(1, vocab, (rows, tokens), generator=g)
    for row, (first, end) in enumerate([(3, 9), (2, 5), (0, 8), (9, 9)]):
        labels[row, :first] = labels[row, end:] = pad
    labels[0, 5] = pad
    return logits, labels


def truth(logits, labels, pad, reduction):
    """Log-probabilities and reduced logits of the tokens in float64, one token after the other."""
    logps, reduced = (torch.zeros(labels.shape, dtype=torch.float64) for _ in range(2))
    for place in (labels != pad).nonzero().tolist():
        row = logits[tuple(place)].double()
        logps[tuple(place)] = row.log_softmax(-1)[labels[tuple(place)]]
        reduced[tuple(place)] = getattr(row.detach(), reduction)()
    return logps, reduced


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("pad", [-100, 0])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_probabilities_logits_and_gradients(modules, dtype, reduction, pad, inplace):
    logits, labels = batch(dtype, pad)
    trainer = trainer_of(modules[0])
    weights = torch.randn(labels.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    exact = logits.detach().clone().double().requires_grad_()
    wanted, reduced = truth(exact, labels, pad, reduction)
    (wanted * weights).sum().backward()
    theirs = trainer.get_per_token_logps(logits, labels, pad, reduction)
    leaf = logits.clone().requires_grad_()
    with ms_swift.applied(inplace_backward=inplace):
        found = trainer.get_per_token_logps(leaf * 1, labels, label_pad_token_id=pad, reduction=reduction)
        (found[0] * weights.to(dtype)).sum().backward()
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(found[0], wanted.to(dtype), **tolerance)
    torch.testing.assert_close(found[1], reduced.to(dtype), **tolerance)
    torch.testing.assert_close(found, theirs, **tolerance)
    torch.testing.assert_close(leaf.grad, exact.grad.to(dtype), **tolerance)
    assert not found[0][3].any()
    assert not leaf.grad[3].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_16_bit_logits_give_float32(modules, dtype, reduction):
    logits, labels = batch(dtype)
    wanted, reduced = truth(logits, labels, -100, reduction)
    theirs = trainer_of(modules[0]).get_per_token_logps(logits, labels, reduction=reduction)
    leaf = logits.clone().requires_grad_()
    with ms_swift.applied():
        found = trainer_of(modules[0]).get_per_token_logps(leaf, labels, reduction=reduction)
        found[0].sum().backward()
    assert (theirs[0].dtype, theirs[1].dtype) == (dtype, dtype)
    assert (found[0].dtype, found[1].dtype, leaf.grad.dtype) == (torch.float32, torch.float32, dtype)
    torch.testing.assert_close(found[0], wanted.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[1], reduced.float(), rtol=1e-5, atol=1e-5)
    assert torch.equal(found[2], theirs[2])
    assert not found[1].requires_grad


def test_logits_of_ignored_tokens_are_not_read(modules):
    logits, labels = batch()
    hidden = torch.where((labels == -100).unsqueeze(-1), torch.nan, logits).requires_grad_()
    with ms_swift.applied():
        logps, mean, _ = trainer_of(modules[0]).get_per_token_logps(hidden, labels)
        logps.sum().backward()
    wanted, reduced = truth(logits, labels, -100, "mean")
    torch.testing.assert_close((logps, mean), (wanted.float(), reduced.float()), rtol=1e-5, atol=1e-5)
    assert hidden.grad.isfinite().all()


@pytest.mark.parametrize("label", [23, -1, -101])
def test_labels_outside_the_vocabulary(modules, label):
    logits, labels = batch()
    labels[0, 4] = label
    with pytest.raises(RuntimeError):
        trainer_of(modules[0]).get_per_token_logps(logits, labels)
    with ms_swift.applied(), pytest.raises(ValueError, match=f"{label}"):
        trainer_of(modules[0]).get_per_token_logps(logits, labels)


def test_other_arguments_that_are_wrong(modules):
    logits, labels = batch()
    with ms_swift.applied():
        with pytest.raises(ValueError, match="Invalid reduction: max"):
            trainer_of(modules[0]).get_per_token_logps(logits, labels, reduction="max")
        with pytest.raises(ValueError, match="same shape"):
            trainer_of(modules[0]).get_per_token_logps(logits[:, 1:], labels)


def test_strided_views(modules):
    wide, labels = batch(tokens=12)
    trainer = trainer_of(modules[0])
    transposed = wide.transpose(0, 1).contiguous().transpose(0, 1)
    cases = [
        (wide[:, -9:], labels[:, -9:]),
        (wide[::2], labels[::2].roll(-1, 1)),
        (wide[..., :20], labels.clamp(max=19)),
        (transposed, labels),
        (wide[:, :0], labels[:, :0]),
        (wide[:2, :1].expand(2, 5, 23), labels[:2, :5]),
    ]
    wanted = [trainer.get_per_token_logps(*case) for case in cases]
    with ms_swift.applied():
        found = [trainer.get_per_token_logps(*case) for case in cases]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_sequence_parallelism_is_ms_swifts_own(modules):
    logits, labels = batch()
    trainer = trainer_of(modules[0], parallel=2)
    wanted = trainer.get_per_token_logps(logits, labels)
    with ms_swift.applied():
        found = trainer.get_per_token_logps(logits, labels, reduction="sum")
    assert found[0] == wanted[0] == "gathered"
    torch.testing.assert_close(found[1], wanted[1], rtol=1e-5, atol=1e-5)


class Distributed(torch.Tensor):
    """A kind of tensor that the kernels do not take."""


def test_other_kinds_of_tensors_are_left_to_ms_swift(modules):
    logits, labels = batch(torch.bfloat16)
    other = logits.as_subclass(Distributed)

    def results():
        return (
            *trainer_of(modules[0]).get_per_token_logps(other, labels),
            modules[1].selective_log_softmax(other, labels.clamp(min=0)),
            modules[1].entropy_from_logits(other),
        )

    wanted = results()
    with ms_swift.applied():
        found = results()
    assert type(found[0]) is type(found[3]) is type(found[4]) is Distributed
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 5), (7,), ()])
def test_trls_functions_keep_shape_dtype_and_gradient(modules, dtype, shape):
    g = torch.Generator().manual_seed(2)
    logits = (3 * torch.randn(*shape, 23, generator=g, dtype=torch.float64)).to(dtype)
    index = torch.randint(23, shape, generator=g)
    weights = torch.randn(shape, generator=g, dtype=torch.float64)
    utils, results = modules[1], []

    def values_and_gradients():
        found = []
        for function, rest in ((utils.selective_log_softmax, (index,)), (utils.entropy_from_logits, ())):
            leaf = logits.clone().requires_grad_()
            value = function(leaf, *rest)
            (value.double() * weights).sum().backward()
            found += [value, leaf.grad]
        return found

    wanted = values_and_gradients()
    with ms_swift.applied():
        results = values_and_gradients()
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.04}[dtype]
    assert [value.dtype for value in results] == [dtype] * 4
    torch.testing.assert_close(results, wanted, rtol=tolerance, atol=tolerance)


def test_every_module_gets_the_replacements_and_gets_the_originals_back(modules):
    mixin, utils = modules
    before = [mixin.selective_log_softmax, utils.entropy_from_logits, mixin.RLHFTrainerMixin.get_per_token_logps]

    class Trainer(mixin.RLHFTrainerMixin):
        pass

    ms_swift.apply()
    undo = ms_swift.apply()
    assert mixin.selective_log_softmax is utils.selective_log_softmax is not before[0]
    assert utils.entropy_from_logits is not before[1]
    assert Trainer.get_per_token_logps is mixin.RLHFTrainerMixin.get_per_token_logps is not before[2]
    undo()
    undo()
    after = [mixin.selective_log_softmax, utils.entropy_from_logits, mixin.RLHFTrainerMixin.get_per_token_logps]
    assert after == before
    assert utils.selective_log_softmax is before[0]


def test_a_trl_without_entropy(tmp_path, monkeypatch):
    mixin, utils = install(tmp_path, monkeypatch, utils=UTILS.partition("def entropy")[0])
    theirs = mixin.selective_log_softmax
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with ms_swift.applied():
            assert mixin.selective_log_softmax is utils.selective_log_softmax is not theirs
            assert not hasattr(utils, "entropy_from_logits")


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"mixin": MIXIN.replace('reduction="mean"', 'reduction="mean", shift=True')}, "has the arguments"),
        ({"mixin": MIXIN.replace("logits.sum(-1)", "logits.amax(-1)")}, "does not compute"),
        ({"mixin": MIXIN.replace("torch.where(mask, logps, 0)", "logps")}, "does not compute"),
        ({"mixin": MIXIN.replace("self.template", "self.settings.template")}, "failed on a small example"),
        ({"utils": UTILS.replace("(logits, index)", "(logits, index, temperature=1.0)")}, "has the arguments"),
        ({"utils": UTILS.replace("-(logps", "(logps")}, "does not compute"),
    ],
)
def test_an_unknown_contract_changes_nothing(tmp_path, monkeypatch, changed, reason):
    mixin, utils = install(tmp_path, monkeypatch, **changed)
    before = [dict(vars(module)) for module in (mixin, utils, mixin.RLHFTrainerMixin)]
    with pytest.warns(RuntimeWarning, match="ms-swift .* was left as it is") as caught:
        undo = ms_swift.apply()
    assert [reason in str(warning.message) for warning in caught] == [True]
    undo()
    assert [dict(vars(module)) for module in (mixin, utils, mixin.RLHFTrainerMixin)] == before


def test_without_the_package(monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(ImportError):
        ms_swift.apply()


#: Runs ms-swift's command with the kernels counted; the examples of `apply()` count too.
RUN = """
import runpy, sys
from contextlib import ExitStack
from tests.frameworks.compare import calls_counted
with ExitStack() as stack:
    calls = calls_counted(stack)
    runpy.run_module("swift.cli.rlhf", run_name="__main__")
    print("calls", len(calls))
"""


@pytest.mark.slow
def test_the_pages_command_trains(tmp_path):
    """The plugin and the command of docs/migration/ms_swift.md, with a tiny model."""
    from frameworks import compare, material

    entry = next(entry for entry in matrix.ENTRIES if entry.name == "ms_swift-4.6.0")
    assert all(matrix.folder(package).is_dir() for package in entry.packages), (
        "python tests/frameworks/matrix.py install"
    )
    page = next(page for page in docs_pages.PAGES if page.name == "ms_swift.md")
    plugin, _, command = docs_pages.blocks(page)[0].text.partition("END\nswift ")
    subprocess.run(["bash", "-ec", plugin + "END\n"], cwd=tmp_path, check=True)
    size = compare.TINY
    material.model_of(size).save_pretrained(tmp_path / "model")
    material.tokenizer_of(size).save_pretrained(tmp_path / "model")
    rows = [
        {
            "messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["chosen"]}],
            "rejected_response": row["rejected"],
        }
        for row in material.pairs_of(size)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    verb, *words = shlex.split(command.replace("Qwen/Qwen2.5-7B-Instruct", "model"))
    assert verb == "rlhf"
    words += shlex.split(
        "--model_type llama --template dummy --tuner_type full --torch_dtype float32 --output_dir out --max_steps 3 "
        f"--per_device_train_batch_size {size.pairs} --gradient_accumulation_steps 1 --logging_steps 1 --report_to none "
        "--check_model false --use_cpu true --split_dataset_ratio 0 --save_strategy no"
    )
    environment = matrix.environment(entry)
    (tmp_path / "aiohttp.py").touch()  # imported at the top of ms-swift's loader of data sets
    environment["PYTHONPATH"] += f":{tmp_path}"
    arguments = [sys.executable, "-W", "error:dpo_kernels:RuntimeWarning", "-c", RUN, *words]
    done = subprocess.run(arguments, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.split("calls ")[-1]) >= 2 * 3  # policy and reference of each step
    log = next((tmp_path / "out").rglob("logging.jsonl")).read_text().splitlines()
    assert abs(json.loads(log[0])["loss"] - 0.6931) < 1e-4
