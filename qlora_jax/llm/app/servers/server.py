"""What a server loads, what it computes differently, and how it is started."""

import json
import pathlib
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import qlora_jax as ql

from ...models.config import DecoderConfig
from ...printable import printable

_INT4_PACKING: Any = ql.QLoRAConfig(fmt="int4_f16").packing
INT4_FMTS: tuple[str, ...] = _INT4_PACKING.format.equivalents  # int4_f16 and q4_0
# For each format of `export` that writes a packed model, the number formats that it
# can hold. The first one is the default.
FMTS_BY_FORMAT: dict[str, tuple[str, ...]] = {"bitsandbytes": ("nf4", "fp4")}
FMTS_BY_FORMAT |= {"awq": INT4_FMTS, "compressed-tensors": INT4_FMTS}
FMTS_BY_FORMAT |= {"mxfp4": ("mxfp4",), "nvfp4": ("nvfp4",)}
# For `Server.bases`: number formats, and the format of `export` for each of them.
BITSANDBYTES = dict.fromkeys(FMTS_BY_FORMAT["bitsandbytes"], "bitsandbytes")
AWQ = dict.fromkeys(INT4_FMTS, "awq")
E2M1 = {"mxfp4": "mxfp4", "nvfp4": "nvfp4"}
# The `quant_method`s in a model's config that vLLM and SGLang load. "float" stands for
# a model without a `quant_method`.
METHODS = ("float", "bitsandbytes", "compressed-tensors", "awq", "gptq")
_README = """\
# {title} for {name}

In this folder:

{start}

Written by qlora_jax {version}: {pair}.
"""


# A function that returns what a server computes differently, or None. Its arguments
# are the model's `config.json` (empty for a GGUF file), the config of the decoder, and
# the number format of the base (None for floats).
FindDifference = Callable[[Mapping[str, Any], DecoderConfig, str | None], str | None]


@dataclass(frozen=True, kw_only=True)
class Server:
    """How a server loads a base and an adapter.

    In the comments below, a format is a value of `export --format`, such as awq, and a
    number format is the format of packed weights, such as int4_f16.
    """

    name: str
    # 1. What it loads.
    reads: tuple[str, ...]  # the `quant_method`s of models that need no export
    # The format of a packed base, by its number format.
    bases: Mapping[str, str] = field(default_factory=dict)
    floats: str = "merged"  # the format of a float base
    adapter: str | None  # the format of an adapter; None if adapters must be merged
    adapts_experts: bool = True  # whether it loads adapters of experts
    needs_older_keys: bool = False  # in `config.json`; see `ql.io.older_config_keys`
    # 2. What it computes differently. None if it computes every model exactly.
    find_difference: FindDifference | None = None
    # 3. How it starts. All texts from here on may contain "{base}" and "{adapter}". The
    # command and the option may also contain "{rank}" and "{flags}".
    command: str
    quote: Callable[[str], str] = shlex.quote  # quotes paths in the command
    option: str = ""  # added to the command if there is an adapter
    ranks: tuple[int, ...] = ()  # an adapter's rank is rounded up to one of these
    flags: Mapping[str, str] = field(default_factory=dict)  # by the format of the base
    files: Mapping[str, str] = field(default_factory=dict)  # other files, by name
    # 4. Requests to its OpenAI-compatible API.
    port: int | None = None  # None if it has no API
    model: str = "{base}"  # the name of the base in requests
    # Added to requests to select the adapter.
    adapter_fields: Mapping[str, Any] = field(default_factory=dict)

    @property
    def loads_gguf(self) -> bool:
        """Whether the server loads GGUF files, in which floats are float16."""
        return self.floats == "gguf"

    def write(
        self,
        base: str,
        adapter: str | None,
        folder: pathlib.Path,
        *,
        base_format: str,
        rank: int,
        is_chat: bool,
        system: str | None,
        source: str,
        pair: str,
    ) -> str:
        """Writes a README with the command that starts the server and a request to it.

        `base` and `adapter` are their paths in the command. The request has the system
        message `system`, if there is one. The README quotes `source`, the model's name,
        and `pair`, which says whether the server reproduces the training's weights
        exactly. Returns the command and the request.
        """
        paths = {"base": base, "adapter": adapter}
        if printable(base) != base:  # it would add lines to the README
            raise ValueError(
                f"`model` must have a path without control characters. Got {base!r}."
            )
        rank = next((n for n in self.ranks if n >= rank), rank)
        command = self.command + (self.option if adapter else "")
        quoted = {name: self.quote(path) for name, path in paths.items() if path}
        texts = {name: text.format(**paths) for name, text in self.files.items()}
        command = command.format(
            **quoted, rank=rank, flags=self.flags.get(base_format, "")
        )
        start = f"    {command}\n{self._make_request(paths, is_chat, system)}".rstrip()
        texts["README.md"] = _README.format(
            name=self.name,
            start=start,
            # The name of a local model is its path.
            title=printable(pathlib.PurePath(source).name)
            + ", with an adapter," * bool(adapter),
            pair=printable(pair),
            version=ql.__version__,
        )
        for name, text in texts.items():
            (folder / name).write_text(text, "utf-8")
        return start

    def _make_request(
        self, paths: Mapping[str, str | None], is_chat: bool, system: str | None
    ) -> str:
        """Returns the part of a README with a request; empty without an API."""
        if self.port is None:
            return ""
        has_adapter = paths["adapter"] is not None
        body = {"model": self.model, **(self.adapter_fields if has_adapter else {})}
        body = {
            key: value.format(**paths) if isinstance(value, str) else value
            for key, value in body.items()
        }
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": "Hello"})
        body |= (
            {"messages": messages}
            if is_chat
            else {"prompt": "Hello", "max_tokens": 100}
        )
        url = f"http://localhost:{self.port}/v1/{'chat/' * is_chat}completions"
        data = shlex.quote(json.dumps(body))
        clause = ", which names the adapter" if has_adapter else ""
        curl = f"curl {url} -H 'Content-Type: application/json' -d {data}"
        return f"\nA request{clause}:\n\n    {curl}\n"
