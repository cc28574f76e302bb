"""Ctrl-C between two steps instead of within one, so that the state that is saved is complete."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType

Delayed = Callable[[], AbstractContextManager[None]]


@contextmanager
def interrupts() -> Iterator[Delayed]:
    """Gives a block that delays one SIGINT to its end; a second one is not delayed.

    Only where Python's own handler has SIGINT and this is the thread that handles signals.
    """
    delaying = pending = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal pending
        if pending or not delaying:
            signal.default_int_handler(number, frame)
        pending = True

    @contextmanager
    def delayed() -> Iterator[None]:
        nonlocal delaying, pending
        delaying = True
        try:
            yield
        finally:
            delaying = False
        if pending:
            pending = False
            raise KeyboardInterrupt

    main = threading.current_thread() is threading.main_thread()
    replaceable = main and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if replaceable:
        signal.signal(signal.SIGINT, handle)
    try:
        yield delayed
    finally:
        if replaceable:
            signal.signal(signal.SIGINT, signal.default_int_handler)
