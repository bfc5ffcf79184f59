"""Ctrl-C and SIGTERM, which stop a run at a moment when no finished task is lost."""

import contextlib
import functools
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

_SAME = 1.0  # seconds after a signal in which another one is ignored: some launchers send each signal twice


class Terminated(KeyboardInterrupt):
    """Raised when the process receives SIGTERM."""


def terminate(*_: Any) -> None:
    """Handle SIGTERM, which batch systems send to end a process, like Ctrl-C."""
    raise Terminated


class Stops:
    """Lets a stop wait while finished tasks are only in memory.

    Args:
      tell: called with a message when a stop has to wait.

    Attributes:
      asked: whether a stop waits.
    """

    def __init__(self, tell: Callable[[str], Any] = lambda text: None):
        self.asked = False
        self._tell, self._held, self._stop, self._last = tell, False, lambda: None, -math.inf

    def hold(self) -> None:
        """From now on, let the first stop wait."""
        self._held = True

    def release(self) -> None:
        """From now on, let no stop wait. Call the handler of one that has waited, which raises its exception."""
        self._held = False  # first, so that no signal is lost
        if self.asked:
            self.asked = False
            self._stop()

    def receive(self, handler: Callable[[int, Any], Any], number: int, frame: Any) -> None:
        """Handle a signal: call its handler now, or in `release` if this is the first stop and it has to wait."""
        now = time.monotonic()
        if now - self._last < _SAME:
            return
        self._last = now
        if self.asked or not self._held:
            handler(number, frame)
            return
        self.asked, self._stop = True, functools.partial(handler, number, frame)
        self._tell("stopping when the current task ends; interrupt again to stop at once")


@contextlib.contextmanager
def held_back(tell: Callable[[str], Any]) -> Iterator[Stops]:
    """Let Ctrl-C, and SIGTERM if `terminate` handles it, wait while the `Stops` are held.

    A program's own handlers are left as they are, and so is everything in other threads, which receive no signals.

    Args:
      tell: as in `Stops`.

    Example:
      >>> with held_back(print) as stops, contextlib.suppress(KeyboardInterrupt):
      ...     stops.hold()
      ...     signal.raise_signal(signal.SIGINT)
      ...     print("saved")
      ...     stops.release()
      ...     print("not reached")
      stopping when the current task ends; interrupt again to stop at once
      saved
    """
    stops = Stops(tell)
    handlers = {}
    if threading.current_thread() is threading.main_thread():
        ours = (signal.default_int_handler, terminate)
        found = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        handlers = {number: handler for number, handler in found.items() if handler in ours}
    try:
        for number, handler in handlers.items():
            signal.signal(number, functools.partial(stops.receive, handler))
        yield stops
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
