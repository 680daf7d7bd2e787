"""What a vision-language model reads beside token ids: pixels, and what its processor says of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import BatchFeature

from ..data.images import open_image
from ..data.processor import image_token_of
from ..errors import DataError, first_line

#: Begins the names of a batch's entries that go to the model as they are.
PREFIX = "model."


@dataclass(frozen=True)
class ImageInputs:
    """Makes the inputs of a model for the images of a batch's rows.

    Args:
        processor: of the model; it decides what the inputs are (`pixel_values`, `image_grid_thw`, and so on).
    """

    processor: Any

    def __call__(self, images: Sequence[Sequence[Any]], input_ids: Tensor, *, copies: int = 1) -> dict[str, Tensor]:
        """The model's inputs by name, without the token ids; nothing where no row has images.

        Args:
            images: of every row, in the order of their places.
            input_ids: [copies * rows, T] int64: the rows in this order, then again; tensors for each token are made of them.
            copies: times that every image stands in `input_ids`: it is processed once and given to the model as often.

        Raises:
            DataError: an image cannot be read, or the processor gives something else than tensors for images and tokens.
        """
        opened = [[open_image(image, "an image of a batch") for image in row] for row in images if row]
        if not opened:
            return {}
        name = type(self.processor).__name__
        try:
            texts = [(image_token_of(self.processor) or "") * len(row) for row in opened]
            padding = self.processor.tokenizer.pad_token is not None  # some give tensors whatever they are asked for
            found = dict(self.processor(text=texts, images=opened, add_special_tokens=False, padding=padding))
            ids = found.pop("input_ids")
            found.pop("attention_mask", None)
            kinds = {key: found.pop(key) for key in list(found) if key.endswith("token_type_ids")}
            pixels = dict(BatchFeature(found, tensor_type="pt"))
        except Exception as error:  # whatever a processor raises
            raise DataError(f"{name} fails on the images of a batch ({first_line(error)})") from error
        for key, value in pixels.items():
            if not isinstance(value, Tensor) or key == "cross_attention_mask":
                raise DataError(f"{name}: gives '{key}' for images, which the trainer cannot put into batches")
        inputs = {key: torch.cat([value] * copies) for key, value in pixels.items()}
        for key, rows in kinds.items():
            # A token's kind follows from its id: that of text is 0.
            inputs[key] = torch.zeros_like(input_ids)
            pairs = {
                (int(token), int(kind)) for row in zip(ids, rows, strict=True) for token, kind in zip(*row, strict=True)
            }
            for token, kind in pairs:
                inputs[key][input_ids == token] = kind
        return inputs


def model_inputs(batch: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The entries of a batch that go to the model as they are, by the model's names; floating ones in `dtype`."""
    found = {name.removeprefix(PREFIX): value for name, value in batch.items() if name.startswith(PREFIX)}
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in found.items()}
