"""What tests with a real vLLM share: the model, artifacts for it, and scenarios played in one process."""

from __future__ import annotations

import fcntl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.engines import require


@pytest.fixture(scope="session")
def model(request) -> Path:
    # Before the model is unpacked for nothing.
    require("vllm")
    return request.getfixturevalue("smollm2_dir")


@pytest.fixture(scope="session")
def any_artifact(model, tmp_path_factory) -> Path:
    from tests.adapters.vllm.artifacts import any_artifact

    return any_artifact(model, tmp_path_factory.mktemp("artifact") / "any.safetensors")


@pytest.fixture(scope="session")
def calibrated(model, tmp_path_factory) -> Path:
    """At 18x, 32x, 34x and 40x; small: what is asked is whether engine and evaluation agree."""
    from tests.adapters.vllm.artifacts import calibrated

    return once(tmp_path_factory, "calibrated", lambda path: calibrated(model, path, 10, (18.0, 32.0, 34.0, 40.0)))


@pytest.fixture(scope="session")
def quickly_calibrated(model, tmp_path_factory) -> Path:
    """At 18x, smaller still: half a minute."""
    from tests.adapters.vllm.artifacts import calibrated

    return once(tmp_path_factory, "quick", lambda path: calibrated(model, path, 30, (18.0,), 2_500, 256, 1))


def checked(result: dict[str, Any]) -> dict[str, Any]:
    """A scenario's."""
    assert "raised" not in result, result["raised"]
    return result


def once(tmp_path_factory: Any, name: str, make: Callable[[Path], None]) -> Path:
    """A file for all processes of this run of tests, made by the first that wants it."""
    base = tmp_path_factory.getbasetemp()
    # Of pytest-xdist each process has a folder in the run's.
    folder = base.parent if base.name.startswith("popen-") else base
    path = folder / f"{name}.safetensors"
    with open(folder / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            make(path)
    return path


@pytest.fixture(scope="session")
def documents(model) -> Callable[[tuple[str, ...]], list[list[int]]]:
    """Token ids of Python's reference, by topic: far from what a small calibration draws."""
    import pydoc_data.topics

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    return lambda topics: [tokenizer(pydoc_data.topics.topics[name])["input_ids"] for name in topics]


@pytest.fixture(scope="session")
def texts(documents) -> Callable[[int], list[tuple[list[int], list[int]]]]:
    """Two contexts of 384 tokens and so many that go on."""
    return lambda tokens: [(x[:384], x[384 : 384 + tokens]) for x in documents(("debugger", "formatstrings"))]


@pytest.fixture(scope="session")
def hybrid(model, tmp_path_factory) -> Path:
    """The model with sliding windows in every other layer: two cache groups."""
    from tests.adapters.vllm.artifacts import hybrid_model

    return hybrid_model(model, tmp_path_factory.mktemp("hybrid"))
