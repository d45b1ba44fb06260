"""Counts what requests use and keeps them within a hard budget: the most a request can use is reserved first."""

import threading
from dataclasses import dataclass

from .types import BudgetExhausted, ChatError, ChatSettings, Usage


@dataclass(frozen=True)
class Reservation:
    """Tokens reserved for one request: at most `prompt_tokens` in and `completion_tokens` out."""

    prompt_tokens: int
    completion_tokens: int


class Ledger:
    """
    Usage and budget of one model, shared by its threads.

    Args:
        settings: Budget and prices.
        spent: What earlier runs have used of the budget.
    """

    def __init__(self, settings: ChatSettings, spent: Usage) -> None:
        self._settings, self._spent = settings, spent
        self._usage = Usage()
        self._reserved: dict[int, Reservation] = {}
        self._changed = threading.Condition()

    @property
    def usage(self) -> Usage:
        with self._changed:
            return self._usage

    def count_cached(self) -> None:
        with self._changed:
            self._usage += Usage(cached=1)

    def reserve(self, prompt_tokens: int, *, wait: bool = True, stop: threading.Event | None = None) -> Reservation:
        """
        Reserves the most that a request can use: `prompt_tokens` and the settings' `max_tokens`.

        Args:
            prompt_tokens: Upper bound of the prompt.
            wait: Whether to wait while requests in flight may still return some of theirs.
            stop: Gives up waiting when set.

        Raises:
            BudgetExhausted: if it does not fit, and waiting cannot help.
            ChatError: if `stop` was set (`kind="stopped"`).
        """
        wanted = Reservation(prompt_tokens, self._settings.max_tokens)
        with self._changed:
            while not self._fits(wanted):
                if not self._reserved or not wait:
                    raise BudgetExhausted(self._refusal(wanted))
                if stop is not None and stop.is_set():
                    raise ChatError("stopped", "given up while waiting for the budget")
                self._changed.wait(0.1)
            self._reserved[id(wanted)] = wanted
        return wanted

    def settle(self, reservation: Reservation, prompt_tokens: int, completion_tokens: int) -> float:
        """Ends a reservation, counts one request with what it used, and returns its cost."""
        cost = self._settings.cost(prompt_tokens, completion_tokens)
        with self._changed:
            del self._reserved[id(reservation)]
            self._usage += Usage(
                requests=1, prompt_tokens=prompt_tokens, completion_tokens=completion_tokens, cost=cost
            )
            self._changed.notify_all()
        return cost

    def release(self, reservation: Reservation) -> float:
        """Ends a reservation whose request was never sent; its cost is 0."""
        with self._changed:
            del self._reserved[id(reservation)]
            self._changed.notify_all()
        return 0.0

    def _fits(self, wanted: Reservation) -> bool:
        return self._tokens_fit(wanted) and self._cost_fits(wanted)

    def _claimed(self, wanted: Reservation) -> tuple[int, int]:
        claims = [*self._reserved.values(), wanted]
        return sum(claim.prompt_tokens for claim in claims), sum(claim.completion_tokens for claim in claims)

    def _tokens_fit(self, wanted: Reservation) -> bool:
        budget, used = self._settings.budget_tokens, self._spent + self._usage
        return budget is None or used.tokens + sum(self._claimed(wanted)) <= budget

    def _cost_fits(self, wanted: Reservation) -> bool:
        budget, used = self._settings.budget_cost, self._spent + self._usage
        return budget is None or used.cost + self._settings.cost(*self._claimed(wanted)) <= budget

    def _refusal(self, wanted: Reservation) -> str:
        settings, used = self._settings, self._spent + self._usage
        if not self._tokens_fit(wanted):
            return (
                f"the budget is exhausted: {used.tokens:,} of {settings.budget_tokens:,} tokens are used and the next "
                f"request may take {wanted.prompt_tokens + wanted.completion_tokens:,}; raise budget_tokens to "
                "continue, or lower max_tokens"
            )
        cost = settings.cost(wanted.prompt_tokens, wanted.completion_tokens)
        return (
            f"the budget is exhausted: {used.cost:.4f} of {settings.budget_cost:.4f} is spent and the next request "
            f"may cost {cost:.4f}; raise budget_cost to continue, or lower max_tokens"
        )
