"""Fixtures of the trainer's tests: tiny models, tokenizers and pairs, and trainers that use them."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from dpo_trainer import DPOTrainer

from .tiny import build_model, build_pairs, build_tokenizer, build_trainer


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


@pytest.fixture(scope="session", autouse=True)
def cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Let datasets cache tokenised rows in a temporary folder, not in the user's cache."""
    folder = tmp_path_factory.mktemp("datasets-cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
        patch.setenv("HF_DATASETS_CACHE", str(folder))  # for processes that tests start
        yield folder


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    """Use one thread, because for tiny matrices more threads make the suite slower and its timings noisy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Cache reference log-probabilities in the test's folder, not in the user's cache."""
    monkeypatch.setenv("DPO_TRAINER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def make_model(tokenizer: PreTrainedTokenizerFast) -> Callable[..., Any]:
    return lambda kind="llama-tied", seed=0: build_model(kind, len(tokenizer), seed)


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., DPOTrainer]:
    return lambda **settings: build_trainer(tmp_path / "run", **settings)


@pytest.fixture
def read_jsonl() -> Callable[[Path], list[dict[str, Any]]]:
    def read(path: Path) -> list[dict[str, Any]]:
        def refuse(text: str) -> None:
            raise ValueError(f"{text} is not JSON")

        return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]

    return read


@pytest.fixture(scope="session")
def pairs() -> Callable[..., list[dict[str, Any]]]:
    return build_pairs


@pytest.fixture(scope="session")
def tokenizers() -> dict[str, PreTrainedTokenizerFast]:
    """Tokenizers that add BOS, EOS, both or neither to a text."""
    return {
        "plain": build_tokenizer(),
        "bos": build_tokenizer(bos=True),
        "eos": build_tokenizer(eos=True),
        "bos+eos": build_tokenizer(bos=True, eos=True),
    }


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model and its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny-model")
    tokenizer = build_tokenizer()
    build_model("llama-tied", len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
