"""Restarts a process with huge pages for its memory.

A training step on a CPU takes and frees gigabytes. By default glibc maps them anew at
each step, and Linux clears each 4 kB page. glibc reads its settings at process start.
"""

import os
import pathlib
import signal
import sys

ENABLED = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
OLDEST_GLIBC = (2, 35)
HUGE_PAGES = "glibc.malloc.hugetlb"
_NEVER = str(2**40)
# What is freed is kept: no array is so large that it is mapped and unmapped. Threads
# share one arena, since that of a thread is too small for large arrays.
SETTINGS = {
    HUGE_PAGES: "1",
    "glibc.malloc.arena_max": "1",
    "glibc.malloc.mmap_threshold": _NEVER,
    "glibc.malloc.trim_threshold": _NEVER,
}
# Tells the second process, whose other variables may have been taken away, not to
# start a third.
DONE = "QLORA_JAX_HUGE_PAGES"


def with_huge_pages(verbose: bool = False) -> None:
    """Replaces this process by one with huge pages, if they are offered and not set."""
    given = os.environ.get("GLIBC_TUNABLES", "")
    if DONE in os.environ or HUGE_PAGES in given or not is_offered():
        return
    if verbose:
        print(
            "Starting again with huge pages and without returning freed memory "
            "(GLIBC_TUNABLES; --huge_pages=false leaves it out).",
            file=sys.stderr,
        )
    sys.stdout.flush()
    sys.stderr.flush()
    # The given settings win.
    added = [f"{name}={x}" for name, x in SETTINGS.items() if f"{name}=" not in given]
    tunables = ":".join([*filter(None, [given]), *added])
    environment = {**os.environ, "GLIBC_TUNABLES": tunables, DONE: "1"}
    # SIGINT waits for the handler of the second process, which unblocks it.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    # The same process number, command line and open files.
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def is_offered() -> bool:
    """Returns whether Linux offers huge pages on request, and glibc can ask."""
    try:
        choice = ENABLED.read_text()  # such as "always [madvise] never"
        name, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").split()
    except (OSError, ValueError, AttributeError):  # not Linux, or another libc
        return False
    numbers = tuple(int(part) for part in version.split(".")[:2])
    return "[never]" not in choice and name == "glibc" and numbers >= OLDEST_GLIBC
