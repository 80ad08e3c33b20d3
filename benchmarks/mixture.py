"""A small mixture of experts: trained from scratch, then fine-tuned in 4 bits.

    python benchmarks/mixture.py [--steps 400] [--tuning-steps 100] [--markdown FILE]

A Qwen3-MoE of 2 layers with 8 experts, of which 2 are active per token, learns the Old
Testament in float32, with a load-balancing loss. Then LoRA of attention and experts is
trained on the New Testament, over the base in float and in several number formats. The
table has the loss on held-out chapters of the New Testament, in nats per token, before
and after; the loads of the busiest and of the idlest expert, in multiples of an even
load; and the share of expert choices that equal those of the run in float.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import argparse
from typing import Any

import formats_model
import jax
import jax.numpy as jnp
import numpy as np
import optax
from timing import print_table
from tqdm import tqdm

import qlora_jax as ql
from qlora_jax.llm.models.decoder import Decoder
from qlora_jax.llm.models.experts import balance_loss, choose_experts
from qlora_jax.llm.models.families import config_from_hf

CONFIG = config_from_hf(
    formats_model.CONFIG
    | {
        "model_type": "qwen3_moe",
        "architectures": None,
        "vocab_size": 512,
        "hidden_size": 64,
        "head_dim": 32,
        "num_attention_heads": 2,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "norm_topk_prob": True,
        "output_router_logits": True,
        "router_aux_loss_coef": 0.01,
    }
)
EXPERTS: Any = CONFIG.experts
ROWS, LENGTH = 8, 64  # of a batch
TARGETS = r"layers/(self_attn|mlp/experts)/.*/kernel"
FORMATS = (None, "nf4", "mxfp4")
HEADER = ["base", "loss before", "loss after", "busiest", "idlest", "same experts, %"]


def run(base, lora, tokens):
    """Returns the mean loss, and the routers' logits `[L, M, E]`."""
    model = ql.linen.wrap(Decoder(CONFIG), scanned=Decoder.scanned)
    variables = {"params": base, "lora": lora}
    logits, collections = model.apply(variables, tokens[:, :-1], mutable="router")
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return jnp.mean(losses), collections["router"]["layers"]["mlp"]["logits"][0]


def balanced_loss(base, lora, tokens):
    """Returns the loss of a training step."""
    loss, routes = run(base, lora, tokens)
    added = balance_loss(routes, jnp.ones(routes.shape[1]), EXPERTS)
    return loss + EXPERTS.balance * added


def fit(loss, trained, ids, steps, rate):
    """Returns the trained parameters after steps on random pieces of a text."""
    rates = optax.linear_schedule(rate, rate / 10, steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rates))

    @jax.jit
    def step(trained, state, tokens):
        updates, state = optimizer.update(jax.grad(loss)(trained, tokens), state)
        return optax.apply_updates(trained, updates), state

    state, rng = optimizer.init(trained), np.random.default_rng(1)
    for _ in tqdm(range(steps), mininterval=10):
        starts = rng.integers(0, len(ids) - LENGTH, ROWS)
        tokens = np.stack([ids[s : s + LENGTH + 1] for s in starts])
        trained, state = step(trained, state, tokens)
    return trained


def row(fmt, params, ids, tokens, steps, expected):
    """Returns a format's row of the table, and the experts that it chooses."""
    qlora = ql.QLoRAConfig(rank=8, fmt=fmt, targets=TARGETS)
    base, lora = ql.init(jax.random.key(0), params, qlora)
    lora = fit(lambda lora, x: balanced_loss(base, lora, x), lora, ids, steps, 2e-3)
    measure = jax.jit(run)
    (before, _), (after, routes) = (
        measure(base, {}, tokens),
        measure(base, lora, tokens),
    )
    chosen = np.sort(choose_experts(routes, EXPERTS)[1], axis=-1)
    count = EXPERTS.count
    loads = np.stack([np.bincount(x.ravel(), minlength=count) for x in chosen])
    loads = loads / loads.mean(axis=1, keepdims=True)
    same = 100 * np.mean(chosen == (chosen if expected is None else expected))
    measurements = [
        f"{before:.3f}",
        f"{after:.3f}",
        f"{loads.max():.2f}",
        f"{loads.min():.2f}",
    ]
    return [fmt or "float32", *measurements, f"{same:.1f}"], chosen


def main(argv=None):
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--tuning-steps", type=int, default=100)
    parser.add_argument("--markdown")
    args = parser.parse_args(argv)
    chapters = formats_model.read_chapters()
    old, _ = formats_model.split(chapters[: formats_model.OLD])
    new, held_out = formats_model.split(chapters[formats_model.OLD :])
    tokenizer = formats_model.train_tokenizer(old, CONFIG.vocab_size)

    def encode(text):
        return np.asarray(tokenizer.encode(text).ids, np.int32)

    params = fit(
        lambda params, x: balanced_loss(params, {}, x),
        formats_model.init(CONFIG),
        encode(old),
        args.steps,
        5e-3,
    )
    tokens = encode(held_out)[: 128 * (LENGTH + 1)].reshape(128, -1)
    rows, first = [], None
    for fmt in FORMATS:
        cells, chosen = row(fmt, params, encode(new), tokens, args.tuning_steps, first)
        first = chosen if first is None else first
        rows.append(cells)
    print_table(HEADER, rows, args.markdown)


if __name__ == "__main__":
    main()
