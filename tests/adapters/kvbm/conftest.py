from __future__ import annotations

from tests.store.conftest import folder

__all__ = ["folder"]
