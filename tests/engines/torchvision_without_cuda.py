"""Lets torchvision of PyPI, a CUDA build, be imported beside torch for the CPU.

Its compiled part cannot load there, and ``import torchvision`` then stops at the kernels that it describes. Their
schemas are declared here just before that import, without kernels: serving text never calls them. Installed beside a
.pth line that imports it; torch itself is imported only when torchvision is.
"""

from __future__ import annotations

import importlib.abc
import sys
from typing import Any


class _BeforeTorchvision(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name != "torchvision":
            return
        sys.meta_path.remove(self)
        import torch

        # Where torch is a CUDA build, too, the compiled part loads, and declares them itself.
        if torch.version.cuda is None:
            for operator in ("nms", "qnms"):
                torch.library.define(
                    f"torchvision::{operator}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                )


sys.meta_path.insert(0, _BeforeTorchvision())
