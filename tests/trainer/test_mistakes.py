"""For every mistake of a user: one clear line that names file, row and field, exit code 2, and no change on disk."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from transformers import PreTrainedTokenizerFast

from dpo_trainer.cli.main import main

from .tiny import build_model, build_tokenizer

#: Good rows of each kind; the functions return such a row with changes (`...` removes a key), as a line of a file.
ROW = {"prompt": "review:", "chosen": " great", "rejected": " awful"}
CHAT = {
    "prompt": [{"role": "user", "content": "the film"}],
    "chosen": [{"role": "assistant", "content": "good"}],
    "rejected": [{"role": "assistant", "content": "bad"}],
}


def changed(row: dict[str, Any] = ROW, **changes: Any) -> str:
    return json.dumps({key: value for key, value in {**row, **changes}.items() if value is not ...})


GOOD, TALK = changed(), changed(CHAT)
USER = {"role": "user", "content": "the film"}

#: (file name, content, text that must follow the file's name in the line). Each file is given as training data.
DATA: list[tuple[str, str | bytes, str]] = [
    # content that contradicts the file's ending
    ("a.jsonl", f'{GOOD}\n\n{{"prompt": \n', ":3: not JSON"),
    ("a.jsonl", "{prompt: a}\n", ":1: not JSON: Expecting property name enclosed in double quotes at column 2"),
    ("a.jsonl", b"\xff\xfe\n", ":1: not UTF-8 text (byte 0 of the line)"),
    ("a.jsonl", f"{GOOD}\n".encode() + b'{"prompt": "caf\xe9"}', ":2: not UTF-8 text"),
    ("a.jsonl", "", ": no rows"),
    ("a.jsonl", "\n\n", ": no rows"),
    ("a.json", "[]", ": no rows"),
    (
        "a.json",
        f"{GOOD}\n{GOOD}",
        ":2: not JSON: Extra data at column 1; if every line is one object, use the ending .jsonl",
    ),
    ("a.json", GOOD, ": expected a list of objects, found an object"),
    ("a.json", f'[{GOOD},\n{{"prompt" 1}}]', ":2: not JSON"),
    (
        "a.json",
        f"[{GOOD}, {changed(chosen=3)}]",
        ": row 2: 'chosen' must be text or a list of messages, found a number",
    ),
    ("a.csv", "", ": not readable as csv"),
    ("a.csv", "prompt,chosen,rejected\na,b,c\na,b,c,d,e\n", ": not readable as csv (Error tokenizing data"),
    ("a.csv", "prompt,chosen,rejected\n", ": no rows"),
    ("a.parquet", "text", ": not readable as parquet"),
    ("a.txt", GOOD, ": unknown format '.txt'; known are .jsonl, .json, .parquet, .csv"),
    # columns
    ("a.jsonl", f"{GOOD}\n{changed(rejected=...)}\n", ":2: no column 'rejected'; it has prompt, chosen"),
    (
        "a.jsonl",
        changed(chosen=..., choosen=" good"),
        ":1: no column 'chosen'; it has prompt, rejected, choosen (did you mean",
    ),
    (
        "a.jsonl",
        changed(prompt=..., promt="a"),
        ":1: no column 'prompt'; it has chosen, rejected, promt (did you mean 'promt'?)",
    ),
    (
        "a.jsonl",
        changed(prompt=..., question="a"),
        ":1: no column 'prompt'; it has chosen, rejected, question (did you mean",
    ),
    ("a.csv", "prompt,chosen\na,b\n", ": row 1: no column 'rejected'; it has prompt, chosen"),
    ("a.csv", "prompt,chosen\n", ": no column 'rejected'; it has prompt, chosen"),
    ("a.jsonl", f"{changed(weight=1)}\n{GOOD}\n", ":2: no column 'weight', which earlier rows have"),
    ("a.jsonl", f"{GOOD}\n{changed(weight=1)}\n", ":2: a column 'weight', which earlier rows do not have"),
    (
        "a.jsonl",
        changed(ref_chosen_logps=-3.0),
        ":1: no column 'ref_rejected_logps'; reference log-probabilities come in",
    ),
    # values
    ("a.jsonl", f"{GOOD}\n[1, 2]\n", ":2: expected an object with prompt, chosen, rejected, found a list"),
    ("a.jsonl", changed(chosen=None), ":1: 'chosen' must be text or a list of messages, found nothing (null)"),
    ("a.jsonl", changed(prompt=7), ":1: 'prompt' must be text or a list of messages, found a number"),
    ("a.jsonl", changed(rejected={"text": "a"}), ":1: 'rejected' must be text or a list of messages, found an object"),
    ("a.jsonl", changed(weight="high"), ":1: 'weight' must be a finite number, found 'high'"),
    ("a.jsonl", changed(weight=-1), ":1: 'weight' must not be negative, found -1"),
    ("a.jsonl", changed(weight=float("nan")), ":1: 'weight' must be a finite number, found nan"),
    ("a.jsonl", changed(weight=10**400), ":1: 'weight' must be a finite number, found 1000"),
    ("a.jsonl", changed(weight=True), ":1: 'weight' must be a finite number, found True"),
    (
        "a.csv",
        "prompt,chosen,rejected,weight\na,b,c,1\na,b,d,\n",
        ": row 2: 'weight' must be a finite number, found ''",
    ),
    (
        "a.jsonl",
        changed(ref_chosen_logps=-1.0, ref_rejected_logps="x"),
        ":1: 'ref_rejected_logps' must be a finite number",
    ),
    ("a.jsonl", changed(tools=3), ":1: 'tools' must be a list of objects or its JSON text, found a number"),
    ("a.jsonl", changed(tools="[look"), ":1: 'tools' must be a list of objects or its JSON text, found '[look'"),
    # messages
    (
        "a.jsonl",
        changed(chosen=CHAT["chosen"]),
        ":1: text and chat are mixed (prompt is text, chosen is chat, rejected is",
    ),
    ("a.jsonl", f"{GOOD}\n{TALK}\n", ":2: chat messages, but earlier rows are text; use one of them for all rows"),
    ("a.jsonl", changed(CHAT, prompt=[]), ":1: empty prompt in 'prompt' (no messages)"),
    ("a.jsonl", changed(CHAT, rejected=[]), ":1: empty completion in 'rejected' (no messages)"),
    (
        "a.jsonl",
        changed(CHAT, chosen=[{"content": "x"}]),
        ":1: message 1 of 'chosen' must be an object with role and content",
    ),
    ("a.jsonl", changed(CHAT, chosen=["x"]), ":1: message 1 of 'chosen' must be an object with role and content"),
    (
        "a.jsonl",
        changed(CHAT, chosen=[{"role": "a", "content": 3}]),
        ":1: message 1 of 'chosen' has no text in 'content'",
    ),
    (
        "a.jsonl",
        changed(CHAT, chosen=[USER]),
        ":1: the first message of 'chosen' after the prompt is of 'user', not of the assistant",
    ),
    ("a.jsonl", f"{TALK}\n{changed(CHAT, prompt='x')}", ":2: text and chat are mixed (prompt is text"),
    # prompts within
    ("a.jsonl", changed(prompt=..., chosen="b", rejected="c"), ":1: no 'prompt', and 'chosen' and 'rejected' share no"),
    (
        "a.jsonl",
        changed(prompt=..., chosen=[USER, {"role": "user", "content": "a"}], rejected=[USER, USER]),
        ":1: the first message of 'chosen' after the prompt is of 'user', not of the assistant",
    ),
    # nothing to learn from
    (
        "a.jsonl",
        changed(rejected=" great"),
        "): nothing is left to train on: train_dataset: 0 of 1 pairs kept, 0",
    ),
    (
        "a.jsonl",
        changed(chosen="  "),
        "): nothing is left to train on: train_dataset: 0 of 1 pairs kept",
    ),
]

#: (arguments after the config, text that the line must contain)
MISTAKES = [
    # names and types
    ("--learning_rte 1e-5", "unknown setting 'learning_rte' (did you mean 'learning_rate'?)"),
    ("--zzz 1", "unknown setting 'zzz'"),
    ("--lora.rr 4", "unknown setting 'lora.rr' (did you mean 'lora.r'?)"),
    ("--lora.r four", "lora.r: expected a whole number, got 'four'"),
    ("--lora.target_modules [nope]", "peft_config: Target modules {'nope'} not found"),
    ("--lora 3", "lora: expected a mapping or null, got 3"),
    ("--beta high", "beta: expected a number, got 'high'"),
    ("--beta -1", "beta: must be a positive number, got -1.0"),
    ("--max_steps 1.5", "max_steps: expected a whole number, got 1.5"),
    ("--bf16 maybe", "bf16: expected true or false, got 'maybe'"),
    ("--statistics.kl 1", "statistics: expected a list of text"),
    ("--lr_scheduler_type wavy", "wavy"),
    ("--logging_steps 0", "logging_steps"),
    ("--loss_type sigmod", "unknown objective 'sigmod' (did you mean 'sigmoid'?); known are sigmoid"),
    ("--max_length 0", "max_length: must be at least 2, got 0"),
    ("--learning_rate", "--learning_rate: a value is missing"),
    ("beta 0.1", "'beta': expected --key value"),
    ("--model /nowhere/model", "model '/nowhere/model': no such folder"),
    (
        "--model some-name-nobody-has",
        "model 'some-name-nobody-has': cannot be loaded: no such folder, not in the cache, and the hub cannot be reached",
    ),
    ("--model train.jsonl", "model 'train.jsonl': not a folder or .gguf file"),
    ("--model missing.gguf", "model 'missing.gguf': no such file"),
    ("--ref_model ./missing", "'./missing': no such folder"),
    ("--train_data missing.jsonl", "missing.jsonl: no such file"),
    ("--train_data config.yaml", "unknown format '.yaml'"),
    ("--train_data null", "train_data: not given"),
    ("--output_dir train.jsonl", "output_dir 'train.jsonl': is a file"),
    ("--output_dir finished", "output_dir 'finished': holds a finished run"),
    ("--output_dir unfinished", "holds an unfinished run (last checkpoint: checkpoint-7)"),
    ("--output_dir saved", "output_dir 'saved': holds a model"),
    ("--resume", "output_dir 'run': holds no checkpoint to resume from"),
    ("--resume --overwrite", "--resume and --overwrite contradict each other"),
    (
        "--win_rate_scorer nowhere:judge --sample_prompts 2 --eval_data eval.jsonl",
        "scorer 'nowhere:judge': cannot be imported",
    ),
    ("--sample_prompts 2", "sample_prompts: there are no held-out pairs; give eval_data"),
    ("--sync_ref_model --precompute_ref_log_probs", "sync_ref_model: the reference moves during training"),
    ("--loss_type simpo --precompute_ref_log_probs", "loss_type simpo uses no reference"),
    ("--resume_from_checkpoint nowhere", "resume_from_checkpoint 'nowhere': not a checkpoint"),
    ("--max_tokens many", "max_tokens: expected a whole number"),
    ("--streaming maybe", "streaming: expected true or false, got 'maybe'"),
    ("--model_init_kwargs 3", "model_init_kwargs: expected a mapping, got 3"),
    (
        "--train_sampling_strategy by_length",
        "unknown 'by_length' (did you mean 'group_by_length'?); known are random, ",
    ),
    ("--filters [identical,dupes]", "filters: unknown 'dupes' (did you mean 'duplicates'?); known are identical, "),
    ("--optimizer AdamW", "optim: unknown 'AdamW' (did you mean 'adamw_torch'?); known are adamw_torch"),
    ("--optim adamw_torc", "(did you mean 'adamw_torch'?)"),
    ("--eval_strategy sometimes", "eval_strategy: sometimes is not a valid IntervalStrategy"),
    ("--report_to tensorbord", "report_to: tensorbord is not supported, only "),
    ("--report_to tensorbord", "(did you mean 'tensorboard'?)"),
    ("--optim_args foo", "optim_args: expected name=value, separated by commas, got 'foo'"),
    # numbers out of range
    ("--per_device_train_batch_size 0", "per_device_train_batch_size: must be at least 1, got 0"),
    ("--gradient_accumulation_steps 0", "gradient_accumulation_steps: must be at least 1, got 0"),
    ("--max_steps 0", "max_steps: must be at least 1, or -1 for whole epochs, got 0"),
    ("--max_steps -1 --num_train_epochs 0", "num_train_epochs: must be positive, got 0.0"),
    ("--learning_rate -1", "learning_rate: must not be negative, got -1.0"),
    ("--adam_beta2 1", "adam_beta2: must lie in [0, 1), got 1.0"),
    ("--seed -1", "seed: must lie in [0, 2**32), got -1"),
    ("--save_steps 0", "save_steps: must be a number of steps, or a share of the run below 1, got 0.0"),
    ("--eval_steps 2.5", "eval_steps: must be a number of steps, or a share of the run below 1, got 2.5"),
    ("--eval_strategy steps", "eval_strategy: there are no held-out pairs; give eval_data, or set val_split: 0.1"),
    ("--sample_prompts 4", "sample_prompts: there are no held-out pairs; give eval_data, or set val_split: 0.1"),
    ("--load_best_model_at_end", "load_best_model_at_end: there are no held-out pairs; give eval_data"),
    ("--val_split 3 --load_best_model_at_end --eval_strategy no", "load_best_model_at_end: eval_strategy is 'no'"),
    (
        "--val_split 3 --load_best_model_at_end --eval_strategy epoch",
        "checkpoints of the same steps; set save_strategy: epoch",
    ),
    ("--warmup_steps -5", "warmup_steps = -5.0, Expected value warmup_steps >= 0"),
    ("--min_weight -1", "min_weight: must not be negative, got -1.0"),
    ("--max_tokens 3", "max_tokens: must be at least 4, got 3"),
    # settings that contradict each other or the data
    (
        "--max_tokens 20",
        "max_tokens: 20 is less than the 26 tokens of a single pair (2 x 13, its longer side); raise it",
    ),
    ("--min_weight 0.5", "min_weight: the pairs of train_dataset (train.jsonl) have no column 'weight'"),
    ("--streaming --max_steps -1", "max_steps: must be given with streaming"),
    ("--streaming --precompute_ref_log_probs", "precompute_ref_log_probs: needs all pairs before training"),
    ("--streaming --train_data list.json", "list.json: a .json list is read as a whole"),
    ("--streaming --train_data bad.jsonl", "bad.jsonl:2: no column 'rejected'; it has prompt, chosen"),
    ("--eval_data bad.jsonl", "bad.jsonl:2: no column 'rejected'; it has prompt, chosen"),
    ("--bf16 --fp16", "At most one of fp16 and bf16"),
    ("--save_strategy best", "save_strategy: 'best' needs metric_for_best_model, such as loss"),
    ("--save_strategy best --metric_for_best_model loss", "save_strategy: 'best' needs evaluations; give eval_data"),
    (
        "--eval_data train.jsonl --save_steps 4 --load_best_model_at_end --metric_for_best_model los",
        "metric_for_best_model: unknown 'los' (did you mean 'loss'?); known are loss, rewards/chosen, ",
    ),
    (
        "--eval_data train.jsonl --eval_strategy steps --eval_steps 4 --metric_for_best_model eval_f1",
        "metric_for_best_model: unknown 'f1'; known are loss, ",
    ),
    (
        "--eval_data train.jsonl --eval_strategy epoch --precompute_ref_log_probs --metric_for_best_model kl",
        "metric_for_best_model: unknown 'kl'; known are loss, ",
    ),
    (
        "--eval_data train.jsonl --save_strategy best --eval_strategy steps --metric_for_best_model win_rate",
        "metric_for_best_model: unknown 'win_rate'; known are loss, ",
    ),
    ("--lora.r 0", "`r` should be a positive integer value but the value passed is 0"),
    ("--backend cuda", "backend: 'cuda' cannot be used: "),
    # places
    ("--train_data nobody/missing", "nobody/missing: no such file, and the hub does not provide it"),
    ("--train_data ./missing", "./missing: no such file"),
    ("--train_data folder", "folder: not a folder saved by datasets"),
    ("--train_data splits", "splits: holds several splits (train, test); name one, e.g. splits/train"),
    ("--output_dir train.jsonl/run", "output_dir 'train.jsonl/run': cannot be created, '"),
    # models
    ("--model folder", "model 'folder': the folder holds no model (no config.json)"),
    ("--model_init_kwargs.dtype float99", "model_init_kwargs: unknown dtype 'float99'"),
    (
        "--model_init_kwargs.nope 3",
        "cannot be loaded (LlamaForCausalLM.__init__() got an unexpected keyword argument 'nope')",
    ),
    (
        "--ref_model other",
        "ref_model: has a vocabulary of 370 tokens, but the model has 306; both must have the same tokenizer",
    ),
    ("--model small", "model: has embeddings for 286 tokens, but the data need token "),
    (
        "--model positions --train_data long.jsonl",
        "max_length: the longest pair has 403 tokens, but the model has pos",
    ),
    (
        "--model untemplated --train_data chat.jsonl",
        "train_dataset (chat.jsonl) row 1: rows are chat messages but the tokenizer",
    ),
    (
        "--model strict --train_data chat.jsonl",
        "(chat.jsonl) row 1: the chat template refuses these messages: only questions",
    ),
]

#: (content of config.yaml, text that the line must contain)
CONFIGS: list[tuple[str | bytes, str]] = [
    ("beta: 1\nmodel: [", "config.yaml:2: not YAML"),
    ("model: a\n  beta: 1\n", "config.yaml:2: not YAML"),
    ("- model\n", "config.yaml: expected 'key: value' lines, found list"),
    ("", "model: not given"),
    ("beta: {a: 1}\n", "beta: expected a number, got {'a': 1}"),
    ("betta: 1\n", "unknown setting 'betta' (did you mean 'beta'?)"),
    (b"\xff\xfe\x00", "config.yaml: not UTF-8"),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """Models that do not fit their tokenizer, their reference or long data, by their names in the table."""
    folder, tokenizer = tmp_path_factory.mktemp("models"), build_tokenizer()
    for name, kind, vocabulary in (
        ("other", "llama-tied", len(tokenizer) + 64),
        ("small", "llama-tied", len(tokenizer) - 20),
        ("positions", "gpt2-learned-positions", len(tokenizer)),
    ):
        build_model(kind, vocabulary).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    for name, template in (("untemplated", None), ("strict", "{{ raise_exception('only questions') }}")):
        shutil.copytree(model_folder, folder / name)
        (folder / name / "chat_template.jinja").unlink()
        changed_tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / name)
        changed_tokenizer.chat_template = template
        changed_tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture
def here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pairs: Callable[..., Any], model_folder: Path, models: Path
) -> Path:
    """A working directory with a config, data, runs, and links to the models."""
    monkeypatch.chdir(tmp_path)
    files = {
        "config.yaml": yaml.safe_dump(
            {
                "model": str(model_folder),
                "train_data": "train.jsonl",
                "output_dir": "run",
                "max_steps": 4,
                "use_cpu": True,
            }
        ),
        "train.jsonl": "".join(json.dumps(row) + "\n" for row in pairs(24)),
        "eval.jsonl": GOOD,
        "bad.jsonl": f"{GOOD}\n{changed(rejected=...)}\n",
        "chat.jsonl": TALK,
        "list.json": f"[{GOOD}]",
        "long.jsonl": changed(prompt="the film " * 200),
        "folder/notes.txt": "mine",
        "finished/summary.json": "{}",
        "unfinished/checkpoint-7/trainer_state.json": "{}",
        "saved/config.json": "{}",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    for model in models.iterdir():
        (tmp_path / model.name).symlink_to(model)
    return tmp_path


def tree(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def complaint(folder: Path, capsys: pytest.CaptureFixture[str], arguments: str) -> str:
    """Run the command, check that it prints one line and changes nothing on disk, and return the line."""
    before = tree(folder)
    code = main(["config.yaml", *arguments.split()])
    shown = capsys.readouterr().err.strip().splitlines()
    assert code == 2
    errors = [line for line in shown if line.startswith("dpo-train: ")]
    assert len(errors) == 1
    assert "Traceback" not in "".join(shown)
    assert tree(folder) == before
    return errors[0].removeprefix("dpo-train: ")


def test_the_table_has_more_than_forty_kinds() -> None:
    assert len({said for *_, said in [*DATA, *MISTAKES, *CONFIGS]}) > 120


@pytest.mark.parametrize(("name", "content", "said"), DATA, ids=[said for *_, said in DATA])
def test_bad_data_are_named(
    here: Path, capsys: pytest.CaptureFixture[str], name: str, content: str | bytes, said: str
) -> None:
    (here / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    line = complaint(here, capsys, f"--train_data {name}")
    assert line.removeprefix("train_dataset (").startswith(name + said)


@pytest.mark.parametrize(
    ("arguments", "said"), MISTAKES, ids=[f"{arguments}: {said}"[:60] for arguments, said in MISTAKES]
)
def test_a_mistake_is_named(here: Path, capsys: pytest.CaptureFixture[str], arguments: str, said: str) -> None:
    if "splits" in arguments:
        datasets.DatasetDict({name: datasets.Dataset.from_list([ROW]) for name in ("train", "test")}).save_to_disk(
            here / "splits"
        )
    assert said in complaint(here, capsys, arguments)


@pytest.mark.parametrize(("content", "said"), CONFIGS)
def test_an_unreadable_config_is_named(
    here: Path, capsys: pytest.CaptureFixture[str], content: str | bytes, said: str
) -> None:
    (here / "config.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert complaint(here, capsys, "").startswith(said)


def test_a_missing_config_is_named(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["none.yaml"]) == 2
    assert "none.yaml: cannot be read (No such file or directory)" in capsys.readouterr().err
