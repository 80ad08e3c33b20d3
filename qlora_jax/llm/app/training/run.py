"""Prepares a run of `train`, and checks it before the model is read."""

import dataclasses
import datetime
import importlib
import math
import pathlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
from jax.sharding import Mesh
from jaxtyping import PyTree

import qlora_jax as ql

from ...data.batching import Batch, BatchSource, batches, eval_batches
from ...data.chat_tokenizer import Tokenizer, open_tokenizer
from ...data.dataset import Dataset, read_dataset
from ...data.encode import Row
from ...models.torch_decoder import TorchEngine
from ...train.objectives import OBJECTIVES, find_objective
from ...train.outputs import plural
from ..adapters import (
    init_shapes,
    lora_config_for,
    packing_config_for,
    read_initial_lora,
)
from ..open_model import OpenModel, open_model
from ..processes import log
from ..row_settings import check_template
from ..run_folder import CONFIG, read_run_config
from ..train_config import LOGGERS, TrainConfig
from .program import make_mesh, make_placer, make_schedule, resolve_dtype
from .resuming import make_fingerprint

if TYPE_CHECKING:
    import grain


@dataclass(frozen=True)
class Run:
    """A run whose settings, data and model were checked to be compatible."""

    config: TrainConfig  # with the settings that the model or the data decide
    model: OpenModel  # with shapes instead of parameters
    # How to pack kernels while they are read; None to use them as they are stored.
    packing_config: ql.QLoRAConfig | None
    lora_config: ql.QLoRAConfig  # the adapters to create
    tokenizer: Tokenizer
    data: Dataset
    fingerprint: dict[str, Any]  # must be the same when the run is resumed, as JSON
    mesh: Mesh | None  # None for one device
    # Puts a base and a lora tree on the devices.
    place: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]]
    teacher: OpenModel | None  # for an objective that uses one
    initial_lora: PyTree | None  # the adapters to start from, if they are not new

    @property
    def folder(self) -> pathlib.Path:
        """The folder of the run."""
        return pathlib.Path(self.config.out)


def make_run(config: TrainConfig, today: str) -> Run:
    """Checks the settings, reads the data, and returns the run.

    `today` is the default date for chat templates, and must be the same in all
    processes.
    """
    # A resumed run keeps the dtype and the date of its start. Its settings are read
    # first, so that a damaged file is reported before any work.
    started_config = config
    if config.resume:
        started_config = read_run_config(pathlib.Path(config.out) / CONFIG)
    check_template(config.template)
    _check_libraries(config.loggers)
    _check_devices(config)
    # The model: its shapes, and the formats of its weights.
    model = open_model(config.model, engine=config.engine)
    if isinstance(model.engine, TorchEngine):
        config = _settings_for_torch(config, model.engine)
    fmt = config.fmt or model.stored_fmt or "nf4"
    packing_config = packing_config_for(config, model, fmt)
    if config.base_memory == "host" and packing_config is model.stored_fmt is None:
        raise ValueError(
            "`base_memory` must be device for a float model, because only packed "
            "layers can stay in host memory. Got host, and fmt=none."
        )
    # The adapters.
    lora_config = lora_config_for(config, model, packing_config)
    initial_lora = None
    if config.adapter is not None:
        initial_lora, alpha = read_initial_lora(config, model, lora_config)
        config = config.replace(lora_alpha=alpha)
        lora_config = dataclasses.replace(lora_config, alpha=alpha)
    mesh = make_mesh(config.mesh_sizes, jax.devices())
    _check_model_fits(model, lora_config, packing_config, mesh)
    dtype = config.dtype
    if dtype == "auto":
        dtype = resolve_dtype(started_config.dtype, jax.default_backend())
    date = config.date or started_config.date or today
    # The data.
    now = datetime.datetime.fromisoformat(date)
    tokenizer = open_tokenizer(model.path, template=config.template, now=now)
    teacher = _open_teacher(config, model, packing_config, tokenizer)
    if teacher is not None:  # raises if the mesh cannot split its weights
        make_placer(teacher.engine, mesh, "device")(teacher.base, {})
    data = _read_data(config, tokenizer, model)
    # The settings that depend on the data or on the model.
    config = config.replace(model=model.name, fmt=fmt, dtype=dtype, date=date)
    config = _complete_settings(
        config, data, None if packing_config else model.stored_packing
    )
    return Run(
        config,
        model,
        packing_config,
        lora_config,
        tokenizer,
        data,
        fingerprint=make_fingerprint(config, model, data, teacher),
        mesh=mesh,
        place=make_placer(model.engine, mesh, config.base_memory),
        teacher=teacher,
        initial_lora=initial_lora,
    )


def _read_data(config: TrainConfig, tokenizer: Tokenizer, model: OpenModel) -> Dataset:
    data = read_dataset(
        config.data,
        tokenizer,
        vocab_size=model.engine.vocab_size,
        max_length=config.max_length,
        keys=config.keys or None,
        train_on=config.train_on,
        validation_split=config.validation_split,
        seed=config.seed,
        too_long=config.too_long,
        chat=config.chat,
        rows=find_objective(config.objective).rows,
    )
    if config.keep_best and not data.valid:
        raise ValueError(f"`keep_best` needs validation rows. {config.data} has none.")
    return data


def _open_teacher(
    config: TrainConfig,
    model: OpenModel,
    packing_config: ql.QLoRAConfig | None,
    tokenizer: Tokenizer,
) -> OpenModel | None:
    """Returns the teacher, or None if the objective uses none.

    By default, the teacher is the model itself, whose weights are then read again
    without packing.
    """
    name = config.teacher
    if not find_objective(config.objective).uses_teacher:
        return None
    if name is None:
        if packing_config is None or model.stored_fmt is not None:
            raise ValueError(
                "`teacher` must be given unless training packs a float model, from "
                "whose weights the packed model then learns. Got none."
            )
        return model
    teacher = open_model(name)
    size, vocab_size = teacher.engine.vocab_size, model.engine.vocab_size
    if size != vocab_size:
        difference = f"{size:,} tokens instead of {vocab_size:,}"
    else:
        vocabulary = tokenizer.inner.get_vocab().items()
        teacher_vocabulary = open_tokenizer(teacher.path).inner.get_vocab().items()
        tokens = {token for token, _ in vocabulary ^ teacher_vocabulary}
        if not tokens:
            return teacher
        difference = f"other ids for {len(tokens):,} tokens"
    raise ValueError(
        f"`teacher` must have the vocabulary of the model. Got {name!r} with "
        f"{difference}."
    )


def _check_libraries(loggers: Sequence[str]) -> None:
    """Checks that the libraries of training and of the loggers are installed."""
    # Some libraries are first used at the end, perhaps after hours of training.
    libraries = ["grain", "matplotlib", "optax", "orbax.checkpoint"]
    extras = dict.fromkeys(libraries, "train")
    extras |= {LOGGERS[name]: name for name in loggers}
    for name, extra in extras.items():
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ImportError(
                f"training needs: pip install 'qlora-jax[{extra}]'. {error}"
            ) from error


def _check_devices(config: TrainConfig) -> None:
    """Checks that the devices support the settings of the computation."""
    platform = jax.default_backend()
    if config.attention == "splash" and platform != "tpu":
        raise ValueError(
            "`attention` must be xla, blocks or cudnn without a TPU, because splash is "
            f"a kernel for TPUs. Got splash, and devices of the platform {platform}."
        )
    device = jax.local_devices()[0]
    capability = str(getattr(device, "compute_capability", ""))
    if config.attention == "cudnn" and not has_flash_attention(capability):
        raise ValueError(
            "`attention` must be xla or blocks without an NVIDIA GPU of compute "
            "capability 8.0 or later, which flash attention in cuDNN needs. Got cudnn, "
            f"and {device.device_kind}."
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


def has_flash_attention(capability: str) -> bool:
    """Returns whether cuDNN has flash attention for GPUs of this compute capability."""
    # AMD's GPUs have a name such as "gfx942" instead, and CPUs have none.
    return capability.replace(".", "").isdecimal() and float(capability) >= 8


def _settings_for_torch(config: TrainConfig, engine: TorchEngine) -> TrainConfig:
    """Checks the settings of a run in PyTorch's code, and adapts them to the model."""
    _check_torch_settings(config, engine)
    if config.eval_examples:
        problem = engine.generation_problem
        if problem is not None:
            log(f"note: no answers to validation rows are generated. {problem}")
            config = config.replace(eval_examples=0)
    return config.replace(engine="torch")


def _check_torch_settings(config: TrainConfig, engine: TorchEngine) -> None:
    """Raises ValueError if PyTorch's code does not support the value of an option."""
    settings = config.to_settings()
    objectives = [x.name for x in OBJECTIVES.values() if not x.uses_teacher]
    # The supported values of each option, and why there are no others.
    requirements = {
        "attention": (["xla"], "only our decoder has the others"),
        "remat": ([True, False], "its layers do not offload their inputs"),
        "base_memory": (["device"], "it keeps all layers in device memory"),
        "mlp_tile": ([None], "its MLPs take all tokens at a time"),
        "stream_dtype": (["float32"], "the dtype of its residual stream is `dtype`"),
        "merge_aware": ([False], "`export` writes no 4-bit files of these models"),
        "objective": (objectives, "losses with a teacher need the head of our decoder"),
    }
    if problems := [
        f"`{name}` must be {' or '.join(map(str, allowed))}, because {reason}. Got "
        f"{settings[name]}."
        for name, (allowed, reason) in requirements.items()
        if settings[name] not in allowed
    ]:
        raise ValueError(f"with the model in PyTorch's code, {' '.join(problems)}")
    problem = engine.packing_problem if config.packing else None
    if problem is not None:
        raise ValueError(
            f"`packing` must be false for {engine.class_name}, because "
            f"{problem}. Got true."
        )


def _check_model_fits(
    model: OpenModel,
    lora_config: ql.QLoRAConfig,
    packing_config: ql.QLoRAConfig | None,
    mesh: Mesh | None,
) -> None:
    """Raises an error if PEFT or the mesh does not support the model."""
    base, lora = init_shapes(model.base, lora_config)
    if not lora_config.merge_aware:  # PEFT does not load merge-aware adapters anyway
        ql.io.peft_config(base, lora, model.names)
    if packing_config is not None:
        base, _ = init_shapes(model.base, packing_config)
    make_placer(model.engine, mesh, "device")(base, {})


def make_batches(config: TrainConfig, data: Dataset) -> "grain.DatasetIterator[Batch]":
    """Returns an iterator over the batches of a run, endless unless it has `epochs`."""
    return batches(
        data.train,
        batch_size=config.batch_size,
        max_length=config.max_length,
        seed=config.seed,
        packing=config.packing,
        num_epochs=config.epochs,
        mix=data.mix,
    )


def make_source(
    config: TrainConfig, rows: Sequence[Row], mix: Sequence[tuple[int, float]] = ()
) -> BatchSource:
    """Returns the batches of a run by index, of which none is made yet."""
    size, length = config.batch_size, config.max_length
    seed, epochs = config.seed, config.epochs
    return BatchSource(rows, size, length, config.packing, seed, epochs, mix)


def make_eval_batches(config: TrainConfig, rows: Sequence[Row]) -> list[Batch]:
    """Returns the validation batches of a run. Each row is in one of them."""
    return eval_batches(
        rows,
        batch_size=config.batch_size,
        max_length=config.max_length,
        packing=config.packing,
    )


def _complete_settings(
    config: TrainConfig, data: Dataset, stored_packing: Any
) -> TrainConfig:
    """Returns the settings, with values for those that were left unset.

    `stored_packing` is the packing of the model's files if the model is used as it is
    stored. It is None if training packs the model, or if the model is in float.
    """
    steps, warmup = config.steps, config.warmup
    epochs = config.epochs or (1.0 if steps is None else None)
    # Both sources also raise if rows do not fit the batches.
    config = config.replace(epochs=epochs)
    source = make_source(config, data.train, data.mix)
    if data.valid:
        make_source(config, data.valid)
    batch_size = config.batch_size
    num_parts = config.num_row_parts
    # At least two rows, because KTO combines the rows of a batch.
    largest = math.ceil(max(source.epoch_size, 2) / num_parts) * num_parts
    if batch_size > largest:
        log(
            f"`batch_size` is {largest:,} instead of {batch_size:,}, because an epoch "
            f"has {plural(source.epoch_size, 'row')}"
        )
        batch_size = largest
    if source.count is not None:
        rows_per_step = batch_size * config.accumulation
        steps_of_epochs = math.ceil(source.count / rows_per_step)
        if steps not in (None, steps_of_epochs):
            raise ValueError(
                f"`steps` must be left out with `epochs`, which take {steps_of_epochs} "
                f"steps. Got {steps}."
            )
        steps = steps_of_epochs
    assert steps is not None  # without `steps`, there are `epochs`
    # `QLoRAConfig` replaces unset values by the defaults of the format, which have no
    # effect with `fmt` none.
    packing = stored_packing or ql.QLoRAConfig(
        fmt=None if config.fmt == "none" else config.fmt,
        block_size=config.block_size,
        double_quant=config.double_quant,
    )
    resolved = config.replace(
        steps=steps,
        batch_size=batch_size,
        warmup=min(20, steps // 10) if warmup is None else warmup,
        lora_alpha=config.lora_alpha or config.rank,
        block_size=packing.block_size,
        double_quant=packing.double_quant,
    )
    make_schedule(resolved)  # raises if it does not fit the steps or the rate
    return resolved
