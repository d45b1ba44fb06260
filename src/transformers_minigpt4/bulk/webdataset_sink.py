"""WebDataset: tar files with the images and their captions."""

import io
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers_minigpt4.utils.files import to_json

from .images import Description
from .sinks import unicode_record


class WebdatasetSink:
    """
    Tar files of `<key>.jpg` and `<key>.json`, as `img2dataset` writes them: the latter has the caption.

    Images are written as they are. All are called `.jpg`, whatever their format, because `datasets` wants the same
    names in every row; programs tell formats by the content. `<key>` is the image's number in the shard, or its key in
    the shard that it comes from.

    Args:
        prompt, model (`str`): of all captions.
    """

    kind, suffix, keeps_images = "wds", ".tar", True

    def __init__(self, prompt: str, model: str) -> None:
        self.prompt, self.model = prompt, model

    @contextmanager
    def open(self, path: Path) -> Iterator[Callable[[Description], None]]:
        """See [`~bulk.sinks.Sink`]."""
        count = 0

        def write(one: Description) -> None:
            nonlocal count
            stem = one.image.stem if one.image.stem is not None else f"{count:09d}"
            record = to_json(unicode_record(one, self.prompt, self.model))
            _add(archive, f"{stem}.jpg", one.image.content or b"")
            _add(archive, f"{stem}.json", record.encode())
            count += 1

        # USTAR takes names of 100 bytes; PAX, which Python and GNU tar read, any.
        with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
            yield write


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # of the epoch, so that the same captions give the same file
    member.size, member.mode = len(content), 0o644
    archive.addfile(member, io.BytesIO(content))
