"""Keeps the processes of a run in step, and ends them after a step at a signal."""

import contextlib
import os
import pathlib
import secrets
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from .train_config import TrainConfig

_HEARTBEAT = 60  # seconds without a sign of a process until the others end
_TEXT = 1 << 14  # bytes of a text that the first process tells the others
_SEEN = 60  # seconds in which all processes must see a file
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def start(config: TrainConfig) -> None:
    """Connects the processes of a distributed run."""
    if not config.distributed or jax.distributed.is_initialized():
        return
    try:
        jax.distributed.initialize(
            config.coordinator_address,
            config.num_processes,
            config.process_id,
            heartbeat_timeout_seconds=_HEARTBEAT,
            shutdown_timeout_seconds=_HEARTBEAT,
        )
    except ValueError as error:
        raise ValueError(
            "`coordinator_address`, `num_processes` and `process_id` must be given "
            f"where JAX does not find the processes of a job. {error}"
        ) from error
    if threading.current_thread() is threading.main_thread():
        # JAX's own handler waits for a step that this run does not wait for.
        handler = signal.getsignal(signal.SIGTERM)
        signal.signal(signal.SIGTERM, handler or signal.SIG_DFL)


def is_first() -> bool:
    """Returns whether this is process 0, which writes files and prints."""
    return jax.process_index() == 0


def tell(*lines: str) -> None:
    """Prints lines on stderr, in the first process only."""
    if is_first():
        print(*lines, sep="\n", file=sys.stderr)


def agree(text: str = "") -> str:
    """Returns the first process's text in all of them."""
    told = np.zeros(_TEXT, np.uint8)
    data = np.frombuffer(text.encode()[: _TEXT - 1], np.uint8)
    told[: len(data)] = data
    told = multihost_utils.broadcast_one_to_all(told)
    return told.tobytes().rstrip(b"\0").decode("utf-8", "ignore")


def gathered(number: int) -> np.ndarray:
    """Returns the numbers of all processes, in each of them: shape `[processes]`."""
    return multihost_utils.process_allgather(np.int32(number))


@contextlib.contextmanager
def all_or_none() -> Iterator[None]:
    """Runs a block in all processes; if it fails in one, it fails in all.

    The block must not wait for other processes.
    """
    failed = True
    try:
        yield
        failed = False
    finally:
        # All processes come here, also those that raise: else the others would wait.
        others = np.flatnonzero(gathered(failed)).tolist()
    if others:
        raise ValueError(f"processes {others} failed; they say why.")


@contextlib.contextmanager
def only_in_first(context: contextlib.AbstractContextManager[Any]) -> Iterator[None]:
    """Enters a context in the first process; if that fails, it fails in all."""
    with contextlib.ExitStack() as stack:
        with all_or_none():
            if is_first():
                stack.enter_context(context)
        yield


def check_shared(folder: pathlib.Path) -> None:
    """Raises ValueError, in all processes, if they do not share a folder."""
    if jax.process_count() == 1:
        return
    file = folder / agree(f".shared-{secrets.token_hex(8)}")
    if is_first():
        file.touch()
    agree()
    end = time.monotonic() + _SEEN
    while not (sees := file.exists()) and time.monotonic() < end:
        time.sleep(0.5)  # a network file system may be late
    seen = gathered(sees)
    if is_first():
        file.unlink()
    if blind := np.flatnonzero(seen == 0).tolist():
        raise ValueError(
            f"`out` must be a folder that all processes share. Got {folder}, in which "
            f"processes {blind} do not see what process 0 writes."
        )


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
