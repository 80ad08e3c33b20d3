"""Settings of a process: a cache of programs, warnings, the best dtype."""

import hashlib
import os
import pathlib
import platform
import time
import warnings
from typing import Any

from ..printable import printable_lines

_STALE_SECONDS = 600


def enable_compilation_cache() -> None:
    """Turns on JAX's compilation cache in a folder of the user, unless one is set."""
    import jax

    names = "enable_compilation_cache", "compilation_cache_dir"
    is_enabled, user_folder = (getattr(jax.config, f"jax_{name}") for name in names)
    if not is_enabled or user_folder:
        return
    cache = user_cache()
    folder = cache / "programs" / _hash_processor()
    try:
        for path in (cache, folder.parent, folder):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not is_private(path):
                warnings.warn(
                    f"{path} must belong to you, and only you may be able to write to "
                    "it, because programs are loaded from it. They are not cached.",
                    stacklevel=2,
                )
                return
        delete_unfinished_programs(folder)
    except OSError:
        return  # for example, the home folder is read-only: go without a cache
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # Above this size (in bytes) JAX deletes the least recently used programs. Setting
    # it also makes JAX lock the folder, so that several processes can share it.
    jax.config.update("jax_compilation_cache_max_size", 2**30)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)


def user_cache() -> pathlib.Path:
    """Returns `$QLORA_JAX_CACHE`, or a folder in the user's cache."""
    if folder := os.environ.get("QLORA_JAX_CACHE"):
        return pathlib.Path(folder)
    parent = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(parent) / "qlora_jax"


def is_private(folder: pathlib.Path) -> bool:
    """Returns whether this user owns a folder, and no other user can write to it."""
    if os.name != "posix":  # the modes of folders have no meaning on Windows
        return True
    status = folder.stat()
    return status.st_uid == os.getuid() and not status.st_mode & 0o022


def delete_unfinished_programs(folder: pathlib.Path) -> None:
    """Deletes cached programs that an interrupted process did not finish writing."""
    for path in folder.glob("*-cache"):
        # JAX writes the access time after the program. A program without one may be
        # truncated, and some versions of JAX then fail to delete old programs.
        access_time = path.with_name(path.name.removesuffix("-cache") + "-atime")
        age = time.time() - path.stat().st_mtime
        if not access_time.exists() and age > _STALE_SECONDS:
            path.unlink(missing_ok=True)


def shorten_warnings() -> None:
    """Makes Python print the warnings for users without their place in the source."""
    format_with_place = warnings.formatwarning

    def format_warning(
        message: Warning | str, category: type[Warning], *place: Any, **line: Any
    ) -> str:
        if category is UserWarning:
            return printable_lines(f"warning: {message}\n")
        return printable_lines(format_with_place(message, category, *place, **line))

    warnings.formatwarning = format_warning


def _hash_processor() -> str:
    # XLA compiles for the instructions of a processor, and machines with different
    # processors may share a home folder.
    keys = "model name", "flags", "Features"
    facts = [platform.machine(), platform.processor()]
    facts += {line for line in read_cpuinfo() if line.startswith(keys)}
    return hashlib.sha256("\n".join(sorted(facts)).encode()).hexdigest()[:16]


def fastest_dtype(jax_platform: str) -> str:
    """Returns the dtype that `--dtype auto` stands for on a platform of JAX."""
    if jax_platform != "cpu":
        return "bfloat16"
    words = {*" ".join(read_cpuinfo()).split()}
    # With AVX512_BF16 but without AMX, XLA's products in bfloat16 are faster than those
    # in float32 on AMD's processors, and slower on Intel's.
    is_fast = "amx_bf16" in words or {"avx512_bf16", "AuthenticAMD"} <= words
    return "bfloat16" if is_fast else "float32"


def read_cpuinfo() -> list[str]:
    """Returns the lines of Linux's /proc/cpuinfo; an empty list elsewhere."""
    path = pathlib.Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []
