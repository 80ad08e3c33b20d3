"""The program `qlora-jax`, which Ctrl-C ends at any time, with one line and status 130.

This module is outside of the package, whose import takes seconds, so that it can handle
Ctrl-C before that import starts.
"""

import atexit
import os
import signal
import sys
import threading

# Windows has no signal masks.
change_mask = getattr(signal, "pthread_sigmask", lambda *arguments: None)


def process() -> None:
    """Runs the program, for which SIGINT is safe from here until Python exits."""
    # A shell without job control starts background jobs that ignore SIGINT.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, end)
    # `restart_with_huge_pages` blocks SIGINT until the second process gets here.
    change_mask(signal.SIG_UNBLOCK, [signal.SIGINT])
    # Exit handlers run in reverse order, so this one runs last. The status is decided
    # by then, and Python is about to remove its handlers.
    atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
    # Threads inherit the mask of the thread that starts them. Importing with SIGINT
    # blocked makes sure that no thread of a library receives it, so that
    # `restart_with_huge_pages` can block it everywhere. Meanwhile, a thread that is
    # started before receives it.
    is_imported = threading.Event()
    receiver = threading.Thread(target=is_imported.wait, daemon=True)
    receiver.start()
    change_mask(signal.SIG_BLOCK, [signal.SIGINT])
    from qlora_jax.llm.cli.main import run_program

    is_imported.set()
    receiver.join()
    change_mask(signal.SIG_UNBLOCK, [signal.SIGINT])
    run_program()


def end(*unused: object) -> None:
    """Ends the process at SIGINT.

    This does not raise KeyboardInterrupt, because imports, callbacks and `__del__` lose
    exceptions or replace them. Files are written in temporary folders until they are
    complete, and those folders are deleted here.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    files = sys.modules.get("qlora_jax.io.files")
    # The module may be imported in part.
    getattr(files, "delete_unfinished", lambda: None)()
    newline = "\n" if os.isatty(2) else ""  # after ^C, or a progress bar
    os.write(2, f"{newline}qlora-jax: interrupted\n".encode())
    os._exit(128 + signal.SIGINT)


if __name__ == "__main__":
    process()
