"""The training step of each library of `tpu_peers.py`, lowered from shapes alone."""

import dataclasses
from typing import Any
from unittest import mock

import aot_scale
import jax
import jax.numpy as jnp
import numpy as np
import optax

# The linear modules of a layer, or of its attention, by the names of each library.
TARGETS = {
    "tunix": {"all": ".*(attn|mlp)/.*_proj", "attention": ".*attn/.*_proj"},
}


def qlora_jax_step(row: dict) -> Any:
    """The step of `qlora-jax train`, whose settings are those of the row."""
    settings = {k: v for k, v in row["settings"].items() if k != "peer"}
    return aot_scale.lower_row(row | {"settings": settings})


def tunix_step(row: dict) -> Any:
    """The step of Tunix's `PeftTrainer`, on a model with qwix's adapters."""
    import qwix
    from flax import nnx
    from tunix.sft import peft_trainer, utils

    settings, tokens = row["settings"], row["settings"]["max_length"]
    devices, _ = aot_scale.devices_of(row)
    provider = qwix.LoraProvider(
        module_path=TARGETS["tunix"][settings["targets"]],
        rank=settings["lora_r"],
        alpha=settings["lora_r"],
        weight_qtype=settings["weight_qtype"],
        tile_size=settings["tile_size"],
    )

    def make_model() -> nnx.Module:
        model = tunix_model(row)
        floats = nnx.state(model, nnx.Param)
        nnx.update(model, jax.tree.map(lambda x: x.astype(jnp.bfloat16), floats))
        inputs = model.get_model_input()
        return qwix.apply_lora_to_model(model, provider, rngs=nnx.Rngs(0), **inputs)

    def model_inputs(batch: peft_trainer.TrainingInput) -> dict:
        mask = jnp.asarray(batch.input_mask)
        return {
            "input_tokens": batch.input_tokens,
            "input_mask": mask,
            "positions": utils.build_positions_from_mask(mask),
            "attention_mask": utils.make_causal_attn_mask(mask),
        }

    model = nnx.eval_shape(make_model)
    config = peft_trainer.TrainingConfig(eval_every_n_steps=1, max_steps=1)
    trainer = peft_trainer.PeftTrainer(model, optax.adamw(1e-4), config)
    trainer.with_gen_model_input_fn(model_inputs)
    # The trainer has made zeros as the moments.
    optimizer = nnx.eval_shape(lambda: trainer.optimizer)
    mesh = jax.sharding.Mesh(np.array(devices[:1]).reshape(1, 1), ("fsdp", "tp"))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def on_chip(tree: Any) -> Any:
        def put(x):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

        return jax.tree.map(put, tree)

    batch = peft_trainer.TrainingInput(
        input_tokens=jax.ShapeDtypeStruct((1, tokens), jnp.int32, sharding=sharding),
        input_mask=jax.ShapeDtypeStruct((1, tokens), jnp.bool, sharding=sharding),
    )
    step = nnx.jit(trainer.create_train_step_fn(), donate_argnames=("optimizer",))
    with mock.patch("jax.devices", return_value=devices), mesh:
        return step.lower(on_chip(model), on_chip(optimizer), batch).lowered


def tunix_model(row: dict) -> Any:
    """Returns a model of Tunix with recomputed layers."""
    from flax import nnx
    from tunix.models.llama3 import model as llama3
    from tunix.models.qwen3 import model as qwen3

    if row["model"] == "Llama-3.1-8B":
        config = dataclasses.replace(
            llama3.ModelConfig.llama3p1_8b(), remat_config=llama3.RematConfig.DECODER,
            **row.get("test", {}),
        )
        return llama3.Llama3(config, rngs=nnx.Rngs(0))
    config = dataclasses.replace(
        qwen3.ModelConfig.qwen3_30b_a3b(),
        remat_config=qwen3.RematConfig.DECODER,
        use_flash_attention=True,
        dtype=jnp.bfloat16,
        param_dtype=jnp.bfloat16,
        **row.get("test", {}),
    )
    return qwen3.Qwen3(config, rngs=nnx.Rngs(0))


STEPS = {"qlora_jax": qlora_jax_step, "tunix": tunix_step}
