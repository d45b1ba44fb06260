"""LLaVA's filter of CC3M: its invariants on random captions, resume, extractors, and bad files."""

import json
import sys
import types
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from transformers_minigpt4.cli import app
from transformers_minigpt4.data.caption_filter import Phrases, filter_captions, open_extractor
from transformers_minigpt4.data.schema import DataError


def words_of(captions):
    """An extractor for tests: every word is a phrase."""
    return [caption.split() for caption in captions]


def random_captions(count: int, seed: int = 0) -> list[str]:
    """Captions of words whose frequencies fall like those of a language: some in nearly all, many in one or two."""
    rng = np.random.default_rng(seed)
    words = rng.zipf(1.4, size=(count, 4)) % 100_000
    return [f"w{a} w{b} w{c} w{d}" for a, b, c, d in words.tolist()]


def chosen(captions: list[str], seed: int = 0) -> np.ndarray:
    phrases = Phrases()
    for caption in captions:
        phrases.add(caption.split())
    return phrases.choose(seed=seed)[0]


def write_tsv(path: Path, captions: list[str]) -> Path:
    path.write_text("".join(f"{caption}\thttp://images/{n}\n" for n, caption in enumerate(captions)))
    return path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["data", "filter-cc3m", *map(str, arguments)])


@pytest.fixture
def extractor(monkeypatch) -> str:
    module = types.ModuleType("word_extractor")
    module.words_of = words_of
    module.too_few = lambda captions: words_of(captions)[1:]
    module.number = 5
    monkeypatch.setitem(sys.modules, "word_extractor", module)
    return "python:word_extractor:words_of"


@pytest.mark.parametrize("seed", range(3))
def test_the_invariants(seed):
    captions = random_captions(20_000, seed)
    pool = chosen(captions, seed)
    counts, kept = Counter(), Counter()
    for caption, is_kept in zip(captions, pool):
        counts.update(set(caption.split()))
        kept.update(set(caption.split()) if is_kept else ())
    kinds = Counter()
    for phrase, count in counts.items():
        if 3 <= count <= 100:
            assert kept[phrase] == count, phrase
        elif count > 100:
            assert kept[phrase] >= 100, phrase
        kinds[0 if count < 3 else 1 if count <= 100 else 2] += 1
    assert min(kinds.values()) > 20  # all three kinds of phrases were there
    for caption, is_kept in zip(captions, pool):
        if is_kept:
            assert max(counts[phrase] for phrase in caption.split()) >= 3
    assert 0 < pool.sum() < len(captions)
    assert (chosen(captions, seed) == pool).all() and (chosen(captions, seed + 1) != pool).any()


def test_at_the_limits():
    """100 captions of a phrase are all kept, of 101 exactly 100, two none; a repeated phrase counts once."""
    captions = ["hundred"] * 100 + ["more"] * 101 + ["two two"] * 2 + ["three"] * 3
    pool = chosen(captions)
    assert [pool[:100].sum(), pool[100:201].sum(), pool[201:203].sum(), pool[203:].sum()] == [100, 100, 0, 3]


def test_lines_stay_as_they_are_and_none_is_there_twice(tmp_path, extractor):
    source = write_tsv(tmp_path / "train.tsv", random_captions(3000))
    done = run(source, "--output", tmp_path / "pool.tsv", "--extractor", extractor)
    assert done.exit_code == 0, done.output
    lines, kept = source.read_bytes().splitlines(), (tmp_path / "pool.tsv").read_bytes().splitlines()
    assert kept == [line for line, is_kept in zip(lines, chosen(random_captions(3000))) if is_kept]
    assert len(set(kept)) == len(kept)
    info = json.loads((tmp_path / "pool.tsv.info.json").read_text())
    assert (info["captions"], info["kept"], info["seed"]) == (3000, len(kept), 0) and "made once" in info["reading"]
    # The same from the phrases that the first run has found, and as JSON Lines.
    again = tmp_path / "captions.jsonl"
    again.write_text("".join(json.dumps({"id": n, "caption": c}) + "\n" for n, c in enumerate(random_captions(3000))))
    done = run(again, "--output", tmp_path / "pool.jsonl", "--phrases", tmp_path / "pool.tsv.phrases.jsonl")
    assert done.exit_code == 0 and len((tmp_path / "pool.jsonl").read_text().splitlines()) == len(kept)


def test_a_killed_run_is_resumed(tmp_path, extractor, monkeypatch):
    """Phrases that are on the disk are not looked for again; a line that a kill cut short is."""
    captions = random_captions(5000)
    source, phrases = write_tsv(tmp_path / "train.tsv", captions), tmp_path / "phrases.jsonl"
    seen: list[str] = []

    def dying(batch):
        seen.extend(batch)
        if len(seen) > 4000:
            raise KeyboardInterrupt
        return words_of(batch)

    monkeypatch.setattr(sys.modules["word_extractor"], "words_of", dying)
    words = [source, "--output", tmp_path / "pool.tsv", "--phrases", phrases, "--extractor", extractor]
    done = run(*words)
    assert done.exit_code == 130 and "resumes" in done.stderr and not (tmp_path / "pool.tsv").exists()
    assert not list(tmp_path.glob(".*.tmp"))
    phrases.write_text(phrases.read_text() + '{"caption": "half')
    seen.clear()
    monkeypatch.setattr(sys.modules["word_extractor"], "words_of", lambda batch: seen.extend(batch) or words_of(batch))
    done = run(*words)
    assert done.exit_code == 0, done.output
    assert seen == captions[4000:]
    assert len((tmp_path / "pool.tsv").read_text().splitlines()) == chosen(captions).sum()


def test_spacy_where_it_is_installed(monkeypatch):
    """With a stand-in for spaCy: its noun chunks as they are written."""
    spacy = types.ModuleType("spacy")

    class Pipeline:
        def pipe(self, captions):
            for caption in captions:
                yield types.SimpleNamespace(noun_chunks=[types.SimpleNamespace(text=w) for w in caption.split()])

    def load(model, exclude):
        if model != "en_core_web_sm":
            raise OSError("E050")
        return Pipeline()

    spacy.load = load
    monkeypatch.setitem(sys.modules, "spacy", spacy)
    assert list(open_extractor("spacy:en_core_web_sm")(["a Cat", "dog"])) == [["a", "Cat"], ["dog"]]
    with pytest.raises(DataError, match="spaCy has no model 'xx'; `python -m spacy download xx`"):
        open_extractor("spacy:xx")
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(DataError, match="spaCy is not installed"):
        open_extractor("spacy:en_core_web_sm")


@pytest.mark.parametrize(
    "phrases,message",
    [
        ('["a"]\n', "train.tsv has more captions than .*phrases.jsonl, which ends after 1"),
        ('["a"]\n' * 3, "phrases.jsonl has more captions than .*train.tsv, which ends after 2"),
        ('["a"]\n"b"\n', "line 2 of .* not a list of phrases"),
        ('["a"]\n["b", 3]\n', "line 2 of .* not a list of phrases"),
        ('["a"]\nbroken\n', "line 2 of .* not a list of phrases"),
        ('["a"]\n{"caption": "of another file", "phrases": []}\n', "line 2 of .* is about 'of another file'"),
    ],
)
def test_bad_phrases(tmp_path, phrases, message):
    source = write_tsv(tmp_path / "train.tsv", ["one", "two"])
    (tmp_path / "phrases.jsonl").write_text(phrases)
    with pytest.raises(DataError, match=message):
        filter_captions(source, tmp_path / "pool.tsv", tmp_path / "phrases.jsonl")
    assert not (tmp_path / "pool.tsv").exists()


@pytest.mark.parametrize(
    "name,content,message",
    [
        ("a.tsv", b"one\n\xff\n", "line 2 of .* cannot be read"),
        ("a.tsv", b"one\n\nthree\n", "line 2 of .* is empty"),
        ("a.jsonl", b'{"image": "a.jpg"}\n', "line 1 of .* has no caption"),
        ("a.csv", b"one\n", "neither .tsv, with the caption first, nor .jsonl"),
        ("a.tsv", b"", "holds no caption"),
    ],
)
def test_bad_captions(tmp_path, extractor, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        filter_captions(tmp_path / name, tmp_path / "pool", tmp_path / "phrases.jsonl", extractor=extractor)


def test_bad_requests(tmp_path, extractor):
    source = write_tsv(tmp_path / "train.tsv", ["one", "two"])
    base = [source, "--output", tmp_path / "pool.tsv"]
    for arguments, message in (
        (base, "give --extractor, such as spacy:en_core_web_sm"),
        ([*base, "--phrases", tmp_path / "none"], "there is no file of phrases"),
        ([*base, "--extractor", "word_extractor"], "write spacy:MODEL or python:MODULE:FUNCTION"),
        ([*base, "--extractor", "python:no_module:f"], "cannot be found"),
        ([*base, "--extractor", "python:word_extractor:number"], "is not a function"),
        ([*base, "--extractor", "python:word_extractor:too_few"], "gave phrases of 1 captions for 2"),
        ([*base, "--extractor", extractor, "--least", 5, "--most", 4], "least is not above most"),
        ([source, "--output", source, "--overwrite", "--extractor", extractor], "is the file to be filtered"),
        ([source, "--output", source, "--extractor", extractor], "exists; name another --output"),
    ):
        done = run(*arguments)
        assert done.exit_code == 1 and message in done.stderr and len(done.stderr.splitlines()) == 1, done.output
