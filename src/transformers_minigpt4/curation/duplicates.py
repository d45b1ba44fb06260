"""Finds near-duplicate texts (MinHash over word shingles) and near-duplicate images (difference hash, colors)."""

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

from transformers_minigpt4.processing.image_utils_minigpt4 import load_image, open_image, to_rgb


_SHINGLE = 3  # words
_HASHES = 100  # of a MinHash signature; divisible by many numbers of rows
_RECALL = 0.999  # of pairs whose similarity is exactly the threshold
_CHUNK = 2_000  # texts whose shingles are hashed at a time, few enough for the processor's cache
_COLUMNS, _ROWS = 9, 8  # fields of an image's near-duplicate hash
HASH_BYTES = 8 + 3 * _COLUMNS * _ROWS
_DRAFT = 32  # JPEG files are decoded at the smallest size with this many pixels per side
_HASH_BITS = 64
_MIXERS = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9], dtype=np.uint64)
_NO_PUNCTUATION = dict.fromkeys(map(ord, string.punctuation + "‘’“”„«»–—…·•"), " ")


@dataclass(frozen=True)
class Duplicate:
    """The earlier text or image that one is similar to, by its place, and how similar it is, in words."""

    of: int
    why: str


# Texts


def similar_texts(texts: Sequence[str], similarity: float) -> dict[int, Duplicate]:
    """
    Texts that are similar to an earlier one; the first of several similar texts is not a duplicate.

    Two texts are similar if their sets of 3-word shingles have a Jaccard index of `similarity` or more. MinHash with
    banding (Broder 1997) proposes pairs, and finds 99.9 % of those at the threshold; each is then confirmed with the
    exact Jaccard index.

    Args:
        texts: In the order of the pairs.
        similarity: From 0 (exclusive) to 1, for which only texts of the same words are duplicates.

    Returns:
        `dict`: by the duplicate's place.
    """
    found: dict[int, Duplicate] = {}
    first: dict[str, int] = {}
    for place, text in enumerate(texts):
        words = " ".join(text.lower().translate(_NO_PUNCTUATION).split())
        if (same := first.setdefault(words, place)) != place:
            found[place] = Duplicate(same, "the same words")
    if similarity >= 1 or not first:
        return found
    places = list(first.values())
    for number, other, jaccard in _similar(list(first), similarity):
        found[places[number]] = Duplicate(places[other], f"{jaccard:.0%} of the shingles are the same")
    # A text with the words of a duplicate is a duplicate of what that one is a duplicate of.
    return {place: found.get(duplicate.of, duplicate) for place, duplicate in found.items()}


def _similar(texts: Sequence[str], similarity: float) -> Iterator[tuple[int, int, float]]:
    """As [`similar_texts`], for different texts without punctuation: place, earlier place, Jaccard index."""
    shingles, ends = _shingles(texts)
    signatures = _signatures(shingles, ends)
    bands = _bands(signatures, _band_rows(similarity))
    buckets: list[dict[int, list[int]]] = [{} for _ in range(bands.shape[1])]
    # For a similar pair, an estimate below this is more than four standard deviations off.
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
    Hashes of all texts' shingles, concatenated, uint64, and where those of each text end.

    A text with fewer words than a shingle has one shingle of all its words.
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
            # Shingles that begin with a text's last two words reach into the next text.
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
    """The most rows a band, hence the fewest candidates, with which the recall is reached at the threshold."""
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


# Images


def near_duplicate_hash(path: Path) -> bytes:
    """
    By what two images are compared: 8 bytes of difference hash, then the colors of 9 x 8 fields, 216 bytes.

    The difference hash (dHash) has a bit for each two neighboring fields: whether the left one is brighter. Scaling
    and recompressing change few bits. Plain images differ in few bits too, which is why the colors are compared as
    well.

    Raises:
        ImageLoadError: for a file that is missing or cannot be read as an image.
    """
    try:
        with open_image(path) as image:
            # A JPEG reduced by 2, 4 or 8 while decoding saves most of the time; the fields need no more pixels.
            image.draft("RGB", (_DRAFT, _DRAFT))
            rgb = to_rgb(image)
            rgb.load()
    except Exception:  # PIL's readers raise all kinds of errors; `load_image` says in one line what is wrong
        rgb = load_image(path)
    fields = rgb.resize((_COLUMNS, _ROWS), Image.Resampling.BOX)
    gray = np.frombuffer(fields.convert("L").tobytes(), dtype=np.uint8).reshape(_ROWS, _COLUMNS)
    return np.packbits(gray[:, :-1] > gray[:, 1:]).tobytes() + fields.tobytes()


def similar_images(hashes: Sequence[bytes], max_bits: int, max_difference: int) -> dict[int, Duplicate]:
    """
    Images that are similar to an earlier one; the first of several similar images is not a duplicate.

    Args:
        hashes: From [`near_duplicate_hash`], in the order of the pairs.
        max_bits: Bits of 64 in which the difference hashes may differ.
        max_difference: Levels of 255 by which any color of any field may differ.

    Returns:
        `dict`: by the duplicate's place.
    """
    if not hashes:
        return {}
    table = np.frombuffer(b"".join(hashes), dtype=np.uint8).reshape(len(hashes), -1)
    bits = np.ascontiguousarray(table[:, :8]).view(np.uint64)[:, 0]
    colors = table[:, 8:].astype(np.int16)
    means = colors.reshape(len(colors), -1, 3).mean(axis=1).astype(np.float32)
    found: dict[int, Duplicate] = {}
    first = np.ones(len(hashes), dtype=bool)
    for place, others in _near_hashes(bits, max_bits):
        others = others[first[others]]
        # Mean colors first: there may be thousands of plain images with the same hash.
        others = others[(np.abs(means[others] - means[place]) <= max_difference).all(axis=1)]
        similar = others[np.abs(colors[others] - colors[place]).max(axis=1, initial=0) <= max_difference]
        if len(similar):
            other = int(similar.min())
            differing = int(np.bitwise_count(bits[other] ^ bits[place]))
            first[place] = False
            found[place] = Duplicate(other, f"{differing} bits of the hash differ")
    return found


def _near_hashes(hashes: np.ndarray, max_bits: int) -> Iterator[tuple[int, np.ndarray]]:
    """
    Each place whose hash is within `max_bits` of earlier ones, with their places.

    If two hashes are that close, at least one of `max_bits` + 1 parts of them is the same (multi-index hashing,
    Norouzi et al. 2012).
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
