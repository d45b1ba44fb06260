"""Near-duplicate texts against an exact count of shingles, and near-duplicate images through many changes."""

import random

import numpy as np
import pytest
from filter_projects import TEXTS, jpeg, photograph
from PIL import Image, ImageEnhance

from transformers_minigpt4.curation.duplicates import near_duplicate_hash, similar_images, similar_texts
from transformers_minigpt4.demo.world import all_scenes, draw
from transformers_minigpt4.processing.image_utils_minigpt4 import ImageLoadError


def shingles(text: str) -> set[tuple[str, ...]]:
    words = text.lower().replace(".", "").replace(",", "").split()
    return set(zip(words, words[1:], words[2:]))


def exact(texts: list[str], similarity: float) -> dict[int, int]:
    """What `similar_texts` finds, by comparing every text with every earlier one that is not a duplicate."""
    found: dict[int, int] = {}
    sets = [shingles(text) for text in texts]
    for place, one in enumerate(sets):
        for other, two in enumerate(sets[:place]):
            if other not in found and len(one & two) >= similarity * len(one | two):
                found[place] = other
                break
    return found


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Texts of 60 words, each third one an earlier one with 0 to 12 words changed."""
    rng = random.Random(0)
    words = [f"word{number}" for number in range(500)]
    texts: list[str] = []
    for number in range(300):
        text = [rng.choice(words) for _ in range(60)]
        if number % 3 == 2:
            text = rng.choice(texts).split()
            for place in rng.sample(range(60), rng.randint(0, 12)):
                text[place] = rng.choice(words)
        texts.append(" ".join(text))
    return texts


class TestTexts:
    @pytest.mark.parametrize("similarity", [0.3, 0.5, 0.8, 0.95])
    def test_as_an_exact_count_finds_them(self, texts, similarity):
        found = similar_texts(texts, similarity)
        expected = exact(texts, similarity)
        assert {place: duplicate.of for place, duplicate in found.items()} == expected
        assert len(expected) > 5

    def test_the_same_words(self):
        texts = [TEXTS[0], TEXTS[1], TEXTS[0].upper().replace(" ", "  "), "Cat.", "Cat!", "", "."]
        for similarity in (0.8, 1):
            found = similar_texts(texts, similarity)
            assert {place: duplicate.of for place, duplicate in found.items()} == {2: 0, 4: 3, 6: 5}
            assert found[2].why == "the same words"
        assert similar_texts([], 0.8) == {}

    def test_later_texts_change_nothing(self, texts):
        first = similar_texts(texts[:150], 0.8)
        assert {place: found for place, found in similar_texts(texts, 0.8).items() if place < 150} == first


def hashes(tmp_path, *images) -> list[bytes]:
    made = []
    for number, image in enumerate(images):
        path = tmp_path / f"{number}.png"
        if isinstance(image, bytes):
            path.write_bytes(image)
        else:
            image.save(path, compress_level=1)
        made.append(near_duplicate_hash(path))
    return made


class TestImages:
    @pytest.mark.parametrize(
        "change",
        [
            lambda p: jpeg(p, 30),
            lambda p: p.resize((100, 75)),
            lambda p: p.resize((500, 375)),
            lambda p: jpeg(p.resize((800, 600)), 50),
            lambda p: ImageEnhance.Brightness(p).enhance(0.95),
            lambda p: p.quantize(256),
            lambda p: p.convert("RGBA"),
        ],
        ids=["compressed", "small", "large", "large and compressed", "darker", "palette", "alpha"],
    )
    def test_the_same_image_changed(self, tmp_path, change):
        originals = [photograph(seed, (200, 150)) for seed in range(4)]
        found = similar_images(hashes(tmp_path, *originals, *map(change, originals)), 4, 24)
        assert {place: duplicate.of for place, duplicate in found.items()} == {4 + i: i for i in range(4)}

    @pytest.mark.parametrize(
        "change",
        [
            lambda p: p.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
            lambda p: p.rotate(180),
            lambda p: Image.merge("RGB", p.split()[::-1]),
            lambda p: p.crop((40, 30, 200, 150)),
        ],
        ids=["mirrored", "turned", "other colors", "cut"],
    )
    def test_another_image(self, tmp_path, change):
        originals = [photograph(seed, (200, 150)) for seed in range(4)]
        assert similar_images(hashes(tmp_path, *originals, *map(change, originals)), 4, 24) == {}

    def test_plain_images_differ_by_color(self, tmp_path):
        """A hash of brightness steps is the same for all of these."""
        plain = [Image.new("RGB", (64, 64), color) for color in ("white", "#ddd", "red", "navy", "#fdfdfd")]
        found = similar_images(hashes(tmp_path, *plain), 4, 24)
        assert {place: duplicate.of for place, duplicate in found.items()} == {4: 0}

    def test_speed_holds_what_the_plain_way_finds(self):
        """Blocks and early sieves against every pair, among them chains of duplicates."""
        rng = np.random.default_rng(0)
        base = rng.integers(0, 256, (40, 224), dtype=np.int16)
        table = base[rng.integers(0, 40, 1200)]
        table[:, 8:] = np.clip(table[:, 8:] + rng.integers(-14, 15, (1200, 216)), 0, 255)
        table[:, 0] ^= rng.integers(0, 2, 1200) * 3
        table = table.astype(np.uint8)
        found = similar_images([row.tobytes() for row in table], 3, 24)
        expected: dict[int, int] = {}
        for place in range(1200):
            bits = np.bitwise_count(table[:place, :8] ^ table[place, :8]).sum(axis=1) <= 3
            near = np.abs(table[:place, 8:].astype(int) - table[place, 8:]).max(axis=1) <= 24
            earlier = [other for other in np.flatnonzero(bits & near).tolist() if other not in expected]
            if earlier:
                expected[place] = earlier[0]
        assert {place: duplicate.of for place, duplicate in found.items()} == expected
        assert 100 < len(expected) < 1190

    def test_the_toy_worlds_scenes_are_distinguished(self, tmp_path):
        """One shape on a plain ground: another color, shape, size or place is another image."""
        scenes, rng = all_scenes()[::9], random.Random(0)
        found = similar_images(hashes(tmp_path, *(draw(scene, rng) for scene in scenes)), 4, 24)
        assert len(found) <= 0.02 * len(scenes)

    def test_unreadable(self, tmp_path):
        (tmp_path / "text.jpg").write_text("no image")
        (tmp_path / "half.jpg").write_bytes(jpeg(photograph(0))[:500])
        for name in ("text.jpg", "half.jpg", "none.jpg"):
            with pytest.raises(ImageLoadError, match=name):
                near_duplicate_hash(tmp_path / name)
