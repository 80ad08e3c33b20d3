"""The program `qlora-jax`, which a signal ends at any time, with one line.

The status is 130 after Ctrl-C and 143 after SIGTERM. This module is outside of the
package, whose import takes seconds, so that it can handle signals before that import
starts.
"""

import atexit
import os
import signal
import sys
from importlib import metadata


def process() -> None:
    """Runs the program, for which signals are safe from here until Python exits."""
    # A shell without job control starts background jobs that ignore SIGINT. `train`
    # replaces these handlers by its own, which save a state.
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, end)
    # Exit handlers run in reverse order, so this one runs last. The status is decided
    # by then, and Python is about to remove its handlers.
    atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
    if sys.argv[1:] == ["--version"]:  # needs no JAX, whose import takes seconds
        print("qlora-jax", metadata.version("qlora-jax"))
        return
    from qlora_jax.llm.cli.main import run_program

    run_program()


def end(number: int, frame: object) -> None:
    """Ends the process at SIGINT or SIGTERM, with the status that shells expect.

    This does not raise KeyboardInterrupt, because imports, callbacks and `__del__` lose
    exceptions or replace them. Files are written in temporary folders until they are
    complete, and those folders are deleted here.
    """
    del frame
    signal.signal(number, signal.SIG_IGN)
    files = sys.modules.get("qlora_jax.io.files")
    # The module may be imported in part.
    getattr(files, "delete_unfinished", lambda: None)()
    newline = "\n" if os.isatty(2) else ""  # after ^C, or a progress bar
    reason = "interrupted" if number == signal.SIGINT else "terminated"
    os.write(2, f"{newline}qlora-jax: {reason}\n".encode())
    os._exit(128 + number)


if __name__ == "__main__":
    process()
