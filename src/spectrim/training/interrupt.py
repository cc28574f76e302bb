"""Ctrl-C between two steps instead of within one, so that what is saved is a whole state."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupts:
    """Holds one interrupt back while a step is taken; a second one is not held back."""

    def __init__(self) -> None:
        self._holding = self._pending = False

    def arrive(self, number: int, frame: FrameType | None) -> None:
        """The signal's handler."""
        if self._holding and not self._pending:
            self._pending = True
        else:
            signal.default_int_handler(number, frame)

    @contextmanager
    def held(self) -> Iterator[None]:
        """The block is not interrupted; the interrupt that came meanwhile is raised at its end."""
        self._holding = True
        try:
            yield
        finally:
            self._holding = False
        if self._pending:
            self._pending = False
            raise KeyboardInterrupt


@contextmanager
def interrupts() -> Iterator[Interrupts]:
    """Take SIGINT over, where Python's own handler has it and this is the thread that handles signals."""
    ours = Interrupts()
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield ours
        return
    signal.signal(signal.SIGINT, ours.arrive)
    try:
        yield ours
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
