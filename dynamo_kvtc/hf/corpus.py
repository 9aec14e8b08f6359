"""The text that every CPython carries: the language's reference topics and the standard library's sources.

It needs no download, is half prose and half code, and is the same for one Python version everywhere (another minor
version has other texts).
"""

from __future__ import annotations

import hashlib
import importlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from dynamo_kvtc.errors import MissingDependencyError

# Tests, bundled third parties and generated tables are not what a model is asked to continue.
SKIPPED_FOLDERS = {
    "test", "tests", "idle_test", "lib2to3", "idlelib", "site-packages", "dist-packages", "ensurepip", "encodings",
    "pydoc_data", "turtledemo", "__pycache__", "__phello__", "lib-dynload",
}  # fmt: skip
# Files outside these bounds are stubs or tables.
LEAST_CHARS, MOST_BYTES = 1000, 2_000_000


def python_topics() -> Iterator[str]:
    """The topics of the Python reference manual, about 450,000 characters in all, in a fixed mixed order.

    Raises MissingDependencyError if this Python was built without them.
    """
    try:
        module = importlib.import_module("pydoc_data.topics")
    except ImportError as exc:
        raise MissingDependencyError("this Python carries no pydoc_data; use another text source") from exc
    topics: dict[str, str] = module.topics
    for name in sorted(topics, key=_mixed):
        yield topics[name]


def python_source() -> Iterator[str]:
    """The standard library's modules, more than 10 million characters, in a fixed mixed order.

    Raises MissingDependencyError if this Python carries no sources.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    names = []
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if not SKIPPED_FOLDERS.intersection(relative.parts[:-1]) and path.stat().st_size <= MOST_BYTES:
            names.append(relative.as_posix())
    if not names:
        raise MissingDependencyError(f"no Python sources under {root}; use another text source")
    for name in sorted(names, key=_mixed):
        try:
            text = (root / name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if len(text) >= LEAST_CHARS:
            yield text


def python_corpus() -> Iterator[str]:
    """Topics and sources interleaved, as many characters of the one as of the other while the topics last."""
    topics, sources = python_topics(), python_source()
    topic_chars = source_chars = 0
    for topic in topics:
        yield topic
        topic_chars += len(topic)
        while source_chars < topic_chars:
            source = next(sources, None)
            if source is None:
                break
            yield source
            source_chars += len(source)
    yield from sources


def _mixed(name: str) -> str:
    """A sort key that mixes names of all letters, the same in every run: a prefix of the corpus is of all kinds."""
    return hashlib.sha256(name.encode()).hexdigest()
