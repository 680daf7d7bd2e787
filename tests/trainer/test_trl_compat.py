"""A script that was written for TRL runs with our classes, or gets a one-line message about what to change."""

import dataclasses
import importlib
import inspect
import json
import typing
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
import transformers
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, HfArgumentParser
from transformers.trainer_utils import HPSearchBackend

from dpo_kernels.objectives import Pairs, objective
from dpo_trainer import ConfigError, DataError, DPOConfig, DPOTrainer, ModelError
from dpo_trainer.cli.build import build_trainer as build_for_cli
from dpo_trainer.settings import objective as of_settings
from dpo_trainer.settings import trl as facts
from dpo_trainer.settings.rows import settings_table
from dpo_trainer.settings.table import Setting
from dpo_trainer.trainer import _loss_of

from .docs_scripts import DOCS, load_script
from .tiny import build_model, build_pairs, build_tokenizer

pytest.importorskip("trl", reason="pip install --no-deps trl==1.16.0 (the extra `peers`)")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import trl

#: Our own fields, and TRL's.
OWN = [row for row in settings_table().values() if row.group not in ("", "run")]
THEIRS = [field for field in dataclasses.fields(trl.DPOConfig) if field.init]


@pytest.fixture
def untold(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Reset the state to a process without any training, in which no command line has silenced transformers."""
    monkeypatch.setattr(facts, "_told", False)
    before = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_warning()
    yield
    transformers.utils.logging.set_verbosity(before)


# --- words -----------------------------------------------------------------------------------------------------------

#: Fields that need special command-line arguments: the arguments and the value that they give.
WORDS: dict[str, tuple[list[str], Any]] = {
    "loss_type": (["sigmoid", "sft"], ["sigmoid", "sft"]),
    "loss_weights": (["0.5"], [0.5]),
    "memory_budget": (["64MB"], "64MB"),
    "model_init_kwargs": (['{"dtype": "float32"}'], {"dtype": "float32"}),
    "diagnostics": (['{"kl_level": 0.25}'], {"kl_level": 0.25}),
    "columns": (['{"prompt": "question"}'], {"prompt": "question"}),
    "weight_from": (['{"margin": "score"}'], {"margin": "score"}),
    "chat_template_kwargs": (['{"role_capital": true}'], {"role_capital": True}),
    "report_to": (["none"], []),
    "activation_offloading": (["false"], False),
    "remove_unused_columns": (["true"], False),
}


def words_for(row: Setting) -> tuple[list[str], Any]:
    """Command-line arguments that set a field, and the field's resulting value."""
    if row.name in WORDS:
        return WORDS[row.name]
    kinds = {row.hint, *typing.get_args(row.hint)}
    if row.choices:
        last = list(row.choices)[-1]
        return [last], [last] if typing.get_origin(row.hint) is list else last
    if bool in kinds:
        return ["true"], True
    if float in kinds:
        return ["0.5"], 0.5
    return (["4"], 4) if int in kinds else (["word"], "word")


@pytest.mark.parametrize("parser", [HfArgumentParser, trl.TrlParser], ids=["transformers", "trl"])
@pytest.mark.parametrize("row", OWN, ids=lambda row: row.name)
def test_every_field_is_read_from_words(row: Setting, parser: Any, tmp_path: Path) -> None:
    words, value = words_for(row)
    more = ["--sample_prompts", "4"] if row.name == "win_rate_scorer" else []
    (config,) = parser(DPOConfig).parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), f"--{row.name}", *words, *more]
    )
    assert getattr(config, row.name) == value
    untouched = DPOConfig(output_dir=str(tmp_path))
    for other in OWN:
        if other.name not in (row.name, "sample_prompts"):
            assert getattr(config, other.name) == getattr(untouched, other.name), other.name


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["--grad_filter", "null"], "grad_filter", None),
        (["--grad_filter", "auto"], "grad_filter", "auto"),
        (["--memory_budget", "67108864"], "memory_budget", 67108864),
        (["--memory_budget", "None"], "memory_budget", None),
        (["--ref_cache_dir", "null"], "ref_cache_dir", None),
        (["--pad_to_multiple_of", "auto"], "pad_to_multiple_of", None),
        (["--pad_to_multiple_of", "8"], "pad_to_multiple_of", 8),
        (["--loss_type", "discopop(tau=0.1)"], "loss_type", ["discopop(tau=0.1)"]),
    ],
)
def test_words_that_may_mean_several_types(words: list[str], name: str, value: Any, tmp_path: Path) -> None:
    (config,) = HfArgumentParser(DPOConfig).parse_args_into_dataclasses(["--output_dir", str(tmp_path), *words])
    assert getattr(config, name) == value
    assert type(getattr(config, name)) is type(value)


def test_the_parsers_can_write_their_help() -> None:
    for parser in (HfArgumentParser(DPOConfig), trl.TrlParser(DPOConfig)):
        text = parser.format_help()
        assert all(f"--{row.name}" in text for row in OWN)


def test_trls_parser_reads_a_yaml_file(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(
        f"output_dir: {tmp_path}\nbeta: 0.3\nloss_type: [sigmoid, sft]\nloss_weights: [1.0, 0.1]\nfilters: []\n"
        "grad_filter: null\nreport_to: none\nmodel_init_kwargs: {dtype: float32}\nlearning_rate: 5.0e-7\n"
    )
    (config,) = trl.TrlParser(DPOConfig).parse_args_and_config(["--config", str(file), "--beta", "0.4"])
    assert (config.beta, config.loss_type, config.loss_weights) == (0.4, ["sigmoid", "sft"], [1.0, 0.1])
    assert (config.filters, config.grad_filter, config.learning_rate) == ([], None, 5e-7)
    assert config.model_init_kwargs == {"dtype": "float32"}


def test_trls_own_script_runs_with_our_classes(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import trl.scripts.dpo as script

    (tmp_path / "data").mkdir()
    for split, count in (("train", 8), ("test", 2)):
        (tmp_path / "data" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, build_pairs(count))))
    monkeypatch.setattr(trl, "DPOConfig", DPOConfig)
    monkeypatch.setattr(trl, "DPOTrainer", DPOTrainer)
    words = f"--dataset_name {tmp_path / 'data'} --model_name_or_path {model_folder} --output_dir {tmp_path / 'run'}"
    words += " --learning_rate 1e-3 --loss_type sigmoid sft --loss_weights 1.0 0.1 --eval_strategy steps --eval_steps 1"
    words += " --max_steps 2 --use_cpu --use_peft --lora_r 4 --lora_target_modules q_proj v_proj --dtype float32"
    parsed = script.make_parser().parse_args_and_config(words.split())
    assert isinstance(parsed[1], DPOConfig)
    script.main(*parsed)
    assert (tmp_path / "run" / "adapter_model.safetensors").exists()
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["eval_last"]["loss"] > 0


# --- fields ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", THEIRS, ids=lambda field: field.name)
def test_every_field_of_trls_is_taken_at_its_default_or_answered(field: Any, tmp_path: Path) -> None:
    missing = field.default_factory is dataclasses.MISSING
    value = field.default if missing else field.default_factory()
    given = {"output_dir": str(tmp_path)} | ({} if field.name == "output_dir" else {field.name: value})
    if field.name in {row.name for row in settings_table().values()}:
        assert isinstance(DPOConfig(**given), DPOConfig)
        return
    with pytest.raises(ConfigError, match=rf"^{field.name}: [^\n]+$"):
        DPOConfig(**given)


def test_the_defaults_that_differ_are_those_that_are_told() -> None:
    tables = load_script("compatibility_tables")
    theirs, ours = tables.of_trl(), tables.defaults(DPOConfig)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = tables.defaults(trl.DPOConfig)
    differ = {
        name
        for name, value in whole.items()
        if name in ours and (theirs.get(name, value) or None) != (tables.ours_of(name, theirs.get(name, value)) or None)
    }
    assert differ - {"pad_to_multiple_of"} == set(facts.DIFFERENT), "'auto' is None on every device but one"
    for name, (value, why, _) in facts.DIFFERENT.items():
        assert theirs[name] == value, name
        assert why.endswith("."), name


def test_what_is_said_of_a_field_is_said_of_one_that_exists() -> None:
    names = {field.name for field in THEIRS}
    assert set(facts.OTHER_MEANING) <= names
    assert set(facts.OTHER_MEANING) <= {row.name for row in settings_table().values()}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"rpo_alpha": 1.0}, "rpo_alpha: is not supported; set loss_type='rpo(alpha=...)'"),
        ({"max_completion_length": 8}, "max_completion_length: is not supported; set max_length"),
        (
            {"warmup_ratio": 0.1},
            "warmup_ratio: is not a setting of the installed transformers; set warmup_steps to the share",
        ),
        ({"evaluation_strategy": "steps"}, "evaluation_strategy: is called eval_strategy"),
        ({"reference_free": True}, "reference_free: is not supported; use an objective without"),
        ({"activation_offloading": True}, "activation_offloading: is not supported; set gradient_checkpointing"),
        ({"padding_free": True, "batch_layout": "padded"}, "padding_free: contradicts batch_layout 'padded'"),
        ({"pad_to_multiple_of": "many"}, "pad_to_multiple_of: expected a whole number or 'auto', got 'many'"),
        ({"f_divergence_type": "js"}, "f_divergence_type: unknown 'js'"),
        (
            {"f_divergence_type": "js_divergence", "loss_type": "aot"},
            "f_divergence_type: objective 'aot' does not support",
        ),
        ({"discopop_tau": 0}, "discopop_tau: must be a positive number, got 0"),
        ({"accelerator_config": {"split_batches": True}}, "accelerator_config.split_batches: is not supported"),
    ],
)
def test_what_cannot_be_followed_is_told_in_a_line(given: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        DPOConfig(output_dir=str(tmp_path), **given)
    assert str(error.value).startswith(said)
    assert "\n" not in str(error.value)


def test_liger_is_refused_on_a_cpu(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="use_liger_kernel: needs an accelerator"):
        DPOConfig(output_dir=str(tmp_path), use_liger_kernel=True, use_cpu=True)


def test_dispatched_batches_are_left_out_with_a_line(
    make_trainer: Any, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    losses = []
    for given in ({}, {"accelerator_config": {"dispatch_batches": True}}):
        trainer = make_trainer(max_steps=2, eval_dataset=build_pairs(3), **given)
        trainer.train()
        losses.append((trainer.state.log_history[0]["loss"], trainer.evaluate()["eval_loss"]))
    assert losses[0] == losses[1]
    assert [line for line in caplog.messages if line.startswith("accelerator_config.dispatch_batches: ignored")]


def scores(name: str, u: torch.Tensor, alpha: float) -> torch.Tensor:
    """f'(exp(u)) of each divergence (Wang et al. 2023), by definition."""
    ratio = u.exp()
    return {
        "reverse_kl": u,
        "forward_kl": 1 - 1 / ratio,
        "js_divergence": (2 * ratio / (1 + ratio)).log(),
        "alpha_divergence": (ratio ** (alpha - 1) - 1) / (alpha - 1),
    }[name]


@pytest.mark.parametrize("name", list(of_settings.DIVERGENCES))
def test_a_divergence_changes_the_log_ratios_and_nothing_else(name: str, tmp_path: Path) -> None:
    config = DPOConfig(
        output_dir=str(tmp_path), f_divergence_type=name, f_alpha_divergence_coef=0.3, loss_type=["sigmoid", "sft"]
    )
    sums, ref = torch.tensor([[-3.0, -2.0, -6.0, -4.0], [-3.5, -1.0, -5.0, -4.5]], dtype=torch.float64)
    beta, smoothing = torch.tensor(0.1, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64)
    pairs = Pairs.from_sums(sums, ref, torch.full((4,), 5.0, dtype=torch.float64), beta, smoothing)
    built = of_settings.build(config)
    score = scores(name, sums - ref, 0.3)
    torch.testing.assert_close(built[0](pairs), -logsigmoid(0.1 * (score[:2] - score[2:])))
    torch.testing.assert_close(built[1](pairs), objective("sft")(pairs))


def test_settings_beside_loss_type_yield_to_its_own_parentheses(tmp_path: Path) -> None:
    config = DPOConfig(
        output_dir=str(tmp_path),
        loss_type=["discopop", "discopop(tau=0.2)", "hinge(divergence=js)", "ipo(beta=0.5)"],
        discopop_tau=0.1,
        f_divergence_type="forward_kl",
    )
    assert [str(item) for item in of_settings.build(config)] == [
        "discopop(tau=0.1, divergence=forward_kl)",
        "discopop(tau=0.2, divergence=forward_kl)",
        "hinge(divergence=js)",
        "ipo(beta=0.5, divergence=forward_kl)",
    ]
    plain = DPOConfig(output_dir=str(tmp_path))
    assert [str(item) for item in of_settings.build(plain)] == ["sigmoid"]


def test_a_divergence_trains(make_trainer: Any) -> None:
    losses = {}
    for kind in ("reverse_kl", "js_divergence"):
        trainer = make_trainer(max_steps=2, f_divergence_type=kind, seed=1)
        trainer.train()
        losses[kind] = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    assert losses["reverse_kl"][0] == pytest.approx(losses["js_divergence"][0], abs=1e-6), "log 2 both"
    assert losses["reverse_kl"][1] != pytest.approx(losses["js_divergence"][1], abs=1e-7)


# --- messages --------------------------------------------------------------------------------------------------------


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.message.startswith("differs from TRL's default")]


@pytest.mark.usefixtures("untold")
def test_a_process_is_told_once_what_differs(make_trainer: Any, caplog: pytest.LogCaptureFixture) -> None:
    make_trainer(max_steps=1).train()
    make_trainer(max_steps=1).train()
    (line,) = told(caplog)
    for said in (
        "num_train_epochs=1.0 (TRL: 3.0)",
        "bf16=False (TRL: True)",
        "truncation_mode=keep_end (TRL: keep_start)",
    ):
        assert said in line
    assert "label_smoothing" not in line
    assert line.endswith("see docs/compatibility.md")


@pytest.mark.usefixtures("untold")
def test_only_what_nobody_chose_is_told(make_trainer: Any, caplog: pytest.LogCaptureFixture) -> None:
    chosen = {"num_train_epochs": 2, "bf16": True, "truncation_mode": "keep_start", "filters": []}
    make_trainer(max_steps=1, train_sampling_strategy="random", label_smoothing=0.1, **chosen).train()
    (line,) = told(caplog)
    assert line == (
        "differs from TRL's default: label_smoothing counts in sigmoid (TRL: not); see docs/compatibility.md"
    )


@pytest.mark.usefixtures("untold")
def test_errors_only_means_no_such_line(make_trainer: Any, caplog: pytest.LogCaptureFixture) -> None:
    make_trainer(max_steps=1, log_level="error").train()
    assert told(caplog) == []


@pytest.mark.usefixtures("untold")
def test_the_command_line_tells_nothing_about_trl(
    caplog: pytest.LogCaptureFixture, tmp_path: Path, model_folder: Path
) -> None:
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, build_pairs(4))))
    settings = {
        "model": str(model_folder),
        "train_data": str(tmp_path / "data.jsonl"),
        "output_dir": str(tmp_path / "run"),
    }
    build_for_cli(DPOTrainer, {**settings, "max_steps": 1, "log_level": "info"}, set()).train()
    assert told(caplog) == []


# --- the constructor -------------------------------------------------------------------------------------------------


def test_the_constructor_takes_trls_arguments_in_trls_order() -> None:
    theirs = list(inspect.signature(trl.DPOTrainer.__init__).parameters)
    ours = list(inspect.signature(DPOTrainer.__init__).parameters)
    assert ours[: len(theirs)] == theirs


def given(tmp_path: Path, **settings: Any) -> dict[str, Any]:
    """Keyword arguments of a small trainer."""
    own = {"output_dir": str(tmp_path / "run"), "use_cpu": True, "write_report": False, "save_strategy": "no"}
    return {
        "args": DPOConfig(**{**own, "disable_tqdm": True, **settings}),
        "train_dataset": build_pairs(4),
        "processing_class": build_tokenizer(),
    }


def test_a_quantization_goes_to_from_pretrained(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    whole = AutoModelForCausalLM.from_pretrained

    def load(name: str, **kwargs: Any) -> Any:
        seen.append(kwargs.pop("quantization_config", None))
        return whole(name, **kwargs)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    wanted = object()
    DPOTrainer(str(model_folder), **given(tmp_path), quantization_config=wanted)
    assert seen == [wanted]
    model = build_model("llama-tied", len(build_tokenizer()))
    with pytest.raises(ConfigError, match="quantization_config: is for a model that is given as a path"):
        DPOTrainer(model, **given(tmp_path), quantization_config=wanted)
    twice = given(tmp_path, model_init_kwargs={"quantization_config": wanted})
    with pytest.raises(ConfigError, match="quantization_config: is given twice"):
        DPOTrainer(str(model_folder), **twice, quantization_config=wanted)


def test_objects_of_other_kinds_are_told_in_a_line(tmp_path: Path) -> None:
    model = build_model("llama-tied", len(build_tokenizer()))
    theirs = trl.DPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    of_trl = importlib.import_module("trl.trainer.dpo_trainer").DataCollatorForPreference(pad_token_id=0)
    for wrong, said in (
        (
            {"args": theirs},
            "args: expected a DPOConfig, got DPOConfig of trl.trainer.dpo_config; import it from dpo_trainer",
        ),
        ({"peft_config": {"r": 4}}, "peft_config: expected a config of peft, such as LoraConfig, got dict"),
        ({"data_collator": of_trl}, "data_collator: its batches have no 'labels'; leave it out"),
    ):
        with pytest.raises(ConfigError) as error:
            DPOTrainer(model, **{**given(tmp_path), **wrong})
        assert str(error.value).startswith(said)


def test_the_hub_gets_the_name_of_the_data(make_trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL's script ends with `push_to_hub(dataset_name=...)`. transformers passes these arguments to the model card."""
    trainer = make_trainer(max_steps=1)
    trainer.train()
    hub = SimpleNamespace(upload_folder=lambda **_: None)
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: hub)
    trainer.hub_model_id = "someone/a-model"
    trainer.push_to_hub(dataset_name="someone/some-pairs")
    card = (Path(trainer.args.output_dir) / "README.md").read_text()
    assert "someone/some-pairs" in card.split("---")[1]
    trainer.create_model_card(model_name="x", dataset_name=None)


def test_keywords_for_a_loaded_model_are_told_to_be_unused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = build_model("llama-tied", len(build_tokenizer()))
    DPOTrainer(model, **given(tmp_path, model_init_kwargs={"dtype": "float32"}))
    assert "model_init_kwargs: not used, because no model is given as a path" in caplog.messages


REMOTE = """\
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_code_that_a_model_brings_runs_only_if_it_is_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    folder = tmp_path / "own"
    build_model("llama-tied", len(build_tokenizer())).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    (folder / "own.py").write_text(REMOTE)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}}
    (folder / "config.json").write_text(json.dumps(config))
    arguments = given(tmp_path)
    del arguments["processing_class"]
    with pytest.raises(ModelError, match="custom code"):
        DPOTrainer(str(folder), **arguments)
    arguments["args"].trust_remote_code = True
    trainer = DPOTrainer(str(folder), **arguments)
    assert type(trainer.model).__name__ == "OwnModel"
    assert type(trainer.ref_model).__name__ == "OwnModel"


def test_a_pad_token_is_one_of_the_vocabulary(tmp_path: Path, model_folder: Path) -> None:
    arguments = given(tmp_path, pad_token="<|start|>")
    arguments["processing_class"] = build_tokenizer.__wrapped__()  # not the one that other tests share
    trainer = DPOTrainer(str(model_folder), **arguments)
    assert trainer.processing_class.pad_token_id == 1
    assert trainer.data_collator.pad_token_id == 1  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"pad_token: '<\|star\|>' is not in the tokenizer's vocabulary.*<\|start\|>"):
        DPOTrainer(str(model_folder), **given(tmp_path, pad_token="<|star|>"))


def test_there_are_no_logits_to_preprocess(tmp_path: Path, model_folder: Path) -> None:
    with pytest.raises(ConfigError, match="preprocess_logits_for_metrics: there are no logits"):
        DPOTrainer(str(model_folder), **given(tmp_path), preprocess_logits_for_metrics=lambda *_: None)


# --- attributes that scripts use -------------------------------------------------------------------------------------


def test_what_scripts_read_of_a_trainer(make_trainer: Any) -> None:
    from peft import LoraConfig

    trainer = make_trainer(beta=0.2)
    assert (trainer.beta, trainer.loss_types, trainer.aux_loss_enabled) == (0.2, ["sigmoid"], False)
    assert trainer.ref_model is not trainer.model
    for name, value in trainer.model.named_parameters():
        assert torch.equal(trainer.ref_model.get_parameter(name), value)
    assert {"dpo", "dpo-kernels"} <= set(trainer.model.model_tags)
    adapted = make_trainer(peft_config=LoraConfig(target_modules=["q_proj"]), loss_type=["sigmoid", "sft"])
    assert adapted.ref_model is None
    assert adapted.loss_types == ["sigmoid", "sft"]
    assert "dpo" in adapted.model.model_tags


def test_the_log_has_trls_names_and_values(make_trainer: Any, tmp_path: Path) -> None:
    rows = build_pairs(8)
    trainer = make_trainer(train_dataset=rows, num_train_epochs=2, train_sampling_strategy="sequential", filters=[])
    trainer.train()
    model = build_model("llama-tied", len(build_tokenizer()))
    model.save_pretrained(tmp_path / "model")
    theirs = trl.DPOTrainer(
        AutoModelForCausalLM.from_pretrained(tmp_path / "model"),
        args=trl.DPOConfig(
            output_dir=str(tmp_path / "trl"), num_train_epochs=2, per_device_train_batch_size=4, logging_steps=1,
            train_sampling_strategy="sequential", bf16=False, use_cpu=True, save_strategy="no", disable_tqdm=True,
            learning_rate=1e-3,
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=build_tokenizer(),
    )  # fmt: skip
    theirs.train()
    logs = [[r for r in run.state.log_history if "learning_rate" in r] for run in (trainer, theirs)]
    assert [len(log) for log in logs] == [4, 4]
    for own, other in zip(*logs, strict=True):
        assert set(other) <= set(own)
        for name, value in other.items():
            assert own[name] == pytest.approx(value, rel=2e-4, abs=2e-5), name


def test_a_resumed_run_goes_on_counting_tokens(make_trainer: Any) -> None:
    settings = {"train_dataset": build_pairs(16), "save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(**settings)
    whole.train()
    resumed = make_trainer(**settings)
    resumed.train(resume_from_checkpoint=str(whole.args.run_folder / "checkpoint-2"))
    counts = [
        [record["num_tokens"] for record in trainer.state.log_history if "num_tokens" in record]
        for trainer in (whole, resumed)
    ]
    assert counts[0] == counts[1]
    assert len(counts[0]) == 4


def test_tokens_that_trl_has_made_are_made_anew_or_told(make_trainer: Any) -> None:
    rows = build_pairs(4)
    tokens = {"prompt_ids": [3], "chosen_ids": [4], "rejected_ids": [5]}
    trainer = make_trainer(train_dataset=datasets.Dataset.from_list([{**row, **tokens} for row in rows]))
    expected = make_trainer(train_dataset=rows)
    assert trainer.train_dataset["chosen_ids"] == expected.train_dataset["chosen_ids"]
    assert trainer.evaluate(trainer.train_dataset)["eval_loss"] == pytest.approx(0.6931, abs=1e-4)
    with pytest.raises(DataError, match="no column 'chosen'; it has prompt_ids, chosen_ids, rejected_ids"):
        make_trainer(train_dataset=datasets.Dataset.from_list([tokens] * 4))


@pytest.mark.parametrize("kind", ["one", "several"])
def test_a_stream_is_evaluated_as_its_rows_are(kind: str, make_trainer: Any) -> None:
    rows = build_pairs(6, seed=3)
    stream = datasets.Dataset.from_list(rows).to_iterable_dataset()
    if kind == "several":
        stream, rows = datasets.IterableDatasetDict({"a": stream}), {"a": rows}
    model = build_model("llama-tied", len(build_tokenizer()))
    trainer = make_trainer(model=model, eval_dataset=stream)
    twice = [trainer.evaluate(), trainer.evaluate()]
    expected = make_trainer(model=model, eval_dataset=rows).evaluate()
    passed = trainer.evaluate(eval_dataset=stream)
    for name in expected:
        if "loss" in name or "rewards" in name:
            assert [found[name] for found in (*twice, passed)] == [expected[name]] * 3


# --- model_init ------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def trials_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make transformers accept this file's trials, which do not belong to a search library such as optuna."""
    whole = transformers.integrations.hp_params
    monkeypatch.setattr(
        transformers.integrations, "hp_params", lambda t: t.params if isinstance(t, SimpleNamespace) else whole(t)
    )


def of_trials(tmp_path: Path, space: Any, **settings: Any) -> DPOTrainer:
    """A trainer for hyper-parameter search; the test starts the trials itself."""
    vocabulary = len(build_tokenizer())
    given_model: Any = settings.pop("model_init", lambda: build_model("llama-tied", vocabulary, seed=7))
    arguments = given(tmp_path, learning_rate=1e-3, logging_steps=1, per_device_train_batch_size=4, **settings)
    trainer = DPOTrainer(model_init=given_model, eval_dataset=build_pairs(4, seed=5), **arguments)
    trainer.hp_search_backend, trainer.hp_space, trainer.hp_name = HPSearchBackend.OPTUNA, space, None
    return trainer


def run_trial(trainer: DPOTrainer, number: int, **params: Any) -> list[float]:
    """Train as `hyperparameter_search` does and return the losses."""
    trainer.train(trial=SimpleNamespace(number=number, params=params))
    return [record["loss"] for record in trainer.state.log_history if "loss" in record]


def test_every_trial_begins_with_a_new_model_and_its_own_settings(tmp_path: Path) -> None:
    trainer = of_trials(tmp_path, lambda trial: trial.params, max_steps=3)
    first = run_trial(trainer, 0, beta=0.1)
    before = trainer.reference
    again = run_trial(trainer, 1, beta=0.1)
    assert first == again, "the same settings on the same new model"
    assert trainer.reference is not before
    assert trainer.policy.model is trainer.model
    other = run_trial(trainer, 2, beta=0.5, loss_type="ipo")
    expected = objective("ipo")(
        Pairs.from_sums(*torch.zeros(2, 2), torch.ones(2), torch.tensor(0.5), torch.tensor(0.0))
    )
    assert other[0] == pytest.approx(expected.item(), rel=1e-5), "where policy and reference agree"


def test_a_search_finds_the_best_settings(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    trainer = of_trials(tmp_path, None, max_steps=2, eval_strategy="steps", eval_steps=2)
    best = trainer.hyperparameter_search(
        lambda trial: {"learning_rate": trial.suggest_categorical("learning_rate", [1e-9, 1e-2])},
        backend="optuna",
        n_trials=4,
        direction="minimize",
    )
    assert best.hyperparameters == {"learning_rate": 1e-2}
    assert 0 < best.objective < 0.6931


def test_a_trial_moves_its_own_reference(tmp_path: Path) -> None:
    settings = {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 1.0}
    trainer = of_trials(tmp_path, lambda trial: trial.params, max_steps=2, **settings)
    run_trial(trainer, 0)
    run_trial(trainer, 1)
    moving = [item for item in trainer.callback_handler.callbacks if type(item).__name__ == "MovingReference"]
    assert moving == [trainer.moving]
    assert trainer.ref_model is not None
    for name, value in trainer.model.named_parameters():  # type: ignore[union-attr]
        assert torch.equal(trainer.ref_model.get_parameter(name), value), "a hard update after every step"


def test_every_trial_is_compared_with_the_reference_that_is_given(tmp_path: Path) -> None:
    vocabulary = len(build_tokenizer())
    reference = build_model("llama-tied", vocabulary, seed=9)
    trainer = DPOTrainer(
        model_init=lambda: build_model("llama-tied", vocabulary, seed=7),
        ref_model=reference,
        **given(tmp_path, max_steps=1),
    )
    trainer.train()
    trainer.train()
    assert trainer.ref_model is reference


def test_an_adapter_is_put_around_every_trials_model(tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel

    vocabulary = len(build_tokenizer())
    trainer = DPOTrainer(
        model_init=lambda trial: build_model("llama-tied", vocabulary, seed=7),
        peft_config=LoraConfig(target_modules=["q_proj"]),
        **given(tmp_path, max_steps=1),
    )
    trainer.train()
    first = trainer.model
    trainer.train()
    assert isinstance(trainer.model, PeftModel)
    assert trainer.model is not first


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"max_length": 16}, "max_length: is read when the trainer is made, so it cannot be searched"),
        ({"beta": -1.0}, "beta: must be a positive number, got -1.0"),
        ({"loss_type": "ipoo"}, "loss_type: unknown objective 'ipoo' (did you mean 'ipo'?)"),
    ],
)
def test_a_trial_that_cannot_be_followed_is_told(params: dict[str, Any], said: str, tmp_path: Path) -> None:
    trainer = of_trials(tmp_path, lambda trial: trial.params, max_steps=1)
    with pytest.raises(ConfigError) as error:
        run_trial(trainer, 0, **params)
    assert str(error.value).startswith(said)


def test_model_init_does_not_go_with_another_model(tmp_path: Path, model_folder: Path) -> None:
    with pytest.raises(ConfigError, match="model_init: makes the model, and a model is given as well"):
        DPOTrainer(str(model_folder), **given(tmp_path), model_init=lambda: None)
    with pytest.raises(ConfigError, match="model_init: returned None"):
        DPOTrainer(**given(tmp_path), model_init=lambda: None)
    with pytest.raises(ConfigError, match="precompute_ref_log_probs: needs one model"):
        DPOTrainer(**given(tmp_path, precompute_ref_log_probs=True), model_init=lambda: None)
    with pytest.raises(ModelError, match="model: none given"):
        DPOTrainer(**given(tmp_path))


def test_what_a_search_seeks_is_the_loss() -> None:
    assert _loss_of({"eval_loss": 2.0, "eval_runtime": 9.0, "eval_rewards/margins": 5.0}) == 2.0
    assert _loss_of({"eval_a_loss": 1.0, "eval_b_loss": 3.0, "epoch": 1.0}) == 2.0


def test_nothing_is_compiled_before_the_first_step(make_trainer: Any) -> None:
    """Testing the layouts again in each trial took a minute, and the result was not used."""
    torch._dynamo.reset()
    frames = torch._dynamo.utils.counters["frames"]
    frames.clear()
    trainer = make_trainer(torch_compile=True, torch_compile_backend="eager")
    assert not frames
    assert trainer.policy.backbone._compiled_call_impl is not None


# --- docs ------------------------------------------------------------------------------------------------------------


def test_the_page_s_tables_are_the_classes() -> None:
    page = (DOCS / "compatibility.md").read_text(encoding="utf-8")
    assert load_script("compatibility_tables").filled(page) == page, "run: python docs/compatibility_tables.py"


def test_every_test_of_trls_that_fails_has_a_reason() -> None:
    found = json.loads(load_script("compatibility_tables").SUITE.read_text(encoding="utf-8"))
    assert found["classes"] == "ours"
    assert found["tests"] == len(found["passed"]) + len(found["failed"]) + len(found["skipped"])
    assert [entry["test"] for entry in found["failed"] if not entry["reason"]] == []
