"""Documents, and token sequences made of them, for calibration and evaluation."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dynamo_kvtc.errors import ConfigError, MissingDependencyError, TooFewTokensError
from dynamo_kvtc.hf import corpus

ACCEPTED = (
    "a text file, a .jsonl file, a directory, 'python', 'python-topics', 'python-source', or "
    "'datasets:NAME[:SPLIT[:FIELD]]'"
)
BUILT_IN: dict[str, Callable[[], Iterator[str]]] = {
    "python": corpus.python_corpus,
    "python-topics": corpus.python_topics,
    "python-source": corpus.python_source,
}
LARGEST_FILE_BYTES = 2_000_000  # in a directory; larger files there are data rather than text
PIECE_CHARS = 100_000  # tokenised at once: bounds memory, and the time lost past the last wanted token


@dataclass(frozen=True)
class TextSource:
    """A source of documents: its name as given, and how to read it."""

    name: str
    documents: Callable[[], Iterator[str]]


@dataclass
class Sequences:
    """Token sequences of one length.

    sequences: int64 [length_tokens] each, drawn from the sources in turn.
    tokens_by_source: tokens drawn from each source, by its name as given.
    """

    sequences: list[Tensor] = field(default_factory=list)
    tokens_by_source: dict[str, int] = field(default_factory=dict)


def text_source(source: str) -> TextSource:
    """Parses a source's name without reading its documents. Raises ConfigError if it is none of the accepted forms."""
    if source in BUILT_IN:
        return TextSource(source, BUILT_IN[source])
    if source.startswith("datasets:"):
        return _datasets_source(source)
    path = Path(source).expanduser()
    if path.is_dir():
        return TextSource(source, lambda: _directory(path))
    if path.is_file():
        return TextSource(source, lambda: _jsonl(path) if path.suffix == ".jsonl" else _text_file(path))
    raise ConfigError(f"text source {source!r} is neither a file nor a known name; use {ACCEPTED}")


def read_documents(source: str) -> Iterator[str]:
    """The documents of a source, lazily and in a fixed order; empty ones are left out.

    source is one of:
    - a text file: one document, UTF-8.
    - a ``.jsonl`` file: a document per line, its "text", else "question" and "answer", else its longest string.
    - a directory: every UTF-8 file below it, in the order of their names; binary files and files over 2 MB are skipped.
    - ``python``: text that every CPython carries, reference topics and library sources half and half as long as the
      topics last (about 900,000 characters), then sources alone; ``python-topics``, ``python-source``: one of the two.
    - ``datasets:NAME[:SPLIT[:FIELD]]``: through the datasets library; the split is "train" if none is named.

    Raises ConfigError for an unknown source or unreadable text, MissingDependencyError if datasets is absent.
    """
    return (document for document in text_source(source).documents() if document.strip())


def token_sequences(
    sources: Sequence[str],
    tokenizer: Any,
    length_tokens: int,
    count: int | None = None,
    held_out: bool = False,
    hold_out_every: int = 0,
) -> Sequences:
    """Cuts the sources' documents into sequences of exactly ``length_tokens`` tokens.

    A source's documents are joined, the tokenizer's end token between them, and cut; a last part shorter than
    length_tokens is dropped. Sequences are drawn from the sources in turn, so that any prefix is balanced while all
    sources last, until there are ``count`` (None: all). If the sources hold fewer than count, all of them are returned:
    look at len(result.sequences). Every sequence begins with the begin token if the tokenizer puts one by default.
    Deterministic: the same sources and tokenizer give the same sequences.

    hold_out_every, held_out: of each source's sequences every ``hold_out_every``-th (the last of each run of that many)
    is held out. held_out=False leaves those away, held_out=True gives only those; 0 holds none out. Held-out sequences
    share no tokens with the others, but may come from another part of the same document.

    Raises ConfigError for arguments that cannot be used, TooFewTokensError if a source gives no full sequence.
    """
    if not sources:
        raise ConfigError(f"no text source was given; use {ACCEPTED}")
    if len(set(sources)) != len(sources):
        raise ConfigError(f"a text source is named twice: {', '.join(sources)}")
    if length_tokens < 2:
        raise ConfigError(f"length_tokens is {length_tokens}; it must be at least 2")
    if count is not None and count < len(sources):
        raise ConfigError(f"count is {count}; it must be at least one sequence per source ({len(sources)})")
    if hold_out_every < 0 or hold_out_every == 1 or (held_out and not hold_out_every):
        raise ConfigError(f"hold_out_every is {hold_out_every}; it must be 2 or more, or 0 with held_out false")
    parsed = [text_source(source) for source in sources]
    result = Sequences(tokens_by_source=dict.fromkeys(sources, 0))
    active = [(source.name, _cut(source, tokenizer, length_tokens, held_out, hold_out_every)) for source in parsed]
    while active and (count is None or len(result.sequences) < count):
        remaining = []
        for name, draw in active:
            if count is not None and len(result.sequences) == count:
                break
            sequence = next(draw, None)
            if sequence is not None:
                result.sequences.append(sequence)
                result.tokens_by_source[name] += length_tokens
                remaining.append((name, draw))
            elif not result.tokens_by_source[name]:
                raise TooFewTokensError(
                    f"text source {name!r} gives no full sequence of {length_tokens} tokens"
                    f"{f' with every {hold_out_every}th held out' if hold_out_every else ''}; "
                    f"give more text or shorter sequences"
                )
        active = remaining
    return result


def _cut(source: TextSource, tokenizer: Any, length: int, held_out: bool, every: int) -> Iterator[Tensor]:
    begin = _begin_token(tokenizer)
    wanted = length - len(begin)
    waiting: list[int] = []
    index = 0
    for ids in _token_pieces(source, tokenizer):
        waiting += ids
        used = 0
        while len(waiting) - used >= wanted:
            if not every or (index % every == every - 1) == held_out:
                yield torch.tensor(begin + waiting[used : used + wanted], dtype=torch.int64)
            used += wanted
            index += 1
        del waiting[:used]


def _token_pieces(source: TextSource, tokenizer: Any) -> Iterator[list[int]]:
    end = getattr(tokenizer, "eos_token_id", None)
    first = True
    for document in source.documents():
        if not document.strip():
            continue
        if not first and end is not None:
            yield [end]
        first = False
        for piece in _pieces(document):
            # verbose=False: a document longer than the model's context is meant to be cut here.
            yield tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]


def _pieces(document: str) -> Iterator[str]:
    """Parts of about PIECE_CHARS characters whose concatenation is the document, split after a line where possible."""
    start = 0
    while len(document) - start > PIECE_CHARS:
        limit = start + PIECE_CHARS
        # A cut in the second half of the piece: after an empty line, else after a line, else anywhere.
        for mark in ("\n\n", "\n", " "):
            found = document.rfind(mark, start + PIECE_CHARS // 2, limit)
            if found >= 0:
                # A space begins the next word's token, so it stays with that word.
                limit = found + len(mark.rstrip(" "))
                break
        yield document[start:limit]
        start = limit
    yield document[start:]


def _begin_token(tokenizer: Any) -> list[int]:
    begin = getattr(tokenizer, "bos_token_id", None)
    with_special = tokenizer("a")["input_ids"]
    return [begin] if begin is not None and with_special[:1] == [begin] else []


def _text_file(path: Path) -> Iterator[str]:
    try:
        yield path.read_text(encoding="utf-8")
    except UnicodeDecodeError as exc:
        raise ConfigError(f"{path} is not UTF-8 text: {exc.reason} at byte {exc.start}; convert it first") from exc
    except OSError as exc:
        raise ConfigError(f"{path} cannot be read: {exc}") from exc


def _directory(root: Path) -> Iterator[str]:
    found = False
    for path in sorted(root.rglob("*")):
        relative = path.relative_to(root)
        if any(part.startswith(".") or part == "__pycache__" for part in relative.parts) or not path.is_file():
            continue
        if path.stat().st_size > LARGEST_FILE_BYTES:
            continue
        data = path.read_bytes()
        # UTF-8 can encode a zero byte, but text has none.
        if b"\0" in data:
            continue
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError:
            continue
        found = True
        yield text
    if not found:
        raise ConfigError(f"{root} holds no UTF-8 text file of at most {LARGEST_FILE_BYTES:,} bytes")


def _jsonl(path: Path) -> Iterator[str]:
    for line_number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as exc:
            raise ConfigError(f"{path} line {line_number} is not JSON: {exc}") from exc
        yield _text_of(row, f"{path} line {line_number}")


def _lines(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8") as file:
            yield from file
    except UnicodeDecodeError as exc:
        raise ConfigError(f"{path} is not UTF-8 text: {exc.reason}; convert it first") from exc
    except OSError as exc:
        raise ConfigError(f"{path} cannot be read: {exc}") from exc


def _text_of(row: Any, where: str) -> str:
    if not isinstance(row, dict):
        raise ConfigError(f"{where} is a {type(row).__name__}, expected an object with a text field")
    if isinstance(row.get("text"), str):
        return row["text"]
    if isinstance(row.get("question"), str) and isinstance(row.get("answer"), str):
        return row["question"] + "\n" + row["answer"]
    strings = [value for value in row.values() if isinstance(value, str)]
    if not strings:
        raise ConfigError(f"{where} has no text: its fields are {', '.join(map(str, row)) or 'none'}")
    return max(strings, key=len)


def _datasets_source(source: str) -> TextSource:
    name, split, column = ([*source.split(":")[1:], "", ""])[:3]
    if not name or source.count(":") > 3:
        raise ConfigError(f"text source {source!r} is not of the form datasets:NAME[:SPLIT[:FIELD]]")

    def documents() -> Iterator[str]:
        try:
            library = importlib.import_module("datasets")
        except ImportError as exc:
            raise MissingDependencyError(
                f"text source {source!r} needs the package datasets; install it with: pip install dynamo-kvtc[datasets]"
            ) from exc
        try:
            rows = library.load_dataset(name, split=split or "train", streaming=True)
        except Exception as exc:
            # The library raises its own kinds, of many bases, for a missing dataset, split or network.
            raise ConfigError(f"text source {source!r} could not be opened: {exc}") from exc
        for index, row in enumerate(rows):
            if column and not isinstance(row.get(column), str):
                raise ConfigError(f"{source} has no text field {column!r}; its fields are {', '.join(row)}")
            yield row[column] if column else _text_of(row, f"{source} row {index}")

    return TextSource(source, documents)
