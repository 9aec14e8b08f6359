"""Where transformers is imported, so that its absence has one clear message."""

from __future__ import annotations

import importlib
from types import ModuleType

from dynamo_kvtc.errors import MissingDependencyError

INSTALL = "pip install dynamo-kvtc[model]"


def transformers() -> ModuleType:
    """The transformers package, its own progress bars off: they would break into ours.

    Raises MissingDependencyError, naming the install command, if it cannot be imported.
    """
    library = _import("transformers")
    library.utils.logging.disable_progress_bar()
    return library


def require_gguf() -> None:
    """Raises MissingDependencyError if gguf or accelerate is absent: transformers reads GGUF files with both."""
    _import("gguf")
    _import("accelerate")


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as exc:
        raise MissingDependencyError(f"this needs the package {name} ({exc}); install it with: {INSTALL}") from exc
