"""QLoRA on a linen model of your own: python examples/wrap_your_model.py

Four lines know of the library; `Classifier` does not. `--tiny` takes two steps.
"""

import argparse

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import qlora_jax as ql


class Classifier(nn.Module):  # any linen model
    @nn.compact
    def __call__(self, x):
        x = x + nn.MultiHeadDotProductAttention(num_heads=4, name="attention")(x)
        x = nn.gelu(nn.Dense(256, name="up")(x))
        return nn.Dense(10, name="head")(x.mean(axis=1))


def main(steps: int):
    x = jax.random.normal(jax.random.key(0), (32, 8, 64))
    labels = jnp.arange(32) % 10
    model = Classifier()
    params = model.init(jax.random.key(1), x)["params"]

    config = ql.QLoRAConfig(rank=8, targets=r"(attention/.*|up)/kernel")
    base, lora = ql.linen.init(jax.random.key(2), model, params, config, x)
    model = ql.linen.wrap(model)
    print(ql.summary(base, lora))

    def loss_fn(lora, base):
        logits = model.apply({"params": base, "lora": lora}, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    tx = optax.adam(1e-2)
    state = tx.init(lora)

    @jax.jit
    def step(lora, state, base):
        loss, grads = jax.value_and_grad(loss_fn)(lora, base)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(lora, updates), state, loss

    losses = []
    for _ in range(steps):
        lora, state, loss = step(lora, state, base)
        losses.append(float(loss))
    print(f"loss: {losses[0]:.3f} at first, {losses[-1]:.3f} after {steps} steps")

    merged = ql.merge(base, lora)  # plain float parameters for the plain model
    difference = Classifier().apply({"params": merged}, x)
    difference -= model.apply({"params": base, "lora": lora}, x)
    print(f"merged and adapted logits differ by {float(abs(difference).max()):.1e}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="QLoRA on your own linen model")
    parser.add_argument("--tiny", action="store_true", help="two steps")
    main(2 if parser.parse_args().tiny else 100)
