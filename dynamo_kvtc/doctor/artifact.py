"""An artifact, and the model it is to serve: refused here as an engine would refuse it at start."""

from __future__ import annotations

from dynamo_kvtc.adapters.engine_model import model_of
from dynamo_kvtc.codec.artifact import Artifact, load_artifact
from dynamo_kvtc.doctor.line import Line, ok, problem
from dynamo_kvtc.errors import ConfigError, KvtcError, MissingDependencyError
from dynamo_kvtc.tier.options import WEIGHTS


def load(path: str) -> tuple[Line, Artifact | None]:
    try:
        artifact = load_artifact(path)
    except KvtcError as exc:
        return problem("artifact", str(exc), "name a file made by `kvtc calibrate`"), None
    m = artifact.manifest
    found = (
        f"profile {m.profile}, points {', '.join(p.name for p in m.points)}, {m.shape.dtype} cache of "
        f"{m.model.model_id}, {m.tp_size} tensor-parallel rank(s)"
    )
    return ok("artifact", found), artifact


def matches(artifact: Artifact, model: str) -> Line:
    """Reads all of the model's weights: their digest is what binds an artifact."""
    dtype = artifact.manifest.shape.dtype
    try:
        artifact.check_model(*model_of(model, dtype, WEIGHTS, artifact))
    except MissingDependencyError as exc:
        return problem("model", "it cannot be looked at", str(exc))
    except ConfigError as exc:
        return problem("model", str(exc), "name a folder with the model")
    except KvtcError as exc:
        return problem("model", str(exc), f"kvtc calibrate --model {model} --out NEW.safetensors")
    return ok("model", f"{model} is the one the artifact was made for ({dtype} cache)")
