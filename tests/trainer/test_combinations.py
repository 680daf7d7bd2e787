"""Every pair of values of two dimensions does what `combinations.EXCEPTIONS` says: nothing is silently ignored or wrong.

The slow tests try all pairs and products of three dimensions and, if DPO_WRITE_RESULTS is 1, write
benchmarks/results/combinations.json for docs/compatibility.md.
"""

import importlib.metadata
import itertools
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dpo_trainer import DPOConfig
from dpo_trainer.errors import ConfigError, ModelError
from dpo_trainer.model.adapters import keep_trainable
from dpo_trainer.settings.combinations import NEEDS

from .combinations import (
    DIMENSIONS,
    EXCEPTIONS,
    NO_EFFECT,
    QUANTISED,
    REFUSED,
    SLOWER,
    VALUES,
    WORKS,
    build,
    covering,
    first_step,
    model_of,
    pairs,
    stated,
    tried,
)
from .tiny import build_pairs, build_trainer

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks/results/combinations.json"
QUANTISED_RESULTS = RESULTS.with_name("combinations_quantised.json")
#: A loss of each kind: of each pair, with lengths, of the whole batch, without reference, with token-level KL, with a running
#: mean, a mix.
KINDS = ("sigmoid", "ipo", "aot", "simpo", "tdpo2", "beta_dpo", "sigmoid + sft")
#: Values whose runs take more than a second.
LONG = {"torch_compile", *(name for name, value in VALUES.items() if value.trains)}
DIMENSION_PAIRS = list(itertools.combinations(DIMENSIONS, 2))


#: What was found, by combination.
FOUND: dict[tuple[str, ...], tuple[str, str]] = {}


@pytest.fixture(scope="module", autouse=True)
def results() -> Iterator[None]:
    """Write what was found, if all pairs were tried and DPO_WRITE_RESULTS is 1."""
    yield
    every = {pair for dimensions in DIMENSION_PAIRS for pair in pairs(*dimensions)}
    if os.environ.get("DPO_WRITE_RESULTS") == "1" and every <= FOUND.keys():
        versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")}
        alone = {name: FOUND[(name,)] for names in DIMENSIONS.values() for name in names}
        odd = {pair: FOUND[pair] for pair in every if FOUND[pair] not in ((WORKS, ""), *(alone[name] for name in pair))}
        whole = {
            **versions,
            "dimensions": {name: list(values) for name, values in DIMENSIONS.items()},
            "pairs": len(every),
            "more": sum(len(names) > 2 for names in FOUND),
            "alone": {name: found for name, found in alone.items() if found[0] != WORKS},
            "together": [[*pair, *odd[pair]] for pair in sorted(odd)],
        }
        RESULTS.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


def check(names: Sequence[str], folder: Path) -> None:
    """Try a combination and compare it with the table."""
    kind, line = stated(names)
    found, said = FOUND[tuple(names)] = tried(names, folder)
    assert found == kind, f"{names}: {found} ({said}), and the table says {kind} ({line})"
    assert said.startswith(line), names


@pytest.mark.parametrize("name", [name for names in DIMENSIONS.values() for name in names])
def test_a_value_alone_is_at_work(tmp_path: Path, name: str) -> None:
    check([name], tmp_path)


@pytest.mark.parametrize(
    ("ones", "others", "kind", "line"), [row for row in EXCEPTIONS if row[1] and row[0][0] not in QUANTISED]
)
def test_an_exception_is_told_before_training(
    tmp_path: Path, ones: tuple[str, ...], others: tuple[str, ...], kind: str, line: str
) -> None:
    for one, other in zip(ones, itertools.cycle(others), strict=False):
        check([one, other], tmp_path)


FAST = covering(
    {
        "loss": KINDS,
        **{
            dimension: [name for name in values if name not in LONG and stated([name])[0] != REFUSED]
            for dimension, values in DIMENSIONS.items()
            if dimension not in ("loss", "torch.compile", "memory")
        },
    }
)


@pytest.mark.parametrize("names", FAST, ids=" ".join)
def test_values_of_all_dimensions_work_together(tmp_path: Path, names: tuple[str, ...]) -> None:
    assert tried(names, tmp_path)[0] in (WORKS, SLOWER)


def changes(loss: str, setting: str, folder: Path) -> bool:
    """Whether a setting of the loss changes the gradient of a loss."""
    one, other = (
        first_step(names, *build(names, folder)).gradients
        for names in ([loss, "ref_model"], [loss, setting, "ref_model"])
    )
    return any(not torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("loss", "setting"),
    [pytest.param(*pair, marks=[] if pair[0] in KINDS else pytest.mark.slow) for pair in pairs("loss", "loss setting")],
)
def test_a_setting_of_the_loss_changes_it_or_is_refused_or_warned_about(
    tmp_path: Path, loss: str, setting: str
) -> None:
    kind = stated([loss, setting])[0]
    if kind != REFUSED:
        assert changes(loss, setting, tmp_path) == (kind != NO_EFFECT)


#: By setting: a value that is not its default, and settings with which it counts.
COUNTING: dict[str, tuple[Any, dict[str, Any]]] = {
    "ref_model_mixup_alpha": (0.3, {"sync_ref_model": True}),
    "ref_model_sync_steps": (3, {"sync_ref_model": True}),
    "precompute_ref_batch_size": (2, {"precompute_ref_log_probs": True}),
    "ref_cache_dir": (None, {"precompute_ref_log_probs": True}),
    "beta": (0.3, {"loss_type": ["sft", "sigmoid"]}),
    "label_smoothing": (0.2, {"loss_type": ["sigmoid(label_smoothing=0.1)", "sigmoid"]}),
    "f_divergence_type": ("forward_kl", {"loss_type": ["sft", "sigmoid"]}),
    "f_alpha_divergence_coef": (0.3, {"f_divergence_type": "alpha_divergence"}),
    "discopop_tau": (0.1, {"loss_type": "discopop"}),
    "memory_budget": ("64MB", {"loss_path": "linear"}),
    "grad_filter": (1e-3, {"loss_path": "linear"}),
    "sample_max_new_tokens": (4, {"sample_prompts": 1}),
    "sample_temperature": (0.5, {"sample_prompts": 1}),
    "label_smoothing_factor": (0.1, {}),
}
#: Settings with which a setting of COUNTING has no effect, if it has one with the defaults.
USELESS = {
    "beta": {"loss_type": "sft"},
    "label_smoothing": {"loss_type": "sigmoid(label_smoothing=0.1)"},
    "f_divergence_type": {"loss_type": "sft"},
}


def test_every_setting_that_needs_another_is_tried() -> None:
    assert [name for names, *_ in NEEDS for name in names] == list(COUNTING)


@pytest.mark.parametrize("name", COUNTING)
def test_a_setting_that_has_no_effect_is_warned_about(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    value, others = COUNTING[name]
    useless = USELESS.get(name, {"loss_path": "logits"})
    for settings, told in ((useless, True), (others, not others)):
        caplog.clear()
        build_trainer(tmp_path, train_dataset=build_pairs(3), eval_dataset=build_pairs(2), **settings, **{name: value})
        found = [
            record.getMessage() for record in caplog.records if record.getMessage().startswith(f"{name}: has no effect")
        ]
        assert len(found) == told


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("beta", {"loss_type": ["sft", "sigmoid(beta=0.2)"]}),
        ("label_smoothing", {"loss_type": "sigmoid(beta=0.2, label_smoothing=0.1)"}),
        ("f_divergence_type", {"loss_type": "sigmoid(divergence=js)"}),
        ("discopop_tau", {"loss_type": "discopop( tau = 0.2)"}),
        ("grad_filter", {"loss_path": "linear", "kl_coef": 0.1}),
        ("grad_filter", {"loss_path": "linear", "loss_type": ["sft", "tdpo2(alpha=0.4)"]}),
    ],
)
def test_a_setting_that_other_settings_replace_is_warned_about(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, settings: dict[str, Any]
) -> None:
    build_trainer(tmp_path, train_dataset=build_pairs(3), **settings, **{name: COUNTING[name][0]})
    assert f"{name}: has no effect here" in caplog.text


def test_a_reference_that_is_not_used_is_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{**row, "ref_chosen_logps": -3.0, "ref_rejected_logps": -4.0} for row in build_pairs(3)]
    build_trainer(tmp_path, train_dataset=rows, ref_model=model_of([], seed=5))
    assert (
        "ref_model: not used, because all data have the columns ref_chosen_logps and ref_rejected_logps" in caplog.text
    )


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"fsdp": True}, "fsdp: needs accelerators; on CPUs accelerate would ignore it without a message"),
        ({"deepspeed": {"zero_optimization": {"stage": 2}}}, "deepspeed: the package deepspeed is not installed"),
    ],
)
def test_a_way_to_shard_that_cannot_work_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], line: str
) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ConfigError, match=line):
        DPOConfig(output_dir=str(tmp_path), use_cpu=True, **settings)


def test_weights_that_would_be_packed_for_evaluation_stay_trainable() -> None:
    part = torch.nn.Linear(2, 2)
    part.support_avx512bf16_for_cpu = True  # as bitsandbytes' Linear4bit has it
    keep_trainable(torch.nn.Sequential(part))
    assert part.support_avx512bf16_for_cpu is False
    part.support_avx512bf16_for_cpu = True
    part.weight.quant_state = SimpleNamespace(packing_format_for_cpu=True)
    with pytest.raises(ModelError, match="bitsandbytes has packed the weights of '0' for evaluation"):
        keep_trainable(torch.nn.Sequential(part))


# --- all of them -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), DIMENSION_PAIRS)
def test_all_pairs(tmp_path: Path, first: str, second: str) -> None:
    for pair in pairs(first, second):
        check(pair, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "dimensions",
    [("loss", "layout", "reference"), ("adapter", "reference", "layout"), ("precision", "layout", "torch.compile")],
)
def test_all_triples(tmp_path: Path, dimensions: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VALUES["torch_compile"].settings, "torch_compile_backend", "aot_eager")
    for names in itertools.product(*(DIMENSIONS[dimension] for dimension in dimensions)):
        if REFUSED not in (stated([name])[0] for name in names):
            check(names, tmp_path)


#: What quantised models are tried with, in addition to LoRA.
BESIDE_QUANTISED = [
    *KINDS,
    *(
        name
        for dimension in ("reference", "adapter", "layout", "loss path", "torch.compile", "memory")
        for name in DIMENSIONS[dimension]
    ),
    "bf16",
]


@pytest.mark.slow
@pytest.mark.parametrize("kind", QUANTISED)
def test_quantised_models(tmp_path: Path, kind: str) -> None:
    package = QUANTISED[kind][0]
    pytest.importorskip(package)
    with pytest.raises(ModelError, match="quantised weights do not train; train an adapter on them"):
        build([kind], tmp_path)
    for other in BESIDE_QUANTISED:
        check([kind, *([] if other in DIMENSIONS["adapter"] else ["LoRA"]), other], tmp_path)
    if os.environ.get("DPO_WRITE_RESULTS") == "1":
        whole = json.loads(QUANTISED_RESULTS.read_text()) if QUANTISED_RESULTS.exists() else {}
        distribution = {"optimum.quanto": "optimum-quanto"}.get(package, package)
        found = {name: tried for name, tried in FOUND.items() if kind in name}
        whole[kind] = {
            "version": f"{distribution} {importlib.metadata.version(distribution)}",
            "tried": len(found),
            "exceptions": {" + ".join(names[1:]): tried for names, tried in found.items() if tried[0] != WORKS},
        }
        QUANTISED_RESULTS.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


@pytest.mark.slow
def test_inductor_gives_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VALUES["torch_compile"].settings, "torch_compile_backend", "inductor")
    check(["torch_compile", "bf16", "LoRA"], tmp_path)


def test_the_results_are_the_table_s() -> None:
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert found["dimensions"] == {name: list(values) for name, values in DIMENSIONS.items()}
    for *names, kind, line in [*([name, *alone] for name, alone in found["alone"].items()), *found["together"]]:
        assert kind == stated(names)[0]
        assert line.startswith(stated(names)[1])
