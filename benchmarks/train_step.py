"""A training step on this machine's CPU, compared with its base products alone.

    python benchmarks/train_step.py [--rounds 7] [--markdown FILE]

A step of SmolLM2-135M's shape: random weights, 16 x 75 tokens, all of them targets,
bfloat16, nf4, rank 16 on all seven kinds of layer, AdamW with clipping. Its *base
products* are those of the frozen weights, packed as in the step: products of the layers
forward and for the input gradient (forward twice with remat), and the head's logits and
their gradient. Here they are chained, with minimal work to make each depend on the one
before. The steps and the products take turns in a process, with a process for each
memory setting. Ratios are ratios of medians.
"""

import argparse
import json
import os
import subprocess
import sys
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from cases import RATE, SMOLLM2_135M, TINY_LLAMA, tokens
from jax_peers import language_model
from timing import interleave, make_parser, print_table

import qlora_jax as ql
from qlora_jax.llm.models.decoder import head_arguments
from qlora_jax.llm.models.products import einsum_f32

ROUNDS = 7
# Settings of glibc 2.35 and later: huge pages, one arena for all threads, and freed
# memory that stays in the process.
HUGE_PAGES = {"glibc.malloc.hugetlb": "1", "glibc.malloc.arena_max": "1"}
HUGE_PAGES |= {f"glibc.malloc.{x}_threshold": str(2**40) for x in ("mmap", "trim")}
MEMORY = {"as glibc takes it": {}, "huge pages, kept": HUGE_PAGES}
NAMES = {
    "chunked": "chunked loss",
    "whole": "loss on whole logits",
    "chunked-remat": "chunked loss, remat",
}
HEADER = ["memory", "step", "/ base products", "s", "base products s", "temporaries MB"]


def make_step(loss: str, remat: bool, case: dict):
    """Returns a call that takes a step, its base tree, and its temporaries in bytes."""
    peer = "qlora_jax-remat" if remat else "qlora_jax"
    model, base, lora, _ = language_model(peer, case)
    batch = tokens(case).astype(np.int32)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(RATE))

    def loss_fn(lora, base):
        variables = {"params": base, "lora": lora}
        if loss == "whole":
            logits = model.apply(variables, batch)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch)
        else:
            hidden = model.apply(variables, batch, return_hidden=True)
            head = head_arguments(model.config, base, lora)
            losses = ql.losses.chunked_cross_entropy(hidden, labels=batch, **head)
        return jnp.mean(losses)

    def step(lora, state, base):
        loss, grads = jax.value_and_grad(loss_fn)(lora, base)
        updates, state = optimizer.update(grads, state, lora)
        return optax.apply_updates(lora, updates), state, loss

    carried = [lora, optimizer.init(lora)]
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*carried, base).compile()

    def call():
        *carried[:], loss = compiled(*carried, base)
        jax.block_until_ready((carried, loss))

    return call, base, compiled.memory_analysis().temp_size_in_bytes


def base_products(base: dict, rows: int) -> dict:
    """Returns calls: products of the layers, with gradients too, and of the head."""
    layers = {**base["layers"]["self_attn"], **base["layers"]["mlp"]}
    kernels = {name: module["kernel"] for name, module in layers.items()}
    head = base["embed_tokens"]["embedding"]

    def forward(x, kernels):
        def layer(x, index):
            def product(x, name):
                return ql.matmul(x, kernels[name], layer=index)

            query, key, value = (product(x, f"{name}_proj") for name in "qkv")
            pair = jnp.concatenate([key, value], axis=-1)
            times = -(-query.shape[-1] // pair.shape[-1])
            query += jnp.tile(pair, (1, times))[:, : query.shape[-1]]
            x = product(query, "o_proj")
            return product(
                product(x, "gate_proj") + product(x, "up_proj"), "down_proj"
            ), None

        return jax.lax.scan(layer, x, jnp.arange(kernels["q_proj"].shape[0]))[0]

    def products_and_gradients(x, kernels):
        y, pull = jax.vjp(lambda x: forward(x, kernels), x)
        return pull(y)[0]

    def logits(x, head):
        y = einsum_f32("td,vd->tv", x, head)
        return einsum_f32("tv,vd->td", y.astype(x.dtype), head)

    x = jnp.ones((rows, head.shape[1]), head.dtype)
    compiled = {
        "forward": (jax.jit(forward), kernels),
        "both": (jax.jit(products_and_gradients), kernels),
        "head": (jax.jit(logits), head),
    }

    def bind(f, weights):
        return lambda: jax.block_until_ready(f(x, weights))

    return {name: bind(*pair) for name, pair in compiled.items()}


def measure(case: dict, rounds: int) -> list[dict]:
    """Returns a record for each kind of step, measured in this process."""
    calls, temporaries, base = {}, {}, {}
    for name in NAMES:
        loss, _, form = name.partition("-")
        calls[name], base, temporaries[name] = make_step(loss, form == "remat", case)
    calls |= base_products(base, case["rows"] * case["length"])
    for call in calls.values():
        call()  # warm-up

    def sampler(call):
        def sample():
            start = time.perf_counter()
            call()
            return time.perf_counter() - start

        return sample

    times = interleave({name: sampler(call) for name, call in calls.items()}, rounds)
    records = []
    for name in NAMES:
        products = times["both"].median + times["head"].median
        if name.endswith("remat"):
            products += times["forward"].median
        record = {"step": times[name].median, "products": products}
        records.append({"name": name, "temporaries": temporaries[name]} | record)
    return records


def in_process(memory: str, arguments: list[str]) -> list[dict]:
    """Runs `measure` in a process with this memory setting."""
    environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    settings = MEMORY[memory]
    if settings:
        pairs = [f"{name}={value}" for name, value in settings.items()]
        environment["GLIBC_TUNABLES"] = ":".join(pairs)
    command = [sys.executable, __file__, "--worker", *arguments]
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout)


def main() -> None:
    """Prints the report."""
    parser = make_parser(__doc__, ROUNDS)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    case = {"rows": 16, "length": 75, "rank": 16, "dtype": "bfloat16"}
    case["model"] = TINY_LLAMA if args.quick else SMOLLM2_135M
    if args.worker:
        print(json.dumps(measure(case, args.rounds)))
        return
    rows = []
    for memory in MEMORY:
        flags = ["--rounds", str(args.rounds), *["--quick"][: args.quick]]
        for record in in_process(memory, flags):
            ratio, nbytes = record["step"] / record["products"], record["temporaries"]
            numbers = (
                f"{ratio:.2f}",
                f"{record['step']:.2f}",
                f"{record['products']:.2f}",
            )
            rows.append(
                [memory, NAMES[record["name"]], *numbers, f"{nbytes / 1e6:.0f}"]
            )
    print_table(HEADER, rows, args.markdown)


if __name__ == "__main__":
    main()
