"""The program `qlora-jax`, which Ctrl-C ends with one line and status 130 at any time.

It is not in the package, whose import takes seconds: the handler is there before it.
"""

import atexit
import os
import signal
import sys
import threading

# Windows has no masks.
change_mask = getattr(signal, "pthread_sigmask", lambda *arguments: None)


def process() -> None:
    """Runs the program, for which SIGINT is safe from here to the end of Python."""
    # A shell without job control starts background jobs that ignore SIGINT.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, end)
    change_mask(signal.SIG_UNBLOCK, [signal.SIGINT])  # blocked by `restart_with_huge_pages`
    # Called last, when the status is decided: Python then takes the handler away.
    atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
    # Threads that libraries start block SIGINT as the thread that imports them does, so
    # that `restart_with_huge_pages` can block it everywhere. Until then another thread gets it.
    imported = threading.Event()
    thread = threading.Thread(target=imported.wait, daemon=True)
    thread.start()
    change_mask(signal.SIG_BLOCK, [signal.SIGINT])
    from qlora_jax.cli.main import process as run

    imported.set()
    thread.join()
    change_mask(signal.SIG_UNBLOCK, [signal.SIGINT])
    run()


def end(*unused: object) -> None:
    """Ends the process at SIGINT.

    No KeyboardInterrupt is raised: imports, callbacks and `__del__` lose exceptions or
    turn them into others. What is written is in temporary folders until it is whole.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    files = sys.modules.get("qlora_jax.io.files")
    # It may be half imported.
    getattr(files, "delete_unfinished", lambda: None)()
    newline = "\n" if os.isatty(2) else ""  # after ^C, or a progress bar
    os.write(2, f"{newline}qlora-jax: interrupted\n".encode())
    os._exit(128 + signal.SIGINT)


if __name__ == "__main__":
    process()
