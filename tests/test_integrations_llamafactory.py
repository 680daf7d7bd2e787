"""LLaMA-Factory's functions and our replacements compute the same.

LLaMA-Factory is a stand-in here: modules with its names and contracts, whose functions are written out below. The true versions
run in tests/test_frameworks.py, which applies the same patch and so compares every example with the true functions.
"""

import importlib
import json
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch
from frameworks import matrix

from dpo_kernels.integrations import llamafactory

import docs_pages

TRAINER_UTILS = """
import torch

IGNORE_INDEX = -100

def get_batch_logps(logits, labels, label_pad_token_id=IGNORE_INDEX, ld_alpha=None):
    if logits.shape[:-1] != labels.shape:
        raise ValueError("same shape")
    log_probs = logits[:, :-1].log_softmax(-1)
    mask = labels[:, 1:] != label_pad_token_id
    tokens = log_probs.gather(2, torch.where(mask, labels[:, 1:], 0)[..., None])[..., 0]
    lengths = mask.sum(1)
    if ld_alpha is None:
        return (tokens * mask).sum(1), lengths
    half = len(labels) // 2
    common = torch.min(lengths[:half], lengths[half:])
    end = mask.int().argmax(1) + torch.cat([common, common])
    public = torch.arange(mask.shape[1])[None] < end[:, None]
    return (tokens * (mask & public)).sum(1) + ld_alpha * (tokens * (mask & ~public)).sum(1), lengths

def _dft_cross_entropy(source, target, num_items_in_batch=None, ignore_index=-100):
    mask = target != ignore_index
    if not mask.any():
        return torch.tensor(0.0, dtype=source.dtype)
    losses = torch.nn.functional.cross_entropy(source[mask], target[mask], reduction="none")
    losses = losses * torch.exp(-losses).detach()
    return losses.mean() if num_items_in_batch is None else losses.sum() / num_items_in_batch
"""
DPO_TRAINER = """
import torch
from ..trainer_utils import get_batch_logps

class CustomDPOTrainer:
    ld_alpha = None

    def concatenated_forward(self, model, batch, is_ref_model=False):
        logits = model(**batch, return_dict=True, use_cache=False).logits.to(torch.float32)
        logps, lengths = get_batch_logps(logits=logits, labels=batch["labels"], ld_alpha=self.ld_alpha)
        return {"logps": logps, "logits": logits}
"""
KTO_TRAINER = """
import torch
from ..trainer_utils import get_batch_logps

class CustomKTOTrainer:
    def forward(self, model, batch, prefix=""):
        logits = model(**batch, return_dict=True, use_cache=False).logits.to(torch.float32)
        logps, lengths = get_batch_logps(logits=logits, labels=batch[f"{prefix}labels"])
        return logits, logps, logps / lengths
"""


def install(folder, monkeypatch, **changed):
    """Write the stand-in to a folder and put it on the path; returns a function that imports one of its modules."""
    sources = {"trainer_utils": TRAINER_UTILS, "dpo.trainer": DPO_TRAINER, "kto.trainer": KTO_TRAINER} | changed
    for name, source in sources.items():
        path = folder.joinpath("llamafactory", "train", *name.split(".")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(source))
    for package in {path.parent for path in folder.rglob("*.py")} | {folder / "llamafactory"}:
        (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(folder)
    return lambda name: importlib.import_module(f"llamafactory.train.{name}")


@pytest.fixture(autouse=True)
def no_module_stays():
    yield
    llamafactory._PATCH.undo()
    for name in [name for name in sys.modules if name.partition(".")[0] == "llamafactory"]:
        del sys.modules[name]


@pytest.fixture
def package(tmp_path, monkeypatch):
    return install(tmp_path, monkeypatch)


def batch(dtype=torch.float32, pad=-100, rows=4, tokens=9, vocab=23):
    """Logits and labels; the last sequence has no label that counts, and one has a gap."""
    g = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(rows, tokens, vocab, generator=g, dtype=torch.float64)).to(dtype)
    labels = torch.randint(1, vocab, (rows, tokens), generator=g)
    for row, (first, end) in enumerate([(3, 9), (2, 5), (0, 8), (9, 9)]):
        labels[row, :first] = labels[row, end:] = pad
    labels[0, 5] = pad
    return logits, labels


def truth(logits, labels, pad, ld_alpha):
    """Sums of log-probabilities in float64, one token after the other."""
    sums = []
    places = [[t for t in range(1, labels.shape[1]) if labels[row, t] != pad] for row in range(len(labels))]
    half = len(labels) // 2
    for row, counted in enumerate(places):
        shared = min(len(counted), len(places[(row + half) % len(labels)]))
        total = logits.new_zeros((), dtype=torch.float64)
        for t in counted:
            value = logits[row, t - 1].double().log_softmax(-1)[labels[row, t]]
            total = total + (value if ld_alpha is None or t < counted[0] + shared else ld_alpha * value)
        sums.append(total)
    return torch.stack(sums), torch.tensor([len(counted) for counted in places])


WEIGHTS = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("pad", [-100, 0])
@pytest.mark.parametrize("ld_alpha", [None, 0.0, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_and_gradients(package, dtype, ld_alpha, pad, inplace):
    logits, labels = batch(dtype, pad)
    exact = logits.detach().clone().double().requires_grad_()
    wanted, lengths = truth(exact, labels, pad, ld_alpha)
    (wanted * WEIGHTS).sum().backward()
    theirs = package("trainer_utils").get_batch_logps(logits, labels, pad, ld_alpha)
    leaf = logits.clone().requires_grad_()
    with llamafactory.applied(inplace_backward=inplace):
        found, counted = package("trainer_utils").get_batch_logps(leaf * 1, labels, pad, ld_alpha)
        (found * WEIGHTS.to(dtype)).sum().backward()
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
    assert found.dtype == theirs[0].dtype == dtype
    assert counted.dtype == theirs[1].dtype
    assert counted.tolist() == theirs[1].tolist() == lengths.tolist() == [5, 3, 7, 0]
    torch.testing.assert_close(found, wanted.to(dtype), **tolerance)
    torch.testing.assert_close(theirs[0], wanted.to(dtype), **tolerance)
    torch.testing.assert_close(leaf.grad, exact.grad.to(dtype), **tolerance)
    assert found[3] == 0
    assert not leaf.grad[3].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ld_alpha", [None, 0.3])
def test_16_bit_logits_give_float32(package, dtype, ld_alpha):
    logits, labels = batch(dtype)
    wanted, _ = truth(logits, labels, -100, ld_alpha)
    theirs, _ = package("trainer_utils").get_batch_logps(logits, labels, ld_alpha=ld_alpha)
    leaf = logits.clone().requires_grad_()
    with llamafactory.applied():
        found, _ = package("trainer_utils").get_batch_logps(leaf, labels, ld_alpha=ld_alpha)
        found.sum().backward()
    assert found.dtype == torch.float32
    assert leaf.grad.dtype == dtype
    torch.testing.assert_close(found, wanted.float(), rtol=1e-5, atol=1e-5)
    # Their function rounds each log-probability to 16 bits, so its trainers convert the logits first.
    assert (theirs.double() - wanted).abs().max() > 20 * (found.double() - wanted).abs().max()


def test_logits_of_ignored_tokens_are_not_read(package):
    logits, labels = batch()
    hidden = logits.clone()
    ignored = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100) == -100
    hidden[ignored] = torch.nan
    leaf = hidden.requires_grad_()
    with llamafactory.applied():
        found, _ = package("trainer_utils").get_batch_logps(leaf, labels)
        found.sum().backward()
    torch.testing.assert_close(found.double(), truth(logits, labels, -100, None)[0], rtol=1e-5, atol=1e-5)
    assert leaf.grad.isfinite().all()
    assert not leaf.grad[ignored].any()


@pytest.mark.parametrize("label", [23, -1, -101])
def test_labels_outside_the_vocabulary(package, label):
    logits, labels = batch()
    labels[0, 4] = label
    get = package("trainer_utils").get_batch_logps
    with pytest.raises(RuntimeError):
        get(logits, labels)
    with llamafactory.applied(), pytest.raises(ValueError, match=f"{label}"):
        package("trainer_utils").get_batch_logps(logits, labels)


def test_strided_views_and_single_tokens(package):
    wide, labels = batch(tokens=12)
    get = package("trainer_utils").get_batch_logps
    transposed = wide.transpose(0, 1).contiguous().transpose(0, 1)
    cases = [
        (wide[:, 2:11], labels[:, 2:11]),
        (wide[::2], labels[::2]),
        (wide[..., :20], labels.clamp(max=19)),
        (transposed, labels),
        (wide[:, :1], labels[:, :1]),  # no token has a label
        (wide[:2, :1].expand(2, 5, 23), labels[:2, :5]),
    ]
    wanted = [get(*case) for case in cases]
    with llamafactory.applied():
        found = [package("trainer_utils").get_batch_logps(*case) for case in cases]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


class Distributed(torch.Tensor):
    """A kind of tensor that the kernels do not take."""


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_other_kinds_of_tensors_are_left_to_llamafactory(package, kind):
    logits, labels = batch(torch.bfloat16)
    other = logits.as_subclass(Distributed)
    utils = package("trainer_utils")
    flat = (logits.float().flatten(0, 1), labels.flatten())
    wanted = (
        utils.get_batch_logps(other, labels),
        utils._dft_cross_entropy(*flat),
        forward(package, kind, Model(other), labels),
    )
    with llamafactory.applied():
        found = (
            package("trainer_utils").get_batch_logps(other, labels),
            package("trainer_utils")._dft_cross_entropy(flat[0].as_subclass(Distributed), flat[1]),
            forward(package, kind, Model(other), labels),
        )
        assert type(found[0][0]) is type(found[1]) is Distributed
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_shapes_that_differ(package):
    logits, labels = batch()
    with llamafactory.applied(), pytest.raises(ValueError, match="same shape"):
        package("trainer_utils").get_batch_logps(logits[:, 1:], labels)


@pytest.mark.parametrize("items", [None, 7, torch.tensor(7)])
@pytest.mark.parametrize("ignore_index", [-100, 3])
def test_the_dft_loss(package, items, ignore_index):
    logits, labels = batch(torch.float64, ignore_index)

    def loss_and_gradient():
        leaf = logits.flatten(0, 1).clone().requires_grad_()
        loss = package("trainer_utils")._dft_cross_entropy(leaf, labels.flatten(), items, ignore_index)
        loss.backward()
        return loss, leaf.grad

    wanted = loss_and_gradient()
    assert wanted[1].abs().max() > 0
    with llamafactory.applied():
        torch.testing.assert_close(loss_and_gradient(), wanted, rtol=1e-12, atol=1e-12)


def test_the_dft_loss_without_labels(package):
    logits, labels = batch()
    with llamafactory.applied():
        loss = package("trainer_utils")._dft_cross_entropy(
            logits.flatten(0, 1), torch.full_like(labels.flatten(), -100)
        )
    assert loss == 0
    assert not loss.requires_grad


class Model:
    """Gives the same logits at every call, in an output with another field."""

    def __init__(self, logits):
        self.logits, self.loss = logits, "none"

    def __call__(self, **inputs):
        assert inputs.pop("return_dict")
        return self


def forward(package, kind, model, labels):
    if kind == "dpo":
        found = package("dpo.trainer").CustomDPOTrainer().concatenated_forward(model, {"labels": labels})
        return found["logps"], found["logits"]
    logits, logps, _ = package("kto.trainer").CustomKTOTrainer().forward(model, {"labels": labels})
    return logps, logits


@pytest.mark.parametrize("kind", ["dpo", "kto"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_trainers_do_not_copy_16_bit_logits(package, kind, dtype):
    logits, labels = batch(dtype)

    def run():
        leaf = logits.clone().requires_grad_()
        logps, seen = forward(package, kind, Model(leaf), labels)
        logps.sum().backward()
        return logps, seen, leaf

    wanted, converted, theirs = run()
    assert converted.dtype == wanted.dtype == torch.float32
    with llamafactory.applied():
        found, kept, ours = run()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    # Both gradients are rounded to 16 bits once, so they may differ in the last one.
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=2**-7 if dtype.itemsize == 2 else 1e-5, atol=1e-5)
    assert (kept is ours) == (dtype != torch.float64)
    assert kept.dtype == (torch.float32 if dtype == torch.float64 else dtype)
    after, converted, _ = run()
    assert torch.equal(after, wanted)
    assert converted.dtype == torch.float32


def test_the_trainers_copy_16_bit_logits_for_another_function(package, monkeypatch):
    logits, labels = batch(torch.bfloat16)
    seen = []
    with llamafactory.applied():
        monkeypatch.setattr(
            package("dpo.trainer"),
            "get_batch_logps",
            lambda logits, labels, **_: seen.append(logits) or (logits, labels),
        )
        forward(package, "dpo", Model(logits), labels)
    assert [each.dtype for each in seen] == [torch.float32]


def test_a_wrapped_model_is_the_model_in_all_else():
    logits, _ = batch(torch.bfloat16)
    model = llamafactory._Uncast(Model(logits))
    output = model(return_dict=True)
    assert (model.loss, output.loss) == ("none", "none")
    assert output.logits.to(torch.float32) is logits
    assert output.logits.shape == logits.shape
    assert torch.equal(output.logits.to(torch.float64), logits.double())
    assert torch.equal(output.logits.float(), logits.float())
    with pytest.raises(AttributeError, match="hidden_states"):
        output.hidden_states  # noqa: B018


def test_every_module_gets_the_replacement_and_gets_the_original_back(package):
    modules = [package(name) for name in ("trainer_utils", "dpo.trainer", "kto.trainer")]
    theirs = modules[0].get_batch_logps
    methods = [modules[1].CustomDPOTrainer.concatenated_forward, modules[2].CustomKTOTrainer.forward]
    undo = llamafactory.apply()
    first = modules[0].get_batch_logps
    undo = llamafactory.apply()
    ours = modules[0].get_batch_logps
    assert len({theirs, first, ours}) == 3
    assert all(module.get_batch_logps is ours for module in modules)
    undo()
    undo()
    assert all(module.get_batch_logps is theirs for module in modules)
    assert methods == [modules[1].CustomDPOTrainer.concatenated_forward, modules[2].CustomKTOTrainer.forward]


def test_modules_imported_later_and_versions_with_less(tmp_path, monkeypatch):
    """Before 0.9.3 get_batch_logps has no ld_alpha, and before 0.9.4 there is no DFT."""
    old = (
        TRAINER_UTILS.partition("def _dft")[0]
        .replace(", ld_alpha=None", "\n    , ")
        .replace("if ld_alpha is None:", "if True:")
    )
    trainer = DPO_TRAINER.replace(", is_ref_model=False", "").replace(", ld_alpha=self.ld_alpha", "")
    package = install(tmp_path, monkeypatch, **{"trainer_utils": old, "dpo.trainer": trainer})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        undo = llamafactory.apply()
    logits, labels = batch(torch.bfloat16)
    assert forward(package, "dpo", Model(logits), labels)[1] is logits
    (tmp_path / "llamafactory" / "train" / "late.py").write_text("from .trainer_utils import get_batch_logps\n")
    importlib.invalidate_caches()
    late = package("late")
    assert late.get_batch_logps is package("trainer_utils").get_batch_logps
    undo()
    assert not hasattr(late.get_batch_logps, "reads_16_bits")


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"trainer_utils": TRAINER_UTILS.replace("ld_alpha=None", "ld_alpha=None, shift=True")}, "has the arguments"),
        ({"trainer_utils": TRAINER_UTILS.replace("labels[:, 1:]", "labels[:, :-1]")}, "does not compute"),
        ({"trainer_utils": TRAINER_UTILS.replace("end[:, None]", "end[:, None] + 1")}, "does not compute"),
        ({"trainer_utils": TRAINER_UTILS.replace("exp(-losses)", "exp(-2 * losses)")}, "does not compute"),
        ({"dpo.trainer": DPO_TRAINER.replace("is_ref_model=False", "is_ref=False")}, "has the arguments"),
        ({"kto.trainer": KTO_TRAINER.replace('prefix=""', "")}, "has the arguments"),
    ],
)
def test_an_unknown_contract_changes_nothing(tmp_path, monkeypatch, changed, reason):
    package = install(tmp_path, monkeypatch, **changed)
    modules = [package(name) for name in ("trainer_utils", "dpo.trainer", "kto.trainer")]
    before = [dict(vars(module)) for module in modules]
    methods = [dict(vars(modules[1].CustomDPOTrainer)), dict(vars(modules[2].CustomKTOTrainer))]
    with pytest.warns(RuntimeWarning, match="was left as it is") as caught:
        undo = llamafactory.apply()
    assert [reason in str(warning.message) for warning in caught] == [True]
    undo()
    assert [dict(vars(module)) for module in modules] == before
    assert methods == [dict(vars(modules[1].CustomDPOTrainer)), dict(vars(modules[2].CustomKTOTrainer))]


def test_without_the_package(monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(ImportError):
        llamafactory.apply()


#: Runs the page's script with the kernels counted; the examples of `apply()` count too.
RUN = """
import runpy, sys
from contextlib import ExitStack
from tests.frameworks.compare import calls_counted
sys.argv = ["train.py", "dpo.yaml"]
with ExitStack() as stack:
    calls = calls_counted(stack)
    runpy.run_path("train.py", run_name="__main__")
    print("calls", len(calls))
"""


@pytest.mark.slow
def test_the_pages_script_trains(tmp_path):
    """docs/migration/llamafactory.md's script with LLaMA-Factory's own reader of settings, data, and loop."""
    from frameworks import compare, material

    entry = next(entry for entry in matrix.ENTRIES if entry.name == "llamafactory-0.9.5")
    assert all(matrix.folder(package).is_dir() for package in entry.packages), (
        "python tests/frameworks/matrix.py install"
    )
    page = next(page for page in docs_pages.PAGES if page.name == "llamafactory.md")
    subprocess.run(["bash", "-ec", docs_pages.blocks(page)[0].text], cwd=tmp_path, check=True)
    size = compare.TINY
    material.model_of(size).save_pretrained(tmp_path / "model")
    material.tokenizer_of(size).save_pretrained(tmp_path / "model")
    (tmp_path / "pairs.json").write_text(
        json.dumps([row | {"instruction": row["prompt"]} for row in material.pairs_of(size)])
    )
    columns = {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"}
    (tmp_path / "dataset_info.json").write_text(
        json.dumps({"pairs": {"file_name": "pairs.json", "ranking": True, "columns": columns}})
    )
    settings = {"model_name_or_path": "model", "stage": "dpo", "finetuning_type": "full", "do_train": True}
    settings |= {"dataset": "pairs", "dataset_dir": ".", "template": "empty", "output_dir": "out", "max_steps": 3}
    settings |= {"per_device_train_batch_size": size.pairs, "report_to": "none", "logging_steps": 1}
    (tmp_path / "dpo.yaml").write_text(json.dumps(settings))
    environment = matrix.environment(entry)
    (tmp_path / "torchaudio.py").touch()  # imported at the top of LLaMA-Factory's reader of images and sound
    environment["PYTHONPATH"] += f":{tmp_path}"
    command = [sys.executable, "-W", "error:dpo_kernels:RuntimeWarning", "-c", RUN]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.split("calls ")[-1]) >= 2 * settings["max_steps"]  # policy and reference
    log = [json.loads(line) for line in (tmp_path / "out" / "trainer_log.jsonl").read_text().splitlines()]
    assert abs(log[0]["loss"] - 0.6931) < 1e-4
