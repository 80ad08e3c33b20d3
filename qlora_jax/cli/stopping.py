"""Ends a run after the step at SIGTERM or SIGINT."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

from .processes import gathered, tell

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stop:
    """The signal that a run was sent, if any."""

    sent = 0  # the number of the one that this process was sent; 0 for none
    number = 0  # that of all processes

    def is_due(self) -> bool:
        """Returns whether any process was sent a signal; all must call this."""
        self.number = int(gathered(self.sent).max())
        return self.number > 0

    def end(self) -> None:
        """Exits as the signal would."""
        if self.number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + self.number)


@contextlib.contextmanager
def catch_signals() -> Iterator[Stop]:
    """Catches SIGTERM and SIGINT; a second one ends the process at once."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    old = {n: signal.getsignal(n) for n in _SIGNALS}
    old = {n: handler for n, handler in old.items() if handler != signal.SIG_IGN}
    # A thread reads the signals: Python's handlers wait for the program of a step.
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    thread = threading.Thread(target=_watch, args=(reader, stop), daemon=True)
    thread.start()
    fd = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in old:
        signal.signal(number, lambda *unused: None)
    try:
        yield stop
    finally:
        for number, handler in old.items():
            # None is a handler that was not set by Python.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        signal.set_wakeup_fd(fd)
        os.close(writer)
        thread.join()
        os.close(reader)


def _watch(reader: int, stop: Stop) -> None:
    """Notes the first signal and ends the process at the second."""
    while data := os.read(reader, 1):
        if (number := data[0]) not in _SIGNALS:
            continue
        if stop.sent:
            os._exit(128 + number)
        stop.sent = number
        name = signal.Signals(number).name
        tell(f"\n{name}: the run ends after this step; at once if there is another")
