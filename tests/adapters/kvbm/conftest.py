from __future__ import annotations

from pathlib import Path

import pytest

from tests.engines import VLLM_KVBM, require
from tests.store.conftest import folder

__all__ = ["folder"]


@pytest.fixture(scope="session")
def model(request) -> Path:
    # Before the model is unpacked for nothing.
    require("stub", f"kvbm-{VLLM_KVBM}", "vllm")
    return request.getfixturevalue("smollm2_dir")
