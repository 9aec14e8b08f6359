"""Errors of runs in numba, threaded over starts: a calibration on a CPU quantises some 10**10 values.

The same float32 operations in the same order as ``reference``, without its temporary tensors.
"""

# numba's decorators hide the types of what they wrap.
# mypy: disable-error-code="misc"
from __future__ import annotations

import numpy as np
from numba import njit, prange

_TOP_FP8 = np.float32(448.0)
_NORMAL_FP8 = np.float32(2.0**-6)
# Adding and subtracting it rounds to multiples of 2**-9, the step of E4M3's subnormals: a float32 of this size has
# no finer ones.
_SUBNORMAL_FP8 = np.float32(1.5 * 2.0**14)


@njit(parallel=True, cache=True)
def run_errors(x, scale, shift, size, top):
    """Squared error float64 [S] of the runs of ``size`` rows of x that start at rows 0 to S - 1.

    x: float32 [R, n]; scale, shift: float32 [S, n]; top: largest code of an integer type, 0 for fp8.
    """
    count, n = scale.shape
    out = np.empty(count, dtype=np.float64)
    for s in prange(count):
        total = np.zeros(n, dtype=np.float32)
        code = np.empty(n, dtype=np.float32)
        bits = code.view(np.int32)
        divisor = np.empty(n, dtype=np.float32)
        for t in range(n):
            divisor[t] = scale[s, t] if scale[s, t] > 0 else np.float32(np.inf)
        for i in range(s, s + size):
            for t in range(n):
                code[t] = (x[i, t] - shift[s, t]) / divisor[t]
            if top > 0:
                for t in range(n):
                    code[t] = min(max(np.rint(code[t]), np.float32(0.0)), top)
            else:
                _round_fp8(code, bits)
            for t in range(n):
                lost = code[t] * scale[s, t] + shift[s, t] - x[i, t]
                total[t] += lost * lost
        out[s] = np.sum(total.astype(np.float64))
    return out


@njit(cache=True)
def _round_fp8(code, bits):
    for t in range(len(code)):
        code[t] = min(max(code[t], -_TOP_FP8), _TOP_FP8)
        small = (code[t] + _SUBNORMAL_FP8) - _SUBNORMAL_FP8
        if abs(code[t]) < _NORMAL_FP8:
            code[t] = small
        else:
            # To nearest, ties to even, on the 3 mantissa bits that E4M3 keeps of 23.
            bits[t] = (bits[t] + np.int32(0x7FFFF) + ((bits[t] >> np.int32(20)) & np.int32(1))) & np.int32(-0x100000)
