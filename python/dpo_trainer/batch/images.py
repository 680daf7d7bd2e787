"""Makes a vision-language model's inputs other than token ids: pixel values and what its processor adds to them."""

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

#: Prefix of the batch entries that are passed to the model unchanged.
PREFIX = "model."


@dataclass(frozen=True)
class ImageInputs:
    """Makes a model's inputs for the images of a batch.

    Args:
        processor: the model's processor. It decides which inputs there are (`pixel_values`, `image_grid_thw`, and so on).
    """

    processor: Any

    def __call__(self, images: Sequence[Sequence[Any]], input_ids: Tensor, *, copies: int = 1) -> dict[str, Tensor]:
        """Process the images of a batch.

        Args:
            images: the images of every row, in the order in which they appear in the row.
            input_ids: [copies * rows, T] int64: all rows in this order, `copies` times. Inputs that have one value for each
                token are derived from these ids.
            copies: how often every image occurs in `input_ids`. An image is processed once, and its tensors are repeated.

        Returns:
            the model's inputs by name, without the token ids. Empty if no row has images.

        Raises:
            DataError: an image cannot be read, or the processor returns something that the trainer cannot batch.
        """
        opened = [[open_image(image, "an image of a batch") for image in row] for row in images if row]
        if not opened:
            return {}
        name = type(self.processor).__name__
        try:
            texts = [(image_token_of(self.processor) or "") * len(row) for row in opened]
            padding = self.processor.tokenizer.pad_token is not None  # some processors always return (padded) tensors
            found = dict(self.processor(text=texts, images=opened, add_special_tokens=False, padding=padding))
            ids = found.pop("input_ids")
            found.pop("attention_mask", None)
            kinds = {key: found.pop(key) for key in list(found) if key.endswith("token_type_ids")}
            pixels = dict(BatchFeature(found, tensor_type="pt"))
        except Exception as error:  # a processor may raise anything
            raise DataError(f"{name} fails on the images of a batch ({first_line(error)})") from error
        for key, value in pixels.items():
            if not isinstance(value, Tensor) or key == "cross_attention_mask":
                raise DataError(f"{name}: returns '{key}' for images, which the trainer cannot put into batches")
        inputs = {key: torch.cat([value] * copies) for key, value in pixels.items()}
        for key, rows in kinds.items():
            # The id of a token determines its type. The type of text is 0.
            inputs[key] = torch.zeros_like(input_ids)
            pairs = {
                (int(token), int(kind)) for row in zip(ids, rows, strict=True) for token, kind in zip(*row, strict=True)
            }
            for token, kind in pairs:
                inputs[key][input_ids == token] = kind
        return inputs


def model_inputs(batch: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The batch entries that are passed to the model, under the model's names. Floating-point entries are cast to `dtype`."""
    found = {name.removeprefix(PREFIX): value for name, value in batch.items() if name.startswith(PREFIX)}
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in found.items()}
