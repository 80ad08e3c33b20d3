"""Checks a run of `train` before the model is read."""

import dataclasses
import datetime
import hashlib
import importlib
import json
import math
import pathlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

import qlora_jax as ql

from ..train.arrays import changes
from ..train.data.readers import describe_path
from .base_model import BaseModel, adapters_for, init_shapes, open_model
from .processes import is_first
from .program import make_mesh, make_place, make_schedule
from .pushing import check_base, push
from .run_folder import CONFIG, read_settings
from .train_config import LOGGERS, SWEPT, TrainConfig

# Settings that do not change the parameters that a run ends with, or do so only by
# the model's files and the data, whose hashes are compared.
FREE = """
out preview data model epochs keys template date stream
eval_batch_size eval_every eval_examples max_new_tokens samples
keep_best early_stopping_patience save_every keep resume resume_step on_nan
log log_every push_to_hub verbose remat base_memory offload_optimizer huge_pages
mesh distributed coordinator_address num_processes process_id
""".split()


@dataclass(frozen=True)
class Run:
    """A run whose settings, data and model fit."""

    config: TrainConfig  # with all settings resolved
    model: BaseModel  # with shapes for parameters
    packing: "ql.QLoRAConfig | None"  # how to pack kernels as they are read
    adapters: "ql.QLoRAConfig"
    tokenizer: "ql.train.Tokenizer"
    data: "ql.train.Dataset"
    stamp: dict[str, Any]  # must be equal in a resumed run
    mesh: Mesh | None  # None for one device
    place: Callable[[Any, Any], tuple[Any, Any]]  # puts base and lora on devices
    folder: pathlib.Path


def make_run(config: TrainConfig, today: str) -> Run:
    """Returns the run, having read its data; `today` must be equal in all processes."""
    _check_here(config)
    model = open_model(config.model, recode=config.recode)
    fmt = config.fmt or model.stored_fmt or "nf4"
    config = dataclasses.replace(config, fmt=fmt, model=model.name)
    if config.push_to_hub is not None:
        check_base(config.model)
        if is_first():
            push(config.push_to_hub)  # refuses now what it would later
    adapters = adapters_for(config, model)
    packing = model.packing(fmt, config.block_size, config.double_quant)
    mesh = make_mesh(config.mesh_sizes, jax.devices())
    base, lora = init_shapes(model.base, adapters)
    # Refuses what PEFT has no adapters of, before they are trained.
    ql.io.peft_config(base, lora, model.names)
    if packing is not None:
        base, _ = init_shapes(model.base, packing)
    # Refuses what does not divide.
    make_place(model.config, mesh, "device")(base, {})
    if config.base_memory == "host" and packing is None and model.stored_fmt is None:
        raise ValueError(
            "`base_memory` must be device for a model in float: packed layers alone "
            f"are kept in host memory. Got host, and fmt={config.fmt}."
        )
    if config.date is None:
        # A run that is resumed has the day on which it began.
        path = pathlib.Path(config.out) / CONFIG
        date = str(read_settings(path)["date"]) if config.resume else today
        config = dataclasses.replace(config, date=date)
    now = datetime.datetime.fromisoformat(str(config.date))
    tokenizer = ql.train.open_tokenizer(model.path, template=config.template, now=now)
    data = ql.train.read_dataset(
        config.data,
        tokenizer,
        vocab_size=model.config.vocab_size,
        max_length=config.max_length,
        keys=config.keys or None,
        train_on=config.train_on,
        stream=config.stream,
        validation_split=config.validation_split,
        seed=_data_seed(config),
        too_long=config.too_long,
        chat=config.chat,
        objective=config.objective,
    )
    if config.keep_best and not data.valid:
        raise ValueError(f"`keep_best` needs validation rows. {config.data} has none.")
    config = _resolved(config, data, None if packing else model.stored_packing)
    return Run(
        config,
        model,
        packing,
        adapters,
        tokenizer,
        data,
        stamp=_stamp(config, model, data),
        mesh=mesh,
        place=make_place(model.config, mesh, config.base_memory),
        folder=pathlib.Path(config.out),
    )


def run_beside(run: Run, config: TrainConfig) -> Run:
    """Returns the run of settings that differ only in what a sweep may change."""
    swept = {name: getattr(config, name) for name in SWEPT}
    return dataclasses.replace(
        run,
        config=dataclasses.replace(run.config, out=config.out, **swept),
        stamp=run.stamp | swept,
        folder=pathlib.Path(config.out),
    )


def _check_here(config: TrainConfig) -> None:
    """Imports what is first needed after hours; refuses what the devices cannot run."""
    if config.template is not None and not pathlib.Path(config.template).is_file():
        raise ValueError(
            f"`template` must be a file. Got {describe_path(config.template)}."
        )
    names = ["grain", "matplotlib", "optax", "orbax.checkpoint"]
    needed = dict.fromkeys(names, "train")
    for name, extra in (needed | {LOGGERS[x]: x for x in config.loggers}).items():
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ImportError(
                f"training needs: pip install 'qlora-jax[{extra}]'. {error}"
            ) from error
    platform = jax.default_backend()
    if config.attention == "splash" and platform != "tpu":
        raise ValueError(
            "`attention` must be xla without a TPU: splash is a kernel for TPUs. Got "
            f"splash, and devices of the platform {platform}."
        )
    wrong = "XLA computed wrong gradients with inputs of layers in host memory"
    if config.remat == "offload" and platform == "gpu":
        raise ValueError(
            f"`remat` must be true or false on a GPU, where {wrong}. Got offload."
        )
    if config.base_memory == "host" and platform == "gpu":
        raise ValueError(
            "`base_memory` must be device on a GPU, where a base in host memory is not "
            f"tested, and {wrong}. Got host."
        )


def _data_seed(config: TrainConfig) -> int:
    return config.seed if config.data_seed is None else config.data_seed


def make_batches(
    config: TrainConfig, data: "ql.train.Dataset", num_epochs: int | None = None
) -> Any:
    """Returns the batches of a run, by default without an end."""
    return ql.train.batches(
        data.train,
        batch_size=config.batch_size,
        max_length=config.max_length,
        seed=_data_seed(config),
        packing=config.packing,
        num_epochs=num_epochs,
        mix=data.mix,
    )


def _resolved(
    config: TrainConfig, data: "ql.train.Dataset", stored: Any
) -> TrainConfig:
    """Returns the settings, with values for those left open.

    `stored` is the packing of a base that is kept as its files have it.
    """
    steps = config.steps
    if steps is None:
        batches = sum(1 for _ in make_batches(config, data, num_epochs=1))
        steps = math.ceil((config.epochs or 1) * batches / config.accumulation)
    warmup = min(20, steps // 10) if config.warmup is None else config.warmup
    alpha = config.lora_r if config.lora_alpha is None else config.lora_alpha
    fmt = None if config.fmt == "none" else config.fmt
    packing = stored or ql.QLoRAConfig(
        fmt=fmt, block_size=config.block_size, double_quant=config.double_quant
    )
    resolved = dataclasses.replace(
        config,
        steps=steps,
        epochs=None,
        warmup=warmup,
        lora_alpha=alpha,
        block_size=packing.block_size,
        double_quant=packing.double_quant,
    )
    make_schedule(resolved)  # refuses what does not fit
    return resolved


def _stamp(config: TrainConfig, model: BaseModel, data: "ql.train.Dataset") -> dict:
    """Returns all that decides a run's final parameters, as JSON."""
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in FREE}
    if config.schedule == "constant":
        del settings["steps"]
    # States of before have none of these.
    names = "recode", "data_seed", "validation_split"
    # A `data_seed` of 0 is set, and equals False.
    unset = [x for x in names if settings[x] is None or settings[x] is False]
    if config.objective == "sft":
        unset += ["objective", "beta", "gamma"]
    for name in unset:
        del settings[name]
    settings["model's files"] = _files_hash(model.path)
    if data.mix:
        settings["rows and weights"] = data.mix
    settings["data"] = data.hash
    return json.loads(json.dumps(settings))


def check_stamp(then: Mapping[str, Any], now: Mapping[str, Any], out: str) -> None:
    """Raises ValueError that names each setting in which a resumed run differs."""
    if differing := changes(then, now, _written, missing="not set"):
        raise ValueError(
            f"`resume` must have the settings of the run in {out}. Got others: "
            f"{'; '.join(differing)}. Give the same ones, or start anew in another "
            "`out`."
        )


def _written(value: Any) -> str:
    """Returns a setting's text. A file's 16 is read as 16.0 where a float is meant."""
    is_whole = isinstance(value, float) and value.is_integer()
    return repr(int(value) if is_whole else value)


def _files_hash(path: pathlib.Path) -> str:
    """Returns a hash of a model's files: their sizes, and samples of their bytes."""
    found = hashlib.sha256()
    samples, size = 64, 1 << 14
    names = ["config.json", *sorted(p.name for p in path.glob("*.safetensors"))]
    for file in [path / name for name in names] if path.is_dir() else [path]:
        length = file.stat().st_size
        found.update(f"{file.name} {length}\n".encode())
        with file.open("rb") as opened:
            for place in np.linspace(0, max(0, length - size), samples, dtype=np.int64):
                opened.seek(int(place))
                found.update(opened.read(size))
    return found.hexdigest()[:16]
