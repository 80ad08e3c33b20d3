"""Time to trace and compile an unrolled model's gradient, packed and dense.

    python benchmarks/compile_time.py [--layers 32] [--width 256] [--rounds 7]

The decoder's layers run in a Python loop. Its rows are the gradient in all weights,
that of LoRA on float kernels, and that of QLoRA (nf4, double quantization). Prints the
medians of one run, in which the three take turns after a warm-up, and ratios to the
first.

Python allocates stack frames in chunks of 16 KB, and unmaps a chunk as soon as it is
empty. If the calls of a loop start a new chunk, each call maps memory and takes 3.8 us
instead of 0.02. Which loops are affected depends on the depth of the stack: at one
depth tracing took 3.2 s for the dense model and 3.4 s for QLoRA, and 32 frames deeper
4.3 s and 3.1 s. So each round traces all three at the same new depth, and the rounds
together cover one chunk.
"""

import argparse
import functools
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from timing import ROUNDS, machine, table, versions
from tqdm import tqdm

import qlora_jax as ql
from qlora_jax.llm.models.attention import LayerData
from qlora_jax.llm.models.config import DecoderConfig
from qlora_jax.llm.models.decoder import Layer, describe_tokens

TARGETS = r".*_proj/kernel"
# This many frames of `at_depth` fill about one chunk of Python's stack.
FRAMES = 140


class Unrolled(nn.Module):
    """A decoder without a scan."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, tokens):
        """Returns logits."""
        c = self.config
        described = describe_tokens(tokens.shape, c)
        x = nn.Embed(c.vocab_size, c.hidden_size)(tokens)
        for i in range(c.num_layers):
            layer = Layer(c, c.layers, name=f"layer_{i}")
            (x, _), _ = layer((x, {}), described, LayerData(), None)
        return nn.Dense(c.vocab_size, use_bias=False, name="head")(x)


def loss(logits, tokens):
    """Mean cross-entropy."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens).mean()


def cases(layers: int, width: int) -> dict:
    """Returns a gradient function and the shapes of its arguments for each row."""
    config = DecoderConfig(512, width, 3 * width, layers, num_heads=4, num_kv_heads=2)
    model, tokens = Unrolled(config), jnp.zeros((2, 32), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    wrapped = ql.linen.wrap(model)

    def dense(params, tokens):
        return loss(model.apply({"params": params}, tokens), tokens)

    def adapted_loss(lora, base, tokens):
        return loss(wrapped.apply({"params": base, "lora": lora}, tokens), tokens)

    def trees(fmt):
        settings = ql.QLoRAConfig(rank=8, fmt=fmt, targets=TARGETS)

        def init(params):
            return ql.linen.init(jax.random.key(1), model, params, settings, tokens)

        base, lora = jax.eval_shape(init, params)
        return lora, base, tokens

    return {
        "dense": (dense, (params, tokens)),
        "LoRA on float": (adapted_loss, trees(None)),
        "QLoRA, nf4": (adapted_loss, trees("nf4")),
    }


def at_depth(depth: int, run: Callable[[], Any]) -> Any:
    """Returns `run()`, called this many frames deeper."""
    return at_depth(depth - 1, run) if depth else run()


def seconds(run, shapes) -> tuple[float, float]:
    """Returns the time to trace and lower, and to compile, with nothing cached."""
    jax.clear_caches()
    start = time.perf_counter()
    lowered = jax.jit(jax.grad(run)).lower(*shapes)
    middle = time.perf_counter()
    lowered.compile()
    return middle - start, time.perf_counter() - middle


def main() -> None:
    """Compiles all models in turn and prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    args = parser.parse_args()
    chosen = cases(args.layers, args.width)
    times: dict = {name: [] for name in chosen}
    for i in tqdm(range(args.rounds + 1), disable=None):
        depth = max(i - 1, 0) * FRAMES // args.rounds  # round 0 is the warm-up
        for name, case in chosen.items():
            times[name].append(at_depth(depth, functools.partial(seconds, *case)))
    rows = []
    dense = statistics.median(map(sum, times["dense"][1:]))
    for name, samples in times.items():
        trace, compile_, both = zip(
            *((a, b, a + b) for a, b in samples[1:]), strict=True
        )
        medians = [statistics.median(part) for part in (trace, compile_, both)]
        ratio = f"{medians[-1] / dense:.2f}"
        rows.append([name, *(f"{s:.2f}" for s in medians), ratio])
    print(f"Machine: {machine()}; {args.layers} layers, width {args.width}")
    print("Versions:", " ".join(f"{k} {v}" for k, v in versions().items()))
    print(table(["model", "trace and lower s", "compile s", "both s", "/ dense"], rows))


if __name__ == "__main__":
    main()
