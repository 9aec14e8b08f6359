"""A program: the forms of each kernel that a GPU would compile for ``warm.compile_all``, and which others traffic after
it asks for. Prints those: nothing, if all is well.

No kernel is run, for what a launch looks like depends on sizes alone, and what it would be compiled for is what
Triton's own binder says of its arguments, for an H200. All sizes that kernels measure are 0: records without payload.
"""

from __future__ import annotations

import os
import sys

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.jit import JITFunction, KernelInterface, create_function_from_signature

os.environ["TRITON_INTERPRET"] = "1"  # so that tensors on the CPU are let in
FORMS: dict[str, set[str]] = {}
BACKEND = CUDABackend(GPUTarget("cuda", 90, 32))


class Recording(KernelInterface):
    def __init__(self, fn, **options):
        self._name, self._kernel = fn.__name__, JITFunction(fn, **options)
        self._bind = create_function_from_signature(self._kernel.signature, self._kernel.params, BACKEND)

    def run(self, *args, grid, warmup, **kwargs):
        _, form, options = self._bind(*args, **kwargs)
        told = [f"{name}: {x}" for name, x in zip(self._kernel.arg_names, form, strict=True)]
        FORMS.setdefault(self._name, set()).add("; ".join([*told, str(options)]))


def jit(fn=None, **options):
    return (lambda f: Recording(f, **options)) if fn is None else Recording(fn, **options)


triton.jit, empty = jit, torch.empty
torch.empty = lambda *size, **options: empty(*size, **options).zero_()

from dynamo_kvtc.codec.paged import Blocks, PagedCodec, PagedLimits  # noqa: E402
from dynamo_kvtc.codec.warm import compile_all  # noqa: E402
from dynamo_kvtc.ops import pages  # noqa: E402
from dynamo_kvtc.ops.pages import PagedCache  # noqa: E402
from dynamo_kvtc.ops.pages import triton as kernels  # noqa: E402
from dynamo_kvtc.types import KVShape  # noqa: E402
from tests.builders import make_artifact  # noqa: E402

pages._backend = lambda cache: kernels
TOKENS, BLOCKS, DIM = 16, 67, 64
SHAPE = KVShape(7, 2, DIM, "bfloat16")
GROUPS = ((0, 2), (2, 5), (5, 7))


def main(seed: int) -> None:
    artifact = make_artifact(SHAPE, groups=GROUPS, seed=seed, components=40)[2]
    views = [torch.zeros(BLOCKS, 2, TOKENS, 2 * DIM, dtype=torch.bfloat16) for _ in range(SHAPE.layers)]
    cache = PagedCache.of([x[..., :DIM] for x in views], [x[..., DIM:] for x in views])
    limits = PagedLimits(16 * TOKENS, 24 * TOKENS, 1 << 24)
    codec = PagedCodec(artifact, "fine", cache, None, limits)
    arena = torch.zeros(1 << 26, dtype=torch.uint8)
    compile_all(codec, arena)
    known = {name: set(forms) for name, forms in FORMS.items()}

    generator = np.random.default_rng(seed)
    for count in (1, 2, 3, 5, 8, 16, 17, 24, 25, 47, 48, 49, BLOCKS, *generator.integers(1, BLOCKS, 20)):
        slots = _tokens(torch.from_numpy(generator.permutation(BLOCKS)[:count]) * TOKENS)
        positions = _tokens(torch.from_numpy(generator.integers(0, 3, count)) * TOKENS)
        some = torch.from_numpy(generator.random(len(slots)) < 0.1)
        for exact in (None, some, torch.ones_like(some)):
            encoded = codec.encode(Blocks.uniform(slots, positions, TOKENS, exact), arena, 0)
            encoded.finish()
            order = generator.permutation(count)
            turned = Blocks.uniform(slots.view(-1, TOKENS)[order].reshape(-1), None, TOKENS)
            records = encoded.offsets[order], encoded.sizes[order]
            for by_group in (True, False):
                assert not codec.decode(arena, *records, turned, by_group).finish().any()
    assert known.keys() >= {"_gather_fixed", "_move_exact", "_copy_kernel"}, known.keys()
    for name, forms in FORMS.items():
        for form in sorted(forms - known.get(name, set())):
            print(name, form)


def _tokens(first: torch.Tensor) -> torch.Tensor:
    """Of blocks whose first token is given, all of them."""
    return (first[:, None] + torch.arange(TOKENS)).reshape(-1)


main(int(sys.argv[1]))
