"""An artifact, and the model it is to serve: refused here as an engine would refuse it at start."""

from __future__ import annotations

from dynamo_kvtc.codec.artifact import Artifact, load_artifact
from dynamo_kvtc.doctor.line import Line, ok, problem
from dynamo_kvtc.errors import KvtcError, MissingDependencyError
from dynamo_kvtc.hf.checkpoint import checkpoint_digest, folder_of, read_config, rope_of, shape_of
from dynamo_kvtc.types import ModelIdentity


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
    shape = artifact.manifest.shape
    try:
        config = read_config(model)
        folder = folder_of(model)
        if folder is None:
            return problem("model", f"the files of {model!r} are not on this machine", "name a folder with the model")
        identity = ModelIdentity(
            model_id=model,
            revision=getattr(config, "_commit_hash", None) or "",
            weights_digest=checkpoint_digest(folder, shape.dtype),
            architecture=(getattr(config, "architectures", None) or [artifact.manifest.model.architecture])[0],
        )
        artifact.check_model(identity, shape_of(config, shape.dtype), rope_of(config, artifact.manifest.rope.style))
    except MissingDependencyError as exc:
        return problem("model", "it cannot be looked at", str(exc))
    except KvtcError as exc:
        return problem("model", str(exc), f"kvtc calibrate --model {model} --out NEW.safetensors")
    return ok("model", f"{model} is the one the artifact was made for ({shape.dtype} cache)")
