"""QLoRA on a Flax NNX model, start to finish: python examples/nnx_finetune.py

A small decoder of Flax layers learns to write words backwards, in float. Wrapping the
model packs its kernels in 4 bits and freezes them. The adapters learn another task:
to write words backwards with every letter shifted by one (abz -> acb). About a minute
on two CPU cores; `--tiny` runs every step in seconds and learns nothing.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import qlora_jax as ql

LETTERS, LENGTH = 26, 6
VOCABULARY = LETTERS + 1  # the last token separates a word from its answer


class Block(nnx.Module):
    def __init__(self, dim: int, rngs: nnx.Rngs):
        self.norm1 = nnx.RMSNorm(dim, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, dim, decode=False, rngs=rngs)
        self.norm2 = nnx.RMSNorm(dim, rngs=rngs)
        self.gate = nnx.Linear(dim, 3 * dim, use_bias=False, rngs=rngs)
        self.up = nnx.Linear(dim, 3 * dim, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(3 * dim, dim, use_bias=False, rngs=rngs)

    def __call__(self, x):
        mask = nnx.make_causal_mask(x[..., 0])
        x = x + self.attention(self.norm1(x), mask=mask)
        y = self.norm2(x)
        return x + self.down(nnx.silu(self.gate(y)) * self.up(y))


class Decoder(nnx.Module):
    """Blocks stacked by `nnx.vmap` and run by `nnx.scan`, with one checkpoint each."""

    def __init__(self, dim: int, depth: int, rngs: nnx.Rngs):
        self.tokens = nnx.Embed(VOCABULARY, dim, rngs=rngs)
        self.positions = nnx.Embed(2 * LENGTH, dim, rngs=rngs)

        @nnx.split_rngs(splits=depth)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def create(rngs):
            return Block(dim, rngs)

        self.blocks = create(rngs)
        self.norm = nnx.RMSNorm(dim, rngs=rngs)
        self.head = nnx.Linear(dim, VOCABULARY, rngs=rngs)

    def __call__(self, tokens):
        x = self.tokens(tokens) + self.positions(jnp.arange(tokens.shape[1]))[None]

        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        @nnx.remat
        def run(block, x):
            return block(x)

        return self.head(self.norm(run(self.blocks, x)))


def make_batch(rng: np.random.Generator, size: int, shift: int):
    """Returns words, a separator, and the reversed words shifted by `shift` letters."""
    words = rng.integers(0, LETTERS, (size, LENGTH))
    answers = (words[:, ::-1] + shift) % LETTERS
    separator = np.full((size, 1), LETTERS)
    return jnp.asarray(np.concatenate([words, separator, answers], axis=1))


def answer_logits(model, sequences):
    return model(sequences[:, :-1])[:, LENGTH:]


def train(model, wrt, *, shift: int, steps: int, learning_rate: float, seed: int):
    """Trains the variables of type `wrt` and returns the last loss."""
    schedule = optax.cosine_decay_schedule(learning_rate, max(steps, 1))
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule))
    optimizer = nnx.Optimizer(model, tx, wrt=wrt)

    @nnx.jit
    def step(model, optimizer, sequences):
        def loss(model):
            logits, answers = (
                answer_logits(model, sequences),
                sequences[:, LENGTH + 1 :],
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, answers)
            return losses.mean()

        value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, wrt))(model)
        optimizer.update(model, grads)
        return value

    rng = np.random.default_rng(seed)
    loss = jnp.nan
    for i in range(steps):
        loss = step(model, optimizer, make_batch(rng, 64, shift))
        if i % 50 == 49:
            print(f"  step {i + 1:4d}  loss {float(loss):.4f}")
    state = jax.tree.leaves(nnx.state(optimizer, nnx.OptState))
    return float(loss), sum(x.nbytes for x in state)


def exact_match(model, shift: int, size: int = 256) -> float:
    """Returns the share of words for which greedy decoding gets every letter right."""
    sequences = make_batch(np.random.default_rng(12345), size, shift)
    run = nnx.jit(lambda model, tokens: model(tokens))
    written = jnp.where(jnp.arange(2 * LENGTH + 1) > LENGTH, 0, sequences)
    for i in range(LENGTH, 2 * LENGTH):
        logits = run(model, written[:, :-1])
        written = written.at[:, i + 1].set(jnp.argmax(logits[:, i], axis=-1))
    return float(jnp.mean(jnp.all(written == sequences, axis=1)))


def main():
    parser = argparse.ArgumentParser(description="QLoRA on a Flax NNX model")
    parser.add_argument("--tiny", action="store_true", help="a few steps of each kind")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--fmt", default="nf4")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    dim, depth, steps = (64, 2, 3) if args.tiny else (128, 2, args.steps)

    print("training a float model to write words backwards")
    model = Decoder(dim, depth, nnx.Rngs(args.seed))
    train(model, nnx.Param, shift=0, steps=steps, learning_rate=2e-3, seed=args.seed)
    print(f"exact match: {exact_match(model, shift=0):.0%}")

    config = ql.QLoRAConfig(
        rank=args.rank, alpha=2 * args.rank, fmt=args.fmt, targets=r"blocks/.*kernel"
    )
    model = ql.nnx.wrap(model, config, rngs=nnx.Rngs(args.seed + 1), donate=True)
    print(f"packed; exact match on the old task: {exact_match(model, shift=0):.0%}")
    print(f"on the new task, before: {exact_match(model, shift=1):.0%}")

    # LoRAParam is a subclass of Param: `wrt=nnx.Param` would train embeddings too.
    loss, optimizer_bytes = train(
        model,
        nnx.LoRAParam,
        shift=1,
        steps=steps,
        learning_rate=5e-3,
        seed=args.seed + 1,
    )
    print(f"on the new task, after: {exact_match(model, shift=1):.0%}, loss {loss:.4f}")
    print(ql.summary(*ql.nnx.split(model)))
    print(f"optimizer state: {optimizer_bytes:,} bytes")

    merged = ql.nnx.merge(model)
    print(f"merged into float, exact match: {exact_match(merged, shift=1):.0%}")


if __name__ == "__main__":
    main()
