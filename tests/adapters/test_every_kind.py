"""Every kind of adapter, in every operation, alone and chosen from a bank.

Each case equals a product with NumPy's adapted weights in float64, or raises an error
with the expected message.
"""

import functools
import itertools

import numpy as np
import pytest
from helpers import normal, ragged_product, relative_error, rounding

import qlora_jax as ql
from qlora_jax.adapters.base import KINDS
from qlora_jax.quant.formats import Packing
from qlora_jax.quant.geometry import Geometry
from qlora_jax.quant.kernel import FloatKernel

K, N, EXPERTS, RANK, SCALING = 64, 48, 3, 4, 2.0
TRAINED_ROWS = (2, 31)
# The adapter in the bank for each row along the first axis of an input.
PLACES = np.array([1, -1, 0])
SELECTIONS = {"alone": None, "by one id": 1, "the base": -1, "by row": PLACES}
SHAPES = {"kn": (K, N), "nk": (N, K), "bkn": (EXPERTS, K, N)}
# The kernels that each operation takes, by the roles of their axes.
OPERATIONS = {
    "product": ["kn", "nk", "bkn"],
    "merged": ["kn", "nk", "bkn"],
    "ragged": ["bkn"],
    "lookup": ["kn", "nk", "float kn"],
}
TABLE_IDS = np.array([[0, 47, -1], [7, 7, -48], [31, 2, 30]])
GROUP_SIZES = np.array([2, 0, 3])


def new_lora(kind, q, seed):
    *batch, k, n = q.matrix_shape
    a, b = normal(seed, (*batch, k, RANK)), normal(seed + 1, (*batch, RANK, n))
    return kind(a, b, SCALING, 0.0, q.geometry)


def new_dora(q, seed):
    lora = new_lora(ql.LoRA, q, seed)
    m = normal(seed + 2, (*lora.batch_shape, q.matrix_shape[-1]))
    return ql.DoRA(lora.a, lora.b, SCALING, 0.0, q.geometry, m)


def new_trained_rows(q, seed):
    rows = normal(seed, (*q.shape[:-2], len(TRAINED_ROWS), q.shape[-1]))
    return ql.TrainedRows(rows, TRAINED_ROWS)


def new_merge_aware(q, seed):
    lora = new_lora(ql.LoRA, q, seed)
    return ql.MergeAware(lora.a, lora.b, SCALING, 0.0, q.geometry, Packing("nf4"))


NEW_ADAPTER = {
    "LoRA": functools.partial(new_lora, ql.LoRA),
    "DoRA": new_dora,
    "MergeAware": new_merge_aware,
    "Trained": lambda q, seed: ql.Trained(normal(seed, q.shape)),
    "TrainedRows": new_trained_rows,
}
FITS = {"TrainedRows": ["kn", "bkn", "float kn"]}


def test_every_kind_is_in_the_table():
    # Another test file may have registered a kind of its own.
    kinds = {x for x in KINDS.values() if x.__module__.startswith("qlora_jax.")}
    assert NEW_ADAPTER.keys() == {kind.__name__ for kind in kinds}
    assert {x.__name__ for x in kinds if x.can_be_in_bank} == {"LoRA"}


def adapted_weights(w, lora, roles):
    """The weights that an adapter stands for, computed by its formula."""
    arrays = {name: np.asarray(x, np.float64) for name, x in lora.arrays.items()}
    if "value" in arrays:
        return arrays["value"]
    if "rows" in arrays:
        w = w.copy()
        w[..., list(TRAINED_ROWS), :] = arrays["rows"]
        return w
    v = (w.T if roles == "nk" else w) + SCALING * arrays["a"] @ arrays["b"]
    if isinstance(lora, ql.MergeAware):
        packed = ql.quantize(np.float32(v), "nf4")  # along K, in matrix form
        v = np.asarray(packed.dequantize(), np.float64)
    if "m" in arrays:
        v *= (arrays["m"] / np.sqrt(np.sum(v**2, -2)))[..., None, :]
    return v.T if roles == "nk" else v


def refusal_of(kind, operation, roles, selection):
    """The error message of a case; None for a case that is supported."""
    if selection != "alone" and kind != "LoRA":
        return "cannot be in a bank"
    if operation == "ragged" and (
        selection != "alone" or kind not in ("LoRA", "MergeAware")
    ):
        return "supports LoRA and MergeAware adapters, and none from a bank"
    if operation == "lookup" and kind not in ("Trained", "TrainedRows"):
        return "must be a Trained or a TrainedRows"
    if selection == "by row" and operation == "merged":
        return "`ids` must be one number where weights are merged"
    if selection == "by row" and roles == "bkn":
        return "a kernel without batch axes"
    return None


CASES = [
    (kind, operation, kernel, selection)
    for kind, operation in itertools.product(NEW_ADAPTER, OPERATIONS)
    for kernel in OPERATIONS[operation]
    for selection in SELECTIONS
    if kernel in FITS.get(kind, OPERATIONS[operation])
]


@pytest.mark.parametrize("kind, operation, kernel, selection", CASES)
def test_an_operation_is_that_of_numpy_or_refused(kind, operation, kernel, selection):
    roles = kernel.removeprefix("float ")
    w = normal(0, SHAPES[roles])
    q = (
        FloatKernel(w, Geometry())
        if roles != kernel
        else ql.quantize(w, contract=roles)
    )
    x = normal(9, (3, 5, K))  # a batch of three, or rows of three experts
    loras = [NEW_ADAPTER[kind](q, seed) for seed in (1, 4)]
    run = {
        "product": lambda lora: ql.apply(q, lora, x),
        "merged": lambda lora: ql.merge(q, lora),
        "ragged": lambda lora: ql.ragged_dot(x[0], q, GROUP_SIZES, lora),
        "lookup": lambda lora: ql.lookup(q, lora, TABLE_IDS),
    }[operation]
    ids = SELECTIONS[selection]

    def compute():
        if ids is None:
            return run(loras[1])
        bank = ql.bank([{"kernel": lora} for lora in loras])
        return run(ql.select(bank, ids)["kernel"])

    if (words := refusal_of(kind, operation, roles, selection)) is not None:
        with pytest.raises((ValueError, NotImplementedError), match=words):
            compute()
        return
    frozen = np.asarray(q.dequantize(), np.float64)
    weights = [*(adapted_weights(frozen, lora, roles) for lora in loras), frozen]
    adapter_ids = np.broadcast_to(1 if ids is None else ids, 3)
    of_rows = [weights[adapter_id] for adapter_id in adapter_ids]
    if operation == "product":
        matrices = of_rows[0] if roles == "bkn" else of_rows
        matrices = [w.T if roles == "nk" else w for w in matrices]
        want = [np.float64(rows) @ w for rows, w in zip(x, matrices, strict=True)]
    elif operation == "merged":
        want = of_rows[0]
    elif operation == "ragged":
        want = ragged_product(x[0], of_rows[0], GROUP_SIZES)
    else:
        want = [w[i] for w, i in zip(of_rows, TABLE_IDS, strict=True)]
    got = compute()
    assert got.shape == np.shape(want)
    # A product with the kernel, one with A and one with B.
    assert relative_error(got, want) < rounding(2 * K + RANK)
