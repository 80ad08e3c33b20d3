"""The training step of each library of `tpu_peers.py`, lowered from shapes alone."""

import dataclasses
import os
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
        weight_qtype=settings.get("weight_qtype"),
        tile_size=settings.get("tile_size"),
    )

    def make_model() -> nnx.Module:
        model = TUNIX_MODELS[row["model"]]()
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

    def place(tree: Any) -> Any:
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
        )

    def place_module(module: Any) -> Any:
        # `jax.tree.map` over a module would copy the variables that its parts share.
        graphdef, state = nnx.split(module)
        return nnx.merge(graphdef, place(state))

    arguments = place_module(model), place_module(optimizer), place(batch)
    step = trainers[0].create_train_step_fn()
    step = nnx.jit(step, donate_argnames=("optimizer",))
    return step.lower(*arguments).lowered


def tunix_llama() -> Any:
    """Returns Tunix's Llama 3.1 8B, which recomputes its layers."""
    from flax import nnx
    from tunix.models.llama3 import model as llama3

    config = llama3.ModelConfig.llama3p1_8b()
    config = dataclasses.replace(config, remat_config=llama3.RematConfig.DECODER)
    return llama3.Llama3(config, rngs=nnx.Rngs(0))


def tunix_qwen3_moe() -> Any:
    """Returns Tunix's Qwen3 30B-A3B, which recomputes its layers."""
    from flax import nnx
    from tunix.models.qwen3 import model as qwen3

    config = dataclasses.replace(
        qwen3.ModelConfig.qwen3_30b_a3b(),
        remat_config=qwen3.RematConfig.DECODER,
        use_flash_attention=True,
        dtype=jnp.bfloat16,
        param_dtype=jnp.bfloat16,
    )
    return qwen3.Qwen3(config, rngs=nnx.Rngs(0))


TUNIX_MODELS = {"Llama-3.1-8B": tunix_llama, "Qwen3-30B-A3B": tunix_qwen3_moe}


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
            model = lora_utils.apply_lora_to_model(create_model(), None, config)
            # What layers recorded when adapters were added, as the trainer does.
            nnx.pop(model, nnx.Intermediate)
            return model

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


def keras_step(row: dict) -> Any:
    """The step of Keras' trainer, on the Llama of keras-hub with its `enable_lora`.

    `quantize("int4")` computes with NumPy, so it cannot run on shapes. The 4-bit layers
    are created by the dtype policies that it gives to layers, as when a model that was
    quantized is read from a file.
    """
    os.environ["KERAS_BACKEND"] = "jax"
    import keras
    import keras_hub

    settings, shape = row["settings"], (1, row["settings"]["max_length"])
    devices, _ = aot_scale.devices_of(row)
    layers = [f"transformer_layer_{i}" for i in range(32)]
    policies = keras.dtype_policies.DTypePolicyMap("bfloat16")
    if settings.get("quantize"):
        names = "|".join([*settings["target_layer_names"], "token_embedding"])
        policies[f"(.*/)?({names})"] = "int4/128_from_bfloat16"
    models = []

    def remat(layer_call: Callable[..., Any]) -> Callable[..., Any]:
        # Keras' `remat` is `jax.checkpoint`, which traces the argument `training`.
        def rematerialized_call(*args, **options):
            return jax.checkpoint(lambda *args: layer_call(*args, **options))(*args)

        return rematerialized_call

    def make_state() -> Any:
        with keras.RematScope("list_of_layers", layer_names=layers):
            backbone = keras_hub.models.Llama3Backbone(
                vocabulary_size=128256,
                num_layers=len(layers),
                num_query_heads=32,
                hidden_dim=4096,
                intermediate_dim=14336,
                num_key_value_heads=8,
                rope_max_wavelength=500000,
                rope_frequency_adjustment_factor=8,
                rope_low_freq_factor=1,
                rope_high_freq_factor=4,
                rope_pretraining_sequence_length=8192,
                dtype=policies,
            )
        backbone.enable_lora(settings["rank"], settings["target_layer_names"])
        model = keras_hub.models.Llama3CausalLM(backbone, preprocessor=None)
        model.compile(keras.optimizers.AdamW(1e-4), weighted_metrics=None)
        model._symbolic_build(data_batch=batch)
        models.append(model)
        return model._get_jax_state(True, True, True, True)

    ids = jax.ShapeDtypeStruct(shape, jnp.int32)
    weights = jax.ShapeDtypeStruct(shape, jnp.float32)
    batch = ({"token_ids": ids, "padding_mask": ids}, ids, weights)
    sharding = jax.sharding.SingleDeviceSharding(devices[0])
    patch_remat = mock.patch("keras.src.backend.jax.core.remat", remat)
    with mock.patch("jax.devices", return_value=devices[:1]), patch_remat:
        arguments = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            (jax.eval_shape(make_state), batch),
        )
        # The same call as in `make_train_function`, which needs an iterator.
        return jax.jit(models[0].train_step, donate_argnums=0).lower(*arguments)


STEPS = {
    "qlora_jax": aot_scale.lower_row,
    "tunix": tunix_step,
    "maxtext": maxtext_step,
    "keras-hub": keras_step,
}
