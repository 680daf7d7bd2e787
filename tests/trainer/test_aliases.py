"""Other tools' names for settings: accepted if they mean one of our settings, else answered with what to set."""

import dataclasses
import re
from pathlib import Path

import pytest
import yaml
from peft import LoraConfig

from dpo_kernels import objectives
from dpo_trainer import ConfigError, DPOConfig
from dpo_trainer.cli.main import main
from dpo_trainer.cli.settings import SWITCHES, read_settings
from dpo_trainer.settings import trl
from dpo_trainer.settings.aliases import ALIASES, ANSWERS, METHODS, OBJECTIVES, SAME, VALUES, setting_of
from dpo_trainer.settings.inherited import lora_fields
from dpo_trainer.settings.rows import settings_table

KNOWN = settings_table()
BASE = {"model": "m", "train_data": "t.jsonl", "output_dir": "o"}

#: Names in other tools' DPO configurations, whether or not we have the same setting.
AXOLOTL = """base_model model_type tokenizer_type load_in_8bit load_in_4bit strict dpo_beta rl datasets dataset_prepared_path
val_set_size output_dir adapter lora_model_dir sequence_len sample_packing pad_to_sequence_len lora_r lora_alpha lora_dropout
lora_target_modules lora_target_linear lora_fan_in_fan_out wandb_project wandb_entity wandb_watch wandb_name wandb_log_model
gradient_accumulation_steps micro_batch_size num_epochs optimizer lr_scheduler learning_rate train_on_inputs group_by_length bf16
fp16 tf32 gradient_checkpointing early_stopping_patience resume_from_checkpoint local_rank logging_steps xformers_attention
flash_attention warmup_steps evals_per_epoch eval_table_size saves_per_epoch debug deepspeed weight_decay fsdp fsdp_config
special_tokens chat_template hub_model_id test_datasets"""
LLAMA_FACTORY = """
model_name_or_path trust_remote_code stage do_train finetuning_type lora_rank lora_target lora_alpha lora_dropout
pref_beta pref_loss pref_ftx dataset dataset_dir template cutoff_len max_samples overwrite_cache preprocessing_num_workers
dataloader_num_workers output_dir logging_steps save_steps plot_loss overwrite_output_dir save_only_model report_to
per_device_train_batch_size gradient_accumulation_steps learning_rate num_train_epochs lr_scheduler_type warmup_ratio bf16
ddp_timeout resume_from_checkpoint val_size per_device_eval_batch_size eval_strategy eval_steps flash_attn quantization_bit
quantization_method simpo_gamma ref_model adapter_name_or_path neftune_noise_alpha"""
MS_SWIFT = """
rlhf_type model ref_model train_type tuner_type dataset val_dataset load_from_cache_file split_dataset_ratio torch_dtype
num_train_epochs per_device_train_batch_size per_device_eval_batch_size learning_rate lora_rank lora_alpha target_modules
gradient_accumulation_steps deepspeed eval_steps save_steps save_total_limit logging_steps max_length output_dir warmup_ratio
dataloader_num_workers rpo_alpha dataset_num_proc use_ray device_groups attn_impl quant_method quant_bits system"""
HANDBOOK = """
model_name_or_path model_revision torch_dtype attn_implementation use_peft load_in_4bit lora_r lora_alpha lora_dropout
lora_target_modules dataset_mixer dataset_mixture dataset_splits preprocessing_num_workers bf16 beta do_eval evaluation_strategy
eval_steps gradient_accumulation_steps gradient_checkpointing gradient_checkpointing_kwargs hub_model_id learning_rate log_level
logging_steps lr_scheduler_type max_length max_prompt_length num_train_epochs optim output_dir per_device_train_batch_size
push_to_hub save_strategy save_total_limit seed warmup_ratio use_flash_attention_2 overwrite_output_dir padding_free"""
COMMON = """
lr batch_size micro_batch_size epochs num_epochs model_name_or_path base_model dataset_name dataset data_path val_set_size
lora_rank lora_r lora_alpha lora_dropout lora_target_modules use_peft grad_accum grad_accumulation_steps load_in_4bit load_in_8bit
max_seq_length cutoff_len sequence_len pref_beta dpo_beta warmup optimizer scheduler wd output out torch_dtype dtype precision"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(**settings: object) -> None:
    Path("c.yaml").write_text(yaml.safe_dump({**BASE, **settings}))


def test_every_alias_is_one_of_a_setting_that_exists() -> None:
    of_lora = {f"lora.{field.name}" for field in dataclasses.fields(LoraConfig)}
    for setting in SAME:
        assert setting in KNOWN or setting in of_lora or setting.startswith("model_init_kwargs."), setting


def test_every_name_has_one_home() -> None:
    assert sum(map(len, SAME.values())) == len(ALIASES)
    assert not {*ALIASES, *ANSWERS} & {*KNOWN}
    assert not {*ALIASES} & {*ANSWERS}
    assert not {*ANSWERS} & {*trl.ANSWERS}
    for name in {*ALIASES} & {*trl.ANSWERS}:  # DPOConfig has an answer for names that the command accepts
        assert ALIASES[name] in trl.ANSWERS[name]
    assert all(name in KNOWN for name, _ in VALUES)


def test_settings_that_an_answer_calls_exist() -> None:
    for name, text in ANSWERS.items():
        for setting in re.findall(r"is called (\w+)", text):
            assert setting in KNOWN or setting == "lora", name
        for switch in re.findall(r"(--[a-z]+) on the command line", text):
            assert switch in SWITCHES
        assert not text.endswith(".")


@pytest.mark.parametrize(
    "names",
    [AXOLOTL, LLAMA_FACTORY, MS_SWIFT, HANDBOOK, COMMON],
    ids=["axolotl", "LLaMA-Factory", "ms-swift", "handbook", "common"],
)
def test_names_of_other_tools_are_understood_or_answered(names: str) -> None:
    for name in names.split():
        assert name in KNOWN or name in ALIASES or name in ANSWERS or name in trl.ANSWERS, name


def test_names_of_trl_s_script_are_understood_or_answered() -> None:
    peers = pytest.importorskip("trl")
    for part in (peers.ModelConfig, peers.ScriptArguments):
        for field in dataclasses.fields(part):
            assert field.name in KNOWN or field.name in ALIASES or field.name in ANSWERS, field.name


def test_an_alias_is_read_and_told(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(lora_r=4, lora_target_modules=["q_proj"], torch_dtype="bfloat16", warmup_ratio=0.1)
    settings, _ = read_settings(["c.yaml", "--lr", "1e-5", "--micro-batch-size=2"])
    assert settings["lora"] == {"r": 4, "target_modules": ["q_proj"]}
    assert settings["model_init_kwargs"] == {"dtype": "bfloat16"}
    assert (settings["learning_rate"], settings["per_device_train_batch_size"], settings["warmup_steps"]) == (
        1e-5,
        2,
        0.1,
    )
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.splitlines() == [
        "lora_r is read as lora.r",
        "lora_target_modules is read as lora.target_modules",
        "torch_dtype is read as model_init_kwargs.dtype",
        "warmup_ratio is read as warmup_steps",
        "--lr is read as learning_rate",
        "--micro_batch_size is read as per_device_train_batch_size",
    ]


@pytest.mark.parametrize("switch", ["--quiet", "--json"])
def test_nothing_is_told_where_nobody_wants_to_know(
    switch: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write()
    settings, _ = read_settings(["c.yaml", "--lr", "1e-5", switch])
    assert settings["learning_rate"] == 1e-5
    assert capsys.readouterr().err == ""


def test_two_names_of_one_setting_in_one_place_are_refused(here: Path) -> None:
    write()
    with pytest.raises(ConfigError, match="--lr and --learning_rate are the same setting; give one of them"):
        read_settings(["c.yaml", "--lr", "1", "--learning_rate", "2"])
    with pytest.raises(ConfigError, match="--lora_r and --lora_rank are the same setting"):
        read_settings(["c.yaml", "--lora_r", "1", "--lora_rank", "2"])
    write(epochs=1, num_train_epochs=2)
    with pytest.raises(ConfigError, match="epochs and num_train_epochs are the same setting"):
        read_settings(["c.yaml"])


def test_the_command_line_wins_over_the_file_whatever_the_name(here: Path) -> None:
    write(lr=1e-3, lora_r=4)
    settings, _ = read_settings(["c.yaml", "--learning_rate", "2e-3", "--lora_rank", "8"])
    assert settings["learning_rate"] == 2e-3
    assert settings["lora"] == {"r": 8}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--batch_size 8", "batch_size: may mean several things; per_device_train_batch_size is"),
        ("--use_peft", "use_peft: is not needed; lora trains an adapter (--lora.r 16)"),
        (
            "--load_in_4bit",
            "set model_init_kwargs: {quantization_config: {load_in_4bit: true, bnb_4bit_quant_type: nf4",
        ),
        ("--precision bf16", "precision: is not a setting; set bf16: true"),
        ("--adapter lora", "adapter: 'lora' is trained if lora is set (--lora.r 16)"),
        ("--rpo_alpha 1", "rpo_alpha: is not supported; set loss_type='rpo(alpha=...)'"),
        ("--group_by_length false", "group_by_length: is called train_sampling_strategy"),
        ("--warmup_ratio 5", "warmup_ratio: must lie in [0, 1), got 5; warmup_steps takes a number of steps"),
        ("--loss_type kto", "loss_type: 'kto' is not supported; unpaired rows are read as pairs"),
        ("--loss_type WPO", "loss_type: 'WPO' is sigmoid with use_weighting: true"),
        ("--loss_type [dpo,cdpo]", "loss_type: 'cdpo' is sigmoid with label_smoothing"),
        ("--lr", "--lr: a value is missing"),
        ("--lr high", "learning_rate: expected a number, got 'high'"),
    ],
)
def test_what_has_no_single_counterpart_is_answered(
    words: str, said: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write()
    assert main(["c.yaml", *words.split()]) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_a_value_that_asks_for_nothing_is_left_out(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(load_in_4bit=False, wandb_project=None, use_peft=False, val_set_size=0)
    settings, _ = read_settings(["c.yaml"])
    assert settings == BASE
    assert "load_in_4bit is not needed" in capsys.readouterr().err


def test_a_mapping_and_a_name_of_one_of_its_keys_are_merged_in_any_order(here: Path) -> None:
    write(torch_dtype="bfloat16", model_init_kwargs={"attn_implementation": "eager"})
    assert read_settings(["c.yaml"])[0]["model_init_kwargs"] == {"dtype": "bfloat16", "attn_implementation": "eager"}
    settings, _ = read_settings(["c.yaml", "--lora.r", "8", "--lora", "{lora_alpha: 3}"])
    assert settings["lora"] == {"r": 8, "lora_alpha": 3}


def test_what_turns_an_adapter_off_contradicts_what_asks_for_one(here: Path) -> None:
    for off in ({"lora": None}, {"use_peft": False}):
        for asks in ({"lora_rank": 8}, {"lora.r": 8}, *([{"lora": {"r": 8}}] if "lora" not in off else [])):
            for both in ({**off, **asks}, {**asks, **off}):
                write()
                with Path("c.yaml").open("a") as file:
                    file.write(yaml.safe_dump(both, sort_keys=False))
                with pytest.raises(ConfigError, match=f"{next(iter(asks))} contradicts {next(iter(off))}: "):
                    read_settings(["c.yaml"])


def test_the_command_line_turns_an_adapter_of_the_file_on_and_off(here: Path) -> None:
    write(lora={"r": 8})
    for words in ("--use_peft false", "--lora null"):
        assert "lora" not in read_settings(["c.yaml", *words.split()])[0]
    write(lora=None)
    assert read_settings(["c.yaml", "--lora_rank", "4"])[0]["lora"] == {"r": 4}


def test_empty_and_false_names_of_another_tool_s_file_ask_for_no_adapter_and_no_quantisation(here: Path) -> None:
    write(lora_r=None, lora_alpha=None, use_dora=False, lora_fan_in_fan_out=False, load_in_8bit=False, torch_dtype=None)
    assert read_settings(["c.yaml"])[0] == BASE


@pytest.mark.parametrize(
    ("given", "ours"),
    [
        ("dpo", "sigmoid"),
        ("DPO", "sigmoid"),
        ("IPO", "ipo"),
        (["dpo", "nll"], ["sigmoid", "sft"]),
        ("simpo(gamma=1)", "simpo(gamma=1)"),
        ("SimPO(gamma=1)", "simpo(gamma=1)"),
        ("sigmoid", "sigmoid"),
    ],
)
def test_words_for_objectives_are_ours(given: str, ours: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(loss_type=given)
    settings, _ = read_settings(["c.yaml"])
    assert settings["loss_type"] == ours
    assert ("is read as" in capsys.readouterr().err) == (given != ours)


def test_words_for_objectives_name_those_that_exist() -> None:
    assert set(OBJECTIVES.values()) <= set(objectives.OBJECTIVES)
    assert not {*OBJECTIVES, *METHODS} & {*objectives.OBJECTIVES}
    assert not {*OBJECTIVES} & {*METHODS}


def test_in_python_the_name_is_answered(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^loss_type: 'dpo' is called 'sigmoid'$"):
        DPOConfig(output_dir=str(tmp_path), loss_type="dpo")
    with pytest.raises(ConfigError, match=r"^loss_type: 'kto_pair' is not supported; bco_pair is the nearest"):
        DPOConfig(output_dir=str(tmp_path), loss_type="kto_pair")


def test_a_name_that_nobody_knows_stays() -> None:
    assert setting_of("betta", 1, KNOWN) == "betta"


def test_the_fields_of_lora_are_read_from_pefts_source() -> None:
    assert lora_fields() == {field.name for field in dataclasses.fields(LoraConfig)}
