"""How well two reviewers agree on the same texts."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Agreement:
    """
    How well two people agree on the same texts.

    Args:
        pairs: Texts that two people decided on; of more decisions, the first two count.
        agreed: Those on which both took the same action.
        raw: Share of `agreed` in `pairs`, or `None` without such texts.
        kappa: Cohen's kappa between first and second decisions; `None` if decisions by chance would always agree.
    """

    pairs: int
    agreed: int
    raw: float | None
    kappa: float | None


def measure_agreement(decisions: Sequence[tuple[str, str]]) -> Agreement:
    """
    Agreement over `(first, second)` decisions.

    Kappa is `(observed - expected) / (1 - expected)`, expected from how often each action is the first and the
    second decision (Cohen 1960, A Coefficient of Agreement for Nominal Scales).
    """
    pairs = len(decisions)
    if not pairs:
        return Agreement(0, 0, None, None)
    agreed = sum(first == second for first, second in decisions)
    raw = agreed / pairs
    firsts, seconds = zip(*decisions)
    # Counts, not shares: exact, to distinguish agreement by chance alone from nearly that.
    chance = sum(firsts.count(action) * seconds.count(action) for action in set(firsts))
    kappa = None if chance == pairs**2 else (raw - chance / pairs**2) / (1 - chance / pairs**2)
    return Agreement(pairs, agreed, raw, kappa)
