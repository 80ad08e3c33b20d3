"""Eight virtual CPU devices, deterministic hypothesis, checked shapes."""

import ctypes
import gc
import importlib.util
import os
import pathlib
import shutil
import sys
import tempfile
from collections import defaultdict

import jax
import jaxtyping
import pytest
from hypothesis import settings

# What needs PyTorch is tested where it is installed.
collect_ignore = [] if importlib.util.find_spec("torchax") else ["qlora_jax/torch"]

# Options of their own: `--closeness` and `--rounding-noise`.
pytest_plugins = ["rounding_noise", "tolerances"]

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

# Most of the time is compilation, and programs are small: LLVM optimizes them only
# where the variable is 0, and XLA writes fusions in LLVM's code at once where it still
# can, not by MLIR's passes. It does not cut programs into parts that LLVM compiles side
# by side. The partitioner, what is fused and memory are the same.
FAST = "JAX_DISABLE_MOST_OPTIMIZATIONS"
# Tests, and the processes that they start, compile the same small programs many times.
# A session shares them in a folder, which is new in each session, so that none is of
# other code. Workers of xdist use the folder of the first process.
CACHE = "JAX_COMPILATION_CACHE_DIR"
IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ
if not IS_WORKER:
    os.environ.setdefault(FAST, "1")
    flags = ["--xla_cpu_parallel_codegen_split_count=1"]
    if os.environ[FAST] != "0" and jax.__version_info__ <= (0, 10, 2):
        flags.append("--xla_cpu_use_fusion_emitters=false")
    os.environ["XLA_FLAGS"] = " ".join([*flags, os.environ.get("XLA_FLAGS", "")])
    os.environ[CACHE] = tempfile.mkdtemp(prefix="qlora-jax-tests-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
# JAX was imported before the variables were set.
jax.config.update("jax_disable_most_optimizations", os.environ[FAST] != "0")
jax.config.update("jax_compilation_cache_dir", os.environ[CACHE])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def pytest_unconfigure():
    if not IS_WORKER:
        shutil.rmtree(os.environ[CACHE], ignore_errors=True)


settings.register_profile("steady", derandomize=True, deadline=None, max_examples=40)
settings.load_profile("steady")

# These modules take plain arrays: the shapes in their annotations are checked at every
# call. Elsewhere arguments come from users, and the code checks them itself.
CHECKED = [
    "qlora_jax.product.backends.reference",
    "qlora_jax.product.backends.tiled",
    "qlora_jax.product.collectives",
    "qlora_jax.quant.codes",
    "qlora_jax.quant.schemes",
]
jaxtyping.install_import_hook(CHECKED, "beartype.beartype")

# The whole suite compiles several GB of programs, which JAX keeps. A worker frees them
# when it has more memory than `LIMIT_MIB`, and between modules, which share few, when
# it has grown by `GROWTH_MIB` since they were last freed.
LIMIT_MIB, GROWTH_MIB = 1400, 400
left_mib = 0.0


def resident_mib() -> float:
    """The process's memory; 0 where there is no /proc, as on macOS."""
    try:
        pages = pathlib.Path("/proc/self/statm").read_text().split()[1]
    except OSError:
        return 0.0
    return int(pages) * os.sysconf("SC_PAGE_SIZE") / 2**20


def trim():
    """Returns free memory to the system, which glibc keeps otherwise."""
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def free_programs():
    global left_mib
    jax.clear_caches()
    gc.collect()
    trim()
    left_mib = resident_mib()


@pytest.fixture(name="free_programs")
def free_programs_fixture():
    """The function, for tests that take much memory."""
    return free_programs


@pytest.fixture(params=["Auto", "Explicit"])
def mesh(request):
    """A mesh in each mode, with the axes "a" and "b"."""
    # Not before the hook above.
    from helpers import make_mesh  # pyright: ignore[reportMissingImports]

    return make_mesh(request.param)


def pytest_collection_finish():
    global left_mib
    # What modules and tests hold lives to the end: garbage collection passes over it.
    gc.freeze()
    left_mib = resident_mib()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item, nextitem):
    limit = LIMIT_MIB
    if nextitem is None or nextitem.path != item.path:
        # After each module where memory is unknown.
        limit = min(limit, left_mib + GROWTH_MIB) if left_mib else -1
    if resident_mib() > limit:
        trim()  # takes no time, and may do
    if resident_mib() > limit:
        free_programs()


# Doctests of these packages read a model and run it, as slow tests do.
SLOW_DOCTESTS = "qlora_jax.llm.app.", "qlora_jax.llm.models.", "qlora_jax.llm.train."


def pytest_collection_modifyitems(items):
    for item in items:
        is_doctest = isinstance(item, pytest.DoctestItem)
        is_slow_doctest = is_doctest and item.name.startswith(SLOW_DOCTESTS)
        if is_slow_doctest or item.get_closest_marker("newest"):
            item.add_marker(pytest.mark.slow)


# `pytest` runs the quick tests, and ends after ten failures. `pytest --all` runs all
# tests, and `-m` chooses from all.
QUICK, MAX_FAILURES = "not slow", 10


def pytest_configure(config):
    option = config.option
    if not option.all and not option.markexpr:
        option.markexpr = QUICK
        option.maxfail = option.maxfail or MAX_FAILURES


# `pytest --resources` prints the memory and the processor time of modules and tests.


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="run slow tests too")
    parser.addoption(
        "--resources",
        action="store_true",
        help="print peaks of resident memory and processor times (Linux)",
    )


def processor_seconds():
    """Processor time of this process and its children, whatever else runs."""
    return sum(os.times()[:4])


def peak_mib():
    """The process's largest memory since Linux was told to count anew."""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 2**10


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item, nextitem):
    if item.config.getoption("resources"):
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # count peaks anew
        item.started = processor_seconds(), resident_mib()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if call.when == "teardown" and item.config.getoption("resources"):
        seconds, mib = item.started
        peak = peak_mib()
        used = processor_seconds() - seconds, peak, peak - mib
        report.user_properties.append(("resources", used))
    return report


def pytest_terminal_summary(terminalreporter, config):
    if config.option.markexpr == QUICK:
        terminalreporter.line("Slow tests were left out. `pytest --all` runs them too.")
    if not config.getoption("resources"):
        return
    modules, tests = defaultdict(list), []
    for report in terminalreporter.stats.get("", []):
        for name, value in report.user_properties:
            if name == "resources":
                modules[report.nodeid.partition("::")[0]].append(value)
                tests.append((*value, report.nodeid))
    terminalreporter.section("processor time and peak of memory, by module")
    for module, values in sorted(modules.items()):
        seconds, peaks, _ = zip(*values, strict=True)
        terminalreporter.line(f"{sum(seconds):7.1f} s {max(peaks):6.0f} MiB  {module}")
    terminalreporter.section("processor time, peak of memory and growth to it, by test")
    for seconds, peak, growth, name in sorted(tests, reverse=True):
        line = f"{seconds:7.2f} s {peak:6.0f} MiB {growth:+6.0f}  {name}"
        terminalreporter.line(line)
