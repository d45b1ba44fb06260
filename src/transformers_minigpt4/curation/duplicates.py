"""Finds near-duplicate texts (MinHash over word shingles) and near-duplicate pictures (difference hash, colours)."""

import hashlib
import math
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image

from transformers_minigpt4.processing.image_utils_minigpt4 import load_image, to_rgb


_SHINGLE = 3  # words
_HASHES = 100  # of a MinHash signature; divisible by many numbers of rows
_RECALL = 0.999  # of pairs that are exactly as similar as asked
_CHUNK = 2_000  # texts whose shingles are hashed at a time, so few that they stay in the processor's cache
_COLUMNS, _ROWS = 9, 8  # fields of a picture's print
HASH_BYTES = 8 + 3 * _COLUMNS * _ROWS
_DRAFT = 32  # JPEG files are decoded at the least size that has so many pixels a side
_HASH_BITS = 64
_MIXERS = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9], dtype=np.uint64)
_NO_MARKS = dict.fromkeys(map(ord, string.punctuation + "‘’“”„«»–—…·•"), " ")


@dataclass(frozen=True)
class Duplicate:
    """The earlier text or picture that one is like, by its place, and how like it is in words."""

    of: int
    why: str


# Texts


def similar_texts(texts: Sequence[str], similarity: float) -> dict[int, Duplicate]:
    """
    Texts that are like an earlier one; the first of several alike is none.

    Two texts are alike where their sets of 3-word shingles have a Jaccard index of `similarity` or more. MinHash with
    banding (Broder 1997) proposes pairs, of which 99.9 % at the very threshold are found; each is then counted out.

    Args:
        texts: In the order in which they came.
        similarity: From 0 (exclusive) to 1, where only texts of the same words are alike.

    Returns:
        `dict`: by the place of each duplicate.
    """
    found: dict[int, Duplicate] = {}
    first: dict[str, int] = {}
    for place, text in enumerate(texts):
        words = " ".join(text.lower().translate(_NO_MARKS).split())
        if (same := first.setdefault(words, place)) != place:
            found[place] = Duplicate(same, "the same words")
    if similarity >= 1 or not first:
        return found
    places = list(first.values())
    for number, other, jaccard in _similar(list(first), similarity):
        found[places[number]] = Duplicate(places[other], f"{jaccard:.0%} of the shingles are the same")
    # What has the words of a duplicate is one of the text that this is a duplicate of.
    return {place: found.get(duplicate.of, duplicate) for place, duplicate in found.items()}


def _similar(texts: Sequence[str], similarity: float) -> Iterator[tuple[int, int, float]]:
    """As [`similar_texts`], of texts without marks of which no two are the same: place, earlier place, index."""
    shingles, ends = _shingles(texts)
    signatures = _signatures(shingles, ends)
    bands = _bands(signatures, _band_rows(similarity))
    buckets: list[dict[int, list[int]]] = [{} for _ in range(bands.shape[1])]
    # An estimate below this is more than four standard deviations off for a pair that is alike.
    least = similarity - 4 * math.sqrt(similarity * (1 - similarity) / _HASHES)
    starts = [0, *ends.tolist()]
    sets = lru_cache(maxsize=10_000)(lambda number: np.unique(shingles[starts[number] : starts[number + 1]]))
    for number, keys in enumerate(bands.tolist()):
        lists = [bucket.setdefault(key, []) for bucket, key in zip(buckets, keys)]
        near = sorted({other for listed in lists for other in listed})
        if near:
            agree = (signatures[near] == signatures[number]).mean(axis=1)
            near = [other for other, share in zip(near, agree.tolist()) if share >= least]
        for other in near:
            jaccard = _jaccard(sets(number), sets(other))
            if jaccard >= similarity:
                yield number, other, jaccard
                break
        else:
            for listed in lists:
                listed.append(number)


def _shingles(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """
    Hashes of all texts' shingles one behind the other, uint64, and where each text's end.

    A text of fewer words than a shingle has one shingle of them all.
    """
    known: dict[str, int] = {}
    hashes: list[int] = []
    lengths = []
    parts = []
    for number, text in enumerate(texts, start=1):
        words = text.split()
        for word in words:
            if (value := known.get(word)) is None:
                value = int.from_bytes(
                    hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little"
                )
                known[word] = value
            hashes.append(value)
        missing = max(0, _SHINGLE - len(words))
        hashes.extend([0] * missing)
        lengths.append(len(words) + missing)
        if number % _CHUNK == 0 or number == len(texts):
            row = np.array(hashes, dtype=np.uint64)
            mixed = row[:-2] * _MIXERS[0] ^ row[1:-1] * _MIXERS[1] ^ row[2:] * _MIXERS[2]
            # Those that begin with a text's last two words reach into the next text.
            inside = np.ones(len(row), dtype=bool)
            last = np.cumsum(lengths[len(lengths) - (number - 1) % _CHUNK - 1 :])
            inside[last - 1] = inside[last - 2] = False
            parts.append((mixed ^ mixed >> np.uint64(31))[inside[:-2]])
            hashes = []
    return np.concatenate(parts), np.cumsum(lengths) - (_SHINGLE - 1) * np.arange(1, len(texts) + 1)


def _jaccard(one: np.ndarray, other: np.ndarray) -> float:
    common = len(np.intersect1d(one, other, assume_unique=True))
    return common / (len(one) + len(other) - common)


def _band_rows(similarity: float) -> int:
    """The most rows a band, so the fewest pairs to look at, with which the recall holds at the threshold."""
    return max(
        (
            rows
            for rows in range(1, 13)
            if _HASHES % rows == 0 and 1 - (1 - similarity**rows) ** (_HASHES // rows) >= _RECALL
        ),
        default=1,
    )


def _signatures(shingles: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """MinHash of each text, `(texts, _HASHES)` uint32: the least of its hashes under as many multiply-add hashes."""
    rng = np.random.default_rng(0)
    factors = rng.integers(0, 2**31, _HASHES, dtype=np.uint32) * np.uint32(2) + np.uint32(1)
    offsets = rng.integers(0, 2**32, _HASHES, dtype=np.uint32)
    signatures = np.empty((len(ends), _HASHES), dtype=np.uint32)
    starts = np.append(0, ends[:-1])
    for first in range(0, len(ends), _CHUNK):
        last = min(first + _CHUNK, len(ends))
        flat = (shingles[starts[first] : ends[last - 1]] >> np.uint64(32)).astype(np.uint32)
        edges = starts[first:last] - starts[first]
        hashed = np.empty_like(flat)
        for column, (factor, offset) in enumerate(zip(factors, offsets)):
            np.multiply(flat, factor, out=hashed)
            np.add(hashed, offset, out=hashed)
            signatures[first:last, column] = np.minimum.reduceat(hashed, edges)
    return signatures


def _bands(signatures: np.ndarray, rows: int) -> np.ndarray:
    """One number for each band of a signature, `(texts, _HASHES // rows)` uint64."""
    parts = signatures.reshape(len(signatures), -1, rows).astype(np.uint64)
    key = np.zeros(parts.shape[:2], dtype=np.uint64)
    for row in range(rows):
        key = (key ^ parts[:, :, row]) * np.uint64(0x9E3779B97F4A7C15)
        key ^= key >> np.uint64(29)
    return key


# Pictures


def near_duplicate_hash(picture: Path) -> bytes:
    """
    What two pictures are compared by: 8 bytes of difference hash, then the colours of 9 x 8 fields, 216 bytes.

    The hash (dHash) has a bit for each two fields side by side: whether the left one is brighter. Scaling and
    recompressing change few bits. Plain pictures differ in few bits too, which is why the colours stand beside it.

    Raises:
        ImageLoadError: for a file that is missing or cannot be read as a picture.
    """
    try:
        with Image.open(picture) as image:
            # The file's own reduction by 2, 4 or 8 saves most of the decoding; it needs no more than these fields.
            image.draft("RGB", (_DRAFT, _DRAFT))
            rgb = to_rgb(image)
            rgb.load()
    except Exception:  # PIL's readers raise whatever comes to them; this one says in one line what is wrong
        rgb = load_image(picture)
    fields = rgb.resize((_COLUMNS, _ROWS), Image.Resampling.BOX)
    gray = np.frombuffer(fields.convert("L").tobytes(), dtype=np.uint8).reshape(_ROWS, _COLUMNS)
    return np.packbits(gray[:, :-1] > gray[:, 1:]).tobytes() + fields.tobytes()


def similar_images(prints: Sequence[bytes], max_bits: int, max_difference: int) -> dict[int, Duplicate]:
    """
    Pictures that are like an earlier one; the first of several alike is none.

    Args:
        prints: From [`near_duplicate_hash`], in the order in which the pictures came.
        max_bits: Bits of 64 in which the difference hashes may differ.
        max_difference: Levels of 255 by which any colour of any field may differ.

    Returns:
        `dict`: by the place of each duplicate.
    """
    if not prints:
        return {}
    table = np.frombuffer(b"".join(prints), dtype=np.uint8).reshape(len(prints), -1)
    hashes = np.ascontiguousarray(table[:, :8]).view(np.uint64)[:, 0]
    colours = table[:, 8:].astype(np.int16)
    means = colours.reshape(len(colours), -1, 3).mean(axis=1).astype(np.float32)
    found: dict[int, Duplicate] = {}
    first = np.ones(len(prints), dtype=bool)
    for place, others in _near_hashes(hashes, max_bits):
        others = others[first[others]]
        # Mean colours first: there may be thousands of plain pictures with one hash.
        others = others[(np.abs(means[others] - means[place]) <= max_difference).all(axis=1)]
        alike = others[np.abs(colours[others] - colours[place]).max(axis=1, initial=0) <= max_difference]
        if len(alike):
            other = int(alike.min())
            bits = int(np.bitwise_count(hashes[other] ^ hashes[place]))
            first[place] = False
            found[place] = Duplicate(other, f"{bits} bits of the hash differ")
    return found


def _near_hashes(hashes: np.ndarray, max_bits: int) -> Iterator[tuple[int, np.ndarray]]:
    """
    Each place whose hash is within `max_bits` of earlier ones, with these.

    Of `max_bits` + 1 parts of two such hashes one at least is the same (multi-index hashing, Norouzi et al. 2012).
    """
    different, inverse = np.unique(hashes, return_inverse=True)
    # The places of each different hash, in their order.
    order, ends = np.argsort(inverse, kind="stable"), np.cumsum(np.bincount(inverse)).tolist()
    members = [order[start:end] for start, end in zip([0, *ends], ends)]
    edges = np.linspace(0, _HASH_BITS, min(max_bits, _HASH_BITS - 1) + 2).astype(int).tolist()
    indexes = [
        _groups(different >> np.uint64(low) & np.uint64(2 ** (high - low) - 1)) for low, high in pairwise(edges)
    ]
    near: dict[int, list[int]] = {}
    for place, own in enumerate(inverse.tolist()):
        if own not in near:
            others = np.concatenate([groups[number[own]] for groups, number in indexes])
            others = others[np.bitwise_count(different[others] ^ different[own]) <= max_bits]
            near[own] = list(set(others.tolist()))
        if len(near[own]) > 1 or len(members[own]) > 1:
            earlier = [members[other][: np.searchsorted(members[other], place)] for other in near[own]]
            if any(map(len, earlier)):
                yield place, np.concatenate(earlier)


def _groups(keys: np.ndarray) -> tuple[list[np.ndarray], list[int]]:
    """The places of each different key, and for each place the number of its group."""
    _, number, counts = np.unique(keys, return_inverse=True, return_counts=True)
    return np.split(np.argsort(number, kind="stable"), np.cumsum(counts)[:-1]), number.tolist()
