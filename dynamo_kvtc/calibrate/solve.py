"""The step size for a target ratio: bits per token fall smoothly with the step, so a bracketed secant finds it."""

from __future__ import annotations

import math
from collections.abc import Callable

from dynamo_kvtc.errors import UnreachableTargetError

TOLERANCE = 0.003
"""Relative: of the ratio that is asked for."""


def solve_step(
    ratio_of: Callable[[float], float], target: float, low: float, high: float, guess: float | None = None
) -> float:
    """The step at which ``ratio_of`` (rising with the step) gives ``target``, searched in [low, high].

    Raises UnreachableTargetError naming the reachable range.
    """
    reach = [ratio_of(low), ratio_of(high)]
    if not reach[0] <= target <= reach[1]:
        raise UnreachableTargetError(
            f"ratio {target:g} cannot be reached with this model and these layer groups; "
            f"reachable is about {math.ceil(reach[0] * 10) / 10:g} to {math.floor(reach[1]):g}"
        )
    # In logarithms the curve is close to a line over a decade; over the whole range it is not, so halve when in doubt.
    x = [math.log(low), math.log(high)]
    y = [math.log(r / target) for r in reach]
    point = math.log(guess) if guess and low < guess < high else (x[0] + x[1]) / 2
    for _ in range(60):
        value = math.log(ratio_of(math.exp(point)) / target)
        if abs(value) < TOLERANCE:
            break
        side = 0 if value < 0 else 1
        x[side], y[side] = point, value
        secant = x[0] - y[0] * (x[1] - x[0]) / (y[1] - y[0])
        margin = 0.02 * (x[1] - x[0])
        # The secant alone crawls where the curve bends; every step must cut the bracket.
        point = secant if x[0] + margin < secant < x[1] - margin and x[1] - x[0] < 3 else (x[0] + x[1]) / 2
    return math.exp(point)


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
