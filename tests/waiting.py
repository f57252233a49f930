"""Waiting for what has no event of its own: it is looked at again and again, until it is so or it is too late."""

from __future__ import annotations

from collections.abc import Callable

import trio


async def until(condition: Callable[[], object], seconds: float = 20.0, *, what: str = "") -> float:
    """Until the condition holds; the seconds that it took.  what: for the error."""
    began = trio.current_time()
    with trio.move_on_after(seconds):
        while not condition():
            await trio.sleep(0.002)
        return trio.current_time() - began
    raise AssertionError(f"waited {seconds:g} s: {what}")
