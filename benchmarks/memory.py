"""Memory that training needs, computed from shapes alone without any weights.

Bytes of trees are those of `jax.eval_shape`; bytes of a step are those of the compiled
program (`memory_analysis()`).
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from tpu_step import LLAMA_3_8B

import qlora_jax as ql
from qlora_jax.llm.data import Batch
from qlora_jax.llm.models.config import DecoderConfig, LayerKind, Rope
from qlora_jax.llm.models.decoder import Decoder
from qlora_jax.llm.train import (
    State,
    decoder_loss,
    make_optimizer,
    make_schedule,
    make_step,
)

# Shapes of each model's `config.json`.
MODELS = {
    "SmolLM2-135M": DecoderConfig(
        49152,
        576,
        1536,
        30,
        num_heads=9,
        num_kv_heads=3,
        layers=(LayerKind(Rope(100_000.0)),),
    ),
    "Llama-3.2-1B": DecoderConfig(
        128256,
        2048,
        8192,
        16,
        num_heads=32,
        num_kv_heads=8,
        layers=(LayerKind(Rope(500_000.0)),),
    ),
    "Llama-3.2-3B": DecoderConfig(
        128256,
        3072,
        8192,
        28,
        num_heads=24,
        num_kv_heads=8,
        layers=(LayerKind(Rope(500_000.0)),),
    ),
    "Llama-3.1-8B": LLAMA_3_8B,
    "Llama-3.1-70B": DecoderConfig(
        128256,
        8192,
        28672,
        80,
        num_heads=64,
        num_kv_heads=8,
        layers=(LayerKind(Rope(500_000.0)),),
        tie_embeddings=False,
    ),
}
RANK, TARGETS = 16, r"layers/.*_proj/kernel"
# The widest batch of 16 rows of `examples/make_data.py --spelled`: rows, tokens, and
# trained tokens.
BATCH, TOKENS, ANSWER = 16, 112, 48


def nbytes(tree: Any) -> int:
    """Bytes of a tree of arrays or shapes."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def abstract_trees(model: Decoder, fmt: str | None, rank: int = RANK):
    """Shapes of the parameters in bfloat16, and of the base and lora trees."""
    config = ql.QLoRAConfig(rank=rank, fmt=fmt, targets=TARGETS)
    tokens = jnp.zeros((1, 8), jnp.int32)

    def make_trees(key):
        params = model.init(key, tokens)["params"]
        params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
        return params, *ql.linen.init(key, model, params, config, tokens)

    return jax.eval_shape(make_trees, jax.random.key(0))


def model_memory(config: DecoderConfig) -> dict[str, dict[str, int]]:
    """Returns the bytes of weights, adapters and AdamW's state for each way to train.

    Args:
        config: The model's shapes.

    Returns:
        For "full", "lora" and "qlora": the bytes of "base", "adapter" and "optimizer".
    """
    model, state = Decoder(config, dtype=jnp.bfloat16), optax.adamw(1e-4).init
    rows = {}
    for name, fmt in (("lora", None), ("qlora", "nf4")):
        params, base, lora = abstract_trees(model, fmt)
        rows[name] = _row(base, lora, jax.eval_shape(state, lora))
        rows["full"] = _row(params, (), jax.eval_shape(state, params))
    return {name: rows[name] for name in ("full", "lora", "qlora")}


def _row(base: Any, lora: Any, state: Any) -> dict[str, int]:
    summary = ql.summary(base, lora or {})
    return {
        "base": summary.base_bytes,
        "adapter": summary.lora_bytes,
        "optimizer": nbytes(state),
    }


def step_memory(
    config: DecoderConfig, fmt: str | None, remat: bool, shape: tuple[int, int, int]
) -> dict[str, int]:
    """Returns the bytes that a step of `qlora-jax train` needs at its peak.

    Args:
        config: The model's shapes.
        fmt: Number format of the frozen kernels; None for bfloat16.
        remat: Whether the backward pass recomputes each layer.
        shape: Rows, tokens of a row, and how many of them are trained.

    Returns:
        The bytes of "base", "adapter", "optimizer", and "temporaries", which the
        compiled program allocates besides its arguments for activations, gradients and
        decoded weights.

    Raises:
        RuntimeError: If the size of the program's arguments is not that of the trees.
    """
    model = Decoder(config, dtype=jnp.bfloat16, remat=remat)
    _, base, lora = abstract_trees(model, fmt)
    schedule = make_schedule("cosine", 1e-3, 400, warmup=20)
    optimizer = make_optimizer("adamw", schedule)
    state = jax.eval_shape(lambda x: State.create(x, optimizer, 0), lora)
    rows, tokens, answer = shape

    def shape_struct(n, dtype=jnp.int32):
        return jax.ShapeDtypeStruct((rows, n), dtype)

    all_tokens, trained_tokens = shape_struct(tokens), shape_struct(answer)
    shapes: Any = (
        all_tokens,
        all_tokens,
        all_tokens,
        trained_tokens,
        trained_tokens,
        shape_struct(answer, jnp.float32),
    )
    batch = Batch(*shapes)
    wrapped = ql.linen.wrap(model, scanned=model.scanned)
    step = make_step(decoder_loss(wrapped), optimizer)
    jitted = jax.jit(step, donate_argnums=0)
    compiled = jitted.lower(state, base, [batch]).compile()
    analysis: Any = compiled.memory_analysis()
    argument_bytes = nbytes((base, state, batch))
    if analysis.argument_size_in_bytes != argument_bytes:
        raise RuntimeError(
            f"The step's arguments must have {argument_bytes} bytes. Got "
            f"{analysis.argument_size_in_bytes}."
        )
    # Results are written over the adapter and the state, which are donated.
    new = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return _row(base, lora, state.opt_state) | {
        "temporaries": analysis.temp_size_in_bytes + new
    }
