"""SIGTERM as a question that a loop may ask."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def terminated(wanted: bool) -> Iterator[Callable[[], bool]]:
    """Whether SIGTERM came; if so the block ends in ``SystemExit(0)``.

    The previous handler is put back.  In another than the main thread nothing is
    handled, as Python cannot.
    """
    if not wanted or threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    came: list[int] = []
    previous = signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
    try:
        yield lambda: bool(came)
    finally:
        signal.signal(signal.SIGTERM, previous or signal.SIG_DFL)
    if came:
        raise SystemExit(0)
