"""Caption metrics against pycocoevalcap's own results, and the sums that they are computed from."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from transformers_minigpt4.evaluation.scorers import caption_metrics
from transformers_minigpt4.evaluation.scorers.caption_metrics import BLEU_COLUMNS, METEOR_COLUMNS


GOLDEN = json.loads((Path(__file__).parent / "golden" / "captions.json").read_text(encoding="utf-8"))


def columns(rows, names):
    return [np.array([row[name] for row in rows], float) for name in names]


def test_bleu_of_the_corpus_from_sums():
    references = GOLDEN["tokenized_references"]
    rows = [caption_metrics.bleu_sums(text, references[key]) for key, text in GOLDEN["tokenized"].items()]
    assert rows[2] == dict(zip(BLEU_COLUMNS, [3, 2, 1, 0, 2, 0, 0, 0, 3, 6]))  # "a big bus": by hand
    sums = [column.sum() for column in columns(rows, BLEU_COLUMNS)]
    for order, expected in enumerate(GOLDEN["bleu"], start=1):
        assert caption_metrics.bleu(order, *sums) == pytest.approx(expected, rel=1e-12)


def test_bleu_of_texts_longer_than_their_references():
    sums = [caption_metrics.bleu_sums("a dog runs fast today", ["a dog"])[name] for name in BLEU_COLUMNS]
    assert caption_metrics.bleu(1, *sums) == pytest.approx(2 / 5)  # no brevity penalty


def test_cider_of_each_caption():
    scores = caption_metrics.cider_scores(GOLDEN["tokenized"], GOLDEN["tokenized_references"])
    assert list(scores.values()) == pytest.approx(GOLDEN["cider_scores"])
    assert np.mean(list(scores.values())) == pytest.approx(GOLDEN["cider"])


def test_meteor_of_each_caption_and_of_the_corpus_from_statistics():
    """The Java program's statistics are kept, so that this needs no Java; the next test asks it again."""
    rows = [
        caption_metrics._meteor_columns(np.array([float(value) for value in line.split()]))
        for line in GOLDEN["meteor_statistics"].values()
    ]
    by_caption = caption_metrics.meteor(*columns(rows, METEOR_COLUMNS))
    assert by_caption == pytest.approx(GOLDEN["meteor_scores"], abs=1e-9)
    corpus = caption_metrics.meteor(*(column.sum() for column in columns(rows, METEOR_COLUMNS)))
    assert corpus == pytest.approx(GOLDEN["meteor"], abs=1e-9)


@pytest.mark.skipif("all" in caption_metrics.missing_tools(), reason="no Java or pycocoevalcap")
def test_tokens_are_those_of_the_golden_file():
    """METEOR's Java program is started by the test of the task."""
    texts = {key: [caption, *GOLDEN["references"][key]] for key, caption in GOLDEN["captions"].items()}
    texts["empty"] = ["", "A line\u2028break, and\nanother."]
    tokenized = caption_metrics.tokenized(texts)
    assert tokenized.pop("empty") == ["", "a line break and another"]
    assert {key: group[0] for key, group in tokenized.items()} == GOLDEN["tokenized"]
    assert {key: group[1:] for key, group in tokenized.items()} == GOLDEN["tokenized_references"]


def test_missing_tools_are_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "java is not installed" in caption_metrics.missing_tools()["all"]
    monkeypatch.setitem(sys.modules, "pycocoevalcap", None)
    assert "transformers_minigpt4[evaluation]" in caption_metrics.missing_tools()["all"]


def test_spice_without_its_models_is_named():
    package = pytest.importorskip("pycocoevalcap.spice")
    models = Path(package.__path__[0], "lib", "stanford-corenlp-3.6.0-models.jar")
    said = caption_metrics.spice_models_missing()
    assert (said == "") if models.is_file() else said.startswith("SPICE is not scored: stanford-corenlp-3.6.0")
