"""Documents of every kind of source, and the sequences cut from them."""

from __future__ import annotations

import json
import sys
import types

import pytest
import torch

from dynamo_kvtc.errors import ConfigError, MissingDependencyError, TooFewTokensError
from dynamo_kvtc.hf import text
from dynamo_kvtc.hf.text import read_documents, token_sequences


def test_a_text_file_is_one_document(tmp_path):
    path = tmp_path / "essay.md"
    path.write_text("één\n\ntwo", encoding="utf-8")
    assert list(read_documents(str(path))) == ["één\n\ntwo"]
    path.write_bytes(b"ok \xff\xfe")
    with pytest.raises(ConfigError, match=r"essay\.md is not UTF-8 text: .* at byte 3"):
        list(read_documents(str(path)))


def test_jsonl_fields(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"text": "a", "other": "longer"}, {"question": "q", "answer": "w"}, {"x": "s", "y": "longest", "n": 3}]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert list(read_documents(str(path))) == ["a", "q\nw", "longest"]
    path.write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(ConfigError, match="line 2 is not JSON"):
        list(read_documents(str(path)))
    path.write_text('{"n": 1}\n')
    with pytest.raises(ConfigError, match="line 1 has no text: its fields are n"):
        list(read_documents(str(path)))
    path.write_text("[1]\n")
    with pytest.raises(ConfigError, match="line 1 is a list"):
        list(read_documents(str(path)))


def test_a_directory_is_read_in_order_without_binaries(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / "b" / "z.py").write_text("print(1)")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / ".git" / "config").write_text("hidden")
    (tmp_path / "c.bin").write_bytes(b"ab\0cd")
    (tmp_path / "d.txt").write_bytes(b"\xff\xff")
    (tmp_path / "e.txt").write_text("x" * 2_000_001)
    (tmp_path / "f.txt").write_text("  \n")
    assert list(read_documents(str(tmp_path))) == ["first", "print(1)"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds no UTF-8 text"):
        list(read_documents(str(tmp_path / "empty")))


def test_the_python_corpus_is_balanced_and_the_same_every_time():
    drawn = []
    total = 0
    for document in read_documents("python"):
        drawn.append(document)
        total += len(document)
        if total > 300_000:
            break
    topics = set(read_documents("python-topics"))
    topic_chars = sum(len(document) for document in drawn if document in topics)
    assert 0.25 < topic_chars / total < 0.75
    again = read_documents("python")
    assert all(next(again) == document for document in drawn)
    sources = read_documents("python-source")
    assert all("\n" in next(sources) for _ in range(20))


def test_unknown_sources_name_the_accepted_forms():
    with pytest.raises(ConfigError, match="'nowhere' is neither a file nor a known name; use a text file"):
        read_documents("nowhere")
    with pytest.raises(ConfigError, match="datasets:NAME"):
        read_documents("datasets:")


def test_datasets_source(monkeypatch):
    calls = []

    def load_dataset(name, split, streaming):
        calls.append((name, split, streaming))
        return [{"body": "one", "text": "uno"}, {"body": "two", "text": "due"}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert list(read_documents("datasets:org/name:test:body")) == ["one", "two"]
    assert list(read_documents("datasets:org/name")) == ["uno", "due"]
    assert calls == [("org/name", "test", True), ("org/name", "train", True)]
    with pytest.raises(ConfigError, match="no text field 'nope'"):
        list(read_documents("datasets:org/name:test:nope"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingDependencyError, match=r"pip install dynamo-kvtc\[datasets\]"):
        list(read_documents("datasets:org/name"))


def write(path, name: str, content: str) -> str:
    (path / name).write_text(content)
    return str(path / name)


def test_sequences_are_the_source_cut_without_gaps(tmp_path, byte_tokenizer):
    rows = [{"text": "abcdefg"}, {"text": "hijklmnop"}, {"text": "qr"}]
    source = write(tmp_path, "r.jsonl", "\n".join(map(json.dumps, rows)))
    result = token_sequences([source], byte_tokenizer, 6)
    assert [byte_tokenizer.decode(s) for s in result.sequences] == ["abcdef", "g<eos>hijk", "lmnop<eos>"]
    assert result.tokens_by_source == {source: 18}  # "qr" is too short and dropped
    assert all(s.dtype == torch.int64 and s.shape == (6,) for s in result.sequences)


def test_sources_take_turns(tmp_path, byte_tokenizer):
    a = write(tmp_path, "a.txt", "a" * 40)
    b = write(tmp_path, "b.txt", "b" * 20)
    everything = token_sequences([a, b], byte_tokenizer, 8)
    assert [byte_tokenizer.decode(s[:1]) for s in everything.sequences] == list("ababaaa")
    assert everything.tokens_by_source == {a: 40, b: 16}
    some = token_sequences([a, b], byte_tokenizer, 8, count=3)
    assert [byte_tokenizer.decode(s[:1]) for s in some.sequences] == list("aba")
    assert some.tokens_by_source == {a: 16, b: 8}


def test_held_out_sequences_and_the_rest_are_a_partition(tmp_path, byte_tokenizer):
    a = write(tmp_path, "a.txt", "".join(chr(33 + i) for i in range(80)))
    whole = token_sequences([a], byte_tokenizer, 8).sequences
    kept = token_sequences([a], byte_tokenizer, 8, hold_out_every=4).sequences
    held = token_sequences([a], byte_tokenizer, 8, hold_out_every=4, held_out=True).sequences
    assert torch.equal(torch.stack(held), torch.stack([whole[3], whole[7]]))
    assert torch.equal(torch.stack(kept), torch.stack([s for i, s in enumerate(whole) if i not in (3, 7)]))


def test_begin_token_only_if_the_tokenizer_adds_one(tmp_path, byte_tokenizer, monkeypatch):
    a = write(tmp_path, "a.txt", "abcdefgh")
    plain = token_sequences([a], byte_tokenizer, 4).sequences
    assert plain[0][0] != 256
    original = type(byte_tokenizer).__call__

    def with_begin(self, text, add_special_tokens=True, **more):
        out = original(self, text, add_special_tokens=False, **more)
        if add_special_tokens:
            out["input_ids"] = [256, *out["input_ids"]]
        return out

    monkeypatch.setattr(type(byte_tokenizer), "__call__", with_begin)
    begun = token_sequences([a], byte_tokenizer, 4).sequences
    assert [byte_tokenizer.decode(s) for s in begun] == ["<bos>abc", "<bos>def"]


def test_long_documents_are_tokenised_in_pieces_and_no_further_than_needed(tmp_path, byte_tokenizer, monkeypatch):
    lines = "".join(f"line {i}\n" for i in range(40_000))
    assert "".join(text._pieces(lines)) == lines
    assert len(list(text._pieces(lines))) >= 4
    assert all(piece.endswith("\n") for piece in text._pieces(lines))
    assert "".join(text._pieces("x" * 250_001)) == "x" * 250_001
    source = write(tmp_path, "long.txt", lines)
    lengths = []
    original = type(byte_tokenizer).__call__

    def counting(self, piece, **more):
        lengths.append(len(piece))
        return original(self, piece, **more)

    monkeypatch.setattr(type(byte_tokenizer), "__call__", counting)
    token_sequences([source], byte_tokenizer, 100, count=10)
    assert sum(lengths) <= 2 * text.PIECE_CHARS


def test_unusable_arguments_are_named(tmp_path, byte_tokenizer):
    a = write(tmp_path, "a.txt", "abc")
    with pytest.raises(TooFewTokensError, match="no full sequence of 4 tokens"):
        token_sequences([a], byte_tokenizer, 4)
    with pytest.raises(ConfigError, match="no text source"):
        token_sequences([], byte_tokenizer, 4)
    with pytest.raises(ConfigError, match="named twice"):
        token_sequences([a, a], byte_tokenizer, 4)
    with pytest.raises(ConfigError, match="length_tokens is 1"):
        token_sequences([a], byte_tokenizer, 1)
    with pytest.raises(ConfigError, match="count is 0"):
        token_sequences([a], byte_tokenizer, 4, count=0)
    with pytest.raises(ConfigError, match="hold_out_every is 0"):
        token_sequences([a], byte_tokenizer, 4, held_out=True)
