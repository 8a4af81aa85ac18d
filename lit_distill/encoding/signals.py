"""Delays signals that end a process until a piece of work is finished."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def signals_delayed() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list; the first one takes effect on leaving.

    A second signal takes effect at once. Outside the main thread nothing is delayed.

    Raises:
        SystemExit: If a signal was received and its handler does not end the process.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    before = {k: handler for k, handler in handlers.items() if handler is not None}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def receive(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if len(received) > 1:
            restore()
            signal.raise_signal(number)

    for number in before:
        signal.signal(number, receive)
    try:
        yield received
    finally:
        restore()
    if received:
        signal.raise_signal(signal.Signals(received[0]))
        raise SystemExit(128 + received[0])
