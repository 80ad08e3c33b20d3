"""QLoRA on your own linen model, whose adapters are merged at the end.

`--tiny` takes 2 steps in place of 100.
"""

import sys

import flax.linen as nn
import jax
import optax

import qlora_jax as ql


class Classifier(nn.Module):  # any linen model
    @nn.compact
    def __call__(self, x):
        x = x + nn.MultiHeadDotProductAttention(num_heads=4, name="attention")(x)
        return nn.Dense(10, name="head")(x.mean(axis=1))


x = jax.random.normal(jax.random.key(0), (32, 8, 64))
labels = jax.random.randint(jax.random.key(1), (32,), 0, 10)
params = Classifier().init(jax.random.key(2), x)["params"]

config = ql.QLoRAConfig(rank=8, targets=r"attention/.*/kernel")
base, lora = ql.linen.init(jax.random.key(3), Classifier(), params, config, x)
model = ql.linen.wrap(Classifier())


def loss_fn(lora, base):
    logits = model.apply({"params": base, "lora": lora}, x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@jax.jit
def step(lora, state, base):
    grads = jax.grad(loss_fn)(lora, base)
    updates, state = tx.update(grads, state)
    return optax.apply_updates(lora, updates), state


tx = optax.adam(1e-2)
state = tx.init(lora)
for _ in range(2 if "--tiny" in sys.argv else 100):
    lora, state = step(lora, state, base)

logits = jax.jit(Classifier().apply)({"params": ql.merge(base, lora)}, x)
print(f"merged: {(logits.argmax(-1) == labels).mean():.0%} of the labels right")
