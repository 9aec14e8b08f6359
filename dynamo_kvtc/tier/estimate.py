"""Whether a restore beats computing again: running means of what the tier itself measured."""

from __future__ import annotations

import threading
from collections.abc import Mapping

WEIGHT = 0.2
"""Of the newest measurement in a running mean."""
PROBE_EVERY = 32
"""One in so many declined loads is let through: a tier that was slow once must be able to show that it no longer is."""


class Mean:
    """A running mean; None until something was measured."""

    def __init__(self) -> None:
        self.value: float | None = None

    def note(self, value: float) -> None:
        self.value = value if self.value is None else (1 - WEIGHT) * self.value + WEIGHT * value


class Estimate:
    """Seconds a restore takes, from the seconds a token took lately: to fetch, by tier, and to decode; and the wait."""

    def __init__(self, prefill_tokens_per_second: float | None) -> None:
        self._lock = threading.Lock()
        self._fetch: dict[str, Mean] = {}
        self._decode, self._wait = Mean(), Mean()
        self._given = prefill_tokens_per_second
        self._declined = 0

    def note_fetch(self, tier: str, tokens: int, seconds: float) -> None:
        with self._lock:
            self._fetch.setdefault(tier, Mean()).note(seconds / max(tokens, 1))

    def note_decode(self, tokens: int, seconds: float) -> None:
        with self._lock:
            self._decode.note(seconds / max(tokens, 1))

    def note_wait(self, seconds: float) -> None:
        with self._lock:
            self._wait.note(seconds)

    def restore_seconds(self, tokens_by_tier: Mapping[str, int]) -> float | None:
        """None until a restore has been measured."""
        with self._lock:
            if self._decode.value is None:
                return None
            fetch = sum(n * (self._fetch[t].value or 0.0) for t, n in tokens_by_tier.items() if t in self._fetch)
            return (self._wait.value or 0.0) + fetch + sum(tokens_by_tier.values()) * self._decode.value

    def recompute_seconds(self, tokens: int) -> float | None:
        """None where no speed was given."""
        return None if self._given is None else tokens / self._given

    def worth(self, tokens_by_tier: Mapping[str, int]) -> bool:
        """Whether to restore. True while either side is unknown, and now and then regardless."""
        restore, compute = self.restore_seconds(tokens_by_tier), self.recompute_seconds(sum(tokens_by_tier.values()))
        if restore is None or compute is None or restore <= compute:
            return True
        with self._lock:
            self._declined += 1
            return self._declined % PROBE_EVERY == 0
