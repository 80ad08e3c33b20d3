"""Keeps compiled programs between runs."""

import hashlib
import pathlib
import platform
import time

from ..models.download import default_cache

_OLD_SECONDS = 600


def keep_programs() -> None:
    """Turns on JAX's compilation cache in the user's cache folder, unless it is set."""
    import jax

    given = lambda name: getattr(jax.config, f"jax_{name}")
    if not given("enable_compilation_cache") or given("compilation_cache_dir"):
        return
    folder = default_cache() / "programs" / _processor()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_unfinished(folder)
    except OSError:
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # Of all programs: the ones not used for longest are deleted.
    # With a bound JAX holds a lock while it reads or writes: processes may share it.
    jax.config.update("jax_compilation_cache_max_size", 2**30)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)


def remove_unfinished(folder: pathlib.Path) -> None:
    """Deletes programs whose writing was interrupted."""
    for path in folder.glob("*-cache"):
        # JAX writes the time of use after the program. Without it the program may be
        # cut off, and some versions of JAX then fail to delete old programs.
        used = path.with_name(path.name.removesuffix("-cache") + "-atime")
        if not used.exists() and time.time() - path.stat().st_mtime > _OLD_SECONDS:
            path.unlink(missing_ok=True)


def _processor() -> str:
    """Returns a hash of the processor's kind: machines may share a home folder."""
    # XLA compiles for the processor's instructions.
    keys = "model name", "flags", "Features"
    facts = [platform.machine(), platform.processor()]
    facts += {line for line in processor_lines() if line.startswith(keys)}
    return hashlib.sha256("\n".join(sorted(facts)).encode()).hexdigest()[:16]


def processor_lines() -> list[str]:
    """Returns what Linux says of the processors; [] elsewhere."""
    path = pathlib.Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []
