"""A tiny chat model on disk."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

TEMPLATE = (
    "{% for m in messages %}<bos>{{ m['role'] }}: {{ m['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<bos>assistant: {% endif %}"
)


@pytest.fixture(scope="session")
def chat_tokenizer(byte_tokenizer: Any) -> Any:
    tokenizer = copy.deepcopy(byte_tokenizer)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="session")
def chat_folder(tmp_path_factory: pytest.TempPathFactory, tiny_module: Any, chat_tokenizer: Any) -> Path:
    folder = tmp_path_factory.mktemp("chat") / "tiny-chat"
    module = tiny_module("llama", torch.bfloat16)
    module.config.max_position_embeddings = 2048
    module.save_pretrained(folder)
    chat_tokenizer.save_pretrained(folder)
    return folder
