"""A conversation with any image-text-to-text model, which reads only what is new in each turn."""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from PIL import Image
from transformers import ProcessorMixin, StoppingCriteria, StoppingCriteriaList

from transformers_minigpt4.processing.image_utils_minigpt4 import load_image
from transformers_minigpt4.processing.processing_minigpt4 import AUTHORS_SAMPLING
from transformers_minigpt4.utils.files import JsonObject, PathLike, write_json
from transformers_minigpt4.utils.models import GenerativeModel

from .chat_files import Saved, from_json, to_json
from .chat_parameters import GREEDY, check_parameters
from .generation import DEFAULT_MAX_NEW_TOKENS, context_length, decode_answers, encode_conversations
from .prefix_cache import PrefixCache
from .sources import ImageSource
from .streaming import CaptionStreamer


# Settings by name, for `Chat(parameters=PRESETS["greedy"])`.
PRESETS: Mapping[str, Mapping[str, object]] = {"authors": AUTHORS_SAMPLING, "greedy": GREEDY}


@dataclass(frozen=True)
class Turn:
    """
    A question and its answer.

    Args:
        question (`str`): what the user said.
        images (`tuple[PIL.Image.Image, ...]`): the images that came with it, before its text.
        answer (`str`): what the model said, maybe nothing.
    """

    question: str
    images: tuple[Image.Image, ...] = field(default=())
    answer: str = ""


class Chat:
    """
    A conversation with an image-text-to-text model.

    Keys and values of earlier turns are kept, and only what is new is read. The answers are those of reading
    everything anew: whatever the chat template writes otherwise than before is read again. Several conversations, each
    in a thread of its own, can share model and processor.

    Args:
        model (`PreTrainedModel`), processor (`ProcessorMixin`): of any image-text-to-text family whose processor has a
            chat template, see [`~inference.loading.load_model_and_processor`].
        system (`str`, *optional*): the system message; by default what the chat template writes.
        parameters (`Mapping[str, object]`, *optional*): settings of `generate`, see `set_parameters`. What is left out
            is the checkpoint's own. `PRESETS["authors"]` samples as the authors' chat does, `PRESETS["greedy"]` always
            takes the likeliest token.
        read_ahead (`bool`, *optional*, defaults to `True`): whether to read an answer again at once where the chat
            template writes it otherwise than it was generated, so that the next turn starts sooner.

    Raises:
        ValueError: for a processor without chat template, and for parameters that cannot be.

    Example:

    ```python
    >>> from transformers_minigpt4.inference.chat import Chat
    >>> from transformers_minigpt4.inference.loading import load_model_and_processor

    >>> chat = Chat(*load_model_and_processor("my-checkpoint"))  # doctest: +SKIP
    >>> chat.ask("What is in this picture?", ["photo.jpg"])  # doctest: +SKIP
    >>> for text in chat.stream("And what is different here?", ["other.jpg"]):  # doctest: +SKIP
    ...     print(text, end="", flush=True)
    >>> chat.save("chat.json")  # doctest: +SKIP
    ```
    """

    def __init__(
        self,
        model: GenerativeModel,
        processor: ProcessorMixin,
        system: str | None = None,
        parameters: Mapping[str, object] | None = None,
        read_ahead: bool = True,
    ) -> None:
        if not getattr(processor, "chat_template", None):
            raise ValueError(
                f"{type(processor).__name__} has no chat template, so this checkpoint takes single questions only; "
                "use `minigpt4 describe --prompt`, or a checkpoint with a chat template"
            )
        self.model, self.processor = model, processor
        self.system, self.read_ahead = system, read_ahead
        self.parameters: dict[str, object] = {}
        self.turns: list[Turn] = []
        self._prefix = PrefixCache()
        self._busy = threading.Lock()
        self._stop = threading.Event()
        self.set_parameters(**(parameters or {}))

    def set_parameters(self, **parameters: object) -> None:
        """
        Changes settings for the next answers: `do_sample`, `temperature`, `top_p`, `top_k`, `repetition_penalty`,
        `max_new_tokens`, `min_new_tokens`.

        Raises:
            ValueError: for another name, or a value that it cannot have; nothing is changed then.
        """
        self.parameters.update(check_parameters(parameters))

    def ask(
        self, question: str, images: Iterable[ImageSource] = (), on_text: Callable[[str], object] | None = None
    ) -> str:
        """
        Asks, and returns the answer.

        Args:
            question (`str`): without image placeholder.
            images (`Iterable`, *optional*): new images, each a path, URL, PIL image or whatever else
                [`~processing.image_utils_minigpt4.load_image`] takes.
            on_text (`Callable[[str], object]`, *optional*): receives the answer word by word.

        Raises:
            ValueError: for an empty question, an image that cannot be loaded, or a conversation that is longer than
                the model's context; the conversation stays as it was.
            RuntimeError: if it is answering another question, in another thread.
        """
        if not question.strip():
            raise ValueError("the question is empty; ask something, such as 'Describe this image in detail.'")
        turn = Turn(question, tuple(load_image(image) for image in images))
        with self._answering():
            return self._answer([*self.turns, turn], on_text)

    def regenerate(self, on_text: Callable[[str], object] | None = None) -> str:
        """
        Answers the last question again, in place of its answer.

        Raises:
            ValueError: if nothing has been asked.
        """
        with self._answering():
            return self._answer([*self.turns[:-1], replace(self._last(), answer="")], on_text)

    def stream(self, question: str, images: Iterable[ImageSource] = ()) -> Iterator[str]:
        """
        Asks, and yields the answer word by word. See `ask`; closing the iterator stops the answer.

        The model runs in another thread.
        """
        pieces: queue.SimpleQueue[str | BaseException | None] = queue.SimpleQueue()

        def work() -> None:
            try:
                self.ask(question, images, pieces.put)
                pieces.put(None)
            except BaseException as error:
                pieces.put(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        piece: str | BaseException | None = ""
        try:
            while isinstance(piece := pieces.get(), str):
                yield piece
        finally:
            while isinstance(piece, str) and thread.is_alive():  # closed before the end
                self.stop()
                thread.join(0.01)
        if piece is not None:
            raise piece

    def stop(self) -> None:
        """Ends the answer that is being generated in another thread; what has been said is kept."""
        self._stop.set()

    def prepare(self) -> None:
        """Reads what the next turn will repeat; `read_ahead` does so at the end of each answer."""
        with self._answering():
            self._prepare()

    def undo(self) -> Turn:
        """
        Takes back the last question and its answer, and returns them.

        Raises:
            ValueError: if nothing has been asked.
        """
        with self._answering():
            turn = self._last()
            self.turns = self.turns[:-1]
            return turn

    def reset(self) -> None:
        """Forgets all turns and frees their memory. System message and parameters stay."""
        with self._answering():
            self.turns = []
            self._prefix.clear()

    @property
    def cache_bytes(self) -> int:
        """Memory of the keys and values that are kept for the next turn; a new `Chat` of the same turns has none."""
        return self._prefix.nbytes

    def save(self, path: PathLike) -> None:
        """Writes the conversation to a JSON file with its images in it, in place of an earlier one."""
        turns = [(turn.question, turn.images, turn.answer) for turn in self.turns]
        write_json(path, to_json(Saved(self.system, self.parameters, turns)))

    @classmethod
    def load(cls, path: PathLike, model: GenerativeModel, processor: ProcessorMixin) -> "Chat":
        """
        A conversation that was saved, to be continued with the same or another model.

        Raises:
            OSError: if the file cannot be read.
            ValueError: if it is no such file. Images that are not in it, but elsewhere, are refused.
        """
        saved = from_json(path)
        chat = cls(model, processor, saved.system, saved.parameters)
        chat.turns = [Turn(*turn) for turn in saved.turns]
        return chat

    def messages(self) -> list[JsonObject]:
        """The conversation as chat templates take it, with PIL images."""
        return _messages(self.system, self.turns)

    def _last(self) -> Turn:
        if not self.turns:
            raise ValueError("nothing has been asked yet")
        return self.turns[-1]

    @contextmanager
    def _answering(self) -> Iterator[None]:
        if not self._busy.acquire(blocking=False):
            raise RuntimeError("this conversation is answering already; wait, stop it, or make another Chat")
        try:
            self._stop.clear()
            yield
        finally:
            self._busy.release()

    def _answer(self, turns: list[Turn], on_text: Callable[[str], object] | None) -> str:
        said: list[str] = []

        def write(text: str) -> None:
            said.append(text)
            if on_text is not None:
                on_text(text)

        try:
            answer = decode_answers(self.processor, self._generate(turns, CaptionStreamer(self.processor, write)))[0]
        except KeyboardInterrupt:
            if said:
                self.turns = [*turns[:-1], replace(turns[-1], answer="".join(said).strip())]
            raise
        self.turns = [*turns[:-1], replace(turns[-1], answer=answer)]
        if self.read_ahead:
            self._prepare()
        return answer

    def _prepare(self) -> None:
        if self.turns and len(self._prefix):
            # What follows must be a question: some templates write the last answer otherwise than earlier ones.
            self._generate([*self.turns, Turn("?")], max_new_tokens=1, min_new_tokens=0, do_sample=False)

    def _generate(
        self, turns: Sequence[Turn], streamer: CaptionStreamer | None = None, **settings: object
    ) -> torch.Tensor:
        """Generates the last answer; returns its ids, of shape `(1, new tokens)`."""
        model = self.model
        inputs = encode_conversations([_messages(self.system, turns)], self.processor)
        prompt = inputs["input_ids"]
        images = [image for turn in turns for image in turn.images]
        output = model.generate(
            **self._prefix.shorten(
                dict(inputs.to(model.device, dtype=model.dtype)), images, getattr(model.config, "image_token_id", None)
            ),
            **self._settings(prompt.shape[1], settings),
            streamer=streamer,
            stopping_criteria=StoppingCriteriaList([_Stopped(self._stop)]),
            return_dict_in_generate=True,
        )
        if isinstance(output, torch.Tensor):
            raise TypeError(f"{type(model).__name__}.generate does not heed return_dict_in_generate")
        self._prefix.keep(output, prompt[0].tolist(), images)
        sequences = output.sequences
        # Encoder-decoder models do not repeat the prompt before the answer.
        repeats = torch.equal(sequences[:, : prompt.shape[1]].cpu(), prompt.cpu())
        return sequences[:, prompt.shape[1] :] if repeats else sequences

    def _settings(self, length: int, settings: Mapping[str, object]) -> dict[str, object]:
        """Settings of `generate` for a prompt of `length` positions."""
        chosen = {"num_beams": 1, "num_return_sequences": 1, **self.parameters, **settings}
        longest = chosen.get("max_new_tokens") or getattr(self.model.generation_config, "max_new_tokens", None)
        chosen["max_new_tokens"] = longest = int(str(longest or DEFAULT_MAX_NEW_TOKENS))
        context = context_length(self.model)
        if context is not None and settings.get("max_new_tokens") is None:
            if length >= context:
                raise ValueError(
                    f"the conversation has {length} positions, but the language model was trained with {context}; "
                    "take back the last question, or begin anew"
                )
            chosen["max_new_tokens"] = min(longest, context - length)
        return chosen


class _Stopped(StoppingCriteria):
    """Ends the generation once an event is set."""

    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: object) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.event.is_set(), device=input_ids.device)


def _messages(system: str | None, turns: Sequence[Turn]) -> list[JsonObject]:
    messages: list[JsonObject] = []
    if system is not None:
        messages.append({"role": "system", "content": [{"type": "text", "text": system}]})
    for turn in turns:
        images: list[JsonObject] = [{"type": "image", "image": image} for image in turn.images]
        messages.append({"role": "user", "content": [*images, {"type": "text", "text": turn.question}]})
        # Chat templates refuse an answer without text.
        messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer or " "}]})
    return messages[:-1] if turns and not turns[-1].answer else messages
