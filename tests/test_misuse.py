"""Arguments of a wrong type raise an error that names them."""

import re

import jax
import jax.numpy as jnp
import pytest
from helpers import normal, trees_of

import qlora_jax as ql

X = jnp.ones((3, 64))
BASE, LORA = trees_of({"kernel": normal(0, (64, 8))}, rank=2)
TABLES = ql.quantize({"embedding": normal(0, (64, 8))}, ql.QLoRAConfig(targets=".*"))
TABLE_LORA = {"embedding": ql.TrainedRows(jnp.ones((1, 8)), (3,))}
EXPERTS, SIZES = ql.quantize(normal(1, (2, 64, 8))), jnp.ones(2, int)
BANK, COMPLEX = ql.bank([LORA]), jnp.ones((64, 8), jnp.complex64)
KERNEL, TABLE = BASE["kernel"], TABLES["embedding"]
WRONG = ["text", {"kernel": KERNEL}, None, 0, 1.5, [1, 2], slice(0, 1), object()]
WRONG += [[[1], [2, 3]]]  # not rectangular
WRONG += [jnp.ones(64), jnp.ones(()), ql.QLoRAConfig(), LORA["kernel"]]

FUNCTIONS = {
    "lookup": (
        ql.lookup,
        {"table": TABLE, "lora": TABLE_LORA["embedding"], "ids": jnp.array([1, 2])},
    ),
    "ragged_dot": (
        ql.ragged_dot,
        {
            "x": X,
            "experts": EXPERTS,
            "group_sizes": SIZES,
            "lora": None,
            "layer": None,
            "dropout_key": None,
        },
    ),
    "apply": (
        ql.apply,
        {"base": KERNEL, "lora": LORA["kernel"], "x": X, "dropout_key": None},
    ),
    "matmul": (ql.matmul, {"x": X, "q": KERNEL, "layer": None}),
    "einsum": (ql.einsum, {"equation": "mk,kn->mn", "x": X, "q": KERNEL}),
    "select": (ql.select, {"bank": BANK, "ids": 0}),
    "a place": (lambda place: BANK[place], {"place": 0}),
    "with_adapter": (BANK.with_adapter, {"place": 0}),
    "init": (ql.init, {"key": jax.random.key(0)}),
}
# Arguments that errors describe instead of naming them.
NAMED_AS = {"base": "`base`|a kernel must", "ids": "ids", "equation": "equation"}
NAMED_AS["x"] = r"`x`|in x and the result.* Got .* axes\."
EXTRA_ARGUMENTS = {"with_adapter": {"lora": LORA}}
EXTRA_ARGUMENTS["init"] = {
    "params": {"kernel": normal(0, (64, 8))},
    "config": ql.QLoRAConfig(),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_argument_of_a_wrong_type_is_named(name):
    call, arguments = FUNCTIONS[name]
    unnamed = []
    for argument in arguments:
        for wrong in WRONG:
            try:
                call(**arguments | EXTRA_ARGUMENTS.get(name, {}) | {argument: wrong})
            except (TypeError, ValueError, IndexError) as error:
                text = str(error).partition("\n")[0]
                named = NAMED_AS.get(argument, f"`{argument}`")
                if not re.search(named, text) or "Got" not in text:
                    unnamed.append((argument, type(wrong).__name__, text))
            except Exception as error:  # noqa: BLE001
                unnamed.append((argument, type(wrong).__name__, repr(error)))
    assert not unnamed, "\n".join(map(str, unnamed))


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: ql.lookup(TABLE, TABLE_LORA, jnp.array([0])),
         "`lora` must be an adapter, such as a LoRA, or None. Got dict."),
        (lambda: ql.ragged_dot(X, EXPERTS, SIZES, LORA),
         "`lora` must be an adapter, such as a LoRA, or None. Got dict."),
        (lambda: ql.ragged_dot(X, {"kernel": EXPERTS}, SIZES),
         "`experts` must be a QTensor, another kernel or a float array [E, K, N]. Got "
         "dict."),
        (lambda: ql.select(LORA, 0),
         "`bank` must be a Bank, as `ql.bank` returns. Got dict."),
        (lambda: ql.apply(jnp.ones(64), None, X),
         "the kernel of `base` must have at least 2 axes. Got shape (64,)."),
        (lambda: ql.apply(ql.combine(BASE, LORA), None, X),
         "a kernel must be a QTensor, a StraightThrough or a float array. Got "
         "AdaptedKernel: `split` a combined tree first."),
        (lambda: ql.apply(COMPLEX, None, X),
         "the kernel of `base` must be real. Got complex64."),
        (lambda: ql.apply({"kernel": jnp.ones((64, 8)), "bias": COMPLEX[0]}, None, X),
         "the bias must be real. Got complex64."),
        (lambda: ql.apply({"kernel": jnp.ones((64, 8)), "bias": [0.0] * 8}, None, X),
         "the bias must be an array. Got list."),
        (lambda: ql.ragged_dot(X, jnp.stack([COMPLEX] * 2), SIZES),
         "`experts` must be real. Got complex64."),
        (lambda: ql.lookup(COMPLEX, None, jnp.array([0])),
         "`table` must be real. Got complex64."),
        (lambda: ql.matmul(X, EXPERTS, layer=2**40),
         "`layer` is out of range: Python int 1099511627776 too large to convert to "
         "int32."),
        (lambda: BANK[0:1], "`place` must be integers. Got slice."),
        (lambda: ql.init(0, {"kernel": jnp.ones((64, 8))}, ql.QLoRAConfig()),
         "`key` must be a PRNG key, such as jax.random.key(0). Got int."),
    ],
)  # fmt: skip
def test_mistakes_of_users(call, words):
    with pytest.raises((TypeError, ValueError)) as error:
        call()
    assert str(error.value) == words
