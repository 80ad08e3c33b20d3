"""QLoRA on a linen model of your own; `--tiny` takes two steps and not 100."""

import sys

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


x, labels = jax.random.normal(jax.random.key(0), (32, 8, 64)), jnp.arange(32) % 10
params = Classifier().init(jax.random.key(1), x)["params"]

config = ql.QLoRAConfig(rank=8, targets=r"(attention/.*|up)/kernel")
base, lora = ql.linen.init(jax.random.key(2), Classifier(), params, config, x)
model = ql.linen.wrap(Classifier())
print(ql.summary(base, lora))


def loss_fn(lora, base):
    logits = model.apply({"params": base, "lora": lora}, x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@jax.jit
def step(lora, state, base):
    loss, grads = jax.value_and_grad(loss_fn)(lora, base)
    updates, state = tx.update(grads, state)
    return optax.apply_updates(lora, updates), state, loss


tx = optax.adam(1e-2)
state = tx.init(lora)
for _ in range(2 if "--tiny" in sys.argv else 100):
    lora, state, loss = step(lora, state, base)
    print(f"loss {loss:.4f}", end="\r")

merged = ql.merge(base, lora)  # plain float parameters for the plain model
logits = Classifier().apply({"params": merged}, x)
difference = logits - model.apply({"params": base, "lora": lora}, x)
print(f"\nmerged and adapted logits differ by {abs(difference).max():.1e}")
