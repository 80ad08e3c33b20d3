"""Finds and reads models, adapters, and the adapters of training runs."""

import dataclasses
import hashlib
import os
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import PyTree

import qlora_jax as ql

from ..data.readers import describe_path
from ..models.config import DecoderConfig
from ..models.families import is_known
from ..models.folder import ModelFolder
from ..models.jax_engine import LAYERS, JaxEngine
from ..models.sharding import Contract
from ..models.torch_decoder import TorchEngine, open_torch_engine
from ..reading import reading
from ..train.checkpoints import Checkpoints
from ..train.outputs import NATIVE_ADAPTER
from ..train.target_modules import ALL_LINEAR, find_target_paths
from .configs import (
    PACKING_OPTIONS,
    EngineName,
    ExportConfig,
    GenerateConfig,
    ScoreConfig,
)
from .merge_aware import pack_as_trained, target_packing_of, target_settings
from .processes import log
from .run_folder import (
    CONFIG,
    STATE,
    is_run,
    quiet_orbax,
    read_run_config,
)
from .train_config import TrainConfig

# A model in `Decoder` or in PyTorch's code, with the attributes that all commands need.
Engine = JaxEngine | TorchEngine

# The arguments `packing_config` and `dtype` with which `BaseModel.read` returns the
# weights that training used. The dict is empty if training did not pack the weights in
# the model's files, but used them unchanged.
LoadOptions = dict[str, Any]


@dataclass(frozen=True)
class BaseModel:
    """A model, optionally with an adapter, before or after its weights are read."""

    engine: Engine
    base: PyTree  # parameters; before `read`, only their shapes
    lora: PyTree = dataclasses.field(default_factory=dict)
    adapter_path: pathlib.Path | None = None  # of an adapter that is not read yet
    peft: ql.io.PeftConfig | None = None  # the adapter's PEFT settings, if known
    recode: bool = False  # whether 4-bit weights may be decoded and packed again
    name: str = ""  # a hub id or a path

    @property
    def path(self) -> pathlib.Path:
        """The folder of the model."""
        return self.engine.path

    @property
    def files(self) -> ModelFolder:
        """The files of the model."""
        return self.engine.files

    @property
    def names(self) -> ql.io.Names:
        """The names of the parameters in the Hugging Face model."""
        return self.engine.names

    @property
    def decoder(self) -> DecoderConfig:
        """The config of the decoder.

        Raises ValueError for a model that runs in PyTorch's code instead.
        """
        if isinstance(self.engine, TorchEngine):
            raise ValueError(
                "`model` must be of a type that docs/models.md lists, because this "
                "command does not support models that run in PyTorch's code. Got "
                f"{self.engine.model_type}."
            )
        return self.engine.decoder

    def check_for_torch(self, option: str, value: str, allowed: Sequence[str]) -> None:
        """Raises ValueError if PyTorch's code runs the model and rejects `value`.

        `allowed` has the values of the option that such models support.
        """
        if isinstance(self.engine, TorchEngine) and value not in allowed:
            choices = f"one of {', '.join(allowed)}" if allowed else "left out"
            raise ValueError(
                f"`{option}` must be {choices} for a {self.engine.model_type} model, "
                f"which runs in PyTorch's code. Got {value}."
            )

    def contract_of(self, patterns: Sequence[Any]) -> Contract:
        """Returns the argument `contract` of `QLoRAConfig` for some kernels.

        `patterns` select the kernels, as `engine.layers` does. For a `JaxEngine`, the
        result is empty, because the default of `QLoRAConfig` holds for its kernels.
        """
        contract = self.engine.contract.items()
        return {pattern: roles for pattern, roles in contract if pattern in patterns}

    @property
    def is_local(self) -> bool:
        """Whether the name is a path on this machine."""
        return pathlib.Path(self.name).expanduser().exists()

    @property
    def revision(self) -> str | None:
        """The commit of a model from the hub; None for other weights."""
        # The hub's cache names the folder of a snapshot after its commit.
        return None if self.is_local else self.path.name

    @property
    def source(self) -> str:
        """Describes where the weights were found."""
        if self.is_local:
            return f"local files in {self.path}"
        return f"{self.name} on the Hugging Face hub, revision {self.revision}"

    @property
    def quantization(self) -> Mapping[str, Any]:
        """The quantization settings in the files; a folder of floats has none."""
        return self.files.quantization

    @property
    def stored_fmt(self) -> str | None:
        """The number format of the weights in the files; None for float weights."""
        return self.quantization.get("fmt")

    @property
    def stored_packing(self) -> Any:
        """The `Packing` of the first packed weight in the files; None for floats."""
        return next(iter(self.stored_packings), None)

    @property
    def stored_packings(self) -> dict[Any, None]:
        """The packings of all weights in the files, in order and without repetition."""
        packed = ql.io.packed_tensors(self.files.stored_tensors).values()
        packings = (getattr(tensor, "packing", None) for tensor in packed)
        return dict.fromkeys(filter(None, packings))

    @property
    def replaces_weights(self) -> bool:
        """Whether the adapter also has biases or modules that replace the base's."""
        path = self.adapter_path
        if path is None or not _is_peft(path):
            return False
        tensors = ql.io.open_safetensors(path / "adapter_model.safetensors")
        return any(".lora_" not in key for key in tensors)

    @property
    def has_native_adapter(self) -> bool:
        """Whether an adapter is not read yet, and is in this library's format.

        Only such an adapter can be merge-aware.
        """
        return self.adapter_path is not None and not _is_peft(self.adapter_path)

    def packing_config(
        self,
        fmt: str,
        block_size: int | None,
        double_quant: bool | None,
    ) -> ql.QLoRAConfig | None:
        """Returns how to pack the layers while reading; None to read them as stored."""
        stored_fmt = self.stored_fmt
        if fmt == "none" or (fmt == stored_fmt and not self.recode):
            self._check_stored(block_size=block_size, double_quant=double_quant)
            return None
        if fmt == stored_fmt and block_size is None:  # pack again, in the same format
            block_size = self.quantization.get("group_size")
        if stored_fmt is not None and not self.recode:
            raise ValueError(
                f"`fmt` must be none or {stored_fmt}, the format of the model, which "
                f"is already in 4 bits. Use `recode` to pack it again. Got {fmt!r}."
            )
        return ql.QLoRAConfig(
            fmt=fmt,
            block_size=block_size,
            double_quant=double_quant,
            targets=self.engine.layers,
            contract=self.contract_of(self.engine.layers),
        )

    def _check_stored(self, **settings: int | bool | None) -> None:
        """Raises ValueError if settings differ from those of the packed weights."""
        requested = {k: value for k, value in settings.items() if value is not None}
        if not requested or (packing := self.stored_packing) is None:
            return  # there are no settings, or no packed weights
        for name, value in requested.items():
            if value != (stored := getattr(packing, name)):
                raise ValueError(
                    f"`{name}` must be {stored}, as in the model, which is already in "
                    f"4 bits. Got {value}."
                )

    def read(
        self,
        *,
        dtype: Any = None,  # by default, the dtype in the files
        packing_config: ql.QLoRAConfig | None = None,
        place: Callable[[PyTree], PyTree] | None = None,
        progress: bool = True,
    ) -> "BaseModel":
        """Reads the parameters and the adapter. The arguments are those of `load`."""
        # Most adapters need only the shapes of the base. They are read first, so that
        # errors are found early. An adapter that replaces weights needs the weights.
        needs_weights = self.replaces_weights
        model = self if needs_weights else self.read_adapter()
        # Some byte layouts of bitsandbytes are not supported. `recode` converts them.
        is_recodable = self.quantization.get("quant_method") == "bitsandbytes"
        options: dict[str, Any] = {"recode": self.recode or is_recodable}
        options |= {"place": place, "progress": progress}
        base = self.engine.load(dtype, packing_config, **options)
        model = dataclasses.replace(model, base=base)
        return model.read_adapter() if needs_weights else model

    def read_adapter(self) -> "BaseModel":
        """Returns the model with its adapter in `lora`.

        If the adapter replaces parameters, they are replaced in the base.
        """
        if (path := self.adapter_path) is None:
            return self
        peft = None
        if _is_peft(path):
            base, lora, peft = ql.io.load_peft(path, self.base, self.names)
        else:
            base, lora = self.base, _read_native(path)
            ql.combine(base, lora)  # raises if the adapter does not fit
        return dataclasses.replace(
            self, base=base, lora=lora, peft=peft, adapter_path=None
        )


def _is_peft(path: pathlib.Path) -> bool:
    return (path / "adapter_config.json").exists()


def _read_native(path: pathlib.Path) -> PyTree:
    file = path / NATIVE_ADAPTER if path.is_dir() else path
    if not file.is_file():
        raise ValueError(
            "`adapter` must be a folder with adapter_config.json or "
            f"{NATIVE_ADAPTER}, or a file of qlora_jax.io.save. Got {str(path)!r}."
        )
    tree = ql.io.restore(file).tree
    # The file has the lora tree itself, or a dict with the lora tree under `lora`.
    return tree["lora"] if isinstance(tree, dict) and "lora" in tree else tree


def open_model(
    name_or_path: str,
    adapter: str | None = None,
    recode: bool = False,
    engine: EngineName = "jax",
) -> BaseModel:
    """Finds a model and an adapter in any format.

    Reads only the model's config and, if it is in this library's format, the adapter,
    so that commands know early whether it is merge-aware. With the engine "auto",
    models that the JAX decoder does not support run in PyTorch's code.
    """
    path = ql.io.fetch(name_or_path)
    if not path.is_dir():
        raise ValueError(
            "`model` must be a folder with config.json and safetensors, or a hub id. "
            f"Got the file {path}."
        )
    adapter_path = None if adapter is None else fetch_adapter(adapter)
    model_engine = _open_engine(path, engine)
    model = BaseModel(
        model_engine,
        model_engine.shapes,
        adapter_path=adapter_path,
        recode=recode or any(x.recode for x in run_configs_of(adapter)),
        name=name_or_path,
    )
    if not model.is_local:
        log(f"weights: {model.source}")
    return model.read_adapter() if model.has_native_adapter else model


def _open_engine(path: pathlib.Path, name: EngineName) -> Engine:
    files = ModelFolder(path)
    if name == "jax":
        return JaxEngine(path, files.config)
    with reading(path / "config.json"):
        has_decoder = is_known(ql.io.read_config_json(path))
    if name == "auto" and has_decoder:
        return JaxEngine(path, files.config)
    engine = open_torch_engine(path)
    log(
        f"engine: torch. {engine.class_name} runs in the PyTorch code of transformers, "
        "through torchax"
    )
    if engine.scan_problem is not None:
        log(f"note: every layer is compiled by itself, because {engine.scan_problem}")
    return engine


def fetch_adapter(adapter: str) -> pathlib.Path:
    """Returns the local folder or file of an adapter, which may be a hub id."""
    try:
        path = ql.io.fetch(adapter)
    except FileNotFoundError as error:  # its message is about the option `model`
        message = str(error).replace("`model`", "`adapter`")
        raise FileNotFoundError(message) from error
    ql.io.check_links(path)
    return path


def open_model_and_adapters(
    config: ScoreConfig | GenerateConfig,
) -> tuple[BaseModel, dict[str, PyTree], LoadOptions]:
    """Returns a model, a dict of adapters by name, and how to read the weights.

    The dict is empty unless there are several adapters. A single adapter is part of the
    model.
    """
    if config.run is not None:
        model, _ = open_run(
            config.run,
            base_model=config.model,
            recode=config.recode,
            engine=config.engine,
        )
        return model, {}, training_load_options(config, model)
    adapters = _split_adapters(config.adapter)
    adapter = adapters[0] if len(adapters) == 1 else None
    engine = config.engine or _engine_of_runs(adapters)
    model = open_model(str(config.model), adapter, config.recode, engine)
    options = training_load_options(config, model)
    if adapter is not None or not adapters:
        return model, {}, options
    bank = _read_bank(model, adapters)
    loras = {name: ql.select(bank, i) for i, name in enumerate(adapters)}
    return model, loras, options


def _split_adapters(adapters: str | Sequence[str] | None) -> list[str]:
    if not isinstance(adapters, str):
        return [*(adapters or [])]
    # A path may contain commas.
    return [adapters] if pathlib.Path(adapters).exists() else adapters.split(",")


def _read_bank(model: BaseModel, adapters: Sequence[str]) -> ql.Bank:
    loras = []
    for adapter in adapters:
        adapted = dataclasses.replace(model, adapter_path=fetch_adapter(adapter))
        if adapted.replaces_weights:
            raise ValueError(
                "`adapter` must not replace weights of the base if there are several "
                f"adapters. Got {adapter!r}, which does."
            )
        loras.append(adapted.read_adapter().lora)
        if target_packing_of(loras[-1]) is not None:
            raise ValueError(
                "`adapter` must be a single one if it is merge-aware, because it has "
                f"packed weights of its own. Got {len(adapters)}, with {adapter!r}."
            )
    # By default, `bank` requires equal dropout rates, but those of training may differ.
    return ql.bank(loras, dropout=0.0)


def run_configs_of(
    adapters: str | Sequence[str] | None, run: str | None = None
) -> list[TrainConfig]:
    """Returns the settings of a run, or of the runs that wrote the adapters.

    A run writes adapters into its folder, so the settings are in the folder that
    contains the adapter. An adapter in another folder has no known run.
    """
    if run is not None:
        return [read_run_config(pathlib.Path(run) / CONFIG)]
    run_configs = []
    for adapter in _split_adapters(adapters):
        # Absolute, because "." has no parent.
        folder = pathlib.Path(os.path.abspath(os.path.expanduser(adapter))).parent
        try:
            run_configs.append(read_run_config(folder / CONFIG))
        except (OSError, ValueError):
            # Without the settings of a run, its base would be packed differently. In
            # other folders, the file may not exist or belong to another program.
            if is_run(folder):
                raise
    return run_configs


def _engine_of_runs(adapters: str | Sequence[str] | None) -> EngineName:
    """Returns the engine of the run that wrote the first adapter, or "auto"."""
    run_configs = run_configs_of(adapters)
    return run_configs[0].engine if run_configs else "auto"


def hash_files(path: pathlib.Path) -> str:
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


def open_run(
    run: str,
    step: int | None = None,
    base_model: str | None = None,
    recode: bool = False,
    engine: EngineName | None = None,
) -> tuple[BaseModel, int | None]:
    """Returns a run's model with the adapter of a saved state, and the state's step.

    By default, the state is the newest. The run may be unfinished, and is not changed.
    `base_model` and `engine` replace the run's settings unless they are None. `recode`
    can turn the setting of the run on, but not off.
    """
    folder = pathlib.Path(run)
    if not (folder / CONFIG).is_file() or not (folder / STATE).is_dir():
        raise ValueError(
            f"`run` must be the folder of a run of train, with {CONFIG} and a folder "
            f"{STATE}. Got {describe_path(folder)}."
        )
    ql.io.check_links(folder)
    run_config = read_run_config(folder / CONFIG)
    model = open_model(
        base_model or run_config.model,
        recode=recode or run_config.recode,
        engine=engine or run_config.engine,
    )
    packing_config = None
    if run_config.merge_aware:
        packing_config = packing_config_for(run_config, model)
    lora_config = lora_config_for(run_config, model, packing_config)
    # Shapes are enough to restore the adapter, and to describe it for PEFT.
    base, lora = init_shapes(model.base, lora_config)
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
    return dataclasses.replace(model, base=base, lora=lora, peft=peft), step


def open_model_for(config: ExportConfig) -> tuple[BaseModel, int | None]:
    """Returns a config's model with its adapter, and the step of a run's state."""
    if config.run is None:
        engine = _engine_of_runs(config.adapter)
        return open_model(str(config.model), config.adapter, engine=engine), None
    return open_run(config.run, config.step, config.model)


def packing_config_for(
    settings: TrainConfig, model: BaseModel, default_fmt: str = "none"
) -> ql.QLoRAConfig | None:
    """Returns how training packs the layers; None if they are used as stored."""
    return model.packing_config(
        settings.fmt or default_fmt,
        settings.block_size,
        settings.double_quant,
    )


def init_shapes(base: PyTree, config: ql.QLoRAConfig) -> tuple[PyTree, PyTree]:
    """Returns the base and the lora tree that `ql.init` would make, as shapes."""
    return jax.eval_shape(lambda base: ql.init(jax.random.key(0), base, config), base)


def training_load_options(
    config: ExportConfig | ScoreConfig | GenerateConfig, model: BaseModel
) -> LoadOptions:
    """Returns options to read a model with the weights its adapter was trained on.

    The options come from the settings of the adapter's run, unless those in `config`
    name another packing. They are empty if the stored weights are used unchanged.
    Prints a note on stderr for each adapter whose run used other weights.
    """
    run_configs = run_configs_of(config.adapter, config.run)
    uses_run = bool(run_configs) and not _packs_differently(config, run_configs[0])
    settings: Any = run_configs[0] if uses_run else config
    fmt, block_size, double_quant = (getattr(settings, x) for x in PACKING_OPTIONS)
    if fmt is None and model.stored_fmt is None:
        for name in PACKING_OPTIONS[1:]:  # all but `fmt`
            if (value := getattr(settings, name)) is not None:
                raise ValueError(
                    f"`fmt` must be given with `{name}`: the format in which training "
                    f"packed the model. Got `{name}` {value}."
                )
    # All adapters share one base. Name those that were trained on another one.
    for run_config in run_configs:
        paths = {os.path.realpath(path) for path in (model.name, run_config.model)}
        if len(paths) > 1 or _packs_differently(settings, run_config):
            base_fmt = fmt or model.stored_fmt or "none"
            here = f"Its weights have fmt {base_fmt} here, as the options say"
            if len(paths) > 1:
                here = (
                    f"The base here is {model.name} with fmt {base_fmt}. This is "
                    "right if it was exported from the other one"
                )
            log(
                f"note: {run_config.out} was trained on {run_config.model} with "
                f"fmt {run_config.fmt}. {here}"
            )
    # The settings of a run have the defaults of these options, even with `fmt` none.
    if fmt == "none" and model.stored_fmt is None and not uses_run:
        options_set = {"block_size": block_size, "double_quant": double_quant}
        for name, value in options_set.items():
            if value is not None:
                raise ValueError(
                    f"`{name}` must be left out with `fmt` none, which packs nothing. "
                    f"Got {value}."
                )
    packing_config = model.packing_config(fmt or "none", block_size, double_quant)
    options: LoadOptions = {}
    if packing_config is not None:
        options["packing_config"] = packing_config
    # Training rounded the weights (or their sum with a merge-aware adapter) to the
    # dtype of the run before it packed them.
    if uses_run and (options or target_packing_of(model.lora) is not None):
        options["dtype"] = settings.dtype
    return options


def _packs_differently(config: object, run_config: TrainConfig) -> bool:
    """Returns whether options of `config` that are set differ from those of a run."""
    options = [
        (getattr(config, x, None), getattr(run_config, x)) for x in PACKING_OPTIONS
    ]
    return any(value not in (None, trained) for value, trained in options)


def read_as_trained(
    model: BaseModel, options: LoadOptions, dtype: DTypeLike
) -> BaseModel:
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


def lora_config_for(
    config: TrainConfig,
    model: BaseModel,
    packing_config: ql.QLoRAConfig | None,
) -> ql.QLoRAConfig:
    """Returns the settings of the adapters that a run trains.

    `packing_config` says how the base is packed, as `BaseModel.packing_config` returns
    it. Only merge-aware adapters depend on it.
    """
    params, engine = model.base, model.engine
    if config.target_modules == ALL_LINEAR:
        # A vision part is only adapted if its modules are named.
        params = engine.language_params(params)
    targets = find_target_paths(
        config.target_modules, params, model.names, head=engine.head_module
    )
    settings: dict[str, Any] = {"fmt": None}  # reading the model packs its kernels
    if config.merge_aware:
        packings = (
            {packing_config.packing} if packing_config else {*model.stored_packings}
        )
        unadapted = [
            path
            for path in ql.leaves_by_path(model.base)
            if re.fullmatch(LAYERS, path)
            and (path not in targets or _is_trained_in_full(config, path))
        ]
        settings |= target_settings(config, packings, unadapted)
    return ql.QLoRAConfig(
        rank=config.rank,
        rank_pattern=_find_small_kernels(config, model, targets),
        alpha=config.lora_alpha,
        targets=tuple(map(re.escape, targets)),
        trainable=config.trainable or (),
        contract=model.contract_of([*map(re.escape, targets)]),
        dropout=config.lora_dropout,
        rank_stabilized=config.use_rslora,
        use_dora=config.use_dora,
        **settings,
    )


def _is_trained_in_full(config: TrainConfig, path: str) -> bool:
    """Returns whether a leaf is trained itself, so that it gets no LoRA."""
    return bool(config.trainable and re.fullmatch(config.trainable, path))


def _find_small_kernels(
    config: TrainConfig, model: BaseModel, targets: Sequence[str]
) -> dict[str | re.Pattern, int]:
    """Returns patterns of kernels that are smaller than their adapters, and the rank.

    One of them is the gate of a shared expert, which has one output. Unless these
    patterns are in `rank_pattern`, `ql.init` rejects such adapters, because wrong axes
    are the usual cause. Here, the axes are known, and PEFT has these adapters too.
    """
    leaves = ql.leaves_by_path(model.base)
    ranks: dict[str | re.Pattern, int] = {}
    for path in targets:
        k, n = leaves[path].shape[-2:]
        is_small = config.rank * (k + n) > k * n
        if is_small and not _is_trained_in_full(config, path):
            ranks[re.escape(path)] = config.rank
    return ranks
