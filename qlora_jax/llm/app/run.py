"""Prepares the runs of `train`, and checks them before the model is read."""

import dataclasses
import datetime
import hashlib
import importlib
import itertools
import json
import math
import pathlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree

import qlora_jax as ql

from ..data.batching import Batch, batches
from ..data.chat_tokenizer import Tokenizer, open_tokenizer
from ..data.dataset import Dataset, read_dataset
from ..data.readers import describe_path
from ..train.arrays import changes
from .base_model import BaseModel, adapters_for, init_shapes, open_model
from .processes import is_first
from .program import make_mesh, make_place, make_schedule
from .pushing import check_base, push
from .run_folder import CONFIG, FAILED, read_settings
from .train_config import LOGGERS, SWEPT, TrainConfig

if TYPE_CHECKING:
    import grain

# Settings that may change when a run is resumed. They do not affect the final weights,
# except through the model's files and the data, whose hashes are in the stamp.
NOT_STAMPED = """
out preview data model epochs keys template date stream
eval_batch_size eval_every eval_examples max_new_tokens samples
keep_best early_stopping_patience save_every keep resume resume_step on_nan
log log_every push_to_hub verbose remat base_memory offload_optimizer huge_pages
mesh distributed coordinator_address num_processes process_id
""".split()


@dataclass(frozen=True)
class Run:
    """A run whose settings, data and model were checked to be compatible."""

    config: TrainConfig  # with every setting resolved
    model: BaseModel  # with shapes instead of parameters
    packing: ql.QLoRAConfig | None  # packs kernels as they are read
    adapters: ql.QLoRAConfig
    tokenizer: Tokenizer
    data: Dataset
    stamp: dict[str, Any]  # must be equal when the run is resumed
    mesh: Mesh | None  # None for one device
    place: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]]  # puts trees on devices
    folder: pathlib.Path


def make_run(config: TrainConfig, today: str) -> Run:
    """Returns the run, with its data read; `today` must be equal in all processes."""
    _check_environment(config)
    # The model: its shapes, and the formats of its weights.
    model = open_model(config.model, recode=config.recode)
    fmt = config.fmt or model.stored_fmt or "nf4"
    config = dataclasses.replace(config, fmt=fmt, model=model.name)
    if config.push_to_hub is not None:
        check_base(config.model)
        if is_first():
            push(config.push_to_hub)  # fails now rather than after training
    adapters = adapters_for(config, model)
    packing = model.packing(fmt, config.block_size, config.double_quant)
    mesh = make_mesh(config.mesh_sizes, jax.devices())
    _check_model_fits(config, model, adapters, packing, mesh)
    # The data. A resumed run keeps the date of its start.
    if config.date is None:
        path = pathlib.Path(config.out) / CONFIG
        date = str(read_settings(path)["date"]) if config.resume else today
        config = dataclasses.replace(config, date=date)
    now = datetime.datetime.fromisoformat(str(config.date))
    tokenizer = open_tokenizer(model.path, template=config.template, now=now)
    data = _read_data(config, model, tokenizer)
    # The settings that depend on the data or on the model.
    config = _resolve(config, data, None if packing else model.stored_packing)
    return Run(
        config,
        model,
        packing,
        adapters,
        tokenizer,
        data,
        stamp=_make_stamp(config, model, data),
        mesh=mesh,
        place=make_place(model.config, mesh, config.base_memory),
        folder=pathlib.Path(config.out),
    )


def _check_environment(config: TrainConfig) -> None:
    """Imports every library of a run, and checks what the devices support."""
    if config.template is not None and not pathlib.Path(config.template).is_file():
        raise ValueError(
            f"`template` must be a file. Got {describe_path(config.template)}."
        )
    # Some libraries are first used at the end, perhaps after hours of training.
    libraries = ["grain", "matplotlib", "optax", "orbax.checkpoint"]
    extras = dict.fromkeys(libraries, "train")
    for name, extra in (extras | {LOGGERS[x]: x for x in config.loggers}).items():
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ImportError(
                f"training needs: pip install 'qlora-jax[{extra}]'. {error}"
            ) from error
    platform = jax.default_backend()
    if config.attention == "splash" and platform != "tpu":
        raise ValueError(
            "`attention` must be xla without a TPU, because splash is a kernel for "
            f"TPUs. Got splash, and devices of the platform {platform}."
        )
    reason = "XLA computes wrong gradients if the inputs of layers are in host memory"
    if config.remat == "offload" and platform == "gpu":
        raise ValueError(
            f"`remat` must be true or false on a GPU, where {reason}. Got offload."
        )
    if config.base_memory == "host" and platform == "gpu":
        raise ValueError(
            "`base_memory` must be device on a GPU, where a base in host memory is not "
            f"tested, and {reason}. Got host."
        )


def _check_model_fits(
    config: TrainConfig,
    model: BaseModel,
    adapters: ql.QLoRAConfig,
    packing: ql.QLoRAConfig | None,
    mesh: Mesh | None,
) -> None:
    base, lora = init_shapes(model.base, adapters)
    ql.io.peft_config(base, lora, model.names)  # raises if PEFT does not support them
    if packing is not None:
        base, _ = init_shapes(model.base, packing)
    # Raises if the mesh cannot split the weights.
    make_place(model.config, mesh, "device")(base, {})
    if config.base_memory == "host" and packing is None and model.stored_fmt is None:
        raise ValueError(
            "`base_memory` must be device for a float model, because only packed "
            f"layers can stay in host memory. Got host, and fmt={config.fmt}."
        )


def _read_data(config: TrainConfig, model: BaseModel, tokenizer: Tokenizer) -> Dataset:
    data = read_dataset(
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
    return data


def _data_seed(config: TrainConfig) -> int:
    return config.seed if config.data_seed is None else config.data_seed


def make_batches(
    config: TrainConfig, data: Dataset, num_epochs: int | None = None
) -> "grain.DatasetIterator[Batch]":
    """Returns an iterator over the batches of a run, endless by default."""
    return batches(
        data.train,
        batch_size=config.batch_size,
        max_length=config.max_length,
        seed=_data_seed(config),
        packing=config.packing,
        num_epochs=num_epochs,
        mix=data.mix,
    )


def _resolve(config: TrainConfig, data: Dataset, stored_packing: Any) -> TrainConfig:
    """Returns the settings, with values for those that were left unset.

    `stored_packing` is the packing of a base that is used as stored, otherwise None.
    """
    steps = config.steps
    if steps is None:
        num_batches = sum(1 for _ in make_batches(config, data, num_epochs=1))
        steps = math.ceil((config.epochs or 1) * num_batches / config.accumulation)
    warmup = min(20, steps // 10) if config.warmup is None else config.warmup
    alpha = config.lora_r if config.lora_alpha is None else config.lora_alpha
    fmt = None if config.fmt == "none" else config.fmt
    packing = stored_packing or ql.QLoRAConfig(
        fmt=fmt, block_size=config.block_size, double_quant=config.double_quant
    )  # fills in the format's defaults
    resolved = dataclasses.replace(
        config,
        steps=steps,
        epochs=None,
        warmup=warmup,
        lora_alpha=alpha,
        block_size=packing.block_size,
        double_quant=packing.double_quant,
    )
    make_schedule(
        resolved, resolved.learning_rate
    )  # raises if the schedule does not fit the steps
    return resolved


# Runs of a sweep


def members_of(config: TrainConfig) -> list[TrainConfig]:
    """Returns the settings of each run of a sweep.

    Runs that failed are left out when the others are resumed.
    """
    if not config.is_sweep:
        return [config]
    swept = {name: getattr(config, name) for name in SWEPT}
    lists = {name: values for name, values in swept.items() if isinstance(values, list)}
    data_seed = config.data_seed
    if data_seed is None:  # all runs see the data in the same order
        data_seed = config.seed[0] if isinstance(config.seed, list) else config.seed
    members = []
    for values in itertools.product(*lists.values()):
        settings = dict(zip(lists, values, strict=True))
        name = "_".join(f"{key}={value}" for key, value in settings.items())
        out = pathlib.Path(config.out) / name
        settings |= {"out": str(out), "data_seed": data_seed}
        if not (config.resume and (out / FAILED).is_file()):
            members.append(dataclasses.replace(config, **settings))
    return members


def make_sibling(run: Run, config: TrainConfig) -> Run:
    """Returns the run of another member of the sweep, with the same model and data."""
    swept = {name: getattr(config, name) for name in SWEPT}
    return dataclasses.replace(
        run,
        config=dataclasses.replace(run.config, out=config.out, **swept),
        stamp=run.stamp | swept,
        folder=pathlib.Path(config.out),
    )


# What must stay the same when a run is resumed


def _make_stamp(config: TrainConfig, model: BaseModel, data: Dataset) -> dict[str, Any]:
    """Returns everything that determines a run's final parameters, as JSON values."""
    settings = dataclasses.asdict(config)
    settings = {k: x for k, x in settings.items() if k not in NOT_STAMPED}
    if config.schedule == "constant":
        del settings["steps"]  # such a run may be extended
    # Older saved states lack these settings, which are therefore left out if unset.
    # `is False` rather than `== False`, because `data_seed` may be set to 0.
    names = "recode", "data_seed", "validation_split"
    unset = [x for x in names if settings[x] is None or settings[x] is False]
    if config.objective == "sft":
        unset += ["objective", "beta", "gamma"]
    for name in unset:
        del settings[name]
    settings["model's files"] = _hash_files(model.path)
    if data.mix:
        settings["rows and weights"] = data.mix
    settings["data"] = data.hash
    return json.loads(json.dumps(settings))


def check_stamp(saved: Mapping[str, Any], now: Mapping[str, Any], out: str) -> None:
    """Raises a ValueError that lists the settings that a resumed run has changed."""
    if differences := changes(saved, now, _describe_value, missing="not set"):
        raise ValueError(
            f"`resume` must be used with the settings of the run in {out}. Got others: "
            f"{'; '.join(differences)}. Use the same settings, or start a new run in "
            "another `out`."
        )


def _describe_value(value: object) -> str:
    # YAML reads 16 as an integer where the settings have 16.0, which must be equal.
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return repr(value)


def _hash_files(path: pathlib.Path) -> str:
    """Returns a hash of the sizes of a model's files and of samples of their bytes."""
    hasher = hashlib.sha256()
    num_samples, sample_bytes = 64, 1 << 14
    names = ["config.json", *sorted(p.name for p in path.glob("*.safetensors"))]
    for file in [path / name for name in names] if path.is_dir() else [path]:
        size = file.stat().st_size
        hasher.update(f"{file.name} {size}\n".encode())
        last = max(0, size - sample_bytes)
        with file.open("rb") as opened:
            for offset in np.linspace(0, last, num_samples, dtype=np.int64):
                opened.seek(int(offset))
                hasher.update(opened.read(sample_bytes))
    return hasher.hexdigest()[:16]
