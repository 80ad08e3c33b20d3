"""`qlora-jax` caches compiled programs for its next run."""

import os

import jax
import pytest
from commands import run_python

from qlora_jax.llm.app.environment import (
    delete_unfinished_programs,
    enable_compilation_cache,
    is_private,
)

NAMES = "jax_compilation_cache_dir", "jax_compilation_cache_max_size"


def test_a_folder_that_the_user_named_stays():
    before = [getattr(jax.config, name) for name in NAMES]
    assert before[0] == os.environ["JAX_COMPILATION_CACHE_DIR"]
    enable_compilation_cache()
    assert [getattr(jax.config, name) for name in NAMES] == before


KEEPS = f"""
from qlora_jax.llm.app.environment import enable_compilation_cache
enable_compilation_cache()
import jax
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.jit(lambda x: x + 1)(1).block_until_ready()
print([getattr(jax.config, name) for name in {NAMES}])
"""


@pytest.mark.parametrize("mode", [0o700, 0o755, 0o775, 0o757])
def test_only_the_user_may_write_to_the_cache(mode, tmp_path, monkeypatch):
    tmp_path.chmod(mode)
    assert is_private(tmp_path) == (mode in (0o700, 0o755))
    monkeypatch.setattr(os, "getuid", lambda: tmp_path.stat().st_uid + 1)
    assert not is_private(tmp_path)


def run(home, **variables):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    environment |= {"XDG_CACHE_HOME": str(home), "JAX_PLATFORMS": "cpu", **variables}
    done = run_python("-c", KEEPS, env=environment, umask=0)
    assert done.returncode == 0 and "Error" not in done.stderr, done.stderr
    return done.stdout


@pytest.mark.slow
def test_programs_are_kept_below_a_bound_in_the_users_cache(tmp_path):
    out = run(tmp_path)
    assert str(tmp_path / "qlora_jax" / "programs") in out and str(2**30) in out
    assert [*tmp_path.rglob("*-cache")]
    # Others could replace programs, which are loaded as code.
    [cache] = (tmp_path / "qlora_jax" / "programs").iterdir()
    folders = cache, cache.parent, cache.parent.parent
    assert [x.stat().st_mode & 0o777 for x in folders] == [0o700] * 3
    cache.chmod(0o770)
    assert "None" in run(tmp_path)
    off = run(tmp_path / "other", JAX_ENABLE_COMPILATION_CACHE="false")
    assert "None" in off and not (tmp_path / "other").exists()


def test_programs_that_were_cut_off_are_deleted(tmp_path):
    for name in ("whole-cache", "whole-atime", "cut-cache", "new-cache"):
        (tmp_path / name).write_bytes(b"x")
        if name != "new-cache":
            os.utime(tmp_path / name, (0, 0))
    delete_unfinished_programs(tmp_path)
    remaining = sorted(path.name for path in tmp_path.iterdir())
    assert remaining == ["new-cache", "whole-atime", "whole-cache"]
