"""Opens and reads a model for an adapter, with the weights that training used."""

import dataclasses
import os
import pathlib
from typing import Any

import jax
from jax.typing import DTypeLike

import qlora_jax as ql
from qlora_jax.io.files import check_links

from ..data.readers import describe_path
from ..reading import reading
from ..train.checkpoints import Checkpoints
from .adapters import init_shapes, lora_config_for, packing_config_for
from .configs import (
    PACKING_OPTIONS,
    EngineName,
    ExportConfig,
    GenerateConfig,
    ScoreConfig,
)
from .merge_aware import pack_as_trained, target_packing_of
from .open_model import OpenModel, hash_files, open_model
from .processes import log
from .run_folder import CONFIG, STATE, is_run, quiet_orbax, read_run_config
from .train_config import TrainConfig

# The arguments `packing_config` and `dtype` with which `OpenModel.read` returns the
# weights that training used. The dict is empty if training did not pack the weights in
# the model's files, but used them unchanged.
LoadOptions = dict[str, Any]
# The configs of commands that use an adapter or a run.
ConfigWithAdapter = ScoreConfig | ExportConfig | GenerateConfig


def run_config_of(config: ConfigWithAdapter) -> TrainConfig | None:
    """Returns the settings of a config's run, or of the run that wrote its adapter.

    A run writes its adapter into its folder, so the settings are in the folder that
    contains the adapter. An adapter in another folder has no known run.
    """
    if config.run is not None:
        return read_run_config(pathlib.Path(config.run) / CONFIG)
    if config.adapter is None:
        return None
    # Absolute, because "." has no parent.
    folder = pathlib.Path(os.path.abspath(os.path.expanduser(config.adapter))).parent
    try:
        return read_run_config(folder / CONFIG)
    except (OSError, ValueError):
        # Without the settings of a run, its base would be packed differently. In other
        # folders, the file may not exist or belong to another program.
        if is_run(folder):
            raise
        return None


def open_model_for(config: ConfigWithAdapter) -> OpenModel:
    """Returns a config's model with its adapter, before the weights are read."""
    step = config.step if isinstance(config, ExportConfig) else None
    engine = None if isinstance(config, ExportConfig) else config.engine
    if config.run is not None:
        return open_run(config.run, step, config.model, engine)
    if (run_config := run_config_of(config)) is not None:
        engine = engine or run_config.engine
    return open_model(str(config.model), config.adapter, engine or "auto")


def open_run(
    run: str,
    step: int | None = None,
    base_model: str | None = None,
    engine: EngineName | None = None,
) -> OpenModel:
    """Returns a run's model with the adapter of a saved state.

    By default, the state is the newest. The run may be unfinished, and is not changed.
    `base_model` and `engine` replace the run's settings unless they are None.
    """
    folder = pathlib.Path(run)
    if not (folder / CONFIG).is_file() or not (folder / STATE).is_dir():
        raise ValueError(
            f"`run` must be the folder of a run of train, with {CONFIG} and a folder "
            f"{STATE}. Got {describe_path(folder)}."
        )
    check_links(folder)
    config = read_run_config(folder / CONFIG)
    model = open_model(base_model or config.model, engine=engine or config.engine)
    packing_config = None
    if config.merge_aware:
        packing_config = packing_config_for(config, model)
    # Shapes are enough to restore the adapter, and to describe it for PEFT.
    base, lora = init_shapes(model.base, lora_config_for(config, model, packing_config))
    with quiet_orbax(), Checkpoints(folder / STATE, read_only=True) as checkpoints:
        step = checkpoints.latest if step is None else step
        lora = checkpoints.restore_lora(lora, step)
        with reading(state := folder / STATE / str(step)):
            trained_hash = checkpoints.metadata(step)["settings"]["model's files"]
    # Another base is only used if it is named.
    if base_model is None and trained_hash != hash_files(model.path):
        raise ValueError(
            f"`model` must be given for {state}, which was not trained on the files "
            f"in {model.path}."
        )
    peft = None
    if target_packing_of(lora) is None:
        source_names = {"base_model": model.name, "revision": model.revision}
        peft = ql.io.peft_config(base, lora, model.names, **source_names)
    return dataclasses.replace(model, base=base, lora=lora, peft=peft, step=step)


def training_load_options(config: ConfigWithAdapter, model: OpenModel) -> LoadOptions:
    """Returns options to read a model with the weights its adapter was trained on.

    The options come from the settings of the adapter's run, unless those in `config`
    name another packing. They are empty if the stored weights are used unchanged.
    Prints a note on stderr if the run used other weights.
    """
    run_config = run_config_of(config)
    options_set = {
        name: value
        for name in PACKING_OPTIONS
        if (value := getattr(config, name)) is not None
    }
    uses_run = run_config is not None and all(
        value == getattr(run_config, name) for name, value in options_set.items()
    )
    settings = run_config if uses_run else config
    fmt, block_size, double_quant = (getattr(settings, x) for x in PACKING_OPTIONS)
    if not uses_run and fmt in (None, "none") and model.stored_fmt is None:
        options_set.pop("fmt", None)
        for name, value in options_set.items():
            raise ValueError(
                f"`fmt` must be given with `{name}`: the format in which training "
                f"packed the model. Got fmt {fmt}, and {name} {value}."
            )
    if run_config is not None:
        _note_other_weights(model, fmt, run_config, uses_run)
    packing_config = model.packing_config(fmt or "none", block_size, double_quant)
    options: LoadOptions = {}
    if packing_config is not None:
        options["packing_config"] = packing_config
    # Training rounded the weights (or their sum with a merge-aware adapter) to the
    # dtype of the run before it packed them.
    if (
        run_config is not None
        and uses_run
        and (options or target_packing_of(model.lora) is not None)
    ):
        options["dtype"] = run_config.dtype
    return options


def _note_other_weights(
    model: OpenModel, fmt: str | None, run_config: TrainConfig, uses_run: bool
) -> None:
    """Prints a note if the weights are not those of the run that wrote the adapter."""
    paths = {os.path.realpath(path) for path in (model.name, run_config.model)}
    if uses_run and len(paths) == 1:
        return
    base_fmt = fmt or model.stored_fmt or "none"
    here = f"Its weights have fmt {base_fmt} here, as the options say"
    if len(paths) > 1:
        here = (
            f"The base here is {model.name} with fmt {base_fmt}. This is right if it "
            "was exported from the other one"
        )
    log(
        f"note: {run_config.out} was trained on {run_config.model} with fmt "
        f"{run_config.fmt}. {here}"
    )


def read_as_trained(
    model: OpenModel, options: LoadOptions, dtype: DTypeLike
) -> OpenModel:
    """Reads the weights that training used, with floats in `dtype`.

    `options` are from `training_load_options`. A merge-aware adapter becomes a part of
    the weights.
    """
    # Weights that training rounded before it packed them are read in the run's dtype.
    model = model.read(**{"dtype": dtype, **options})
    base, lora = pack_as_trained(model.base, model.lora)

    def cast_leaf(leaf: Any) -> Any:
        return leaf if ql.is_packed(leaf) else leaf.astype(dtype)

    base = jax.tree.map(cast_leaf, base, is_leaf=ql.is_packed)
    return dataclasses.replace(model, base=base, lora=lora)
