"""Time and memory of the chunked loss and of Optax's on the logits of all tokens.

    python benchmarks/losses.py [--rounds 7] [--markdown FILE]

Measures the loss of a language model and its gradient in the hidden states, in
bfloat16, with a frozen head. Both take turns in one process. Ratios are ratios of
medians. Temporaries are from `memory_analysis()` of the compiled function. The largest
case is only compiled.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from timing import interleave, make_parser, mib, print_table, timed
from tqdm import tqdm

import qlora_jax as ql
from qlora_jax.llm.models.products import einsum_f32

ROUNDS = 7
# Tokens, vocabulary size, width, and whether to run the case.
CASES = [
    (2048, 49152, 576, True),
    (8192, 49152, 576, True),
    (8192, 128256, 4096, False),
]
QUICK = [(64, 512, 32, True), (64, 1024, 32, False)]
HEADER = [
    "tokens x words x width",
    "chunked / Optax",
    "chunked s",
    "Optax s",
    "chunked MiB",
    "Optax MiB",
]


def chunked(hidden, head, labels):
    """Returns the mean of this library's loss."""
    return jnp.mean(ql.losses.chunked_cross_entropy(hidden, head, labels))


def unchunked(hidden, head, labels):
    """Returns the mean of Optax's loss on float32 logits."""
    logits = einsum_f32("td,vd->tv", hidden, head)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def row(tokens: int, words: int, width: int, runs: bool, rounds: int) -> list[str]:
    """Returns the row of a case."""
    rng = np.random.default_rng(0)
    shapes = [
        jax.ShapeDtypeStruct((tokens, width), jnp.bfloat16),
        jax.ShapeDtypeStruct((words, width), jnp.bfloat16),
        jax.ShapeDtypeStruct((tokens,), jnp.int32),
    ]
    functions = {
        loss.__name__: jax.jit(jax.value_and_grad(loss)).lower(*shapes).compile()
        for loss in (chunked, unchunked)
    }
    memory = [mib(f.memory_analysis().temp_size_in_bytes) for f in functions.values()]
    name = f"{tokens:,} x {words:,} x {width:,}"
    if not runs:
        return [name, "-", "-", "-", *memory]

    def draw(shape):
        return rng.standard_normal(shape, dtype=np.float32)

    hidden = jnp.asarray(draw((tokens, width)), jnp.bfloat16)
    head = jnp.asarray(draw((words, width)) / np.sqrt(width), jnp.bfloat16)
    labels = jnp.asarray(rng.integers(0, words, tokens), jnp.int32)

    def sample(f):
        return timed(lambda: jax.block_until_ready(f(hidden, head, labels)))

    times = interleave({n: sample(f) for n, f in functions.items()}, rounds)
    ours, theirs = times["chunked"].median, times["whole"].median
    return [name, f"{ours / theirs:.2f}", f"{ours:.2f}", f"{theirs:.2f}", *memory]


def main() -> None:
    """Prints the report."""
    args = make_parser(__doc__, ROUNDS).parse_args()
    cases = tqdm(QUICK if args.quick else CASES)
    rows = [row(*case, args.rounds) for case in cases]
    print_table(HEADER, rows, args.markdown)


if __name__ == "__main__":
    main()
