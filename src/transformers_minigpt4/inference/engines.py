"""The programs that answer prompts about images: transformers in this process, or vLLM."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Literal, NamedTuple, Protocol, TypeVar, get_args

from PIL import Image
from transformers import GenerationConfig, ProcessorMixin

from transformers_minigpt4.processing.image_utils_minigpt4 import ImageLoadError
from transformers_minigpt4.utils.loading import MAX_THREADS, load_ahead
from transformers_minigpt4.utils.models import GenerativeModel

from .generation import answer_prompts


EngineName = Literal["transformers", "vllm"]
ENGINES: tuple[EngineName, ...] = get_args(EngineName)
DEFAULT_BATCH_SIZE = 8
_MOST_LOADED = 32  # images in memory ahead of an engine that takes more requests at once
Item = TypeVar("Item")


class Request(NamedTuple):
    """
    One user turn: RGB images, and a text without image placeholder.

    `earlier` are the turns before it, prompt and answer of each; then the images belong to the first of them. They
    need a processor with a chat template.
    """

    images: Sequence[Image.Image]
    prompt: str
    earlier: Sequence[tuple[str, str]] = ()


class TokenRequest(NamedTuple):
    """RGB images, and the ids of all that the model reads, with one id of the placeholder for each image."""

    images: Sequence[Image.Image]
    ids: list[int]


class Engine(Protocol):
    """
    Answers requests with a loaded image-text-to-text model.

    `processor` is the model's; `batch_size` says how many requests are worked on at once, `device` and `dtype` where
    and how the model runs.
    """

    @property
    def processor(self) -> ProcessorMixin: ...

    @property
    def batch_size(self) -> int: ...

    @property
    def device(self) -> str: ...

    @property
    def dtype(self) -> str: ...

    def answers(self, requests: Iterable[Request], **generate_kwargs: object) -> Iterator[str]:
        """
        The answers, in the order of the requests, which are taken as they are needed and may be endless.

        Args:
            requests (`Iterable[Request]`): What to ask.
            generate_kwargs: As of `generate` of transformers; by default the checkpoint's generation config applies.

        Yields:
            `str`: An answer without prompt, special tokens and surrounding white space.

        Raises:
            ValueError: for settings or numbers of images that the engine or the model does not support.
        """
        ...


class TokenEngine(Engine, Protocol):
    """An engine that keeps what it computed for the start of a prompt, and so takes prompts that continue another."""

    @property
    def generation_config(self) -> GenerationConfig: ...

    def answer_ids(self, requests: Iterable[TokenRequest], **generate_kwargs: object) -> Iterator[list[int]]:
        """
        The ids of the answers, and those of their end mark if they have one; otherwise as [`Engine.answers`].

        Args:
            requests (`Iterable[TokenRequest]`): What to ask.
            generate_kwargs: As of [`Engine.answers`].
        """
        ...


@dataclass
class TransformersEngine:
    """
    Answers in batches with `generate`.

    Args:
        model (`PreTrainedModel`), processor (`ProcessorMixin`): of any image-text-to-text family; other threads may
            use the processor at the same time.
        batch_size (`int`, *optional*, defaults to 8): Requests that go through the model at once. Those of a batch
            have the same number of images.

    Raises:
        ValueError: if `batch_size` is below 1.
    """

    model: GenerativeModel
    processor: ProcessorMixin
    batch_size: int = DEFAULT_BATCH_SIZE

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(
                f"batch_size is {self.batch_size}, but a batch needs at least one image; set it to 1 or more"
            )

    @property
    def device(self) -> str:
        """Where the model is."""
        return str(self.model.device)

    @property
    def dtype(self) -> str:
        """Data type of the weights."""
        return str(self.model.dtype)

    def answers(self, requests: Iterable[Request], **generate_kwargs: object) -> Iterator[str]:
        """See [`Engine`]."""
        for _, alike in groupby(requests, key=lambda request: len(request.images)):
            while batch := list(islice(alike, self.batch_size)):
                images, prompts = [request.images for request in batch], [request.prompt for request in batch]
                earlier = [request.earlier for request in batch]
                yield from answer_prompts(images, prompts, self.model, self.processor, earlier, **generate_kwargs)


def answer_items(
    items: Iterable[Item], prepare: Callable[[Item], Request], engine: Engine, **generate_kwargs: object
) -> Iterator[tuple[Item, str | ImageLoadError]]:
    """
    Answer a request about each of many items, lazily and in order, while threads prepare the next ones.

    Args:
        items (`Iterable`): may be endless. At most two batches are prepared ahead of the engine, or twice 32 items.
        prepare (`Callable`): makes the request of an item, in a thread: decodes its images.
        engine (`Engine`): answers.
        generate_kwargs: passed on to the engine.

    Yields:
        `tuple`: each item with its answer, or with the `ImageLoadError` that `prepare` raised. Other errors are raised
        here.
    """

    def prepared(item: Item) -> Request | ImageLoadError:
        try:
            return prepare(item)
        except ImageLoadError as error:
            return error

    ahead = min(engine.batch_size, _MOST_LOADED)
    taken: deque[tuple[Item, ImageLoadError | None]] = deque()  # those without an answer so far

    def requests() -> Iterator[Request]:
        iterator = iter(items)
        for batch in load_ahead(iter(lambda: list(islice(iterator, ahead)), []), prepared, min(ahead, MAX_THREADS)):
            for item, request in batch:
                if isinstance(request, ImageLoadError):
                    taken.append((item, request))
                else:
                    taken.append((item, None))
                    yield request

    def failed_first() -> Iterator[tuple[Item, ImageLoadError]]:
        while taken and (error := taken[0][1]) is not None:
            yield taken.popleft()[0], error

    for answer in engine.answers(requests(), **generate_kwargs):
        yield from failed_first()
        yield taken.popleft()[0], answer
    yield from failed_first()
