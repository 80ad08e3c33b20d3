"""`qlora-jax export`: models and adapters for other programs."""

import dataclasses
import pathlib
from dataclasses import dataclass
from typing import Any, get_args

from qlora_jax.io.files import new_path
from qlora_jax.trees.paths import leaves_by_path

from ...data.chat_tokenizer import open_tokenizer
from ..as_trained import (
    LoadOptions,
    open_model_for,
    run_config_of,
    training_load_options,
)
from ..configs import PACKING_OPTIONS, AdapterFormat, ExportConfig
from ..exporting.formats import WRITERS, Writer
from ..exporting.pairing import AS_IS, MERGED, Pair, open_pair
from ..exporting.repacking import Repacked
from ..merge_aware import (
    complete_export,
    note_packing,
    target_packing_of,
)
from ..open_model import OpenModel
from ..processes import log
from ..pushing import check_base, push
from ..row_settings import find_system_message
from ..servers import FMTS_BY_FORMAT, SERVERS


@dataclass(frozen=True)
class Written:
    """The result of `export`.

    Attributes:
        out: The folder or file.
        format: Its format.
        bytes: Its size in bytes.
        cost: What packing changed, if an adapter was merged into 4 bits afterwards.
        pair: For a server: what was written, and whether it is exact.
        start: For a server: the command that starts it in `out`, and in the next line a
            request, if it has an API.
    """

    out: str
    format: str
    bytes: int
    cost: Repacked | None = None
    pair: Pair | None = None
    start: str | None = None

    def __str__(self):
        written = f"{self.out}: {self.format}, {self.bytes:,} bytes"
        if self.pair is not None:
            written = f"{written}; {self.pair}"
        lines = [written] + [str(self.cost)] * (self.cost is not None)
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
    used, and the sum is packed as in training.

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
    if export_format.startswith("gguf") and path.exists():
        raise ValueError(f"`out` must be new. Got {config.out!r}, which exists.")
    if export_format in get_args(AdapterFormat):
        WRITERS[export_format](Writer(config, model, {}, path))
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
    cost = WRITERS[export_format](Writer(config, model, merge_options, path))
    return Written(str(config.out), export_format, _count_bytes(path), cost)


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


def _count_bytes(path: pathlib.Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def _export_for_server(config: ExportConfig) -> Written:
    """Writes the base and the adapter for a server, and how to start it."""
    server, out = SERVERS[str(config.server)], pathlib.Path(str(config.out))
    if out.exists():
        raise ValueError(f"`out` must be new. Got {config.out!r}, which exists.")
    model, options, pair = open_pair(config)
    with new_path(out) as folder:  # renamed to `out` once it is complete
        folder.mkdir()
        paths, cost = _write_pair(config, model, options, pair, folder)
        ranks = (x.rank for x in leaves_by_path(model.lora).values())
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
            gguf_type = "Q4_0" if pair.exact else None
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
        writer = Writer(part_config, model, options, folder / file)
        return f"./{file}", WRITERS[export_format](writer)

    if pair.adapter == MERGED:
        paths["base"], cost = write_part("model", model, options, pair.base)
        return paths, cost
    if pair.base != AS_IS:
        base = dataclasses.replace(model, lora={}, adapter_path=None)
        paths["base"], _ = write_part("base", base, options, pair.base)
    # The adapter alone is written, so no options are needed to read the base.
    paths["adapter"], _ = write_part("adapter", model, {}, pair.adapter)
    return paths, None
