"""Tiny vision-language models with random weights, their processors, and pairs about images, all made here."""

import random
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import AddedToken
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3Processor,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from .tiny import NASTY, NICE, SUBJECTS, build_tokenizer

#: IMAGE is replaced by the text that the model's own template writes for an image.
TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for part in m['content'] %}{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
#: For each model, the text of its template for an image, and the special tokens that it needs.
MARKS = {
    "qwen2.5-vl": (
        "<|vision_start|><|image_pad|><|vision_end|>",
        ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"],
    ),
    "llava": ("<image>\n", ["<image>"]),
    "gemma3": ("<boi>", ["<boi>", "<eoi>", "<img>"]),
    "idefics3": (
        "<image>",
        ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>"]
        + [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)],
    ),
}
KINDS = tuple(MARKS)
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
}


class ImagesOnly(Qwen2_5_VLProcessor):
    """Qwen's processor without the part for videos, which needs torchvision."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None) -> None:
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids([self.image_token, self.video_token])
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def build_processor(kind: str) -> Any:
    mark, tokens = MARKS[kind]
    base = build_tokenizer.__wrapped__()
    base.add_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
    named = {"boi_token": "<boi>", "eoi_token": "<eoi>", "image_token": "<img>"} if kind == "gemma3" else {}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=base.backend_tokenizer, eos_token="<|end|>", pad_token="<|end|>", extra_special_tokens=named
    )
    template = TEMPLATE.replace("IMAGE", mark)
    if kind == "qwen2.5-vl":
        pixels = Qwen2VLImageProcessorPil(
            patch_size=4, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 64, "longest_edge": 2048}
        )
        return ImagesOnly(pixels, tokenizer, chat_template=template)
    if kind == "llava":
        pixels = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
        return LlavaProcessor(
            pixels,
            tokenizer,
            patch_size=4,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=template,
        )
    if kind == "gemma3":
        pixels = Gemma3ImageProcessorPil(size={"height": 16, "width": 16}, image_seq_length=4)
        return Gemma3Processor(pixels, tokenizer, image_seq_length=4, chat_template=template)
    pixels = Idefics3ImageProcessorPil(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
    return Idefics3Processor(pixels, tokenizer, image_seq_len=4, chat_template=template)


def build_vision_model(kind: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    tokenizer = build_processor(kind).tokenizer
    vocab, ids = len(tokenizer), {token: tokenizer.convert_tokens_to_ids(token) for token in MARKS[kind][1]}
    tower = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "image_size": 16,
        "patch_size": 4,
    }
    if kind == "qwen2.5-vl":
        config = Qwen2_5_VLConfig(
            text_config={
                **TEXT,
                "vocab_size": vocab,
                "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
            },
            vision_config={
                "depth": 2,
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_heads": 2,
                "patch_size": 4,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
                "window_size": 16,
                "fullatt_block_indexes": [1],
                "out_hidden_size": 32,
            },
            image_token_id=ids["<|image_pad|>"],
            video_token_id=ids["<|video_pad|>"],
            vision_start_token_id=ids["<|vision_start|>"],
            vision_end_token_id=ids["<|vision_end|>"],
        )
        model: Any = Qwen2_5_VLForConditionalGeneration(config)
    elif kind == "llava":
        model = LlavaForConditionalGeneration(
            LlavaConfig(
                vision_config=CLIPVisionConfig(**tower),
                text_config=LlamaConfig(**TEXT, vocab_size=vocab),
                image_token_index=ids["<image>"],
                vision_feature_select_strategy="default",
                vision_feature_layer=-1,
            )
        )
    elif kind == "gemma3":
        model = Gemma3ForConditionalGeneration(
            Gemma3Config(
                text_config={**TEXT, "vocab_size": vocab, "head_dim": 8},
                vision_config=tower,
                mm_tokens_per_image=4,
                image_token_index=ids["<img>"],
                boi_token_index=ids["<boi>"],
                eoi_token_index=ids["<eoi>"],
            )
        )
    else:
        model = Idefics3ForConditionalGeneration(
            Idefics3Config(
                text_config=LlamaConfig(**TEXT, vocab_size=vocab),
                vision_config=tower,
                image_token_id=ids["<image>"],
                scale_factor=2,
                pad_token_id=0,
            )
        )
    with torch.no_grad():  # larger than at initialisation, so that an image changes the logits by more than rounding
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    return model


def build_image(seed: int, width: int = 20, height: int = 28) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def vision_pairs(count: int, seed: int = 0, images: tuple[int, ...] = (1, 2, 0, 1)) -> list[dict[str, Any]]:
    """Chat rows with images of several sizes. `images` gives the number of images of each row, in turn."""
    generator = random.Random(seed)
    rows = []
    for number in range(count):
        words = " ".join(generator.choices(SUBJECTS, k=generator.randint(1, 4)))
        sides = (generator.choices(kind, k=generator.randint(1, 4)) for kind in (NICE, NASTY))
        chosen, rejected = ([{"role": "assistant", "content": " ".join(side)}] for side in sides)
        rows.append(
            {
                "prompt": [{"role": "user", "content": f"{words} {number}"}],
                "chosen": chosen,
                "rejected": rejected,
                "images": [
                    build_image(100 * number + place, 16 + 8 * (number % 3), 24 + 8 * place)
                    for place in range(images[number % len(images)])
                ],
            }
        )
    return rows
