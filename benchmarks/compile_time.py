"""Time to trace and compile a training step of 32 unrolled layers, beside plain LoRA.

    python benchmarks/compile_time.py [--layers 32] [--width 512] [--rounds 3]

Prints the ratio of medians of one run, in which the two take turns: QLoRA (nf4) over
LoRA on float kernels, the loss's gradient by a Python loop over the layers, each with
kernels of its own (up and down projections, and a norm).
"""

import argparse
import os
import statistics
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
from timing import machine, table, versions

import qlora_jax as ql


def shapes(layers: int, width: int, fmt: str | None) -> tuple:
    """Returns the shapes of base, adapters and input; nothing is allocated."""
    layer = {
        "up": {"kernel": (width, 4 * width)},
        "down": {"kernel": (4 * width, width)},
    }
    is_shape = lambda leaf: isinstance(leaf, tuple)
    to_struct = lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    params = jax.tree.map(
        to_struct, {f"{i}": layer for i in range(layers)}, is_leaf=is_shape
    )
    init = lambda params: ql.init(
        jax.random.key(0), params, ql.QLoRAConfig(rank=16, fmt=fmt)
    )
    return *jax.eval_shape(init, params), to_struct((64, width))


def loss(lora, base, x):
    """The mean square of what a stack of two-layer perceptrons with residuals gives."""
    for name in base:
        h = x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)
        h = jax.nn.silu(ql.apply(base[name]["up"], lora[name]["up"], h))
        x = x + ql.apply(base[name]["down"], lora[name]["down"], h)
    return jnp.mean(x**2)


def seconds(base, lora, x) -> tuple[float, float]:
    """Returns the time to trace and lower, and to compile, with nothing cached."""
    jax.clear_caches()
    start = time.perf_counter()
    lowered = jax.jit(jax.grad(loss)).lower(lora, base, x)
    middle = time.perf_counter()
    lowered.compile()
    return middle - start, time.perf_counter() - middle


def main() -> None:
    """Runs both, in turns, and prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    cases = {fmt: shapes(args.layers, args.width, fmt) for fmt in (None, "nf4")}
    times: dict = {fmt: [] for fmt in cases}
    for _ in range(args.rounds + 1):
        for fmt, (base, lora, x) in cases.items():
            times[fmt].append(seconds(base, lora, x))
    rows, medians = [], {}
    for fmt, found in times.items():
        found = [*zip(*found[1:], strict=True)]  # the first round warms up
        medians[fmt] = [statistics.median(part) for part in found]
        medians[fmt].append(statistics.median(map(sum, zip(*found, strict=True))))
        rows.append([fmt or "float", *(f"{s:.2f}" for s in medians[fmt])])
    ratios = [a / b for a, b in zip(medians["nf4"], medians[None], strict=True)]
    rows.append(["nf4 / float", *(f"{ratio:.2f}" for ratio in ratios)])
    print(f"Machine: {machine()}; {args.layers} layers of width {args.width}")
    print("Versions:", " ".join(f"{k} {v}" for k, v in versions().items()))
    print(table(["base", "trace and lower s", "compile s", "both s"], rows))


if __name__ == "__main__":
    main()
