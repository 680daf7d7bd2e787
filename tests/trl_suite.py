"""TRL's own tests of its DPO trainer, run with our classes in place of TRL's.

    python tests/trl_suite.py CHECKOUT [--write] [--classes trl] [-k EXPRESSION]

CHECKOUT is a folder with `VERSION` and `tests/` of TRL's repository, which this repository does not contain. The tests' models
and data sets are not downloaded: tiny ones are made here under the same names. `--write` writes the result to
benchmarks/results/trl_suite.json, which docs/compatibility.md shows. Tests of vision-language models are counted separately.
CI does not run this file.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from importlib import import_module, metadata
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.update(HF_HUB_OFFLINE="1", TRL_EXPERIMENTAL_SILENCE="1", TOKENIZERS_PARALLELISM="false")
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT), str(ROOT / "python")]

import datasets  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from trainer.tiny import NASTY, NICE, SUBJECTS, build_tokenizer  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "trl_suite.json"
HUB = "trl-internal-testing/"
#: Patterns of tests that are counted separately.
APART = ("*VLM*", "*Vision*", "*vision*", "*vlm*")
#: Reasons why tests fail, by pattern of their names. The first matching pattern counts.
REASONS: tuple[tuple[str, str], ...] = (
    (
        "*liger*",
        "use_liger_kernel is refused on a CPU, where these tests ran: Liger's Triton kernels cannot run there, and would stay "
        "in every later model of the process.",
    ),
    ("*test_tag_added*", "The model's tags say what trained it: dpo, dpo-kernels."),
    (
        "*test_train_dataset_required",
        "Refused as in TRL, by a ValueError with a text of our own. With an eval_dataset it is allowed.",
    ),
    (
        "*test_train_with_eval",
        "It takes the first log record for the evaluation's; here the first step has logged its loss (logging_first_step).",
    ),
    (
        "*test_evaluate_precompute_ref_log_probs_after_training_raises",
        "Refused as in TRL, by a ValueError with a text of our own.",
    ),
    (
        "*test_train?trl-internal-testing*",
        "It looks for aux_loss in the run's last record, the summary; here the records of the steps have it.",
    ),
)


# --- models -------------------------------------------------------------------------------------------------------

SIZES = {
    "hidden_size": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 32,
    "bos_token_id": 1,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "max_position_embeddings": 1024,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
NEMOTRON = {
    **EXPERTS,
    "hidden_size": 16,
    "layers_block_type": ["mamba", "attention", "moe"],
    "mamba_num_heads": 8,
    "mamba_head_dim": 4,
    "mamba_n_groups": 1,
    "ssm_state_size": 16,
    "n_routed_experts": 4,
    "moe_shared_expert_intermediate_size": 32,
    "use_mamba_kernels": False,
}
#: For each name on the hub: the architecture, and its config in addition to SIZES.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny-Cohere2ForCausalLM": ("Cohere2", {"logit_scale": 1.0}),
    "tiny-Glm4MoeForCausalLM": (
        "Glm4Moe",
        {**EXPERTS, "head_dim": 2, "n_routed_experts": 4, "first_k_dense_replace": 1},
    ),
    "tiny-GptOssForCausalLM": ("GptOss", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 2}),
    "tiny-Qwen2ForCausalLM-2.5": ("Qwen2", {}),
    "tiny-Qwen3MoeForCausalLM": ("Qwen3Moe", {**EXPERTS, "num_experts": 4, "head_dim": 8}),
    "tiny-NemotronHForCausalLM-nano": ("NemotronH", NEMOTRON),
    "tiny-Olmo3ForCausalLM": ("Olmo3", {}),
    "tiny-Lfm2ForCausalLM": ("Lfm2", {"layer_types": ["conv", "full_attention"]}),
    "tiny-Lfm2ForCausalLM-2.5": ("Lfm2", {"layer_types": ["conv", "full_attention"]}),
    "tiny-RemoteForCausalLM": ("Llama", {}),
}
REMOTE = """\
from transformers import LlamaConfig, LlamaForCausalLM


class RemoteConfig(LlamaConfig):
    model_type = "remote"


class RemoteForCausalLM(LlamaForCausalLM):
    config_class = RemoteConfig
"""
TEMPLATE = (
    "{% if tools %}<|start|>tools\n{{ tools | tojson }}<|end|>\n{% endif %}{% for m in messages %}<|start|>{{ m['role'] }}\n"
    "{{ m['content'] or '' }}{% for call in m['tool_calls'] or [] %}{{ call | tojson }}{% endfor %}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def save_model(name: str, folder: Path) -> None:
    """Save a tiny model and its tokenizer under the name of a model on the hub."""
    tokenizer = build_tokenizer()
    kind, extra = MODELS[name]
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, "vocab_size": len(tokenizer), **extra})
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    with torch.no_grad():  # in a new model of this size, the gradients of some parameters would be too small
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3)
    model.save_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    if "Remote" in name:
        (folder / "remote.py").write_text(REMOTE, encoding="utf-8")
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        classes = {"AutoConfig": "remote.RemoteConfig", "AutoModelForCausalLM": "remote.RemoteForCausalLM"}
        config |= {"model_type": "remote", "architectures": ["RemoteForCausalLM"], "auto_map": classes}
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


# --- data ---------------------------------------------------------------------------------------------------------


def said(role: str, text: str, **more: Any) -> list[dict[str, Any]]:
    """One message, in a list."""
    return [{"role": role, "content": text, **more}]


def texts(count: int) -> list[dict[str, str]]:
    """Preference pairs as plain text, all different."""
    return [
        {
            "prompt": f"{SUBJECTS[index % 5]} {SUBJECTS[index // 5 % 5]} {index} is",
            "chosen": f" {NICE[index % 3]} and {NICE[index // 3 % 3]}",
            "rejected": f" {NASTY[index % 2]}",
        }
        for index in range(count)
    ]


def conversations(count: int) -> list[dict[str, Any]]:
    """Preference pairs as messages."""
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    return [{key: said(role, row[key].strip()) for key, role in roles.items()} for row in texts(count)]


def implicit(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows without the column `prompt`: both answers begin with the prompt."""
    return [{side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in rows]


def tool_calls(count: int) -> list[dict[str, Any]]:
    """Conversations whose chosen answer calls a tool."""
    tool = {"type": "function", "function": {"name": "grade", "parameters": {"type": "object", "properties": {}}}}
    call = {"type": "function", "function": {"name": "grade", "arguments": {"film": "the film"}}}
    return [
        {**row, "chosen": said("assistant", "", tool_calls=[call]), "tools": json.dumps([tool])}
        for row in conversations(count)
    ]


DATA: dict[tuple[str, str], Callable[[int], list[dict[str, Any]]]] = {
    ("zen", "standard_preference"): texts,
    ("zen", "conversational_preference"): conversations,
    ("zen", "standard_implicit_prompt_preference"): lambda count: implicit(texts(count)),
    ("zen", "conversational_implicit_prompt_preference"): lambda count: implicit(conversations(count)),
    ("zen", "standard_unpaired_preference"): lambda count: [
        {"prompt": row["prompt"], "completion": row["chosen"], "label": True} for row in texts(count)
    ],
    ("harmony", "preference"): conversations,
    ("toolcall", "preference"): tool_calls,
}
#: Rows of each split, as in TRL's data set zen.
SPLITS = {"train": 17, "test": 2}


def load_dataset(path: str, name: str = "", split: str | None = None, *, streaming: bool = False, **_: Any) -> Any:
    """Replaces `datasets.load_dataset`."""
    made = {key: datasets.Dataset.from_list(DATA[path.removeprefix(HUB), name](count)) for key, count in SPLITS.items()}
    kinds: tuple[Any, Any] = (datasets.IterableDatasetDict, datasets.DatasetDict)
    if streaming:
        made = {key: value.to_iterable_dataset() for key, value in made.items()}
    return made[split] if split is not None else kinds[0 if streaming else 1](made)


# --- the run ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def replaced(folder: Path, classes: str) -> Iterator[None]:
    """A context in which hub names give the models and data made here and, unless `classes` is "trl", TRL's names our classes."""
    import trl

    import dpo_trainer

    def here(name: Any) -> Any:
        if not isinstance(name, str) or not name.startswith(HUB):
            return name
        place = folder / name.removeprefix(HUB)
        if not place.exists():
            save_model(place.name, place)
        return str(place)

    def redirected(kind: Any) -> Any:
        whole = kind.from_pretrained
        return lambda name, *args, **kwargs: whole(here(name), *args, **kwargs)

    def absent(name: str) -> Any:
        """Replaces functions that the suite imports to ask for packages and that the installed TRL lacks."""
        if name.startswith("is_"):
            return lambda: False
        raise AttributeError(name)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(import_module("trl.import_utils"), "__getattr__", absent, create=True))
        for kind in ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer", "AutoProcessor"):
            loader = getattr(transformers, kind)
            stack.enter_context(mock.patch.object(loader, "from_pretrained", redirected(loader)))
        stack.enter_context(mock.patch.object(datasets, "load_dataset", load_dataset))
        if classes == "trl":
            # create_model_from_path reads the config of the given name and then gets the class that the config names.
            for architecture in {kind for kind, _ in MODELS.values()}:
                loader = getattr(transformers, f"{architecture}ForCausalLM")
                stack.enter_context(mock.patch.object(loader, "from_pretrained", redirected(loader)))
        else:
            for name in ("DPOConfig", "DPOTrainer"):
                stack.enter_context(mock.patch.object(trl, name, getattr(dpo_trainer, name)))
        yield


class Record:
    """A pytest plugin that records the outcome of each test."""

    def __init__(self) -> None:
        self.outcomes: dict[str, dict[str, str]] = {}
        self.apart: list[str] = []

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        apart = [item for item in items if any(fnmatchcase(short(item.nodeid), pattern) for pattern in APART)]
        self.apart = [short(item.nodeid) for item in apart]
        config.hook.pytest_deselected(items=apart)
        items[:] = [item for item in items if item not in apart]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and not (report.when == "setup" and report.outcome != "passed"):
            return
        found = {"outcome": report.outcome}
        if report.outcome == "failed":
            crash = getattr(report.longrepr, "reprcrash", None)
            found["error"] = (crash.message if crash else str(report.longrepr)).splitlines()[0][:200]
        elif report.outcome == "skipped":
            found["error"] = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)[:200]
        self.outcomes[short(report.nodeid)] = found


def short(nodeid: str) -> str:
    """A test's name without its file."""
    return nodeid.partition("::")[2]


def reason_of(test: str) -> str | None:
    """The reason from REASONS why a test fails, or None."""
    return next((reason for pattern, reason in REASONS if fnmatchcase(test, pattern)), None)


def result_of(record: Record, checkout: Path, classes: str) -> dict[str, Any]:
    """The content of the results file."""
    failed = {test: found for test, found in record.outcomes.items() if found["outcome"] == "failed"}
    return {
        "suite": (checkout / "VERSION").read_text(encoding="utf-8").strip(),
        "trl": metadata.version("trl"),
        "classes": classes,
        "tests": len(record.outcomes),
        "passed": sorted(test for test, found in record.outcomes.items() if found["outcome"] == "passed"),
        "failed": [
            {"test": test, "reason": reason_of(test), "error": found["error"]} for test, found in sorted(failed.items())
        ],
        "skipped": [
            {"test": test, "reason": found["error"]}
            for test, found in sorted(record.outcomes.items())
            if found["outcome"] == "skipped"
        ],
        "apart": len(record.apart),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path, help="a folder with TRL's tests/ and VERSION")
    parser.add_argument("--write", action="store_true", help=f"write {RESULT.name}")
    parser.add_argument("--classes", choices=("ours", "trl"), default="ours", help="whose classes are tested")
    parser.add_argument("-k", default="", help="as pytest's")
    given = parser.parse_args()
    checkout, record = given.checkout.resolve(), Record()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch, replaced(Path(scratch) / "models", given.classes):
        datasets.config.HF_DATASETS_CACHE = Path(scratch) / "datasets"
        os.environ["DPO_TRAINER_CACHE"] = str(Path(scratch) / "cache")
        os.environ["HF_MODULES_CACHE"] = str(Path(scratch) / "modules")
        os.chdir(scratch)  # runs without an output_dir write to the current folder
        words = ["-q", "--no-header", "--tb=short", "-p", "no:cacheprovider", "-p", "no:xdist"]
        words += ["--rootdir", str(checkout), "-c", os.devnull, "-k", given.k, "--basetemp", f"{scratch}/tmp"]
        pytest.main([*words, str(checkout / "tests" / "test_dpo_trainer.py")], plugins=[record])
    result = result_of(record, checkout, given.classes)
    if given.write:
        RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({**result, "passed": len(result["passed"])}, indent=1))
    unexplained = [entry["test"] for entry in result["failed"] if entry["reason"] is None]
    print(f"{len(result['passed'])} of {result['tests']} pass; without a reason: {unexplained or 'none'}")
    return 1 if unexplained else 0


if __name__ == "__main__":
    sys.exit(main())
