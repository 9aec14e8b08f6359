"""A tiny model on disk, an artifact made for it, and text: what the tests of evaluate and cli share."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dynamo_kvtc.calibrate.narrow import quantise_narrow
from dynamo_kvtc.codec.artifact import FORMAT_VERSION, Manifest, Point, save_artifact
from dynamo_kvtc.codec.channels import join_rows
from dynamo_kvtc.codec.kvtc_point import WIDE_STEP
from dynamo_kvtc.ops import project
from dynamo_kvtc.ops.rope import remove_rope
from tests.builders import class_scales, class_tensors, lane_tensors

STEPS = (("8", 0.05), ("30", 0.6), ("kl=0.005", 0.2))
WIDE_BELOW = 0.5
"""Below this step all components are wide: there are so few channels that 8-bit ones would leak into each other."""
WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "seven", "grey", "owls")


@dataclass(frozen=True)
class Tiny:
    """folder: what --model takes; model: the same, loaded; artifact: a kvtc artifact for it; text: a text file."""

    folder: Path
    model: Any
    artifact: Path
    text: Path

    def sequences(self, count: int, tokens: int) -> list[torch.Tensor]:
        ids = torch.tensor(self.model.tokenizer(self.text.read_text())["input_ids"])
        return [ids[i * tokens : (i + 1) * tokens] for i in range(count)]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, tiny_module: Any, byte_tokenizer: Any) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("tiny"), tiny_module("llama"), byte_tokenizer)


@pytest.fixture(scope="session")
def tiny_bf16(tmp_path_factory: pytest.TempPathFactory, tiny_module: Any, byte_tokenizer: Any) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("tiny16"), tiny_module("llama", torch.bfloat16), byte_tokenizer)


def make_tiny(root: Path, module: Any, tokenizer: Any) -> Tiny:
    from dynamo_kvtc.hf.model import load_model

    folder = root / "tiny-model"
    module.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    text = root / "words.txt"
    text.write_text(words(9000))
    model = load_model(str(folder))
    artifact = root / "tiny.safetensors"
    write_artifact(artifact, model)
    return Tiny(folder, model, artifact, text)


def words(count: int, seed: int = 5) -> str:
    draw = random.Random(seed)
    return " ".join(draw.choice(WORDS) for _ in range(count))


def passages(path: Path, count: int) -> Path:
    path.write_text("".join(json.dumps({"text": words(16, seed)}) + "\n" for seed in range(count)))
    return path


def write_artifact(path: Path, model: Any, steps: tuple[tuple[str, float], ...] = STEPS, tp_size: int = 1) -> None:
    """Channels scaled to unit variance and a random orthonormal basis of full rank, in two layer groups."""
    shape, generator = model.shape, np.random.default_rng(3)
    ids = torch.from_numpy(generator.integers(0, 256, 500))
    k, v = model.prefill(ids)
    k = remove_rope(k.float(), torch.arange(500), model.rope)
    heads = shape.kv_heads // tp_size
    tensors: dict[str, torch.Tensor] = {}
    groups = ((0, 1), (1, shape.layers))
    for rank in range(tp_size):
        mine = slice(heads * rank, heads * (rank + 1))
        for g, (start, end) in enumerate(groups):
            rows = join_rows(k[start:end, mine], v[start:end, mine].float())
            channels = rows.shape[1]
            basis, _ = np.linalg.qr(generator.standard_normal((channels, channels)))
            name = f"rank{rank}.group{g}"
            tensors[f"{name}.mean"] = rows.mean(dim=0)
            tensors[f"{name}.weight"] = 1 / (rows.std(dim=0) + 1e-3)
            columns = torch.from_numpy(basis)
            entries, scale, exponent = quantise_narrow(columns.float(), torch.ones(channels))
            tensors[f"{name}.reach"] = (rows - rows.mean(dim=0)).abs().amax(dim=0) * tensors[f"{name}.weight"]
            tensors[f"{name}.wide"] = project.quantise_basis(columns)
            tensors[f"{name}.narrow"], tensors[f"{name}.scale"] = entries, scale
            tensors[f"{name}.exponent"] = torch.tensor([exponent], dtype=torch.int32)
            for p, (_, step) in enumerate(steps):
                nearest = np.abs(np.log(class_scales(8.0 / step)) - np.log(0.7 / step)).argmin()
                classes = np.full(channels, int(nearest), dtype=np.uint8)
                tensors[f"{name}.point{p}.classes"] = torch.from_numpy(classes)
                wide = channels if step < WIDE_BELOW else min(WIDE_STEP, channels)
                tensors[f"{name}.point{p}.wide"] = torch.tensor([wide], dtype=torch.int32)
                lane = lane_tensors(generator, np.full(channels, 1 / step), classes, 0.0, step, 0.5, 0.0)
                tensors |= {f"{name}.point{p}.{key}": value for key, value in lane.items()}
        for p, (_, step) in enumerate(steps):
            shared = class_tensors(step, 0.5, 0.0)
            tensors |= {f"rank{rank}.point{p}.{key}": value for key, value in shared.items()}
    points = tuple(Point(name, step, 4.0, 0.01 if name == "8" else None) for name, step in steps)
    manifest = Manifest(
        FORMAT_VERSION, "kvtc", model.identity, shape, model.rope, tp_size, 16, groups, points, {"tokens": 500}
    )
    save_artifact(path, manifest, tensors)
