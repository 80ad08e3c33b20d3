"""The adapter of a run's state, whether the run has finished or not."""

import dataclasses
import pathlib

import jax

import qlora_jax as ql

from .configs import ExportConfig
from .model import adapters_for, open_shapes
from .orbax_log import quiet_orbax
from .run_folder import CONFIG, STATE, read_config
from .train_config import TrainConfig


def save_run_adapter(config: ExportConfig, scratch: str) -> ExportConfig:
    """Writes the adapter of a run's state for PEFT.

    Nothing in the run's folder is changed, so that the run may go on meanwhile.

    Args:
        config: The run, and perhaps the step.
        scratch: The folder to write it to.

    Returns:
        The settings that export the adapter from there.

    Raises:
        ValueError: If the folder is not that of a run, or the state is not there or is
            damaged.
    """
    folder = pathlib.Path(str(config.run))
    if not (folder / CONFIG).is_file() or not (folder / STATE).is_dir():
        raise ValueError(
            f"`run` must be the folder of a run of train. Got {folder}, which has no "
            f"{CONFIG} or no folder {STATE}."
        )
    run = TrainConfig(**read_config(folder / CONFIG))
    source = config.model or run.model
    model = open_shapes(source)
    adapters = adapters_for(run, model)
    base, lora = jax.eval_shape(
        lambda base: ql.init(jax.random.key(0), base, adapters), model.base
    )
    states = ql.train.Checkpoints(folder / STATE, read_only=True)
    with quiet_orbax(), states:
        step = states.latest if config.step is None else config.step
        lora = states.restore_lora(lora, step)
    settings = ql.io.peft_config(base, lora, model.names, base_model=source)
    ql.io.save_peft(scratch, base, lora, model.names, settings)
    out = config.out or str(folder / f"adapter-{step}")
    return dataclasses.replace(
        config, model=source, adapter=scratch, run=None, step=None, out=out
    )
