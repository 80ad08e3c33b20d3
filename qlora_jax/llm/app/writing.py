"""`qlora-jax export`: models and adapters for other programs."""

import dataclasses
import pathlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args

from jaxtyping import PyTree

import qlora_jax as ql

from ..data.chat_tokenizer import open_tokenizer
from .base_model import (
    LAYERS,
    BaseModel,
    LoadOptions,
    open_config,
    open_model,
    read_as_trained,
    runs_of,
    training_load_options,
)
from .calibrating import WIDTH, make_calibrator
from .configs import GGUF_4_BITS, PACKING_OPTIONS, AdapterFormat, ExportConfig
from .merge_aware import (
    check_holds,
    complete_export,
    describe,
    note_packing,
    pack_as_trained,
    packing_of,
)
from .pairs import AS_IS, MERGED, NOT_RUN, Pair, open_pair, pair_for
from .processes import log
from .pushing import check_base, push
from .repacking import FileLosses, Repacked, repack
from .row_settings import read_rows_like_run
from .scoring import BATCH_TOKENS, Score, make_scorer
from .servers import FMTS, SERVERS


@dataclass(frozen=True)
class Written:
    """The result of `export`.

    Attributes:
        out: The folder or file.
        format: Its format.
        bytes: Its size in bytes.
        cost: What packing changed, if an adapter was merged into 4 bits afterwards.
        losses: The losses of the adapter and of the file, if there are data.
        pair: For a server: what was written, and whether it is exact.

    Example:
        >>> from qlora_jax.llm import app
        >>> print(app.Written("new", "merged", 1200))
        new: merged, 1,200 bytes
    """

    out: str
    format: str
    bytes: int
    cost: Repacked | None = None
    losses: FileLosses | None = None
    pair: Pair | None = None

    def __str__(self):
        written = f"{self.out}: {self.format}, {self.bytes:,} bytes"
        if self.pair is not None:
            written = f"{written}; {self.pair}"
        return "\n".join([written, *(str(x) for x in (self.cost, self.losses) if x)])


def export(config: ExportConfig) -> Written:
    """Writes a model or an adapter in a format that other programs load.

    A merged adapter is added to the weights that training used; if training packed them
    in 4 bits, it is added to their decoded values. Weights are merged and written one
    at a time. With a 4-bit format, the adapter is added to the weights in the model's
    files instead, and the sum is packed. The base, the sum and the packed sum are then
    all in memory. A merge-aware adapter is always added to the weights that training
    used, and the sum is packed as in training. With `data`, the written file is read
    again, and its loss is compared with that of the adapter.

    Args:
        config: The model, the adapter and the format.

    Returns:
        The path, the format and the size.

    Raises:
        ValueError: If the model or the adapter cannot be read, if they do not fit each
            other, if the format cannot represent them, or if `out` is not empty.
        OSError: If the result cannot be pushed to the hub.

    Example:
        >>> import os, tempfile
        >>> from qlora_jax.llm import app
        >>> from qlora_jax.llm.models.tiny import save_tiny
        >>> model, out = save_tiny(tempfile.mkdtemp()), tempfile.mkdtemp()
        >>> config = app.ExportConfig(model, "bitsandbytes", out)
        >>> app.export(config).format
        'bitsandbytes'
        >>> os.path.isfile(out + "/model.safetensors")
        True
    """
    if config.push_to_hub is None:
        return _export(config)
    is_adapter = config.format in (None, *get_args(AdapterFormat))
    if is_adapter and config.server is None:
        for run in runs_of(config.adapter, config.run):
            if not run.adapter.merge_aware:  # which is not exported as an adapter
                check_base(run.model.path, config.model)
    # Without a path, `push` uploads nothing. If the repository cannot be written, it
    # fails here, before the export.
    push(config.push_to_hub)
    written = _export(config)
    log(f"pushed to {push(config.push_to_hub, pathlib.Path(written.out))}")
    return written


def _export(config: ExportConfig) -> Written:
    if config.server is not None:
        return _export_for_server(config)
    model, step = open_config(config)
    config = complete_export(config, model.lora, step)
    form, path = str(config.format), pathlib.Path(str(config.out))
    model.check_engine("format", form, ("peft", "peft-portable", "merged"))
    if form.startswith("gguf") and path.exists():
        raise ValueError(f"`out` must be new. Got {config.out!r}, which exists.")
    if form == "gguf" and config.data is not None and path.suffix != ".gguf":
        raise ValueError(
            "`out` must end in .gguf with `data`, so that the file can be read again. "
            f"Got {config.out!r}."
        )
    if form in get_args(AdapterFormat):
        _WRITERS[form](_Writer(config, model, {}, path))
        return Written(str(config.out), form, _count_bytes(path))
    is_packed = form in FMTS or config.gguf_type in GGUF_4_BITS
    # If the result is packed, the packing options describe it, and not the base.
    unset = dict.fromkeys((*PACKING_OPTIONS, "calibrate")) if is_packed else {}
    trained = training_load_options(dataclasses.replace(config, **unset), model)
    options, is_merge_aware = trained, packing_of(model.lora) is not None
    note_packing(model.lora)
    has_adapter = model.adapter is not None or bool(model.lora)
    if is_packed and not is_merge_aware:
        # The adapter is merged into the weights of the files, not into the weights that
        # training packed. Those already have values of a 4-bit format, so packing the
        # sum of such a weight and a small change would give the old value again.
        options = {}
        if trained:
            log(
                f"note: the adapter was trained on {trained['packing'].fmt}. It is "
                f"merged into the weights of {model.name}, and the sum is packed"
            )
    elif form == "merged" and has_adapter and not is_merge_aware:
        _note_grid(trained, model.stored_fmt)
    score = calibrate = None
    if config.data is not None:
        rows = read_rows_like_run(config, model, config.data, BATCH_TOKENS)
        score = make_scorer(model, rows)
    if config.calibrate is not None:
        rows = read_rows_like_run(config, model, config.calibrate, WIDTH)
        calibrate = make_calibrator(model, rows)
    # The model is read and scored before the file is written, and the file afterwards,
    # so that only one of them is in memory.
    beside = None if score is None else _score_model(score, model, trained)
    writer = _Writer(config, model, options, path, calibrate)
    cost, losses = _WRITERS[form](writer), None
    if score is not None and beside is not None:
        losses = FileLosses(beside, _score_model(score, open_model(str(path)), {}))
    return Written(str(config.out), form, _count_bytes(path), cost, losses)


def _note_grid(trained: LoadOptions, stored_fmt: str | None) -> None:
    """Prints what packing the sum of 4-bit weights and an adapter again would do."""
    fmt = trained["packing"].fmt if "packing" in trained else stored_fmt
    if fmt in (None, "int8"):  # the steps of int8 are smaller than most changes
        return
    remedy = "train there with `--fmt int8`"
    if stored_fmt is None:
        remedy = "export with `--fmt none`"
    log(
        f"note: the adapter is added to weights in {fmt}. Packing the sum in {fmt} "
        "again, as a second training does, rounds most weights back to their old "
        f"values. To keep the adapter, {remedy}"
    )


def _score_model(
    score: Callable[[PyTree, PyTree], Score], model: BaseModel, options: LoadOptions
) -> float:
    """Returns the loss of a model, which is in memory only during this call."""
    # 4-bit weights in a format that this package lacks are decoded exactly.
    model = dataclasses.replace(model, recode=True)
    model = read_as_trained(model, options, "float32")
    return score(model.base, model.lora).loss


def _count_bytes(path: pathlib.Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def _export_for_server(config: ExportConfig) -> Written:
    """Writes the base and the adapter for a server, and how to start it."""
    server, out = SERVERS[str(config.server)], pathlib.Path(str(config.out))
    if out.exists():
        raise ValueError(f"`out` must be new. Got {config.out!r}, which exists.")
    model, options = open_pair(config)
    model.check_engine("server", server.name, ())
    pair = pair_for(server, model, options, tokenizer=config.tokenizer)
    if pair.base == NOT_RUN:
        raise ValueError(f"{server.name} cannot run {model.name}: {pair.why}")
    is_merged = pair.adapter == MERGED
    base_model = model
    if not is_merged:
        base_model = dataclasses.replace(model, lora={}, adapter=None)
    # What the command calls the base and the adapter. A base that is not exported has
    # the path or the name of the model; exported files are in the same folder.
    name = str(model.path) if model.path.is_file() else model.name
    local = pathlib.Path(name)
    paths = {"base": str(local.absolute()) if local.exists() else name}
    with ql.io.new_path(out) as new:  # renamed to `out` once it is complete
        new.mkdir()
        for part, form in {"base": pair.base, "adapter": pair.adapter}.items():
            if form in (AS_IS, MERGED):
                continue
            is_base = part == "base"
            file = ("model" if is_merged else part) + ".gguf" * form.startswith("gguf")
            # Q4_0 stores int4_f16 in blocks of 32 exactly.
            gguf_type = "Q4_0" if pair.exact and form == "gguf" else None
            settings = dataclasses.replace(
                config,
                server=None,
                format=form,
                gguf_type=gguf_type,
                **dict.fromkeys(PACKING_OPTIONS),
            )
            # Adapters are written as they are.
            parts = (base_model, options) if is_base else (model, {})
            _WRITERS[form](_Writer(settings, *parts, new / file))
            paths[part] = f"./{file}"
        ranks = (x.rank for x in ql.leaves_by_path(model.lora).values())
        stored = model.quantization.get("quant_method")
        server.write(
            paths["base"],
            paths.get("adapter"),
            new,
            form=str(stored) if pair.base == AS_IS else pair.base,
            rank=max(ranks, default=0),
            # Servers without an API need no example of a request.
            is_chat=bool(server.port) and open_tokenizer(model.path).has_template,
            source=model.name,
            pair=str(pair),
        )
    return Written(str(out), f"for {server.name}", _count_bytes(out), pair=pair)


@dataclass(frozen=True)
class _Writer:
    """Writes a model or an adapter; there is a method for each format."""

    config: ExportConfig
    model: BaseModel
    options: LoadOptions
    out: pathlib.Path
    # Returns the importance for the search of scales, from the float parameters.
    calibrate: Callable[[PyTree], PyTree] | None = None

    # Adapters

    def write_peft(self) -> None:
        # The base's weights are needed only if the adapter replaces some of them.
        has_weights = self.model.replaces_weights
        model = self.model.read() if has_weights else self.model.with_adapter()
        trees, peft = (model.base, model.lora, model.names), model.peft
        if peft is None:
            source = {"base_model": model.name, "revision": model.revision}
            peft = ql.io.peft_config(*trees, **source)
        ql.io.save_peft(self.out, *trees, peft)

    def write_portable(self) -> None:
        model = self._read_plain()
        trees = model.base, ql.io.portable(model.base, model.lora), model.names
        settings = model.peft.extra_settings if model.peft else {}
        # If the adapter's files name a base model, the export names the same one.
        name = settings.get("base_model_name_or_path")
        revision = settings.get("revision") if name else model.revision
        source = {"base_model": name or model.name, "revision": revision}
        ql.io.save_peft(self.out, *trees, ql.io.peft_config(*trees, **source))

    def write_gguf_lora(self) -> None:
        from ..gguf.decoder_out import save_gguf_lora

        save_gguf_lora(self.out, self.model.path, self._make_plain_lora())

    def write_mlx(self) -> None:
        lora = self._make_plain_lora()
        ql.io.save_mlx(self.out, lora, self.model.decoder.num_layers)

    def _make_plain_lora(self) -> ql.io.PlainLoRA:
        model = self._read_plain()
        return ql.io.PlainLoRA.of(model.base, model.lora, model.exported_names)

    def _read_plain(self) -> BaseModel:
        """Returns the model with its adapter read; raises if servers cannot load it."""
        config = self.config
        if self.model.replaces_weights:
            raise ValueError(
                f"`adapter` must not replace biases or modules for {config.format}, "
                f"since servers do not load them. Got {config.adapter!r}, which does. "
                "Use the format merged."
            )
        return self.model.with_adapter()

    # Models

    def write_merged(self) -> None:
        # Tensors are copied from file to file unless their values or names change.
        model, names = self.model, self.model.exported_names
        is_changed = self.options or model.has_vision or model.replaces_weights
        is_changed = is_changed or packing_of(model.lora) is not None
        is_copied = model.path.is_dir() and not is_changed
        model = model.with_adapter() if is_copied else model.read(**self.options)
        weights, lora, dtype = model.path, model.lora, self.config.dtype
        if not is_copied:
            weights, lora = pack_as_trained(model.base, lora)
            if not lora and model.lora and dtype is not None:
                check_holds(dtype, weights)
        with model.files.open_description() as folder:
            ql.io.save_merged(self.out, weights, lora, names, folder, dtype=dtype)

    def write_packed(self) -> Repacked | None:
        """Writes a folder in one of the formats of `FMTS`."""
        config, model, form = self.config, self.model, str(self.config.format)
        fmts, stored = FMTS[form], model.stored_fmt
        # By default, weights in a suitable 4-bit format keep their codes.
        default = stored if stored in fmts else fmts[0]
        # A folder in another 4-bit format keeps that format. `save_bitsandbytes` then
        # raises an error that lists the packed kernels.
        if form == "bitsandbytes" and not model.files.is_recoded:
            default = stored or default
        fmt = config.fmt or default
        base, cost = self._read_packed(fmt, config.block_size, config.double_quant)
        layout = "awq" if form == "awq" else "compressed-tensors"
        with model.files.open_description() as folder:
            parts = self.out, base, model.exported_names, folder
            if form == "bitsandbytes":
                ql.io.save_bitsandbytes(*parts)
            else:
                ql.io.save_packed(*parts, layout)
        return cost

    def write_gguf(self) -> Repacked | None:
        from ..gguf.decoder_out import check_gguf_source, save_gguf

        config, model, cost = self.config, self.model, None
        check_gguf_source(model.files, tokenizer=config.tokenizer)
        is_q4_0 = config.gguf_type == "Q4_0"
        if is_q4_0 and (model.adapter or model.lora or config.scales == "search"):
            base, cost = self._read_packed("q4_0", None, None)
            model = dataclasses.replace(model, base=base, lora={})
        else:
            # 4-bit weights in a format that this package lacks can be decoded to floats
            # exactly. This is not done for Q4_0, which would round the floats.
            model = dataclasses.replace(model, recode=not is_q4_0).read(**self.options)
        settings = {"fmt": config.gguf_type or "F16", "tokenizer": config.tokenizer}
        save_gguf(self.out, model.path, model.base, model.lora, **settings)
        return cost

    def _read_packed(
        self, fmt: str, block_size: int | None, double_quant: bool | None
    ) -> tuple[PyTree, Repacked | None]:
        """Returns the base in 4 bits, and the cost of merging an adapter, if any."""
        model = self.model
        if (trained_for := packing_of(model.lora)) is not None:
            model = model.read(**self.options)
            base, _ = pack_as_trained(model.base, model.lora)
            _check_layers(base, trained_for)
            return base, None
        packing_options = fmt, block_size, double_quant, self.config.scales
        if model.adapter is None and not model.lora:
            packing = model.packing(*packing_options)
            if self.config.scales is not None and packing is None:
                raise ValueError(
                    "`scales` must be left out for a model whose weights are in this "
                    "format already, because they keep their scales. Got "
                    f"{self.config.scales}."
                )
            if packing is None or self.calibrate is None:
                return model.read(**(self.options or {"packing": packing})).base, None
            base = model.read().base
            importance = self.calibrate(base)
            return ql.quantize(base, packing, importance=importance, donate=True), None
        # 4-bit weights in a format that this package lacks are decoded exactly.
        model = dataclasses.replace(model, recode=True)
        packing = model.packing(*packing_options)
        assert packing is not None  # `recode` always packs
        return repack(model.read(), packing, self.calibrate)


def _check_layers(base: PyTree, packing: Any) -> None:
    """Raises ValueError if packing would still round layers, which have no adapter."""
    leaves = ql.leaves_by_path(base).items()
    layers = {path: leaf for path, leaf in leaves if re.fullmatch(LAYERS, path)}
    others = [x for x in layers if getattr(layers[x], "packing", None) != packing]
    if others:
        raise ValueError(
            "a merge-aware adapter must have all layers that are not yet in "
            f"{describe(packing)}, so that no layer is rounded after training. Got "
            f"none for {', '.join(others)}. Use the format merged."
        )


_WRITERS: dict[str, Callable[[_Writer], Repacked | None]] = {
    "peft": _Writer.write_peft,
    "peft-portable": _Writer.write_portable,
    "gguf-lora": _Writer.write_gguf_lora,
    "mlx": _Writer.write_mlx,
    "merged": _Writer.write_merged,
    "gguf": _Writer.write_gguf,
    **dict.fromkeys(FMTS, _Writer.write_packed),
}
