"""What is worth storing: blocks of long enough sequences, on their n-th use."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence

REMEMBERED = 1 << 18
"""Blocks whose uses are counted, the last used ones: some 50 MB of keys at most."""


class Admission:
    def __init__(self, min_tokens: int = 0, store_on_use: int = 1, remembered: int = REMEMBERED) -> None:
        self.min_tokens, self._on_use, self._remembered = min_tokens, store_on_use, remembered
        self._uses: OrderedDict[bytes, int] = OrderedDict()
        self._lock = threading.Lock()

    def admit(self, keys: Sequence[bytes], sequence_tokens: int | None = None) -> list[bool]:
        """Whether each block is to be stored now; every call is a use. sequence_tokens: None if nobody knows."""
        if sequence_tokens is not None and sequence_tokens < self.min_tokens:
            return [False] * len(keys)
        if self._on_use == 1:
            return [True] * len(keys)
        out = []
        with self._lock:
            for key in keys:
                uses = self._uses.pop(key, 0) + 1
                self._uses[key] = uses
                out.append(uses >= self._on_use)
            while len(self._uses) > self._remembered:
                self._uses.popitem(last=False)
        return out
