"""Keys and values that a conversation has already computed, kept for as long as its beginning stays the same."""

from collections.abc import Sequence
from itertools import takewhile

import torch
from PIL import Image
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.generation.utils import GenerateOutput


# Inputs of models whose positions follow from the ids alone. More than these (image sizes, grids, token types) belong
# to models that count positions or see images in ways that are not known here; they read every turn anew.
PLAIN_INPUTS = {"input_ids", "attention_mask", "pixel_values"}


class PrefixCache:
    """
    Keys and values of what a conversation has read, and the ids and images they belong to.

    A chat template may write an earlier turn otherwise than it was generated: the end mark, white space, thoughts that
    are left out later. So the ids of every prompt are compared with those of the cache, which is cut where they begin
    to differ. Images are compared by identity, because all have the same ids.
    """

    def __init__(self) -> None:
        self._cache: DynamicCache | None = None
        self._ids: list[int] = []
        self._images: list[Image.Image] = []

    def clear(self) -> None:
        """Frees the memory; the next prompt is read completely."""
        self._cache, self._ids, self._images = None, [], []

    def __len__(self) -> int:
        """Positions that are kept."""
        return len(self._ids)

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values that are kept."""
        tensors = [tensor for layer in self._cache or () for tensor in layer if tensor is not None]
        return sum(tensor.nbytes for tensor in tensors)

    def shorten(
        self, inputs: dict[str, torch.Tensor], images: Sequence[Image.Image], image_token_id: int | None
    ) -> dict[str, object]:
        """
        Inputs of `generate` for a prompt, with the cache for its beginning, and only the images after that.

        Nothing is kept until [`keep`] is called: a generation that fails leaves a cache of unknown length.

        Args:
            inputs (`dict[str, torch.Tensor]`): what the processor returned for one prompt, without padding.
            images (`Sequence[PIL.Image.Image]`): the images of the prompt, in order.
            image_token_id (`int`, *optional*): what the placeholders of images are in `input_ids`.
        """
        cache, known, known_images = self._cache, self._ids, self._images
        self.clear()
        ids = inputs["input_ids"][0].tolist()
        starts = _image_starts(inputs, ids, len(images), image_token_id)
        if cache is None or starts is None:
            return dict(inputs)
        # At least one position must be read for there to be a next token.
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(known, ids[:-1])))
        ends = [*starts[1:], len(ids)]
        for number, (start, end) in enumerate(zip(starts, ends)):
            last = max(position for position in range(start, end) if ids[position] == image_token_id)
            read = last < same and known_images[number : number + 1] and known_images[number] is images[number]
            if start < same and not read:
                same = start
        if not same:
            return dict(inputs)
        cache.crop(same - len(known))
        shortened: dict[str, object] = {**inputs, "past_key_values": cache}
        seen = sum(start < same for start in starts)
        if seen == len(images):
            shortened.pop("pixel_values", None)
        else:
            shortened["pixel_values"] = inputs["pixel_values"][seen:]
        return shortened

    def keep(self, output: GenerateOutput, prompt: Sequence[int], images: Sequence[Image.Image]) -> None:
        """
        Takes over the cache of a generation, if it can be cut later and covers the complete prompt.

        Args:
            output (`GenerateOutput`): of `generate` with `return_dict_in_generate=True`.
            prompt (`Sequence[int]`): the ids of the complete prompt.
            images (`Sequence[PIL.Image.Image]`): its images, in order.
        """
        cache = getattr(output, "past_key_values", None)
        ids = output.sequences[0].tolist()
        # A sliding window or a state without positions (linear attention) cannot be put back. The last token has been
        # chosen, but not read.
        if not isinstance(cache, DynamicCache) or any(type(layer) is not DynamicLayer for layer in cache.layers):
            return
        if ids[: len(prompt)] == list(prompt) and cache.get_seq_length() == len(ids) - 1:
            self._cache, self._ids, self._images = cache, ids[:-1], list(images)


def _image_starts(
    inputs: dict[str, torch.Tensor], ids: list[int], count: int, image_token_id: int | None
) -> list[int] | None:
    """Where each image begins in `ids`; `None` where that is not known, and so nothing can be left out."""
    if not inputs.keys() <= PLAIN_INPUTS or not bool(inputs["attention_mask"].all()):
        return None
    positions = [position for position, id_ in enumerate(ids) if id_ == image_token_id]
    if not count:
        return None if positions else []
    if len(inputs["pixel_values"]) != count or not positions or len(positions) % count:
        return None
    return positions[:: len(positions) // count]
