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
from ..models.jax_engine import LAYERS
from .as_trained import (
    LoadOptions,
    open_model_for,
    read_as_trained,
    run_config_of,
    training_load_options,
)
from .configs import PACKING_OPTIONS, AdapterFormat, ExportConfig
from .merge_aware import (
    check_dtype_holds,
    complete_export,
    describe_packing,
    note_packing,
    pack_as_trained,
    target_packing_of,
)
from .open_model import OpenModel, open_model
from .pairing import AS_IS, MERGED, Pair, open_pair
from .processes import log
from .pushing import check_base, push
from .repacking import FileLosses, Repacked, repack
from .row_settings import find_system_message, read_rows_like_run
from .scoring import BATCH_TOKENS, Score, make_scorer
from .servers import FMTS_BY_FORMAT, SERVERS


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
        start: For a server: the command that starts it in `out`, and in the next line a
            request, if it has an API.

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
    start: str | None = None

    def __str__(self):
        written = f"{self.out}: {self.format}, {self.bytes:,} bytes"
        if self.pair is not None:
            written = f"{written}; {self.pair}"
        lines = [written, *(str(x) for x in (self.cost, self.losses) if x)]
        if self.start is not None:
            lines.append(f"To start the server in {self.out}:\n\n{self.start}")
        return "\n".join(lines)


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
        run_config = run_config_of(config)
        # A merge-aware adapter is not exported as an adapter.
        if run_config is not None and not run_config.merge_aware:
            check_base(run_config.model, config.model)
    # Without a path, `push` uploads nothing. If the repository cannot be written, it
    # fails here, before the export.
    push(config.push_to_hub)
    written = _export(config)
    log(f"pushed to {push(config.push_to_hub, pathlib.Path(written.out))}")
    return written


def _export(config: ExportConfig) -> Written:
    if config.server is not None:
        return _export_for_server(config)
    model = open_model_for(config)
    config = complete_export(config, model.lora, model.step)
    export_format, path = str(config.format), pathlib.Path(str(config.out))
    model.check_for_torch("format", export_format, ("peft", "peft-portable", "merged"))
    _check_out(config, path)
    if export_format in get_args(AdapterFormat):
        _WRITERS[export_format](_Writer(config, model, {}, path))
        return Written(str(config.out), export_format, _count_bytes(path))
    is_packed = export_format in FMTS_BY_FORMAT or config.gguf_type == "Q4_0"
    # If the result is packed, the packing options describe it, and not the base.
    unset = dict.fromkeys(PACKING_OPTIONS) if is_packed else {}
    training_options = training_load_options(
        dataclasses.replace(config, **unset), model
    )
    # How to read the weights into which the adapter is merged.
    merge_options = training_options
    is_merge_aware = target_packing_of(model.lora) is not None
    note_packing(model.lora)
    has_adapter = model.adapter_path is not None or bool(model.lora)
    if is_packed and not is_merge_aware:
        # The adapter is merged into the weights of the files, not into the weights that
        # training packed. Those already have values of a 4-bit format, so packing the
        # sum of such a weight and a small change would give the old value again.
        merge_options = {}
        _note_other_base(training_options, model.name)
    elif export_format == "merged" and has_adapter and not is_merge_aware:
        _note_rounding(training_options, model.stored_fmt)
    scorer = None
    if config.data is not None:
        rows = read_rows_like_run(config, model, config.data, BATCH_TOKENS)
        scorer = make_scorer(model, rows)
    # The model is read and scored before the file is written, and the file afterwards,
    # so that only one of them is in memory.
    loss = None if scorer is None else _score_model(scorer, model, training_options)
    writer = _Writer(config, model, merge_options, path)
    cost, losses = _WRITERS[export_format](writer), None
    if scorer is not None and loss is not None:
        written = open_model(str(path), engine=model.engine.name)
        losses = FileLosses(loss, _score_model(scorer, written, {}))
    return Written(str(config.out), export_format, _count_bytes(path), cost, losses)


def _check_out(config: ExportConfig, path: pathlib.Path) -> None:
    if str(config.format).startswith("gguf") and path.exists():
        raise ValueError(f"`out` must be new. Got {config.out!r}, which exists.")
    if config.format == "gguf" and config.data is not None:
        raise ValueError(
            "`data` must be left out for gguf, which only llama.cpp reads: measure the "
            f"loss with its llama-perplexity. Got {config.data!r}."
        )


def _note_other_base(training_options: LoadOptions, name: str) -> None:
    """Prints a note if an adapter is merged into other weights than in training."""
    if training_options:
        fmt = training_options["packing_config"].fmt
        log(
            f"note: the adapter was trained on {fmt}. It is merged into the weights of "
            f"{name}, and the sum is packed"
        )


def _note_rounding(training_options: LoadOptions, stored_fmt: str | None) -> None:
    """Warns that packing a merged model in 4 bits again would undo its adapter."""
    packing_config = training_options.get("packing_config")
    fmt = stored_fmt if packing_config is None else packing_config.fmt
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
    scorer: Callable[[PyTree, PyTree], Score], model: OpenModel, options: LoadOptions
) -> float:
    """Returns the loss of a model, which is in memory only during this call."""
    model = read_as_trained(model, options, "float32")
    return scorer(model.base, model.lora).loss


def _count_bytes(path: pathlib.Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def _export_for_server(config: ExportConfig) -> Written:
    """Writes the base and the adapter for a server, and how to start it."""
    server, out = SERVERS[str(config.server)], pathlib.Path(str(config.out))
    if out.exists():
        raise ValueError(f"`out` must be new. Got {config.out!r}, which exists.")
    model, options, pair = open_pair(config)
    if config.gguf_type == "Q4_0" and not pair.exact:
        # As for the format gguf, the weights in the model's files are packed.
        if pair.adapter == MERGED:
            _note_other_base(options, model.name)
        options = {}
    with ql.io.new_path(out) as folder:  # renamed to `out` once it is complete
        folder.mkdir()
        paths, cost = _write_pair(config, model, options, pair, folder)
        ranks = (x.rank for x in ql.leaves_by_path(model.lora).values())
        stored = model.quantization.get("quant_method")
        start = server.describe_start(
            paths["base"],
            paths.get("adapter"),
            base_format=str(stored) if pair.base == AS_IS else pair.base,
            rank=max(ranks, default=0),
            # Servers without an API need no example of a request.
            is_chat=bool(server.port) and open_tokenizer(model.path).has_template,
            system=find_system_message(config),
        )
    size = _count_bytes(out)
    name = f"for {server.name}"
    return Written(str(out), name, size, cost, pair=pair, start=start)


def _write_pair(
    config: ExportConfig,
    model: OpenModel,
    options: LoadOptions,
    pair: Pair,
    folder: pathlib.Path,
) -> tuple[dict[str, str], Repacked | None]:
    """Writes the files of a pair, and returns the paths with which a server loads them.

    A base that is not exported has the path or the name of the model. The second result
    is what packing changed, if a 4-bit file has the adapter merged.
    """
    # Servers get quoted paths, in which a shell does not expand "~".
    path = pathlib.Path(model.name).expanduser()
    paths = {"base": str(path.absolute()) if path.exists() else model.name}

    def write_part(
        file: str, model: OpenModel, options: LoadOptions, export_format: Any
    ) -> tuple[str, Repacked | None]:
        file += ".gguf" * export_format.startswith("gguf")
        gguf_type = None
        if export_format == "gguf":
            # Only Q4_0 can be exact in GGUF, where floats are rounded to float16.
            gguf_type = config.gguf_type or ("Q4_0" if pair.exact else None)
        # In the config of a server, these options say how training packed the base, as
        # `options` do. In the config of one file, they would describe the file instead.
        unset = dict.fromkeys((*PACKING_OPTIONS, "server"))
        # Only a whole model in GGUF can do without its tokenizer.
        part_config = dataclasses.replace(
            config,
            format=export_format,
            gguf_type=gguf_type,
            tokenizer=config.tokenizer or export_format != "gguf",
            **unset,
        )
        writer = _Writer(part_config, model, options, folder / file)
        return f"./{file}", _WRITERS[export_format](writer)

    if pair.adapter == MERGED:
        paths["base"], cost = write_part("model", model, options, pair.base)
        return paths, cost
    if pair.base != AS_IS:
        base = dataclasses.replace(model, lora={}, adapter_path=None)
        paths["base"], _ = write_part("base", base, options, pair.base)
    # The adapter alone is written, so no options are needed to read the base.
    paths["adapter"], _ = write_part("adapter", model, {}, pair.adapter)
    return paths, None


@dataclass(frozen=True)
class _Writer:
    """Writes a model or an adapter; there is a method for each format."""

    config: ExportConfig
    model: OpenModel
    options: LoadOptions  # for the weights to merge into, or for the base of a server
    out: pathlib.Path

    # Adapters

    def write_peft(self) -> None:
        # The base's weights are needed only if the adapter replaces some of them.
        has_weights = self.model.replaces_weights
        model = self.model.read() if has_weights else self.model.read_adapter()
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
        from ..gguf.save import save_gguf_lora

        save_gguf_lora(self.out, self.model.path, self._make_plain_lora())

    def write_mlx(self) -> None:
        lora = self._make_plain_lora()
        ql.io.save_mlx(self.out, lora, self.model.decoder.num_layers)

    def _make_plain_lora(self) -> ql.io.PlainLoRA:
        model = self._read_plain()
        return ql.io.PlainLoRA.of(model.base, model.lora, model.engine.exported_names)

    def _read_plain(self) -> OpenModel:
        """Returns the model with its adapter.

        Raises ValueError if the adapter replaces weights.
        """
        config = self.config
        if self.model.replaces_weights:
            raise ValueError(
                f"`adapter` must not replace biases or modules for {config.format}, "
                f"since servers do not load them. Got {config.adapter!r}, which does. "
                "Use the format merged."
            )
        return self.model.read_adapter()

    # Models

    def write_merged(self) -> None:
        # `save_merged` takes the model's folder or a tree of weights. The folder is
        # enough if an adapter is added to the weights as they are stored, under the
        # same names. Only a model with a vision part is written under other names.
        model, names = self.model, self.model.engine.exported_names
        is_merge_aware = target_packing_of(model.lora) is not None
        is_changed = self.options or is_merge_aware or model.replaces_weights
        is_copied = not (is_changed or model.engine.has_vision)
        model = model.read_adapter() if is_copied else model.read(**self.options)
        weights, lora, dtype = model.path, model.lora, self.config.dtype
        if not is_copied:
            weights, lora = pack_as_trained(model.base, lora)
            if is_merge_aware and dtype is not None:
                check_dtype_holds(dtype, weights)
        with model.files.open_description() as folder:
            ql.io.save_merged(self.out, weights, lora, names, folder, dtype=dtype)

    def write_packed(self) -> Repacked | None:
        """Writes a folder in one of the formats of `FMTS_BY_FORMAT`."""
        config, model, export_format = self.config, self.model, str(self.config.format)
        fmts, stored_fmt = FMTS_BY_FORMAT[export_format], model.stored_fmt
        # By default, weights in a suitable 4-bit format keep their codes.
        default = stored_fmt if stored_fmt in fmts else fmts[0]
        # `save_bitsandbytes` raises an error that lists kernels in another format.
        if export_format == "bitsandbytes":
            default = stored_fmt or default
        fmt = config.fmt or default
        base, cost = self._read_packed(fmt, config.block_size, config.double_quant)
        with model.files.open_description() as folder:
            arguments = self.out, base, model.engine.exported_names, folder
            if export_format == "bitsandbytes":
                ql.io.save_bitsandbytes(*arguments)
            elif export_format == "awq":
                ql.io.save_packed(*arguments, "awq")
            else:
                ql.io.save_packed(*arguments, "compressed-tensors")
        return cost

    def write_gguf(self) -> Repacked | None:
        from ..gguf.save import check_gguf_source, save_gguf

        config, model, cost = self.config, self.model, None
        check_gguf_source(model.files, tokenizer=config.tokenizer)
        is_q4_0 = config.gguf_type == "Q4_0"
        if is_q4_0 and (model.adapter_path or model.lora):
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
        if (trained_for := target_packing_of(model.lora)) is not None:
            model = model.read(**self.options)
            base, _ = pack_as_trained(model.base, model.lora)
            _check_all_packed(base, trained_for)
            return base, None
        packing_options = fmt, block_size, double_quant
        if model.adapter_path is None and not model.lora:
            packing_config = model.packing_config(*packing_options)
            # The base of a server is packed as in training, by `self.options`. They are
            # empty for a `--format` in 4 bits, which is packed as requested.
            options = self.options or {"packing_config": packing_config}
            return model.read(**options).base, None
        # 4-bit weights in a format that this package lacks are decoded exactly.
        model = dataclasses.replace(model, recode=True)
        packing_config = model.packing_config(*packing_options)
        assert packing_config is not None  # `recode` always packs
        return repack(model.read(), packing_config)


def _check_all_packed(base: PyTree, packing: Any) -> None:
    """Raises ValueError if layers without a merge-aware adapter are not packed yet."""
    unpacked = [
        path
        for path, leaf in ql.leaves_by_path(base).items()
        if re.fullmatch(LAYERS, path) and getattr(leaf, "packing", None) != packing
    ]
    if unpacked:
        raise ValueError(
            "a merge-aware adapter must have all layers that are not yet in "
            f"{describe_packing(packing)}, so that no layer is rounded after training. "
            f"Got none for {', '.join(unpacked)}. Use the format merged."
        )


_WRITERS: dict[str, Callable[[_Writer], Repacked | None]] = {
    "peft": _Writer.write_peft,
    "peft-portable": _Writer.write_portable,
    "gguf-lora": _Writer.write_gguf_lora,
    "mlx": _Writer.write_mlx,
    "merged": _Writer.write_merged,
    "gguf": _Writer.write_gguf,
    **dict.fromkeys(FMTS_BY_FORMAT, _Writer.write_packed),
}
