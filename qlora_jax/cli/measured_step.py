"""A step of training on this machine's device, compared with the CPU's."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import qlora_jax as ql

from ..models.decoder import Decoder
from ..models.families import config_from_hf
from ..models.tiny import CONFIG, random_params
from .measured_products import medians, on_cpu

_SIZES = dict(hidden_size=256, intermediate_size=768, vocab_size=512)
_TOKENS = 8, 128
# Programs of other devices sum in another order, and round activations to 8 bits of
# precision: the loss is a mean over many.
_BOUND = 0.01


def check_step(rounds: int) -> dict[str, Any]:
    """Returns the loss of a tiny Llama after two steps in nf4, time and memory."""
    loss, call, plan = _train(steps=2)
    with on_cpu() as is_other:
        cpu = _train(steps=2)[0] if is_other else None
    seconds = medians({"step": call}, rounds)["step"]
    stats = jax.local_devices()[0].memory_stats() or {}
    is_right = math.isfinite(loss)
    if cpu is not None:
        is_right &= abs(loss - cpu) <= _BOUND * abs(cpu)
    return {
        "loss": loss if math.isfinite(loss) else None,
        "cpu": cpu,
        "bound": _BOUND,
        "is_right": is_right,
        "seconds": seconds,
        "tokens_per_s": np.prod(_TOKENS).item() / seconds,
        "planned_bytes": plan,
        "peak_bytes": stats.get("peak_bytes_in_use"),
    }


def _train(steps: int) -> tuple[float, Callable[[], jax.Array], int]:
    """Returns the loss after steps, a call of one more, and the bytes it plans."""
    config, rng = config_from_hf({**CONFIG, **_SIZES}), np.random.default_rng(0)
    params = random_params(config)
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params)
    base, lora = ql.init(jax.random.key(0), params, ql.QLoRAConfig(rank=16))
    module = Decoder(config, dtype=jnp.dtype(jnp.bfloat16), remat=True)
    model = ql.linen.wrap(module, scanned=module.scanned)
    optimizer = ql.train.make_optimizer("adamw", 1e-3)
    step = ql.train.make_step(ql.train.decoder_loss(model), optimizer)
    ids = rng.integers(0, config.vocab_size, _TOKENS, np.int32)
    rows = [ql.train.Row(row, row, "random") for row in ids]
    count, length = _TOKENS
    [batch] = ql.train.eval_batches(rows, batch_size=count, max_length=length)
    held = [ql.train.State.create(lora, optimizer, 0)]
    memory = step.lower(held[0], base, batch).compile().memory_analysis()
    names = "argument", "output", "temp", "alias"
    sizes = [getattr(memory, f"{name}_size_in_bytes", 0) for name in names]

    def call() -> jax.Array:
        held[0], report = step(held[0], base, [batch])
        return report.loss

    *_, loss = [float(call()) for _ in range(steps + 1)]
    return loss, call, sum(sizes[:3]) - sizes[3]
