"""The training step of each library of `tpu_peers.py`, lowered from shapes alone."""

import dataclasses
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any
from unittest import mock

import aot_scale
import jax
import jax.numpy as jnp
import numpy as np
import optax


def tunix_step(row: dict) -> Any:
    """The step of Tunix's `PeftTrainer`, on a model with qwix's adapters."""
    import qwix
    from flax import nnx
    from tunix.sft import peft_trainer, utils

    settings, tokens = row["settings"], row["settings"]["max_length"]
    devices, _ = aot_scale.devices_of(row)
    provider = qwix.LoraProvider(
        module_path=settings["module_path"],
        rank=settings["rank"],
        alpha=settings["rank"],
        weight_qtype=settings["weight_qtype"],
        tile_size=settings["tile_size"],
    )

    def make_model() -> nnx.Module:
        model = tunix_model()
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

    def make_trainer(model: nnx.Module) -> peft_trainer.PeftTrainer:
        config = peft_trainer.TrainingConfig(eval_every_n_steps=1, max_steps=1)
        trainer = peft_trainer.PeftTrainer(model, optax.adamw(1e-4), config)
        return trainer.with_gen_model_input_fn(model_inputs)

    batch = peft_trainer.TrainingInput(
        input_tokens=jax.ShapeDtypeStruct((1, tokens), jnp.int32),
        input_mask=jax.ShapeDtypeStruct((1, tokens), jnp.bool),
    )
    mesh = jax.sharding.Mesh(np.array(devices[:1]).reshape(1, 1), ("fsdp", "tp"))
    with mock.patch("jax.devices", return_value=devices), mesh:
        return lower_peft_step(nnx.eval_shape(make_model), make_trainer, batch, mesh)


def lower_peft_step(
    model: Any, make_trainer: Callable[[Any], Any], batch: Any, mesh: jax.sharding.Mesh
) -> Any:
    """Lowers the step of a trainer of Tunix, as its `jit_train_and_eval_step` does."""
    from flax import nnx

    trainers = []

    def make_optimizer() -> nnx.Optimizer:
        trainers.append(make_trainer(model))
        return trainers[0].optimizer

    optimizer = nnx.eval_shape(make_optimizer)
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        (model, optimizer, batch),
    )
    step = trainers[0].create_train_step_fn()
    step = nnx.jit(step, donate_argnames=("optimizer",))
    return step.lower(*arguments).lowered


def tunix_model() -> Any:
    """Returns Tunix's Llama 3.1 8B, which recomputes its layers."""
    from flax import nnx
    from tunix.models.llama3 import model as llama3

    config = llama3.ModelConfig.llama3p1_8b()
    config = dataclasses.replace(config, remat_config=llama3.RematConfig.DECODER)
    return llama3.Llama3(config, rngs=nnx.Rngs(0))


def maxtext_step(row: dict) -> Any:
    """The step of MaxText's trainer of adapters (`trainers.post_train.sft.train_sft`).

    MaxText's mode for compiling ahead of time, `train_compile`, adds no adapters.
    """
    import maxtext
    from flax import nnx
    from flax.linen import partitioning
    from maxtext.configs import pyconfig
    from maxtext.optimizers import optimizers
    from maxtext.trainers.post_train.sft import train_sft
    from maxtext.utils import lora_utils, maxtext_utils, model_creation_utils

    settings = row["settings"]
    devices, _ = aot_scale.devices_of(row)
    path = pathlib.Path(maxtext.__file__).parent / "configs/post_train/sft.yml"
    options = {k: v for k, v in settings.items() if k not in ("peer", "max_length")}
    with mock.patch("jax.devices", return_value=devices[:1]):
        config = pyconfig.initialize(
            ["", str(path)],
            run_name="peers",
            base_output_directory=tempfile.gettempdir(),
            hardware="tpu",
            skip_jax_distributed_system=True,
            enable_checkpointing=False,
            log_config=False,
            steps=1000,
            max_target_length=settings["max_length"],
            **options,
        )
        grid = maxtext_utils.create_device_mesh(config, devices[:1])
        mesh = jax.sharding.Mesh(grid, config.mesh_axes)
        create_model = model_creation_utils.get_nnx_create_model_fn(config, mesh)

        def make_model() -> nnx.Module:
            # Without a mesh, arrays are not moved, which tracers cannot be.
            return lora_utils.apply_lora_to_model(create_model(), None, config)

        def make_trainer(model: nnx.Module) -> Any:
            schedule = maxtext_utils.create_learning_rate_schedule(config)
            optimizer = optimizers.get_optimizer(config, schedule, model)
            clip = optax.clip_by_global_norm(config.gradient_clipping_threshold)
            trainer = train_sft.MaxTextPeftTrainer(
                model, optax.chain(clip, optimizer), train_sft.get_tunix_config(config)
            )
            return train_sft.use_maxtext_loss_function(trainer, config)

        rules = partitioning.axis_rules(config.logical_axis_rules)
        with jax.set_mesh(mesh), rules:
            batch = maxtext_utils.get_shaped_batch(config)
            model = nnx.eval_shape(make_model)
            return lower_peft_step(model, make_trainer, batch, mesh)


STEPS = {
    "tunix": tunix_step,
    "maxtext": maxtext_step,
}
