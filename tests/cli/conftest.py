"""Fixtures of this room."""

from tests.evaluate.tiny import tiny, tiny_bf16

__all__ = ["tiny", "tiny_bf16"]
