"""The kernels compile for a real GPU where there is none, and round every float32 operation on its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from dynamo_kvtc.ops.pages import triton as kernels

STRIDES = ["stride_block", "stride_head", "stride_token"]
WIDTHS = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "i16"}
POINTERS = {
    "addresses": "i64", "slots": "i64", "energy": "i64", "base": "i64", "wide_slot": "i32", "wide_heads": "i32",
    "index": "i32", "count": "i32", "groups": "i32", "low": "i8", "high": "i8", "saturated": "u8", "keep": "u8",
    "buffer": "u8", "table": "i64", "group_of": "i32",
}

def ptx(name, **constants):
    kernel = getattr(kernels, name)
    kinds = {}
    for argument in kernel.arg_names:
        if argument in constants:
            kinds[argument] = "constexpr"
        elif argument in POINTERS:
            kinds[argument] = "*" + POINTERS[argument]
        elif argument in ("cos", "sin", "mean", "gain", "rows"):
            kinds[argument] = "*fp32"
        else:
            kinds[argument] = "fp32" if argument == "scale" else "i64" if argument in STRIDES else "i32"
    aligned = [a for a, kind in kinds.items() if kind[0] == "*" or a in STRIDES or a.startswith("ld_")]
    attributes = {(kernel.arg_names.index(a),): [["tt.divisibility", 16]] for a in aligned}
    source = ASTSource(kernel, kinds, constants, attributes)
    made = compile(source, GPUTarget("cuda", 90, 32), {"num_warps": 4, "enable_fp_fusion": False})
    print("KERNEL", name)
    print(made.asm["ptx"])

common = {"N": 16, "TABLED": False, "PAIRS": 64, "D": 128, "INTERLEAVED": False, "ALIGN": 16, "BLOCK_T": 8}
common["BLOCK_D"] = 128
ptx("_gather_fixed", **common, ALL_HEADS=8, HEADS=2, KIND=2)
ptx("_gather_fixed", **{**common, "D": 96, "PAIRS": 20, "INTERLEAVED": True}, ALL_HEADS=3, HEADS=1, KIND=0)
ptx("_gather_fixed", **{**common, "TABLED": True}, ALL_HEADS=8, HEADS=2, KIND=2)
ptx("_scatter_rows", **common, HEADS=8, KIND=2, TOP=torch.finfo(torch.bfloat16).max)
ptx("_scatter_rows", **{**common, "TABLED": True}, HEADS=8, KIND=2, TOP=torch.finfo(torch.bfloat16).max)
ptx("_scatter_rows", **common, HEADS=8, KIND=1, TOP=torch.finfo(torch.float16).max)
# Integers that are 1 become constants.
ptx("_gather_fixed", **common, ALL_HEADS=1, HEADS=1, KIND=1, layers=1, tokens=1, wide=1, first_layer=1)
ptx("_scatter_rows", **common, HEADS=1, KIND=0, TOP=torch.finfo(torch.float32).max, layers=1, tokens=1)
for to_pages in (False, True):
    units = {"UNITS": 128, "UNITS_PER_VALUE": 1, "BLOCK_R": 16, "BLOCK_U": 128}
    ptx("_move_exact", N=16, TABLED=to_pages, HEADS=8, TO_PAGES=to_pages, **units)
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> list[str]:
    pytest.importorskip("triton")
    # A file, as Triton reads a kernel's source; another process, as in this one kernels are interpreted.
    root = Path(__file__).parents[2]
    # Not out of the user's cache: the compiler itself is what is asked.
    cache = str(tmp_path_factory.mktemp("cache"))
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": cache}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, cwd=root, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split("KERNEL ")[1:]


def test_no_multiply_add_is_fused_and_no_subnormal_flushed(compiled):
    assert len(compiled) == 10
    for ptx in compiled:
        found = set(re.findall(r"\b(?:fma|mad|\w+(?:\.\w+)*\.ftz)[.\w]*", ptx))
        assert not {name for name in found if "f32" in name}, ptx.split()[0]


def test_whole_rows_are_read_16_bytes_at_a_time(compiled):
    for ptx in compiled[:1]:
        assert len(re.findall(r"ld\.global\.v4\.b32", ptx)) >= 8
