"""Loads checkpoints and serves the web page for them."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers_minigpt4.conversion.verify_captions import EMOJI, SHAPES, bundled
from transformers_minigpt4.inference.batching import BatchedModel
from transformers_minigpt4.inference.chat import Chat
from transformers_minigpt4.inference.demo_checkpoint import knows_drawn_shapes_only
from transformers_minigpt4.inference.loading import Quantization, load_model_and_processor
from transformers_minigpt4.web.server import LOCAL_HOSTS, PageServer, import_gradio, serve
from transformers_minigpt4.web.uploads import Uploads, upload_folder

from .web_conversations import Conversations, Served
from .web_feedback import Feedback
from .web_images import Limits
from .web_page import CSS, ChatPage, Example, build_page


_TITLE = "Chat about images"
_DEMO_NOTE = "This is the demo's model, which knows drawn shapes only."
BATCH_SIZE = 8
# In times of what one message may bring.
_ROOM_FOR_UPLOADS = 50
_EXAMPLES = {
    SHAPES: ("Describe this image in detail.", ("red circle", "blue star", "green square", "yellow cross")),
    EMOJI: ("What is in this picture?", ("a brown dog", "a house with a red roof", "a yellow banana", "a red car")),
}


@dataclass(frozen=True)
class WebSettings:
    """
    How the page is served.

    Args:
        output (`Path`): folder for votes and flags.
        blind (`bool`, *optional*, defaults to `False`): compare two models whose names are hidden.
        greedy (`bool`, *optional*, defaults to `False`): the settings that the page begins with.
        batch_size (`int`, *optional*, defaults to 8): answers that a model decodes at once.
        cache_memory (`float`, *optional*, defaults to 4): GiB for what conversations keep between questions.
        max_upload (`int`, *optional*, defaults to 32): MiB of one image file.
        everywhere (`bool`, *optional*, defaults to `False`): whether to listen on all addresses of this machine.
        port (`int`, *optional*): by default the first free one from 7860.
        credentials (`str`, *optional*): `USER:PASSWORD`.
    """

    output: Path
    blind: bool = False
    greedy: bool = False
    batch_size: int = BATCH_SIZE
    cache_memory: float = 4
    max_upload: int = 32
    everywhere: bool = False
    port: int | None = None
    credentials: str | None = None

    def check(self, checkpoints: Sequence[str]) -> None:
        """
        Refuses settings that do not go together.

        Raises:
            ValueError: with what to do.
        """
        user, _, password = (self.credentials or "").partition(":")
        if self.credentials is not None and not (user and password):
            raise ValueError("--auth is not USER:PASSWORD; give both, with a colon between them")
        if self.everywhere and self.credentials is None:
            raise ValueError(
                "--listen lets other machines use the page and needs a password: set MINIGPT4_WEB_AUTH to "
                "USER:PASSWORD, or give --auth"
            )
        if self.blind and len(checkpoints) < 2:
            raise ValueError(
                f"--blind compares two checkpoints or more, but {len(checkpoints)} was given; name another"
            )


def load_served(
    checkpoints: Sequence[str],
    batch_size: int,
    dtype: str = "auto",
    device: str | None = None,
    trust_remote_code: bool = False,
    quantization: Quantization | None = None,
) -> list[Served]:
    """
    Loads checkpoints for the page.

    Args:
        checkpoints (`Sequence[str]`): folders or Hub ids.
        batch_size (`int`): answers that each decodes at once.
        dtype, device, trust_remote_code, quantization: as for [`~inference.loading.load_model_and_processor`].

    Raises:
        ValueError: for a checkpoint that cannot be loaded, or cannot chat.
    """
    found = []
    names = [Path(checkpoint).name if Path(checkpoint).is_dir() else checkpoint for checkpoint in checkpoints]
    if len(set(names)) < len(names):
        names = list(checkpoints)
    for name, checkpoint in zip(names, checkpoints):
        model, processor = load_model_and_processor(checkpoint, dtype, device, trust_remote_code, quantization)
        Chat(model, processor)  # refuses a processor without chat template
        found.append(Served(name, checkpoint, BatchedModel(model, processor, batch_size), processor))
    return found


@contextlib.contextmanager
def serve_chats(served: Sequence[Served], settings: WebSettings) -> Iterator[PageServer]:
    """
    Serves the page until the end of the `with` statement.

    Args:
        served (`Sequence[Served]`): the models.
        settings (`WebSettings`): how.

    Raises:
        ValueError: if Gradio is not installed.
        OSError: if the port is taken.
    """
    import_gradio("web")
    limits, largest = Limits(), settings.max_upload * 2**20
    only_shapes = all(knows_drawn_shapes_only(one.checkpoint) for one in served)
    with upload_folder() as folder:
        uploads = Uploads(folder, largest, limits.images, _ROOM_FOR_UPLOADS * limits.images * largest)
        memory = int(settings.cache_memory * 2**30)
        conversations = Conversations(served, folder, memory, settings.blind, limits)
        chat = ChatPage(conversations, Feedback(settings.output), uploads, settings.batch_size)
        page = build_page(
            chat,
            _TITLE,
            _DEMO_NOTE if only_shapes else "",
            _write_examples(SHAPES if only_shapes else EMOJI, folder),
            settings.greedy,
        )
        with serve(
            page,
            css=CSS,
            uploads=uploads,
            credentials=settings.credentials,
            host="0.0.0.0" if settings.everywhere else LOCAL_HOSTS[0],
            port=settings.port,
        ) as server:
            yield server


def _write_examples(name: str, folder: Path) -> list[Example]:
    """Copies some of the bundled images to where the page can show them."""
    question, captions = _EXAMPLES[name]
    images = {row.caption: row.image for row in bundled(name)}
    found = []
    for number, caption in enumerate(captions):
        path = folder / f"example-{number}.png"
        images[caption].save(path)
        found.append(Example(caption, path, question))
    return found
