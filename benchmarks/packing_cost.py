"""The time of merge-aware training and of scales by search, on this machine's CPU.

    python benchmarks/packing_cost.py [--rounds 9] [--markdown FILE]

The first rows compare the gradient of 30 blocks of SmolLM2-135M's MLP (53M weights,
rank 16, bfloat16) with merge-aware adapters to that with ordinary LoRAs on an NF4 base.
The other rows compare packing a float32 kernel `[1024, 2048]` with `scales="search"`,
without and with `importance`, to packing it by the rule of the format. What is compared
takes turns in one process, and ratios are ratios of medians.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
from timing import interleave, make_parser, print_table, timed

import qlora_jax as ql

ROUNDS = 9
WIDTHS = 576, 1536  # of SmolLM2-135M and of its MLP
LAYERS, TOKENS = 30, (80, 320, 1280)
BASES = ("nf4", "int8", None)  # None is bfloat16
FORMATS = [("nf4", 64), ("fp4", 64), ("int4", 64), ("int8", 64), ("int4_f16", 128)]
FORMATS += [("int4_f16", 32), ("q4_0", 32), ("mxfp4", 32), ("nvfp4", 16)]
HEADER = ["packing", "tokens", "compared with", "ratio", "ms"]


def make_gradient(fmt: str | None, merge_aware: bool, tokens: int):
    """Returns a call that computes the gradient of the adapters of all layers."""
    narrow, wide = WIDTHS
    key = jax.random.key(0)
    params = {
        "up": jax.random.normal(key, (LAYERS, narrow, wide), jnp.bfloat16),
        "down": jax.random.normal(key, (LAYERS, wide, narrow), jnp.bfloat16),
    }
    target = {"merge_aware": True, "target_fmt": "nf4"} if merge_aware else {}
    config = ql.QLoRAConfig(fmt=fmt, targets=".*", double_quant=False, **target)
    base, lora = ql.init(key, params, config)
    x = jax.random.normal(key, (tokens, narrow), jnp.bfloat16)

    def loss(lora, base, x):
        def layer(x, trees):
            base, lora = trees
            h = jax.nn.silu(ql.apply(base["up"], lora["up"], x))
            return x + 0.01 * ql.apply(base["down"], lora["down"], h), None

        return jnp.sum(jnp.square(jax.lax.scan(layer, x, (base, lora))[0]))

    gradient = jax.jit(jax.grad(loss))
    return lambda: jax.block_until_ready(gradient(lora, base, x))


def make_packing(fmt: str, block_size: int, **options):
    """Returns a call that packs a kernel."""
    w = jax.random.normal(jax.random.key(0), (1024, 2048))
    settings = {"block_size": block_size, "double_quant": False, **options}
    pack = jax.jit(lambda w: ql.quantize(w, fmt, **settings))
    return lambda: jax.block_until_ready(pack(w).codes)


def compare(calls: dict, rounds: int) -> list[tuple[str, str, str]]:
    """Returns name, ratio to the first call, and milliseconds of the other calls."""
    times = interleave({name: timed(call) for name, call in calls.items()}, rounds)
    first, *others = (times[name].median for name in calls)
    names = [*calls][1:]
    return [
        (name, f"{x / first:.1f}", f"{1e3 * x:.1f}")
        for name, x in zip(names, others, strict=True)
    ]


def main(argv: list[str] | None = None) -> None:
    """Measures both and prints a table."""
    args = make_parser(__doc__, ROUNDS).parse_args(argv)
    rows = []
    for tokens in TOKENS[:1] if args.quick else TOKENS:
        calls = {"lora": make_gradient("nf4", False, tokens)}
        for fmt in BASES:
            name = f"merge-aware, {fmt or 'bfloat16'} to nf4"
            calls[name] = make_gradient(fmt, True, tokens)
        for name, *measured in compare(calls, args.rounds):
            rows.append([name, str(tokens), "LoRA on nf4", *measured])
    importance = jnp.linspace(0.1, 2, 1024)
    for fmt, block_size in FORMATS[:1] if args.quick else FORMATS:
        settings = {"search": {"scales": "search"}}
        settings["search, importance"] = settings["search"] | {"importance": importance}
        calls = {"rule": make_packing(fmt, block_size)}
        for name, options in settings.items():
            calls[f"{fmt}, {block_size}: {name}"] = make_packing(
                fmt, block_size, **options
            )
        for name, *measured in compare(calls, args.rounds):
            rows.append([name, "", "the format's rule", *measured])
    print_table(HEADER, rows, args.markdown)


if __name__ == "__main__":
    main()
