"""What a server reads, what it misreads, and how it is started."""

import json
import pathlib
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import qlora_jax as ql

from ...models.config import DecoderConfig

# The number formats of each format of `export` for packed models; the first one is the
# default.
FMTS: dict[str, tuple[str, ...]] = {"bitsandbytes": ("nf4", "fp4")}
_INT4_PACKING: Any = ql.QLoRAConfig(fmt="int4_f16").packing
FMTS |= dict.fromkeys(("awq", "compressed-tensors"), _INT4_PACKING.format.equivalents)
FMTS |= {"mxfp4": ("mxfp4",), "nvfp4": ("nvfp4",)}
# The form of each number format, for servers that load it.
BITSANDBYTES = dict.fromkeys(FMTS["bitsandbytes"], "bitsandbytes")
AWQ = dict.fromkeys(FMTS["awq"], "awq")
E2M1 = {"mxfp4": "mxfp4", "nvfp4": "nvfp4"}
# The `quant_method`s that vLLM and SGLang load; "float" is a folder without one.
METHODS = ("float", "bitsandbytes", "compressed-tensors", "awq", "gptq")
_README = """\
# {source}, with an adapter, for {name}

In this folder:

    {command}
{request}
Written by qlora_jax {version}: {pair}.
"""


# Returns what a server computes differently, or None, for a model with a `config.json`
# (empty for a GGUF file), in a number format (None for floats).
Misreads = Callable[[Mapping[str, Any], DecoderConfig, str | None], str | None]


@dataclass(frozen=True, kw_only=True)
class Server:
    """How a server loads a base and an adapter. A form is a format of `export`."""

    name: str
    # 1. What it reads: the `quant_method`s of models that need no export, the form of
    # each number format of a packed base, the form of a float base, and the form of an
    # adapter, which is None if adapters must be merged.
    reads: tuple[str, ...]
    bases: Mapping[str, str] = field(default_factory=dict)
    floats: str = "merged"
    adapter: str | None
    adapts_experts: bool = True
    needs_older_keys: bool = False  # in `config.json`; see `ql.io.older_config_keys`
    # 2. What it misreads; None if it computes every model exactly.
    misreads: Misreads | None = None
    # 3. How it is started, with "{base}", "{adapter}", "{rank}" and "{flags}".
    command: str
    option: str = ""  # added to the command for an adapter
    ranks: tuple[int, ...] = ()  # values of "{rank}", which is rounded up
    flags: Mapping[str, str] = field(default_factory=dict)  # by the form of the base
    files: Mapping[str, str] = field(default_factory=dict)  # other files, by name
    # 4. Requests to its OpenAI-compatible API.
    port: int | None = None  # None without an API
    model: str = "{base}"  # the name of the base
    with_adapter: Mapping[str, Any] = field(default_factory=dict)  # selects the adapter

    def write(
        self,
        base: str,
        adapter: str | None,
        folder: pathlib.Path,
        *,
        form: str,
        rank: int,
        is_chat: bool,
        source: str,
        pair: str,
    ) -> None:
        """Writes a README with the command that starts the server and a request to it.

        `base` and `adapter` are paths in the command, and `form` is the base's form.
        `source` and `pair` describe the model and how exactly it is served.
        """
        paths = {"base": base, "adapter": adapter}
        rank = next((n for n in self.ranks if n >= rank), rank)
        command = self.command + (self.option if adapter else "")
        texts = {name: text.format(**paths) for name, text in self.files.items()}
        texts["README.md"] = _README.format(
            name=self.name,
            command=command.format(**paths, rank=rank, flags=self.flags.get(form, "")),
            request=self._make_request(paths, is_chat),
            source=source,
            pair=pair,
            version=ql.__version__,
        )
        for name, text in texts.items():
            (folder / name).write_text(text, "utf-8")

    def _make_request(self, paths: Mapping[str, str | None], is_chat: bool) -> str:
        """Returns the part of a README with a request; empty without an API."""
        if self.port is None:
            return ""
        has_adapter = paths["adapter"] is not None
        body = {"model": self.model, **(self.with_adapter if has_adapter else {})}
        body = {
            key: value.format(**paths) if isinstance(value, str) else value
            for key, value in body.items()
        }
        chat = {"messages": [{"role": "user", "content": "Hello"}]}
        body |= chat if is_chat else {"prompt": "Hello", "max_tokens": 100}
        url = f"http://localhost:{self.port}/v1/{'chat/' * is_chat}completions"
        data = shlex.quote(json.dumps(body))
        clause = ", which names the adapter" if has_adapter else ""
        curl = f"curl {url} -H 'Content-Type: application/json' -d {data}"
        return f"\nA request{clause}:\n\n    {curl}\n"
