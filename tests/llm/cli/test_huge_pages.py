"""The command line starts its process again with huge pages, once."""

import json
import os
import signal

import pytest
from commands import PROGRAM, run_python

from qlora_jax.llm.app import environment
from qlora_jax.llm.cli.main import main

TUNABLES, ARENAS = "GLIBC_TUNABLES", "glibc.malloc.arena_max=1:"
MINE = "glibc.malloc.arena_max=3:glibc.malloc.tcache_count=9"
SETTINGS = ":".join(f"{name}={value}" for name, value in environment.SETTINGS.items())
needs_pages = pytest.mark.skipif(
    not environment.has_huge_pages(), reason="no huge pages, or another libc than glibc"
)


def run(*command, **variables):
    """Runs Python with `variables`, and without the tunables of this process."""
    environment_variables = {
        k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"
    }
    return run_python(*command, env={**environment_variables, **variables})


# Prints a line in each process that reaches the end.
CODE = """
import json, os, signal, sys
from qlora_jax.llm.app.environment import restart_with_huge_pages
print("begins", flush=True)
restart_with_huge_pages("--verbose" in sys.argv)
print(json.dumps([os.environ.get("GLIBC_TUNABLES"), sys.argv[1:], sys.flags.utf8_mode]))
"""


@pytest.mark.slow
@needs_pages
def test_process_starts_again_once_with_its_command_line():
    done = run("-X", "utf8", "-c", CODE, "a b", "--verbose")
    first, second, state = done.stdout.splitlines()
    assert first == second == "begins"
    assert json.loads(state) == [SETTINGS, ["a b", "--verbose"], 1]
    assert done.stderr.count("Restarting with huge pages") == 1


@pytest.mark.slow
@needs_pages
@pytest.mark.parametrize(
    ("variables", "begins", "settings"),
    [
        ({TUNABLES: MINE}, 2, f"{MINE}:{SETTINGS.replace(ARENAS, '')}"),
        ({TUNABLES: "glibc.malloc.hugetlb=0"}, 1, "glibc.malloc.hugetlb=0"),
        ({"QLORA_JAX_HUGE_PAGES": "1"}, 1, None),  # in the second process
    ],
)
def test_settings_of_the_user_stay(variables, begins, settings):
    done = run("-c", CODE, **variables)
    *begun, state = done.stdout.splitlines()
    assert begun == ["begins"] * begins and not done.stderr
    assert json.loads(state)[0] == settings


@pytest.mark.slow
@needs_pages
@pytest.mark.parametrize(
    "end, status",
    [("sys.exit(7)", 7), ("os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM)],
)
def test_exit_status_and_signals_are_the_second_process_s(end, status):
    done = run("-c", CODE + end)
    assert done.returncode == status
    assert done.stdout.count("begins") == 2


@pytest.mark.parametrize(
    "enabled, libc, expected",
    [
        ("always [madvise] never\n", "glibc 2.35", True),
        ("[always] madvise never\n", "glibc 2.41", True),
        ("always madvise [never]\n", "glibc 2.41", False),
        ("always [madvise] never\n", "glibc 2.34", False),
        ("always [madvise] never\n", None, False),
        (None, "glibc 2.41", False),
    ],
)
def test_where_huge_pages_are_offered(monkeypatch, tmp_path, enabled, libc, expected):
    file = tmp_path / "enabled"
    if enabled is not None:
        file.write_text(enabled)
    monkeypatch.setattr(environment, "ENABLED", file)
    monkeypatch.setattr(environment.os, "confstr", lambda name: libc)
    assert environment.has_huge_pages() == expected


WRONG = ["train", "--model=none", "--data=nowhere/no", "--out"]


@pytest.mark.slow
@needs_pages
@pytest.mark.parametrize("flags, starts", [([], 1), (["--huge-pages=false"], 0)])
def test_command_line(flags, starts, tmp_path):
    done = run(*PROGRAM, *WRONG, str(tmp_path), "--verbose", *flags)
    assert done.returncode == 1 and done.stderr.count("huge pages") == starts
    assert done.stderr.count("qlora-jax train: ") == 1


def test_python_call_does_not_start_the_process_again(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(environment.os, "execve", None)
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    assert main([*WRONG, str(tmp_path)]) == 1
    assert "huge pages" not in capsys.readouterr().err
