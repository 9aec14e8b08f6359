"""What a coded context costs a continuation, as `kvtc eval` reckons it: with the model of transformers, no engine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from dynamo_kvtc.codec.artifact import load_artifact
from dynamo_kvtc.codec.pipeline import BlockCodec
from dynamo_kvtc.hf.model import load_model


def predicted_kl(
    model_dir: Path, artifact: Path, texts: Sequence[tuple[list[int], list[int]]], block_tokens: int, point: str
) -> list[float]:  # fmt: skip
    """Mean KL per continuation token of each text."""
    model = load_model(str(model_dir), dtype="float32")
    loaded = load_artifact(artifact)
    codec = BlockCodec(loaded, point)
    out = []
    for context, continuation in texts:
        ids = torch.tensor(continuation)
        k, v = model.prefill(torch.tensor(context))
        records = codec.encode_blocks(k, v, torch.arange(len(context)), block_tokens=block_tokens)
        k2, v2, _ = codec.decode_blocks([r.record for r in records])
        p, q = (
            torch.log_softmax(model.logits(a, b, ids, len(context)).double(), dim=-1) for a, b in ((k, v), (k2, v2))
        )  # fmt: skip
        out.append(float((p.exp() * (p - q)).sum(dim=-1).mean()))
    return out
