"""Synchronizes the processes of a run, and stops them between steps on a signal."""

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

from ..printable import printable_lines
from ..train.loop import Callback, Training
from .train_config import TrainConfig

_HEARTBEAT = 60  # seconds without a heartbeat after which the other processes stop
_MAX_BYTES = 1 << 14  # the maximum size of a text to broadcast
_SHARED_SECONDS = 60  # the time in which all processes must see a new file
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def start_distributed(config: TrainConfig) -> None:
    """Connects the processes of a distributed run."""
    if not config.distributed or jax.distributed.is_initialized():
        return
    settings: dict[str, Any] = {}
    if isinstance(config.distributed, str):
        address, count, index = config.distributed.split(",")
        settings = dict(
            coordinator_address=address, num_processes=int(count), process_id=int(index)
        )
    try:
        jax.distributed.initialize(
            **settings,
            heartbeat_timeout_seconds=_HEARTBEAT,
            shutdown_timeout_seconds=_HEARTBEAT,
        )
    except ValueError as error:
        raise ValueError(
            "`distributed` must have the address of the first process, the number of "
            "processes and the index of this one if JAX cannot detect the processes of "
            f"the job, such as host0:9876,4,0. Got {config.distributed}. {error}"
        ) from error
    if threading.current_thread() is threading.main_thread():
        # JAX's own handler of SIGTERM waits for a step that this run may never reach.
        # Setting Python's handler again replaces it. `None` stands for a C handler.
        handler = signal.getsignal(signal.SIGTERM)
        signal.signal(signal.SIGTERM, handler or signal.SIG_DFL)


def is_first() -> bool:
    """Returns whether this is process 0, which writes files and prints."""
    return jax.process_index() == 0


def log(*lines: str) -> None:
    """Prints lines on stderr, in the first process only."""
    if is_first():
        print(*map(printable_lines, lines), sep="\n", file=sys.stderr)


def broadcast_text(text: str = "") -> str:
    """Returns the first process's text in all processes, once all of them call this."""
    buffer = np.zeros(_MAX_BYTES, np.uint8)
    data = np.frombuffer(text.encode()[: _MAX_BYTES - 1], np.uint8)
    buffer[: len(data)] = data
    buffer = multihost_utils.broadcast_one_to_all(buffer)
    return buffer.tobytes().rstrip(b"\0").decode("utf-8", "ignore")


def gather_numbers(number: int) -> np.ndarray:
    """Returns the numbers of all processes, in each of them: shape `[processes]`."""
    return multihost_utils.process_allgather(np.int32(number))


@contextlib.contextmanager
def all_or_none() -> Iterator[None]:
    """Runs a block in all processes; if it fails in one, it fails in all.

    The block must not wait for other processes.
    """
    has_failed = True
    try:
        yield
        has_failed = False
    finally:
        # Every process gets here, even if its block raised; otherwise the others hang.
        failed = np.flatnonzero(gather_numbers(has_failed)).tolist()
    if failed:
        raise ValueError(f"Processes {failed} failed; see their logs.")


@contextlib.contextmanager
def only_in_first(context: contextlib.AbstractContextManager[object]) -> Iterator[None]:
    """Enters a context in the first process; if that fails, it fails in all."""
    with contextlib.ExitStack() as stack:
        with all_or_none():
            if is_first():
                stack.enter_context(context)
        yield


def check_shared(folder: pathlib.Path) -> None:
    """Raises ValueError in all processes unless all of them see the same folder."""
    if jax.process_count() == 1:
        return
    file = folder / broadcast_text(f".shared-{secrets.token_hex(8)}")
    if is_first():
        file.touch()
    broadcast_text()  # a barrier: the file now exists
    deadline = time.monotonic() + _SHARED_SECONDS
    while not (exists := file.exists()) and time.monotonic() < deadline:
        time.sleep(0.5)  # a network file system may show new files late
    has_file = gather_numbers(exists)
    if is_first():
        file.unlink()
    if missing := np.flatnonzero(has_file == 0).tolist():
        raise ValueError(
            f"`out` must be a folder that all processes share. Processes {missing} do "
            f"not see the files that process 0 writes. Got {folder}."
        )


class StopAtSignal(Callback):
    """Ends a run after the step in which one of its processes got a signal."""

    local_number = 0  # the number of the first signal to this process; 0 for none
    number = 0  # the largest `local_number` of all processes; set by `is_due`

    def is_due(self) -> bool:
        """Sets `number` and returns whether it is set; all processes must call this."""
        self.number = int(gather_numbers(self.local_number).max())
        return self.number > 0

    def on_step(self, training: Training) -> None:
        """Ends the run in all processes if one of them got a signal."""
        training.is_over |= self.is_due()

    def raise_exception(self) -> None:
        """Raises KeyboardInterrupt for SIGINT, and SystemExit for SIGTERM."""
        if self.number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + self.number)


@contextlib.contextmanager
def catch_signals() -> Iterator[StopAtSignal]:
    """Catches SIGTERM and SIGINT; a second signal ends the process at once."""
    stop = StopAtSignal()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread may set handlers
        return
    handlers = {number: signal.getsignal(number) for number in _SIGNALS}
    # Signals that are ignored stay ignored, as in background jobs of a shell.
    handlers = {k: old for k, old in handlers.items() if old != signal.SIG_IGN}
    # Python runs handlers in the main thread, only once the running step returns. A
    # thread that reads the numbers of signals from a pipe reacts immediately.
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    thread = threading.Thread(target=_watch, args=(reader, stop), daemon=True)
    thread.start()
    old_wakeup_fd = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in handlers:
        signal.signal(number, lambda *unused: None)
    try:
        yield stop
    finally:
        for number, handler in handlers.items():
            # `None` stands for a handler that was not set by Python.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        signal.set_wakeup_fd(old_wakeup_fd)
        os.close(writer)  # ends the thread
        thread.join()
        os.close(reader)


def _watch(reader: int, stop: StopAtSignal) -> None:
    """Records the first signal, and ends the process at the second."""
    while data := os.read(reader, 1):
        if (number := data[0]) not in _SIGNALS:
            continue
        if stop.local_number:
            os._exit(128 + number)
        stop.local_number = number
        name = signal.Signals(number).name
        log(f"\n{name}: the run stops after this step. Repeat the signal to stop now.")
