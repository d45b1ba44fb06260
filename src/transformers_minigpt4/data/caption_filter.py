"""
LLaVA's filter of CC3M: captions chosen so that rare noun phrases stay and frequent ones do not drown them.

The article's appendix describes it; its code is unpublished. Phrases are counted over all captions, each once per
caption. Those seen fewer than 3 times are dropped. From the rarest phrase upwards all captions that hold it join the
pool; of a phrase seen more than 100 times, a random 100 of all its captions do. "Lowest remaining frequency" is read
as the counts made once, of the phrases that remain after the drop, so their order decides only what is drawn.
"""

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import import_module
from itertools import islice, zip_longest
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np

from transformers_minigpt4.utils.files import JsonLinesWriter, JsonObject, atomic_file, write_json
from transformers_minigpt4.utils.json_files import brief, json_lines, open_regular, parse_json

from .schema import DataError


LEAST, MOST = 3, 100  # the article's: phrases seen less often are dropped, captions drawn of one seen more often
CAPTION_KEYS = ("caption", "text")
PYTHON, SPACY = "python:", "spacy:"
_BATCH = 2000  # captions that an extractor gets at once, and that are on the disk together
Extractor: TypeAlias = Callable[[list[str]], Iterable[Sequence[str]]]


class Filtered(NamedTuple):
    """Counts of a run: captions read and kept, phrases seen in all, and those seen at least `least` times."""

    captions: int
    kept: int
    phrases: int
    frequent_phrases: int


class Phrases:
    """
    The phrases of captions, as numbers in the order in which they first appear.

    Each phrase's text is held once, and each occurrence takes 4 bytes.
    """

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self._occurrences = array("i")
        self._ends = array("q", [0])

    def add(self, phrases: Iterable[str]) -> None:
        """The phrases of the next caption; one that is repeated counts once."""
        numbers = self._numbers
        self._occurrences.extend({numbers.setdefault(phrase, len(numbers)) for phrase in phrases})
        self._ends.append(len(self._occurrences))

    def __len__(self) -> int:
        return len(self._ends) - 1

    @property
    def unique(self) -> int:
        return len(self._numbers)

    def choose(self, least: int = LEAST, most: int = MOST, seed: int = 0) -> tuple[np.ndarray, int]:
        """
        The pool.

        Args:
            least: Phrases of fewer captions are dropped.
            most: Captions drawn of a phrase that more have.
            seed: Draws them.

        Returns:
            An array (captions,) of booleans, and the number of phrases that were not dropped.
        """
        pool = np.zeros(len(self), dtype=bool)
        if not self._occurrences:
            return pool, 0
        phrases = np.frombuffer(self._occurrences, dtype=np.intc)
        ends = np.frombuffer(self._ends, dtype=np.int64)
        captions = np.repeat(np.arange(len(self), dtype=np.int32), ends[1:] - ends[:-1])
        counts = np.bincount(phrases, minlength=self.unique)
        of_these = counts[phrases]
        pool[captions[(of_these >= least) & (of_these <= most)]] = True
        wanted = of_these > most
        phrases, captions = phrases[wanted], captions[wanted]
        order = np.argsort(phrases, kind="stable")
        by_phrase, numbers = captions[order], np.flatnonzero(counts > most)
        starts = np.searchsorted(phrases[order], numbers)
        rng = np.random.default_rng(seed)
        for place in np.argsort(counts[numbers], kind="stable"):
            size, start = int(counts[numbers[place]]), int(starts[place])
            pool[by_phrase[start + rng.choice(size, most, replace=False)]] = True
        return pool, int((counts >= least).sum())


def filter_captions(
    source: Path,
    output: Path,
    phrases: Path,
    *,
    extractor: str | None = None,
    least: int = LEAST,
    most: int = MOST,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Filtered:
    """
    Write the lines of a file whose captions are chosen, unchanged and in their order, and the counts next to it.

    Args:
        source: CC3M's TSV (the caption first, no header), or JSON Lines with `caption` or `text`.
        output: File of the same format, replaced in one step; `OUTPUT.info.json` has the counts and settings.
        phrases: JSON Lines with the phrases of each caption, in the order of `source`: a list, or an object with
            `caption` and `phrases`, where the caption is compared.
        extractor: `spacy:MODEL` or `python:MODULE:FUNCTION`, see [`open_extractor`]: makes what `phrases` lacks and
            appends it there, so that a killed run is resumed.
        least, most, seed: As of [`Phrases.choose`].
        progress: Called with the number of captions whose phrases are known.

    Raises:
        DataError: for a file of another format, phrases of other captions, and an extractor that does not work.
        OSError: if a file cannot be read or written.
    """
    if not 1 <= least <= most:
        raise DataError(f"least is {least} and most is {most}; both are numbers from 1, and least is not above most")
    if output.exists() and source.exists() and output.samefile(source):
        raise DataError(f"{output} is the file to be filtered; name another --output")
    if extractor is not None:
        _extract(source, phrases, open_extractor(extractor), progress)
    found = Phrases()
    for number, (line, row) in enumerate(zip_longest(_captions(source), _phrases(phrases)), start=1):
        if line is None or row is None:
            short, longer = (source, phrases) if line is None else (phrases, source)
            raise DataError(
                f"{longer} has more captions than {short}, which ends after {number - 1}; give the phrases of the "
                "same file, or an --extractor that adds what is missing"
            )
        _same(phrases, number, line[1], row)
        found.add(row[1])
    if not found:
        raise DataError(f"{source} holds no caption; give another file")
    pool, frequent = found.choose(least, most, seed)
    done = Filtered(len(found), int(pool.sum()), found.unique, frequent)
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(output) as scratch, scratch.open("wb") as file:
        file.writelines(line if line.endswith(b"\n") else line + b"\n" for line, _ in _chosen(source, pool))
    settings: JsonObject = {"least": least, "most": most, "seed": seed, "extractor": extractor}
    reading = "counts are made once; captions of a phrase are drawn from all of its captions"
    write_json(output.with_name(f"{output.name}.info.json"), {**done._asdict(), **settings, "reading": reading})
    return done


def open_extractor(name: str) -> Extractor:
    """
    What finds the noun phrases of captions.

    Args:
        name: `spacy:MODEL`, such as `spacy:en_core_web_sm`, whose noun chunks are taken as they are written; or
            `python:MODULE:FUNCTION`, called with a list of captions and returning their phrases.

    Raises:
        DataError: if it is not installed or not a function.
    """
    if name.startswith(SPACY):
        return _spacy(name.removeprefix(SPACY))
    module, _, function = name.removeprefix(PYTHON).partition(":")
    if not name.startswith(PYTHON) or not module or not function:
        raise DataError(f"{name!r} is not an extractor; write spacy:MODEL or python:MODULE:FUNCTION")
    try:
        found: Extractor = getattr(import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise DataError(f"the extractor {name!r} cannot be found ({error})") from error
    if not callable(found):
        raise DataError(f"the extractor {name!r} is not a function")
    return found


def _spacy(model: str) -> Extractor:
    try:
        import spacy
    except ImportError as error:
        raise DataError("spaCy is not installed; `pip install spacy`, or give --phrases made elsewhere") from error
    try:
        pipeline = spacy.load(model, exclude=["ner", "lemmatizer"])
    except (OSError, ValueError) as error:
        raise DataError(
            f"spaCy has no model {model!r}; `python -m spacy download {model}`, or give --phrases made elsewhere"
        ) from error
    return lambda captions: ([chunk.text for chunk in text.noun_chunks] for text in pipeline.pipe(captions))


def _extract(source: Path, phrases: Path, extractor: Extractor, progress: Callable[[int], None] | None) -> None:
    """Appends the phrases of the captions that the file does not have yet."""
    phrases.parent.mkdir(parents=True, exist_ok=True)
    with JsonLinesWriter(phrases) as writer:
        captions = (caption for _, caption in _captions(source))
        done = 0
        for row in _phrases(phrases):
            done += 1
            caption = next(captions, None)
            if caption is None:
                raise DataError(f"{phrases} has phrases of more captions than {source} has; name another --phrases")
            _same(phrases, done, caption, row)
        while batch := list(islice(captions, _BATCH)):
            rows = [[str(phrase) for phrase in found] for found in extractor(batch)]
            if len(rows) != len(batch):
                raise DataError(f"the extractor gave phrases of {len(rows)} captions for {len(batch)}")
            writer.append({"caption": caption, "phrases": row} for caption, row in zip(batch, rows))
            done += len(batch)
            if progress is not None:
                progress(done)


def _captions(source: Path) -> Iterator[tuple[bytes, str]]:
    """The lines of a file with their captions."""
    is_json = source.suffix in (".jsonl", ".json")
    if not is_json and source.suffix not in (".tsv", ".txt"):
        raise DataError(f"{source} is neither .tsv, with the caption first, nor .jsonl with caption or text")
    with open_regular(source) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                raise DataError(f"line {number} of {source} is empty; remove it")
            try:
                row = parse_json(line) if is_json else line.decode("utf-8").rstrip("\r\n").split("\t")[0]
            except ValueError as error:
                raise DataError(f"line {number} of {source} cannot be read: {error}; correct or remove it") from error
            caption = next((row[key] for key in CAPTION_KEYS if row.get(key)), None) if isinstance(row, dict) else row
            if not isinstance(caption, str) or not caption.strip():
                raise DataError(f"line {number} of {source} has no caption: {brief(row)}; correct or remove it")
            yield line, caption


def _chosen(source: Path, pool: np.ndarray) -> Iterator[tuple[bytes, str]]:
    return (line for line, chosen in zip(_captions(source), pool) if chosen)


def _phrases(path: Path) -> Iterator[tuple[str | None, list[str]]]:
    """The captions of a file of phrases, where it names them, with their phrases."""
    if not path.exists():
        raise DataError(f"there is no file of phrases {str(path)!r}; give --phrases FILE, or an --extractor")
    for number, row in json_lines(path):
        caption, phrases = (row.get("caption"), row.get("phrases")) if isinstance(row, dict) else (None, row)
        if not isinstance(phrases, list) or not all(isinstance(phrase, str) for phrase in phrases):
            raise DataError(f"line {number} of {path} is {brief(row)}, not a list of phrases; correct it")
        yield caption, phrases


def _same(path: Path, number: int, caption: str, row: tuple[str | None, list[str]]) -> None:
    if row[0] is not None and row[0] != caption:
        raise DataError(
            f"line {number} of {path} is about {brief(row[0])}, but the caption is {brief(caption)}; these are the "
            "phrases of another file, name another --phrases"
        )
