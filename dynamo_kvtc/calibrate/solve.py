"""The step size for a target ratio: bits per token fall smoothly with the step, so a bracketed secant finds it."""

from __future__ import annotations

import math
from collections.abc import Callable

from dynamo_kvtc.errors import UnreachableTargetError

TOLERANCE = 0.003
"""Relative: of the ratio that is asked for."""


_SLOPE = 0.8
"""Of log ratio over log step, about: where the search has nothing better."""


def solve_step(
    ratio_of: Callable[[float], float], target: float, low: float, high: float, guess: float | None = None
) -> float:
    """The step at which ``ratio_of`` (rising with the step) gives ``target``, searched in [low, high].

    guess: where to begin (default: in the middle). The ends are only evaluated if the search runs into them: they are
    the dearest to evaluate.
    Raises UnreachableTargetError naming the reachable range.
    """
    ends = (math.log(low), math.log(high))
    bracket = list(ends)
    # In logarithms the curve is close to a line over a decade: a secant, kept inside what is known to bracket it.
    x = min(max(math.log(guess), ends[0]), ends[1]) if guess else sum(ends) / 2
    last: tuple[float, float] | None = None
    for _ in range(60):
        y = math.log(ratio_of(math.exp(x)) / target)
        if abs(y) < TOLERANCE:
            break
        if (y > 0 and x <= ends[0]) or (y < 0 and x >= ends[1]):
            reach = [ratio_of(low), ratio_of(high)]
            raise UnreachableTargetError(
                f"ratio {target:g} cannot be reached with this model and these layer groups; "
                f"reachable is about {math.ceil(reach[0] * 10) / 10:g} to {math.floor(reach[1]):g}"
            )
        bracket[0 if y < 0 else 1] = x
        slope = (y - last[1]) / (x - last[0]) if last and x != last[0] else _SLOPE
        last = (x, y)
        if bracket[1] - bracket[0] < 1e-9:
            break
        x -= y / min(max(slope, 0.2), 3.0)
        if not bracket[0] < x < bracket[1]:
            outside = bracket[0] if x <= bracket[0] else bracket[1]
            # Into an end that was not evaluated yet, or back between two points that were.
            x = outside if outside in ends and outside != last[0] else (bracket[0] + bracket[1]) / 2
    return math.exp(x)


def solve_kl(kl_of: Callable[[float], float], target: float, reachable: tuple[float, float], start: float) -> float:
    """The step at which the measured mean KL is within 3% of ``target``; each evaluation runs the model.

    KL grows with about the square of the step, so a secant in logarithms needs three or four evaluations.
    Raises UnreachableTargetError if the step that would be needed is outside ``reachable``.
    """
    x = [math.log(start)]
    y = [math.log(max(kl_of(start), 1e-12) / target)]
    for _ in range(8):
        if abs(y[-1]) < 0.03:
            break
        slope = (y[-1] - y[-2]) / (x[-1] - x[-2]) if len(x) > 1 and x[-1] != x[-2] else 2.0
        move = -y[-1] / min(max(slope, 0.5), 4.0)
        point = x[-1] + min(max(move, -1.5), 1.5)
        if not math.log(reachable[0]) <= point <= math.log(reachable[1]):
            raise UnreachableTargetError(
                f"KL {target:g} cannot be reached: at step {math.exp(x[-1]):.4g} it is {target * math.exp(y[-1]):.3g} "
                f"and the step must stay within {reachable[0]:.3g} to {reachable[1]:.3g}"
            )
        x.append(point)
        y.append(math.log(max(kl_of(math.exp(point)), 1e-12) / target))
    best = min(range(len(x)), key=lambda i: abs(y[i]))
    return math.exp(x[best])
