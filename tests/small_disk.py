"""A disk that is soon full."""

import contextlib
import os
import resource
import subprocess


@contextlib.contextmanager
def small_disk(folder, kilobytes=1024, file_bytes=300_000):
    """Makes a folder on a small disk where we may mount one (as root, on Linux).

    Elsewhere the size of each file that this process writes is limited. Gives what
    writing says in the end.
    """
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", folder]
    if os.geteuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0:
        try:
            yield "No space left on device"
        finally:
            subprocess.run(["umount", folder], check=True)
        return
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, before[1]))
    try:
        yield "File too large"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
