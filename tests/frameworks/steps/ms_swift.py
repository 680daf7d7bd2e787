"""ms-swift's DPO step: its DPOTrainer with a reference model, on batches that its template makes."""

from __future__ import annotations

import importlib.metadata
import sys
import tempfile
import types

import torch
from torch import Tensor

from ..compare import Size, Step
from ..material import model_of, pairs_of, step_of_trainer, tokenizer_of

# ms-swift imports aiohttp at the top, and uses it only to download data sets.
sys.modules.setdefault("aiohttp", types.ModuleType("aiohttp"))

OLD = importlib.metadata.version("ms_swift").startswith("3.")
if OLD:
    from swift.llm import get_model_tokenizer as load
    from swift.llm import get_template
    from swift.trainers.rlhf_arguments import DPOConfig
    from swift.trainers.rlhf_trainer import DPOTrainer
else:
    from swift.model import get_model_processor as load
    from swift.rlhf_trainers import DPOTrainer
    from swift.rlhf_trainers.arguments import DPOConfig
    from swift.template import get_template


def loaded(size: Size, seed: int = 0):
    """(model, tokenizer) by ms-swift's own loader, which adds what its trainer reads."""
    with tempfile.TemporaryDirectory() as folder:
        model_of(size, seed).save_pretrained(folder)
        tokenizer_of(size).save_pretrained(folder)
        return load(folder, torch_dtype=torch.float32, model_type="llama", device_map="cpu")


def step_of(size: Size) -> Step:
    """The step of the trainer: `DPOTrainer.compute_loss`, which runs policy and reference."""
    (model, tokenizer), folder = loaded(size), tempfile.TemporaryDirectory()
    template = get_template("dummy", tokenizer) if OLD else get_template(tokenizer, template_type="dummy")
    template.set_mode("rlhf")
    rows = [
        {
            "messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["chosen"]}],
            "rejected_response": row["rejected"],
        }
        for row in pairs_of(size)
    ]
    encoded = [template.encode(row) for row in rows]
    trainer = DPOTrainer(
        model=model,
        ref_model=loaded(size, seed=1)[0],
        args=DPOConfig(
            folder.name,
            beta=0.1,
            loss_type="sigmoid",
            use_cpu=True,
            report_to=[],
            check_model=False,
            gradient_checkpointing=False,
            disable_dropout=True,
            remove_unused_columns=False,
        ),
        template=template,
        train_dataset=encoded,
    )
    batch = template.data_collator(encoded)

    def step() -> tuple[float, dict[str, Tensor]]:
        assert folder  # lives as long as the step
        return step_of_trainer(trainer, batch)

    return step


def versions() -> dict[str, str]:
    """Of ms-swift and of what it stands on."""
    return {name: importlib.metadata.version(name) for name in ("ms_swift", "transformers", "trl", "peft")}
