"""A checkpoint on disk as an engine serves it: what must agree with an artifact, without loading the model."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from dynamo_kvtc.errors import ConfigError
from dynamo_kvtc.hf.library import transformers
from dynamo_kvtc.hf.support import check_config, read_rotary, refuse
from dynamo_kvtc.types import DTYPES, KVShape, RopeSpec


def read_config(name_or_path: str) -> Any:
    """The model's config, judged as calibration judges it. Raises ConfigError, UnsupportedModelError."""
    try:
        config = transformers().AutoConfig.from_pretrained(name_or_path)
    except (OSError, ValueError) as exc:
        raise ConfigError(f"model {name_or_path!r} has no readable config: {str(exc).splitlines()[0]}") from exc
    check_config(config)
    return config


def shape_of(config: Any, dtype: str) -> KVShape:
    """The whole model's cache of this dtype. Raises ConfigError for a dtype that is not coded (fp8)."""
    heads = config.num_attention_heads
    return KVShape(
        layers=config.num_hidden_layers,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        dtype=dtype,
    )


def rope_of(config: Any, style: str) -> RopeSpec:
    """RoPE as the config makes it. style: which dims pair up is the architecture's and in no config; calibration has
    proven it. Raises UnsupportedModelError."""
    with torch.device("meta"):
        module = transformers().AutoModelForCausalLM.from_config(config)
    # A meta module has the structure and no numbers: the rotary part is made again.
    for name, part in list(module.named_modules()):
        if isinstance(getattr(part, "inv_freq", None), torch.Tensor):
            try:
                fresh = type(part)(config=config)
            except Exception as exc:
                raise refuse(f"its rotary module {name} cannot be made from the config: {exc}") from exc
            parent = module.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], fresh)
    frequencies, scaling = read_rotary(module)
    return RopeSpec(frequencies, scaling, style)


def folder_of(name_or_path: str) -> Path | None:
    """Where the checkpoint's files are on this machine; None if they are not here."""
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name_or_path, local_files_only=True))
    except Exception:
        return None


def checkpoint_digest(folder: Path, dtype: str) -> str:
    """``hf.model.weights_digest`` of a checkpoint's safetensors files, as loaded in this dtype.

    Raises ConfigError if there are none or they cannot be read.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ConfigError(
            f"{folder} has no safetensors files: set weights to the artifact's digest if you know it fits"
        )
    where: dict[str, Path] = {}
    digest = hashlib.sha256()
    try:
        for path in files:
            with safe_open(path, "pt") as file:
                where.update(dict.fromkeys(file.keys(), path))
        opened = {path: safe_open(path, "pt").__enter__() for path in files}
        for name in sorted(where):
            tensor = opened[where[name]].get_tensor(name)
            if tensor.is_floating_point():
                tensor = tensor.to(DTYPES[dtype])
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    except (OSError, SafetensorError) as exc:
        raise ConfigError(f"{folder}: its weights cannot be read: {exc}") from exc
    return digest.hexdigest()
