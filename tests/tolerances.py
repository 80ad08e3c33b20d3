"""How far a computed float may be from the exact result, by its rounding errors.

There are two ways to compare computed floats. `assert_close` bounds the norm of the
difference by the magnitude of the terms that were summed. Where terms cancel in a way
that has no formula, as in gradients of a deep model, `assert_equal_but_for_rounding`
runs the reference again, and measures how far rounding moves it. Neither has a
hand-chosen tolerance. Both compare norms of whole arrays: an error in a single entry
of 30,000 still exceeds the bound hundreds of times.

`pytest --closeness 0.5` prints which share of its bound each comparison used, and fails
those that used more than half, which leaves a margin for other processors.
`--rounding-noise` (rounding_noise.py) finds bounds that hold by luck.
"""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

# More terms than the sums have along any path through the small models of the tests,
# forward and backward. Mistakes cause far larger errors than these bounds: a product in
# TF32, which stores 10 bits of mantissa, is off by 30 times as much, and one in
# bfloat16, which stores 7, by 250 times.
TERMS = 2**12
ARRAYS = (np.ndarray, jax.Array)


def rounding(terms, dtype=np.float32):
    """Bounds the relative error of sums of this many products, in any order.

    Each addition rounds its partial sum by at most half an eps of it. Signs are random,
    so sums of n products, and the n roundings in each, grow with the root of n. The
    bound is twice the root of n times half an eps, as in Higham and Mary (2019). In a
    chain of products, the terms of all of them count.
    """
    return float(np.sqrt(terms) * jnp.finfo(dtype).eps)


def norm(x):
    """Returns the Frobenius norm of the finite entries, in float64."""
    x = np.asarray(x, np.float64).ravel()
    return np.linalg.norm(x[np.isfinite(x)])


def relative_error(got, want):
    """Returns the Frobenius norm of the difference, relative to that of `want`.

    This is for errors of a method, such as those of 4-bit weights. Use `assert_close`
    for rounding errors.
    """
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-30)


def assert_close(got, want, terms=TERMS, *, roundings=1, dtype=None, magnitude=None):
    """Asserts that `got` equals `want` except for rounding: an array, or each leaf.

    Leaves that are not floats must be equal. Dtypes must be equal too, except that a
    floating-point reference may be wider.

    Args:
      got: The values that the code under test computed.
      want: The expected values, with the same structure and shapes.
      terms: How many terms the sums along a path to the result have in total.
      roundings: How often a path rounds to 16 bits, if the result has 16 bits. The
        sums are in float32 then.
      dtype: The dtype of the computation. Defaults to the dtype of `got` or `want` with
        fewer bits, or float32 if that is float64, as for numbers that Python parsed.
      magnitude: The magnitudes of the sums: `want`, computed with the magnitudes of the
        summed terms. A tree like `want`, or a number for every leaf. Defaults to
        `want`, which is correct where terms do not cancel, as in arrays of many random
        entries. The magnitude of a leaf is at least a tenth of the largest leaf's. For
        example, the gradient of a key's bias is zero, but its terms are as large as
        those of the query's.
    """
    if isinstance(got, ARRAYS) or isinstance(want, ARRAYS):
        got, want = np.asarray(got), np.asarray(want)
    leaves, structure = jax.tree.flatten_with_path(got)
    assert structure == jax.tree.structure(want)
    if isinstance(magnitude, (int, float)):
        magnitude = jax.tree.map(lambda x: np.full(np.shape(x), magnitude), want)
    sizes = jax.tree.leaves(want if magnitude is None else magnitude)
    norms = [norm(x) if is_float(x) else 0.0 for x in sizes]
    least = 0.1 * max(norms, default=0)
    want_leaves = jax.tree.leaves(want)
    for (path, x), y, size in zip(leaves, want_leaves, norms, strict=True):
        x, y, name = np.asarray(x), np.asarray(y), jax.tree_util.keystr(path)
        assert x.shape == y.shape, (name, x.shape, y.shape)
        assert has_dtype_of(x, y), (name, x.dtype, y.dtype)
        bound = relative_bound(terms, roundings, dtype or coarser(x, y))
        if is_float(x):
            check(distance(x, y, name), bound * max(size, least), name)
        else:
            np.testing.assert_array_equal(x, y, err_msg=name)


def has_dtype_of(x, y):
    """Returns whether y has the dtype of x, or is a wider reference.

    Python parsed what is float64, such as a server's answer.
    """
    wider = {np.dtype(np.float64), np.dtype(np.int64)}
    if is_float(x) and jnp.finfo(x.dtype).bits < 32:
        wider.add(np.dtype(np.float32))
    return y.dtype == x.dtype or y.dtype in wider or x.dtype == np.float64


def is_float(x):
    return jnp.issubdtype(np.asarray(x).dtype, jnp.floating)


def distance(x, y, name=""):
    """Returns the norm of the difference; infinities and NaNs must be equal."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    finite = np.isfinite(y)
    np.testing.assert_array_equal(x[~finite], y[~finite], err_msg=name)
    return np.linalg.norm(x[finite] - y[finite])


def coarser(*arrays):
    """Returns float32, or the dtype of the arrays with the fewest bits of mantissa."""
    kinds = [x.dtype for x in arrays if is_float(x)]
    return max([np.dtype("f4"), *kinds], key=lambda kind: jnp.finfo(kind).eps)


def relative_bound(terms, roundings, dtype):
    """Bounds the relative error of sums in at least float32 and of 16-bit results."""
    if jnp.finfo(dtype).bits < 32:
        return rounding(terms) + rounding(roundings, dtype)
    return rounding(terms, dtype)


def assert_equal_but_for_rounding(got, run, *args, times=10):
    """Asserts that `got` equals `run(*args)` except for the order of sums.

    How far rounding moves a result depends on how much cancels in it, as in gradients
    of a deep model. To measure this, `run` is called three more times, with every float
    of `args` moved up or down by an eps at random. In each leaf, the norm of the
    difference may be at most `times` the largest change.
    """
    want, errors = measure_rounding(run, *args)
    assert_within_rounding(got, want, errors, times)


def measure_rounding(run, *args):
    """Returns `run(*args)`, and how far rounding moves each leaf of it.

    `assert_equal_but_for_rounding` explains the second result, which is a tree of
    norms. Each is at least eps times the norm of the leaf, and eps times a tenth of the
    largest norm.
    """
    want = run(*args)
    moved_results = [run(*_moved(args, seed)) for seed in range(3)]
    least = 0.1 * max(map(norm, jax.tree.leaves(want)), default=0)

    def measure(y, *moved_leaves):
        floor = max(norm(y), least) * rounding(1)
        return max(floor, *(distance(z, y) for z in moved_leaves))

    return want, jax.tree.map(measure, want, *moved_results)


def assert_within_rounding(got, want, errors, times=10):
    """Asserts that no leaf differs by more than `times` its error."""
    leaves, structure = jax.tree.flatten_with_path(got)
    assert structure == jax.tree.structure(want)
    for (path, x), y, error in zip(
        leaves, jax.tree.leaves(want), jax.tree.leaves(errors), strict=True
    ):
        name = jax.tree_util.keystr(path)
        assert x.dtype == y.dtype and x.shape == y.shape, name
        check(distance(x, y, name), times * error, name)


def _moved(tree, seed):
    """Returns the tree with each float multiplied by 1 + eps or 1 - eps."""
    rng = np.random.default_rng(seed)

    def move(x):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        factor = 1 + rng.choice([-1, 1], x.shape) * float(jnp.finfo(x.dtype).eps)
        return jnp.asarray(np.asarray(x, np.float64) * factor, x.dtype)

    return jax.tree.map(move, tree)


# `pytest --closeness LIMIT`

closest = {}  # in the current test, the largest share by the line that compared
limit = 1.0  # the largest share of its bound that an error may use


def check(error, bound, name=""):
    """Asserts that an error is within its bound, and records the share it uses."""
    frame = sys._getframe(1)
    while frame.f_globals.get("__name__") == __name__ and frame.f_back:
        frame = frame.f_back
    line = f"{pathlib.Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
    share = float(error / bound) if bound else float(error > 0)
    closest[line] = max(share, closest.get(line, 0.0))
    assert share <= limit, (
        f"The norm of the error{name and ' of ' + name} is {error:.2e}, and roundings "
        f"explain {bound:.2e}."
    )


def pytest_addoption(parser):
    parser.addoption(
        "--closeness",
        type=float,
        metavar="LIMIT",
        help="print what share of its bound each comparison of floats used, and fail "
        "those that used more than this",
    )


def pytest_configure(config):
    global limit
    limit = config.getoption("closeness") or 1.0


def pytest_runtest_setup():
    closest.clear()


def pytest_runtest_teardown(item):
    if item.config.getoption("closeness"):
        item.user_properties.append(("closeness", dict(closest)))


def pytest_terminal_summary(terminalreporter, config):
    if not config.getoption("closeness"):
        return
    lines = []
    for report in terminalreporter.stats.get("", []):
        for name, shares in report.user_properties:
            if name == "closeness":
                lines += [
                    (share, line, report.nodeid) for line, share in shares.items()
                ]
    terminalreporter.section("share of its bound that each comparison used, by test")
    for share, at, name in sorted(lines, reverse=True):
        terminalreporter.line(f"{share:6.3f}  {at}  {name}")
