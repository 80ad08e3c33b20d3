"""A joint step of several adapters over one base against separate steps.

    python benchmarks/sweeps.py [--rounds 7] [--markdown FILE]

SmolLM2-135M's shape with random weights, 8 x 75 tokens, all of them targets, bfloat16,
nf4, rank 16 on all seven kinds of layer, AdamW with clipping, remat, chunked loss. The
joint step and a single step take turns in one process. The ratio is the median of the
joint step over the number of adapters times the median of the single step.
"""

import os
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import optax
from cases import RATE, SMOLLM2_135M, TINY_LLAMA, tokens
from jax_peers import language_model
from timing import interleave, make_parser, print_table

from qlora_jax.llm import data, train

ROUNDS = 7
HEADER = ["adapters", "step / steps alone", "s", "one alone s", "temporaries MB"]
HEADER += ["of one alone MB", "states MB"]


def measure(case: dict, count: int, rounds: int) -> list:
    """Returns the row for a number of adapters."""
    model, base, lora, _ = language_model("qlora_jax-remat", case)
    ids = tokens(case).astype(np.int32)
    positions = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)
    weights = np.ones(ids.shape, np.float32)
    batch = data.Batch(
        ids, ids * 0 + 1, positions, positions, np.roll(ids, -1, 1), weights
    )

    def make_optimizer(rate):
        return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate))

    optimizer = make_optimizer(RATE)
    loss = train.decoder_loss(model)
    single_step = train.make_step(loss, optimizer)

    def copy_lora():
        return jax.tree.map(lambda x: x + 0, lora)

    def begin(seed):
        return train.State.create(copy_lora(), optimizer, seed)

    joint = train.make_step(loss, make_optimizer, [RATE] * count)
    alone = begin(0)
    several = train.State.stack([begin(seed) for seed in range(count)])
    size = sum(x.nbytes for x in jax.tree.leaves((several.lora, several.opt_state)))

    def run_one():
        nonlocal alone
        alone, report = single_step(alone, base, [batch])
        jax.block_until_ready(report)

    def run_joint():
        nonlocal several
        several, report = joint(several, base, [batch])
        jax.block_until_ready(report)

    def sampler(call):
        def sample():
            start = time.perf_counter()
            call()
            return time.perf_counter() - start

        call()  # warm-up
        return sample

    calls = {"one": sampler(run_one), "joint": sampler(run_joint)}
    lowered: list = [
        single_step.lower(alone, base, batch),
        joint.lower(several, base, batch),
    ]
    analyses = [program.compile().memory_analysis() for program in lowered]
    temporaries = [analysis.temp_size_in_bytes for analysis in analyses]
    times = interleave(calls, rounds)
    joint_s, one_s = times["joint"].median, times["one"].median
    return [
        str(count),
        f"{joint_s / (count * one_s):.2f}",
        f"{joint_s:.2f}",
        f"{one_s:.2f}",
        f"{temporaries[1] / 1e6:.0f}",
        f"{temporaries[0] / 1e6:.0f}",
        f"{size / 1e6:.0f}",
    ]


def main():
    """Measures 2 and 4 adapters."""
    args = make_parser(__doc__, ROUNDS).parse_args()
    case = dict(dtype="bfloat16", rank=16, rows=8, length=75, model=SMOLLM2_135M)
    if args.quick:
        case |= dict(rows=2, length=16, model=TINY_LLAMA)
    rows = [measure(case, count, args.rounds) for count in (2, 4)]
    print_table(HEADER, rows, args.markdown)


if __name__ == "__main__":
    main()
