"""Parquet: the images and their captions as a dataset of Hugging Face."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features, Image, Value

from .images import Description
from .sinks import unicode_record


_ROWS = 100  # of a row group: what `datasets` recommends for images, so that one row can be read without many others
_TEXT = Value("string")
_FEATURES = Features({"image": Image(), "key": _TEXT, "caption": _TEXT, "prompt": _TEXT, "model": _TEXT})


class ParquetSink:
    """
    Parquet files with the columns `image` (the file's content), `key`, `caption`, `prompt` and `model`.

    Args:
        prompt, model (`str`): of all captions.
    """

    kind, suffix, keeps_images = "parquet", ".parquet", True

    def __init__(self, prompt: str, model: str) -> None:
        self.prompt, self.model = prompt, model

    @contextmanager
    def open(self, path: Path) -> Iterator[Callable[[Description], None]]:
        """See [`~bulk.sinks.Sink`]."""
        rows: list[dict[str, object]] = []
        schema = _FEATURES.arrow_schema

        def write(one: Description) -> None:
            record = unicode_record(one, self.prompt, self.model)
            image = {"bytes": one.image.content, "path": None}
            rows.append({**record, "key": record["image"], "image": image})
            if len(rows) == _ROWS:
                flush()

        def flush() -> None:
            writer.write_table(pa.Table.from_pylist(rows, schema))
            rows.clear()

        with pq.ParquetWriter(path, schema) as writer:
            yield write
            if rows:  # `datasets` fails at a first row group without rows
                flush()
