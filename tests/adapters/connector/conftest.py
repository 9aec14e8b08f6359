from __future__ import annotations

from pathlib import Path

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


@pytest.fixture
def start(model, tmp_path):
    """``start(name, extra, **options)``: an engine that is on its way; ``.ready()`` waits for it."""
    from tests.adapters.connector.workers import EngineWorker

    made: list[EngineWorker] = []

    def one(name, extra, **options) -> EngineWorker:
        made.append(EngineWorker(tmp_path, name, model, {"extra": extra, **options}))
        return made[-1]

    yield one
    for worker in made:
        worker.end()
