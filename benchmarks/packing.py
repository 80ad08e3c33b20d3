"""The gain of packing: batches of sequences of many lengths, packed and padded.

    python benchmarks/packing.py [--rounds 7] [--markdown FILE]

The data are 2,000 sequences with lengths like instruction data (log-normal, median 77
tokens, 8 to 512), and all tokens are targets. An epoch has packed rows of 512 tokens,
as in `qlora-jax train`; padded batches of sequences of similar length, as with
`--packing false`; or padded batches of sequences in random order, as in a simple loop.
All have the same number of tokens per batch, on average. The measured time is that of
the gradient, for two random batches of each way: SmolLM2-135M's shape, random weights,
bfloat16, nf4, rank 16, remat, chunked loss. The ways take turns in one process. Ratios
are ratios of medians of the time per token.
"""

import os
import time
from collections.abc import Iterable
from functools import partial

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
from cases import SMOLLM2_135M, TINY_LLAMA
from jax_peers import language_model
from timing import interleave, make_parser, print_table
from tqdm import tqdm

from qlora_jax.llm import data, train
from qlora_jax.llm.data.batching import Batch, collate
from qlora_jax.llm.data.encode import Row
from qlora_jax.llm.data.ordering import round_up

ROUNDS = 7
SEQUENCES = 2000
TIMED = 2  # batches of each way
ROWS = 2  # of a packed batch
LONGEST = 512
HEADER = ["batches", "time a token / packed", "ms a token", "padding in an epoch"]


def draw(number: int, vocabulary: int, longest: int) -> list[Row]:
    """Returns sequences of random tokens, all of them targets."""
    rng = np.random.default_rng(0)
    lengths = np.exp(rng.normal(np.log(0.15 * longest), 0.8, number))
    lengths = np.clip(lengths, longest // 64, longest).astype(int)
    ids = [rng.integers(0, vocabulary, n).astype(np.int32) for n in lengths]
    return [Row(x, x, f"drawn:{i}") for i, x in enumerate(ids)]


def as_drawn(rows: list[Row], size: int) -> Iterable[Batch]:
    """Yields batches padded to their longest sequence."""
    for start in range(0, len(rows), size):
        group = rows[start : start + size]
        width = int(round_up(max(len(row.ids) for row in group)))
        yield collate([[row] for row in group], size, width, width)


def make_ways(rows: list[Row], longest: int) -> dict[str, list[Batch]]:
    """Returns an epoch's batches in each way."""
    tokens = sum(len(row.ids) for row in rows)
    size = max(1, round(ROWS * longest * len(rows) / tokens))
    settings = {"max_length": longest, "seed": 0, "num_epochs": 1}
    packed = data.batches(rows, batch_size=ROWS, packing=True, **settings)
    similar = data.batches(rows, batch_size=size, packing=False, **settings)
    return {
        "packed": list(packed),
        "padded, of similar lengths": list(similar),
        "padded, as drawn": list(as_drawn(rows, size)),
    }


def measure(case: dict, longest: int, rounds: int) -> list[list[str]]:
    """Returns the table's rows."""
    model, base, lora, _ = language_model("qlora_jax-remat", case)
    loss = train.decoder_loss(model)
    grad = jax.jit(jax.value_and_grad(loss, has_aux=True))
    ways = make_ways(draw(SEQUENCES, case["model"]["vocab_size"], longest), longest)
    rng = np.random.default_rng(1)
    timed = {
        name: [batches[i] for i in rng.choice(len(batches), TIMED, replace=False)]
        for name, batches in ways.items()
    }

    def run(batches: list[Batch]) -> float:
        start = time.perf_counter()
        for batch in batches:
            jax.block_until_ready(grad(lora, base, batch, None))
        return time.perf_counter() - start

    for batches in tqdm(timed.values(), desc="compiling"):
        run(batches)
    times = interleave({name: partial(run, x) for name, x in timed.items()}, rounds)
    rows, tokens = [], lambda batches: sum(batch.num_tokens for batch in batches)

    def seconds_per_token(name):
        return times[name].median / tokens(timed[name])

    for name, batches in ways.items():
        padding = 1 - tokens(batches) / sum(batch.ids.size for batch in batches)
        ratio, tokens_per_ms = (
            seconds_per_token(name) / seconds_per_token("packed"),
            1e3 * seconds_per_token(name),
        )
        numbers = f"{ratio:.2f}", f"{tokens_per_ms:.2f}", f"{100 * padding:.1f}%"
        rows.append([name, *numbers])
    return rows


def main() -> None:
    """Prints the report."""
    args = make_parser(__doc__, ROUNDS).parse_args()
    case = {"rank": 16, "dtype": "bfloat16"}
    case["model"] = TINY_LLAMA if args.quick else SMOLLM2_135M
    rows = measure(case, 64 if args.quick else LONGEST, args.rounds)
    print_table(HEADER, rows, args.markdown)


if __name__ == "__main__":
    main()
