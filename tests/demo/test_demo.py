"""``kvtc demo`` on a tiny model: the three ways, what they hold, and the files."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from dynamo_kvtc.cli.main import main
from dynamo_kvtc.codec.artifact import load_artifact
from dynamo_kvtc.codec.pipeline import BlockCodec
from dynamo_kvtc.codec.policy import ExactPolicy
from dynamo_kvtc.demo import setting
from dynamo_kvtc.demo.conversation import Coded, Raw, Recompute, converse
from dynamo_kvtc.demo.engine import where
from dynamo_kvtc.demo.report import summary
from dynamo_kvtc.errors import ConfigError
from dynamo_kvtc.hf.model import Model, load_model

SMALL = {
    "--tokens": 1500, "--context": 128, "--groups": 2, "--ratio": 6, "--turns": 4, "--document-tokens": 500,
    "--answer-tokens": 12,
}  # fmt: skip


def demo(folder: Path, out: Path, **changes: object) -> tuple[int, str, str]:
    arguments = ["demo", "--model", str(folder), "--out", str(out)]
    for name, value in (SMALL | {f"--{k.replace('_', '-')}": v for k, v in changes.items()}).items():
        arguments += [name, str(value)]
    result = CliRunner().invoke(main, arguments)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(scope="module")
def ran(chat_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("out") / "demo-out"
    code, text, err = demo(chat_folder, out)
    assert code == 0, err
    return out, text


def refuse(constant: str) -> float:
    raise AssertionError(f"{constant} in the JSON")


def test_json_has_every_way_and_turn(ran: tuple[Path, str]) -> None:
    facts = json.loads((ran[0] / "demo.json").read_text(), parse_constant=refuse)
    ways, turns, settings = facts["ways"], facts["turns"], facts["settings"]
    assert list(ways) == ["recompute", "raw", "kvtc"]
    assert len(turns) == 4
    token_bytes = 3 * 2 * 8 * 2 * 2
    for turn in turns:
        held = turn["ways"]["raw"]["held_bytes"] / token_bytes
        least = turn["context_tokens"] + turn["prompt_tokens"]
        assert least <= held < least + SMALL["--answer-tokens"]
        assert turn["ways"]["recompute"]["held_bytes"] == 0
        assert 0 < turn["ways"]["kvtc"]["held_bytes"] < turn["ways"]["raw"]["held_bytes"]
        for way in turn["ways"].values():
            assert way["first_token_seconds"] >= way["restore_seconds"] >= 0
    assert turns[0]["ways"]["kvtc"]["kl"] is None
    assert turns[1]["ways"]["kvtc"]["kl"] > turns[1]["ways"]["recompute"]["kl"] >= -1e-6
    assert ways["raw"]["kl"] is None
    assert ways["kvtc"]["compared_tokens"] == ways["recompute"]["compared_tokens"] > 0
    assert 0 <= ways["kvtc"]["top1"] <= 1
    assert settings["artifact"]["calibrated_in_this_run"] is True
    assert settings["cache_dtype"] == "bfloat16"
    assert set(settings["seconds"]) == {"load the model", "calibrate", "conversation"}


def test_the_picture_and_the_tables_are_there(ran: tuple[Path, str]) -> None:
    assert (ran[0] / "demo.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    for text in ("recompute", "raw", "kvtc", "first token", "top-1", "turn 4", setting.QUESTIONS[3][:12], "artifact:"):
        assert text in ran[1]


def test_an_artifact_that_fits_is_used_again_and_a_damaged_one_is_not(
    ran: tuple[Path, str], chat_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*arguments: object, **named: object) -> None:
        raise AssertionError("calibrated again")

    monkeypatch.setattr(setting, "calibrate", never)
    assert demo(chat_folder, ran[0])[0] == 0
    facts = json.loads((ran[0] / "demo.json").read_text())
    assert facts["settings"]["artifact"]["calibrated_in_this_run"] is False
    (path,) = ran[0].glob("*.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    monkeypatch.undo()
    code, _, err = demo(chat_folder, ran[0])
    assert code == 0
    assert "is made again" in err
    load_artifact(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"turns": 9}, "--turns is 9"),
        ({"turns": 0}, "--turns is 0"),
        ({"document_tokens": 3}, "--document-tokens 3 is less than"),
        ({"document_tokens": 1900}, "fewer --turns or --document-tokens"),
        ({"ratio": -1}, "target -1.0 is not a positive number"),
        ({"groups": 4}, "4 layer groups asked of a model with 3"),
    ],
)
def test_bad_input_is_refused_with_one_line(
    chat_folder: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    code, _, err = demo(chat_folder, tmp_path / "out", **change)
    assert code == 2
    assert message in err.splitlines()[-1]
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_a_model_without_a_chat_template_is_refused(tiny_llama: Model) -> None:
    with pytest.raises(ConfigError, match="no chat template"):
        setting.prompts(tiny_llama.tokenizer, "text", 2)


def test_a_document_that_was_calibrated_on_is_refused(byte_tokenizer: Any) -> None:
    text = setting.document(byte_tokenizer, 3000)
    assert len(text) > 1500
    other = torch.tensor(byte_tokenizer("nothing of the kind " * 50)["input_ids"])
    setting.check_unseen(byte_tokenizer, text, [other])
    seen = torch.tensor(byte_tokenizer(text[500:1500])["input_ids"])
    with pytest.raises(ConfigError, match="would flatter"):
        setting.check_unseen(byte_tokenizer, text, [other, seen])


def test_prompts_join_to_the_template(chat_tokenizer: Any) -> None:
    turns = setting.prompts(chat_tokenizer, "DOC", 3)
    joined = "".join(chat_tokenizer.decode(ids) + "ANSWER" for _, ids in turns)
    messages = []
    for number, (question, _) in enumerate(turns):
        content = f"Here is a document.\n\nDOC\n\nAnswer from the document. {question}" if not number else question
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": "ANSWER"}]
    assert joined + "<eos>" == chat_tokenizer.apply_chat_template(messages, tokenize=False)


def test_a_coded_cache_is_that_of_coding_everything_at_once(ran: tuple[Path, str], chat_folder: Path) -> None:
    """Only blocks that are new or that the window touched are encoded again, and none is forgotten."""
    model = load_model(str(chat_folder))
    (path,) = ran[0].glob("*.safetensors")
    artifact = load_artifact(path)
    policy = ExactPolicy(sinks=4, window=20)
    codec = BlockCodec(artifact, artifact.manifest.points[0].name, policy)
    way = Coded(model, codec, policy)
    ids = torch.arange(150) % 250
    k, v = model.prefill(ids)
    for tokens in (37, 64, 65, 150):
        way.keep(k[:, :, :tokens], v[:, :, :tokens])
        positions = torch.arange(tokens)
        expected = codec.encode_blocks(
            k[:, :, :tokens], v[:, :, :tokens], positions, policy.mask(positions, tokens)
        )  # fmt: skip
        restored = way.restore()
        whole = codec.decode_blocks([block.record for block in expected])
        assert way.held_bytes == sum(len(block.record) for block in expected)
        for mine, other, raw in zip(restored, whole[:2], (k, v), strict=True):
            assert torch.equal(mine, other)
            assert torch.equal(mine[:, :, tokens - 20 :], raw[:, :, tokens - 20 : tokens])


def test_a_lossless_way_diverges_by_nothing_and_one_that_forgets_does(chat_folder: Path) -> None:
    model = load_model(str(chat_folder))

    class Forgetful(Raw):
        name = "kvtc"

        def restore(self) -> tuple[torch.Tensor, torch.Tensor]:
            k, v = super().restore()
            return k, torch.zeros_like(v)

    class Copy(Raw):
        name = "copy"

    chat = setting.prompts(model.tokenizer, "A short document about nothing much.", 3)
    turns = converse(model, chat, [Raw(model), Recompute(model), Copy(model), Forgetful(model)], 8, lambda share: None)
    for turn in turns[1:]:
        copied, forgot = turn.ways["copy"].divergence, turn.ways["kvtc"].divergence
        assert copied is not None
        assert forgot is not None
        assert copied.kl == 0
        assert copied.same_top1 == copied.tokens
        assert forgot.kl > 0.01 * forgot.tokens
        assert turn.ways["copy"].answer == turn.ways["raw"].answer
    assert summary(turns)["kvtc"]["kl"] > 0.01


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--engine", "vllm"], "has no vLLM: `make engines ENGINE_PARTS=vllm`"),
        (["--engine", "vllm", "--engine-python", sys.executable], "has no vLLM: `make engines ENGINE_PARTS=vllm`"),
        (["--engine", "vllm", "--engine-python", "/no/such/python"], "cannot be run"),
        (["--engine", "vllm", "--turns", "3"], "--turns: not with --engine"),
        (["--sessions", "3"], "--sessions: only with --engine"),
        (["--engine", "vllm", "--sessions", "3"], "at least 6 sessions"),
        (["--engine", "vllm", "--host-sessions", "0"], "--host-sessions is 0.0; it must be 0.1 to 1000"),
    ],
)
def test_the_engines_demo_says_what_it_needs(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = CliRunner().invoke(main, ["demo", "--out", str(tmp_path / "out"), *arguments])
    assert result.exit_code == 2
    assert message in result.stderr.splitlines()[-1]


def test_conversations_are_all_different_and_fit(chat_tokenizer: Any) -> None:
    text, chats = setting.conversations(chat_tokenizer, 5, 600)
    assert len(chats) == len({tuple(first) for first, _ in chats}) == 5
    assert all(500 < len(first) <= 600 for first, _ in chats)
    assert all(setting.QUESTIONS[1] in chat_tokenizer.decode(second) for _, second in chats)
    assert chat_tokenizer.decode(chats[4][0])[200:300] in text
    with pytest.raises(ConfigError, match="ask for fewer sessions"):
        setting.conversations(chat_tokenizer, 100_000, 600)
    with pytest.raises(ConfigError, match="32 tokens beside its question"):
        setting.conversations(chat_tokenizer, 2, 120)


def test_where_a_context_was() -> None:
    visit = {"cached_tokens": 320, "prompt_tokens": 400, "host_blocks": 0, "disk_blocks": 0}
    assert where(visit, 32) == "device"
    assert where(visit | {"host_blocks": 3}, 32) == "host"
    assert where(visit | {"host_blocks": 3, "disk_blocks": 1}, 32) == "disk"
    assert where(visit | {"cached_tokens": 96, "disk_blocks": 3}, 32) == "computed"
