"""Starts a process again with huge pages for its memory.

A training step on a CPU takes gigabytes of temporary memory and gives them back. By
default glibc maps them anew at each step, and Linux makes and clears every page of
4 kB. glibc reads its settings when a process starts.
"""

import os
import pathlib
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
    """Starts this process again with huge pages, unless it has them.

    The new process takes this one's place: same number, command line and files. Nothing
    happens where Linux and glibc offer no huge pages, or where `GLIBC_TUNABLES` decides
    on them already; its other settings stay. With `verbose` it says so on stderr.
    """
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
    environment = {**os.environ, "GLIBC_TUNABLES": with_settings(given), DONE: "1"}
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def is_offered() -> bool:
    """Whether Linux makes huge pages of memory that asks for them, and glibc can ask.

    Example:
        >>> is_offered() in (True, False)
        True
    """
    try:
        choice = ENABLED.read_text()  # such as "always [madvise] never"
        name, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").split()
    except (OSError, ValueError, AttributeError):  # not Linux, or another libc
        return False
    numbers = tuple(int(part) for part in version.split(".")[:2])
    return "[never]" not in choice and name == "glibc" and numbers >= OLDEST_GLIBC


def with_settings(given: str) -> str:
    """Returns the value of `GLIBC_TUNABLES`: what is given, and ours behind it.

    Example:
        >>> with_settings("glibc.malloc.arena_max=4").split(":")[:2]
        ['glibc.malloc.arena_max=4', 'glibc.malloc.hugetlb=1']
    """
    added = [f"{name}={x}" for name, x in SETTINGS.items() if f"{name}=" not in given]
    return ":".join([*filter(None, [given]), *added])
