from __future__ import annotations

import pytest


@pytest.fixture
def start(model, tmp_path):
    """``start(name, extra, **options)``: an engine that is on its way; ``.ready()`` waits for it. of: another model."""
    from tests.adapters.connector.workers import EngineWorker

    made: list[EngineWorker] = []

    def one(name, extra, of=None, **options) -> EngineWorker:
        made.append(EngineWorker(tmp_path, name, of or model, {"extra": extra, **options}))
        return made[-1]

    yield one
    for worker in made:
        worker.end()
