"""CIDEr, BLEU, METEOR and SPICE through pycocoevalcap, taken apart so that they can be computed on any sample."""

import math
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np


# Sums over a corpus's captions that its BLEU depends on: n-grams guessed and right, lengths.
BLEU_COLUMNS = tuple(f"bleu_{kind}_{n}" for kind in ("guess", "right") for n in range(1, 5)) + (
    "bleu_length",
    "bleu_reference_length",
)
# The same for METEOR: matches weighted by kind on both sides, weighted lengths, matched words, lengths, chunks.
METEOR_COLUMNS = tuple(
    f"meteor_{name}"
    for name in (
        *("weighted_matches", "reference_weighted_matches", "weighted_length", "reference_weighted_length"),
        *("matches", "reference_matches", "length", "reference_length", "chunks"),
    )
)
# Parameters of METEOR 1.5 for English ("rank"): its paper (Denkowski and Lavie, 2014).
_ALPHA, _BETA, _GAMMA, _DELTA = 0.85, 0.2, 0.6, 0.75
_MATCH_WEIGHTS = np.array([1.0, 0.6, 0.8, 0.6])  # exact, stem, synonym, paraphrase
_METEOR_STATISTICS = 23
# Against division by zero in the official BLEU.
_SMALL, _TINY = 1e-9, 1e-15


def missing_tools() -> dict[str, str]:
    """What cannot be computed here, with the reason: `"all"`, or `"spice"`; empty if everything can."""
    if find_spec("pycocoevalcap") is None:
        return {"all": 'pycocoevalcap is not installed; run pip install "transformers_minigpt4[evaluation]"'}
    if shutil.which("java") is None:
        return {"all": "java is not installed, but the tokenizer of all metrics needs it; install Java 8 or later"}
    reason = spice_models_missing()
    return {"spice": reason} if reason else {}


def spice_models_missing() -> str:
    """Why SPICE cannot run, or an empty string. Its parser's models are not in the package."""
    import pycocoevalcap.spice

    folder = Path(next(iter(pycocoevalcap.spice.__path__)), "lib")
    lost = [
        name
        for name in ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
        if not (folder / name).is_file()
    ]
    if not lost:
        return ""
    return (
        f"SPICE is not scored: {lost[0]} is not in {str(folder)!r}; `python -m "
        "pycocoevalcap.spice.get_stanford_models` downloads it"
    )


def tokenized(texts: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """
    Texts as the official tokenizer (Stanford's, in Java) returns them: lower case, without punctuation.

    Raises:
        OSError: if it returned another number of lines; the reason is on standard error.
    """
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    # One line per text: line breaks other than "\n" would split one.
    given = {key: [{"caption": " ".join(text.split())} for text in group] for key, group in texts.items()}
    found: dict[str, list[str]] = PTBTokenizer().tokenize(given) if given else {}
    if {key: len(group) for key, group in found.items()} != {key: len(group) for key, group in texts.items()}:
        raise OSError("the tokenizer of pycocoevalcap (Java) stopped early; see its output above")
    return found


def bleu_sums(caption: str, references: Sequence[str]) -> dict[str, int]:
    """The counts of one tokenized caption that BLEU is computed from; the length is that of the closest reference."""
    from pycocoevalcap.bleu.bleu_scorer import cook_refs, cook_test

    counts = cook_test(caption, cook_refs(references), eff="closest")
    values = (*counts["guess"], *counts["correct"], counts["testlen"], counts["reflen"])
    return dict(zip(BLEU_COLUMNS, values))


def bleu(order: int, *sums: np.ndarray) -> np.ndarray:
    """BLEU of `order` from the sums of [`BLEU_COLUMNS`] (arrays of one shape), as in the official script."""
    guessed, right, (length, reference_length) = sums[:4], sums[4:8], sums[8:]
    product = math.prod((right[n] + _TINY) / (guessed[n] + _SMALL) for n in range(order))
    ratio = (length + _TINY) / (reference_length + _SMALL)
    return product ** (1 / order) * np.where(ratio < 1, np.exp(1 - 1 / np.minimum(ratio, 1)), 1)


def cider_scores(captions: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """CIDEr-D of each tokenized caption; the rarity of words is counted over all references."""
    from pycocoevalcap.cider.cider import Cider

    _, scores = Cider().compute_score(dict(references), {key: [caption] for key, caption in captions.items()})
    return dict(zip(captions, map(float, scores)))


def meteor_sums(captions: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> dict[str, dict[str, float]]:
    """
    The sums of each tokenized caption that METEOR is computed from.

    Raises:
        OSError: if the Java program returned no statistics.
    """
    from pycocoevalcap.meteor.meteor import Meteor

    scorer = Meteor()
    found = {}
    for key, caption in captions.items():
        line = scorer._stat(caption, list(references[key]))
        values = [float(value) for value in line.split()]
        if len(values) != _METEOR_STATISTICS:
            raise OSError(f"METEOR's program (Java) returned {line!r} for {caption!r}; has it enough memory (2 GB)?")
        found[key] = _meteor_columns(np.array(values))
    return found


def _meteor_columns(values: np.ndarray) -> dict[str, float]:
    lengths, function_words = values[:2], values[2:4]
    # For each of the four kinds of match: content words of the caption and the reference, function words of both.
    content, function = values[4:20].reshape(4, 2, 2).transpose(1, 0, 2)
    matches = _MATCH_WEIGHTS @ (_DELTA * content + (1 - _DELTA) * function)
    weighted_lengths = _DELTA * (lengths - function_words) + (1 - _DELTA) * function_words
    chunks, *matched = values[20:]
    return dict(zip(METEOR_COLUMNS, map(float, (*matches, *weighted_lengths, *matched, *lengths, chunks))))


def meteor(
    matches: np.ndarray,
    reference_matches: np.ndarray,
    length: np.ndarray,
    reference_length: np.ndarray,
    matched: np.ndarray,
    reference_matched: np.ndarray,
    words: np.ndarray,
    reference_words: np.ndarray,
    chunks: np.ndarray,
) -> np.ndarray:
    """METEOR 1.5 from the sums of [`METEOR_COLUMNS`] (arrays of one shape)."""
    precision, recall = matches / length, reference_matches / reference_length
    mean = 1 / (_ALPHA / recall + (1 - _ALPHA) / precision)
    # One chunk that covers both texts has no break to be penalized.
    complete = (matched == words) & (reference_matched == reference_words) & (chunks == 1)
    breaks = np.where(complete, 0.0, chunks / ((matched + reference_matched) / 2))
    score = mean * (1 - _GAMMA * breaks**_BETA)
    return np.where(np.asarray(matched) + np.asarray(reference_matched) == 0, 0.0, score)


def spice_scores(captions: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """
    SPICE of each tokenized caption; NaN, for a caption in which nothing is found, becomes 0.

    Raises:
        OSError: if its Java program fails, as it may on Java versions after 8, for which it was written.
    """
    from pycocoevalcap.spice.spice import Spice

    try:
        _, scores = Spice().compute_score(dict(references), {key: [caption] for key, caption in captions.items()})
    except subprocess.CalledProcessError as error:
        raise OSError(
            f"SPICE is not scored: its Java program exited with {error.returncode}; see its output above"
        ) from error
    # It returns scores in the order of the sorted keys.
    return {key: float(np.nan_to_num(score["All"]["f"])) for key, score in zip(sorted(captions), scores)}
