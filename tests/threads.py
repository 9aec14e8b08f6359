"""Several threads at one thing."""

from __future__ import annotations

import threading
from collections.abc import Callable


def hammer(work: Callable[[int], None], threads: int, seconds: float = 60.0) -> None:
    """``work(0)`` to ``work(threads - 1)`` at once. Raises what the first of them raised; fails if one does not end."""
    raised: list[BaseException] = []

    def run(number: int) -> None:
        try:
            work(number)
        except BaseException as exc:
            raised.append(exc)

    running = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join(seconds)
    if raised:
        raise raised[0]
    assert not any(thread.is_alive() for thread in running), f"threads have not ended in {seconds:.0f} s"
