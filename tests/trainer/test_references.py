"""Every kind of reference: cached on disk and checked, moving and resumed bit by bit, or none."""

import gc
import logging
import math
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
from peft import LoraConfig

from dpo_trainer import ConfigError, DPOConfig, DPOTrainer, ModelError, OutputError
from dpo_trainer.data.rows import REFERENCE
from dpo_trainer.model import reference_cache

from .tiny import build_pairs

Make = Callable[..., DPOTrainer]
LORA = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def columns(trainer: DPOTrainer) -> list[list[float]]:
    return [list(trainer.train_dataset[name]) for name in REFERENCE]


def files(cache: Path) -> list[Path]:
    return sorted(cache.rglob("*.parquet"))


def curve(trainer: DPOTrainer, name: str = "loss") -> list[float]:
    return [record[name] for record in trainer.state.log_history if name in record]


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Records the shards whose reference log-probabilities are computed."""
    counted = []
    real = reference_cache.ReferenceCache.write
    monkeypatch.setattr(
        reference_cache.ReferenceCache,
        "write",
        lambda self, shard, part: (counted.append(shard), real(self, shard, part))[1],
    )
    return counted


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference_cache, "SHARD", 5)  # 24 pairs: four whole shards and a short one


# --- on disk -------------------------------------------------------------------------------------------------------


def test_a_second_run_reads_what_the_first_computed(
    make_trainer: Make, make_model: Any, own_cache: Path, small_shards: None, forwards: list[int], caplog: Any
) -> None:
    first = make_trainer(model=make_model(), precompute_ref_log_probs=True)
    assert len(files(own_cache)) == 5
    assert forwards == [0, 1, 2, 3, 4]
    with caplog.at_level(logging.INFO, "dpo_trainer"):
        second = make_trainer(model=make_model(), precompute_ref_log_probs=True, beta=0.3, learning_rate=1e-5)
    assert forwards == [0, 1, 2, 3, 4], "beta and the learning rate change nothing about a reference"
    assert "read from" in caplog.text
    assert columns(second) == columns(first)
    nothing_kept = make_trainer(model=make_model(), precompute_ref_log_probs=True, ref_cache_dir=None)
    assert columns(nothing_kept)[0] == pytest.approx(columns(first)[0], rel=1e-5)
    assert len(files(own_cache)) == 5


@pytest.mark.parametrize(
    "other",
    [
        {"max_length": 6},
        {"append_eos": False},
        {"train_dataset": build_pairs(24, seed=9)},
        {"train_dataset": build_pairs(23)},
        {"bf16": True},
        {"seed_of_model": 1},
        {"kind": "granite-divisor"},
        {"dtype": torch.bfloat16},
    ],
    ids=lambda other: next(iter(other)),
)
def test_what_the_numbers_depend_on_makes_another_key(
    other: dict[str, Any], make_trainer: Make, make_model: Any, own_cache: Path
) -> None:
    make_trainer(model=make_model(), precompute_ref_log_probs=True)
    model = make_model(other.pop("kind", "llama-tied"), seed=other.pop("seed_of_model", 0))
    model = model.to(other.pop("dtype", torch.float32))
    make_trainer(model=model, precompute_ref_log_probs=True, **other)
    assert len({path.parent for path in files(own_cache)}) == 2


def test_only_the_scale_of_a_config_is_told_apart_too(make_trainer: Make, make_model: Any, own_cache: Path) -> None:
    """Equal weights with another config: a key from the weights only would confuse the two models."""
    for divisor in (4.0, 2.0):
        model = make_model("granite-divisor")
        model.config.logits_scaling = divisor
        model.logits_scaling = divisor
        make_trainer(model=model, precompute_ref_log_probs=True)
    assert len({path.parent for path in files(own_cache)}) == 2


def test_an_adapter_shares_the_key_of_the_model_under_it(
    make_trainer: Make, make_model: Any, forwards: list[int]
) -> None:
    plain = make_trainer(model=make_model(), precompute_ref_log_probs=True)
    adapted = make_trainer(model=make_model(), peft_config=LORA, precompute_ref_log_probs=True)
    assert adapted.reference is None
    assert forwards == [0]
    assert columns(adapted) == columns(plain)


def test_a_kill_loses_one_shard(
    make_trainer: Make, make_model: Any, own_cache: Path, small_shards: None, forwards: list[int], monkeypatch: Any
) -> None:
    whole = columns(make_trainer(model=make_model(), precompute_ref_log_probs=True, ref_cache_dir=str(own_cache / "w")))
    forwards.clear()
    real = pyarrow.parquet.write_table

    def deadly(table: Any, where: Any, **options: Any) -> None:
        if "00003-" in str(where):
            Path(where).write_bytes(b"PAR1 half")  # as after a kill: a temporary file that is not renamed
            raise KeyboardInterrupt
        real(table, where, **options)

    monkeypatch.setattr(pyarrow.parquet, "write_table", deadly)
    with pytest.raises(KeyboardInterrupt):
        make_trainer(model=make_model(), precompute_ref_log_probs=True)
    monkeypatch.setattr(pyarrow.parquet, "write_table", real)
    assert forwards == [0, 1, 2, 3]
    resumed = make_trainer(model=make_model(), precompute_ref_log_probs=True)
    assert forwards == [0, 1, 2, 3, 3, 4], "three shards were kept, one was lost"
    assert columns(resumed) == whole, "bit for bit, wherever the kill fell"


def damage_truncate(path: Path, other: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def damage_empty(path: Path, other: Path) -> None:
    path.write_bytes(b"")


def damage_flip(path: Path, other: Path) -> None:
    raw = bytearray(path.read_bytes())
    value = pyarrow.parquet.read_table(path)["ref_chosen_logps"][0].as_py()
    place = raw.find(torch.tensor([value], dtype=torch.float64).numpy().tobytes())
    if place < 0:  # stored compressed or in a dictionary, so change a byte of the first page
        place = 60
    raw[place + 3] ^= 0x10
    path.write_bytes(bytes(raw))


def damage_foreign(path: Path, other: Path) -> None:
    path.write_bytes(other.read_bytes())


def damage_unstamped(path: Path, other: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.parquet.read_table(path).replace_schema_metadata(None), path)


def forged(path: Path, **columns: Any) -> None:
    """Write other columns with the metadata of the right ones."""
    table = pyarrow.parquet.read_table(path)
    content = {**table.to_pydict(), **columns}
    pyarrow.parquet.write_table(pyarrow.table(content, metadata=table.schema.metadata), path)


def damage_nan(path: Path, other: Path) -> None:
    forged(path, ref_chosen_logps=[math.nan] * len(pyarrow.parquet.read_table(path)))


def damage_other_model(path: Path, other: Path) -> None:
    forged(path, **{name: pyarrow.parquet.read_table(other)[name].to_pylist() for name in REFERENCE})


def damage_nulls(path: Path, other: Path) -> None:
    forged(path, ref_rejected_logps=[None] * len(pyarrow.parquet.read_table(path)))


def damage_text(path: Path, other: Path) -> None:
    forged(path, ref_rejected_logps=["-1"] * len(pyarrow.parquet.read_table(path)))


def damage_length(path: Path, other: Path) -> None:
    forged(path, **{name: values[:-1] for name, values in pyarrow.parquet.read_table(path).to_pydict().items()})


def damage_stamp(path: Path, other: Path) -> None:
    table = pyarrow.parquet.read_table(path)
    pyarrow.parquet.write_table(table.replace_schema_metadata({"dpo_trainer": "[]"}), path)


DAMAGES = [value for name, value in list(globals().items()) if name.startswith("damage_")]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_shard_that_is_not_right_is_refused_in_one_line_and_computed_again(
    damage: Callable[..., None], make_trainer: Make, make_model: Any, own_cache: Path, small_shards: None,
    forwards: list[int], caplog: Any,
) -> None:  # fmt: skip
    right = columns(make_trainer(model=make_model(), precompute_ref_log_probs=True))
    make_trainer(model=make_model(seed=1), precompute_ref_log_probs=True, ref_cache_dir=str(own_cache / "other"))
    others = files(own_cache / "other")
    damage([path for path in files(own_cache) if path not in others][2], others[2])
    forwards.clear()
    caplog.clear()
    again = make_trainer(model=make_model(), precompute_ref_log_probs=True)
    assert columns(again) == right
    assert forwards == [2]
    lines = [record.getMessage() for record in caplog.records if "is not used" in record.getMessage()]
    assert len(lines) == 1
    assert "\n" not in lines[0]
    forwards.clear()
    make_trainer(model=make_model(), precompute_ref_log_probs=True)
    assert forwards == [], "the shard has been computed again"


def test_processes_share_the_shards_out(own_cache: Path, small_shards: None) -> None:
    lengths = [3, 9, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]
    truth = ([-float(n) for n in range(12)], [float(n) for n in range(12)])
    computed: list[list[int]] = [[], []]

    def compute(process: int) -> Callable[[list[int]], Any]:
        def of(rows: list[int]) -> Any:
            computed[process].extend(rows)
            return tuple([side[row] for row in rows] for side in truth)

        return of

    cache = reference_cache.ReferenceCache(own_cache, {"model": "m"}, lengths)
    waits = 0

    def other_process() -> None:  # runs during the first process's second wait
        nonlocal waits
        waits += 1
        if waits == 2:
            cache.write(1, compute(1)(cache.rows(1)))

    found = cache.fill(compute(0), name="train", process_index=0, num_processes=2, wait=other_process)
    assert found == truth
    assert sorted(computed[0]) == sorted(cache.rows(0) + cache.rows(2))
    assert computed[1] == cache.rows(1)


def test_a_folder_that_cannot_be_written_costs_a_line_and_not_the_run(
    make_trainer: Make, make_model: Any, tmp_path: Path, caplog: Any
) -> None:
    (tmp_path / "file").write_text("")
    trainer = make_trainer(
        model=make_model(), precompute_ref_log_probs=True, ref_cache_dir=str(tmp_path / "file" / "x")
    )
    assert "cannot be written to the cache" in caplog.text
    assert len(columns(trainer)[0]) == 24


def test_no_reference_stays_in_memory(make_trainer: Make, make_model: Any) -> None:
    seen: list[Any] = []
    real = DPOTrainer._make_reference

    def spy(self: DPOTrainer, *args: Any) -> Any:
        found = real(self, *args)
        seen.append(weakref.ref(found.split.model))
        return found

    other = make_model(seed=1)
    DPOTrainer._make_reference = spy  # type: ignore[method-assign]
    try:
        trainer = make_trainer(model=make_model(), ref_model=other, precompute_ref_log_probs=True, max_steps=1)
    finally:
        DPOTrainer._make_reference = real  # type: ignore[method-assign]
    del other
    gc.collect()
    assert seen[0]() is None
    trainer.train()


# --- moving --------------------------------------------------------------------------------------------------------


def test_the_reference_moves_as_the_paper_says(make_trainer: Make, make_model: Any) -> None:
    """Eq. 4 holds for every parameter, with updates only at steps 2 and 4."""
    model = make_model()
    trainer = make_trainer(
        model=model, sync_ref_model=True, ref_model_mixup_alpha=0.25, ref_model_sync_steps=2, max_steps=5
    )
    reference = trainer.reference.split.model
    expected = {name: value.clone() for name, value in reference.named_parameters()}

    class Check(type(trainer.moving).__mro__[1]):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step % 2 == 0:
                for name, value in model.named_parameters():
                    expected[name] = 0.25 * value.detach() + 0.75 * expected[name]
            for name, value in reference.named_parameters():
                torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-7)

    trainer.add_callback(Check())
    trainer.train()
    assert any((value != p).any() for value, p in zip(reference.parameters(), model.parameters(), strict=True))
    assert not any(p.requires_grad for p in reference.parameters())


def test_a_hard_update_starts_the_loss_anew(make_trainer: Make) -> None:
    trainer = make_trainer(sync_ref_model=True, ref_model_mixup_alpha=1.0, ref_model_sync_steps=3, max_steps=8)
    trainer.train()
    losses = [round(loss, 7) for loss in curve(trainer)]
    assert [step for step, loss in enumerate(losses, 1) if loss == 0.6931472] == [1, 4, 7]
    assert "replaced by the policy every 3 steps" in trainer.reference_kind


def test_a_moving_reference_resumes_bitwise(make_trainer: Make, make_model: Any, tmp_path: Path) -> None:
    settings = {
        "sync_ref_model": True, "ref_model_mixup_alpha": 0.6, "ref_model_sync_steps": 2, "max_steps": 7,
        "save_strategy": "steps", "save_steps": 5,
    }  # fmt: skip
    whole = make_trainer(model=make_model(), **settings)
    whole.train()
    resumed = make_trainer(model=make_model(), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-5"))
    assert curve(resumed)[-2:] == curve(whole)[-2:]
    for name, value in whole.reference.split.model.state_dict().items():
        assert torch.equal(value, resumed.reference.split.model.state_dict()[name]), name
    checkpoint = str(tmp_path / "run" / "checkpoint-5")
    make_trainer(model=make_model(), **{**settings, "sync_ref_model": False}).train()  # writes the checkpoint again
    with pytest.raises(OutputError, match="sync_ref_model was off when it was written"):
        make_trainer(model=make_model(), **settings).train(resume_from_checkpoint=checkpoint)


def test_a_reference_that_cannot_move_is_refused(make_trainer: Make, make_model: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be precomputed"):
        DPOConfig(output_dir=str(tmp_path), sync_ref_model=True, precompute_ref_log_probs=True)
    with pytest.raises(ConfigError, match="cannot move the reference of an adapter"):
        make_trainer(model=make_model(), peft_config=LORA, sync_ref_model=True)
    rows = [{**row, "ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0} for row in build_pairs(4)]
    with pytest.raises(ConfigError, match="cannot move reference log-probabilities in the data"):
        make_trainer(model=make_model(), train_dataset=rows, sync_ref_model=True)
    with pytest.raises(ModelError, match="must have one architecture; they differ in"):
        make_trainer(model=make_model(), ref_model=make_model("llama-untied"), sync_ref_model=True)
    for name, value, said in (
        ("ref_model_mixup_alpha", 0.0, r"must lie in \(0, 1\]"),
        ("ref_model_mixup_alpha", 1.5, r"must lie in \(0, 1\]"),
        ("ref_model_sync_steps", 0, "must be at least 1"),
    ):
        with pytest.raises(ConfigError, match=said):
            DPOConfig(output_dir=str(tmp_path), sync_ref_model=True, **{name: value})


# --- none ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss_type", "adapter"),
    [("simpo", None), ("cpo", None), ("orpo", None), ("sft", None), (["simpo(gamma=1)", "sft"], None), ("simpo", LORA)],
)
def test_objectives_without_a_reference_copy_and_run_none(
    loss_type: Any, adapter: Any, make_trainer: Make, make_model: Any
) -> None:
    model = make_model()
    calls = []
    trainer = make_trainer(model=model, loss_type=loss_type, peft_config=adapter, beta=2.0, max_steps=3)
    trainer.policy.backbone.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    assert trainer.reference is None
    assert trainer.reference_kind == "none"
    trainer.train()
    assert calls.count(True) == 3, "one forward with a gradient a step"
    assert calls.count(False) <= 24 // 8, "and none without, but the look at the data before the first step"
    assert not any("kl" in record for record in trainer.state.log_history)
    assert trainer.evaluate(build_pairs(3))["eval_loss"] > 0


def test_one_objective_with_a_reference_brings_it_back(make_trainer: Make, make_model: Any) -> None:
    trainer = make_trainer(model=make_model(), loss_type=["simpo", "sigmoid"], max_steps=1)
    assert trainer.reference is not None
    given = make_trainer(model=make_model(), ref_model=make_model(seed=1), loss_type="simpo", max_steps=1)
    given.train()
    assert curve(given, "kl")[0] > 0, "a reference that is given is looked at, for the KL"


def test_there_is_nothing_to_precompute_or_to_move_without_a_reference(tmp_path: Path) -> None:
    for name in ("precompute_ref_log_probs", "sync_ref_model"):
        with pytest.raises(ConfigError, match=f"{name}: loss_type simpo uses no reference"):
            DPOConfig(output_dir=str(tmp_path), loss_type="simpo", **{name: True})
