"""Files that each server gets, and how it starts: `export --for`."""

import ast
import json
import shlex
import shutil

import gguf
import numpy as np
import pytest
import yaml
from helpers import assert_same_bits
from stored import draw_peft, export

import qlora_jax as ql
from qlora_jax.llm import app
from qlora_jax.llm.app.exporting.pairing import open_pair
from qlora_jax.llm.models.checkpoint import load
from qlora_jax.llm.models.tiny import save_tiny
from qlora_jax.trees.paths import leaves_by_path

LAYERS = r"layers/.*/kernel"
MODULES = {f"model.layers.{i}.mlp.down_proj": (64, 128) for i in range(2)}
SUM = "added to the base"
VLLM, MLX, PEFT, LLAMA = "peft-portable", "mlx", "peft", "gguf-lora"
# Format and block size of the base, and the formats of base and adapter to write for
# vLLM, SGLang, llama.cpp, Ollama, mlx-lm and transformers. * marks inexact pairs.
WHOLE = f"gguf {SUM} *"
TABLE = {
    (None, None): (
        f"as it is {VLLM}", f"as it is {VLLM}", f"gguf {LLAMA} *", WHOLE,
        f"merged {MLX}", f"as it is {PEFT}",
    ),
    ("nf4", 64): (
        f"bitsandbytes {VLLM}", f"bitsandbytes {VLLM}", WHOLE, WHOLE,
        f"merged {SUM} *", f"bitsandbytes {PEFT}",
    ),
    ("int4_f16", 32): (
        f"awq {VLLM}", f"awq {VLLM}", f"gguf {LLAMA}", WHOLE,
        f"awq {MLX}", f"compressed-tensors {PEFT}",
    ),
    ("int4_f16", 64): (
        f"awq {VLLM}", f"awq {VLLM}", WHOLE, WHOLE,
        f"awq {MLX}", f"compressed-tensors {PEFT}",
    ),
    ("mxfp4", None): (
        f"mxfp4 {VLLM}", f"merged {SUM} *", WHOLE, WHOLE,
        f"merged {SUM} *", f"mxfp4 {PEFT}",
    ),
    ("nvfp4", None): (
        f"nvfp4 {VLLM} *", f"merged {SUM} *", WHOLE, WHOLE,
        f"merged {SUM} *", f"nvfp4 {PEFT}",
    ),
    ("int4", 64): (
        f"merged {SUM} *", f"merged {SUM} *", WHOLE, WHOLE,
        f"merged {SUM} *", f"merged {SUM} *",
    ),
}  # fmt: skip
SERVERS = ("vllm", "sglang", "llama.cpp", "ollama", "mlx", "transformers")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("servers") / "model")


def write_adapter(folder, **settings):
    draw_peft(folder, MODULES, target_modules=[*MODULES], **settings)
    return str(folder)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters") / "adapter"
    return write_adapter(folder, use_rslora=True)


def pairs_of(model, adapter, **packing):
    """What each server gets, in the words of `TABLE`."""
    rows = []
    for server in SERVERS:
        config = app.ExportConfig(model, None, "x", adapter, server=server, **packing)
        pair = open_pair(config)[2]
        rows.append(f"{pair.base} {pair.adapter}{'' if pair.exact else ' *'}")
    return tuple(rows)


@pytest.mark.parametrize("fmt, block_size", TABLE)
def test_pairs(model, adapter, fmt, block_size):
    packing = dict(fmt=fmt, block_size=block_size)
    assert pairs_of(model, adapter, **packing) == TABLE[fmt, block_size]


def test_a_block_size_without_a_format_is_refused(model, adapter):
    with pytest.raises(ValueError, match="`fmt` must be given with `block_size`"):
        pairs_of(model, adapter, block_size=32)


def test_the_packing_of_the_run_is_used(model, tmp_path):
    settings = dict(model=model, data="d", out=str(tmp_path), fmt="nf4", block_size=64)
    config = app.TrainConfig.from_settings(settings)
    text = yaml.safe_dump(config.to_settings())
    (tmp_path / "config.yaml").write_text(text)
    adapter = write_adapter(tmp_path / "adapter")
    assert pairs_of(model, adapter) == TABLE["nf4", 64]


def test_adapters_that_servers_do_not_load_are_added(model, tmp_path):
    zeros = {
        f"base_model.model.{name}.lora_magnitude_vector": np.ones(n, np.float32)
        for name, (n, _) in MODULES.items()
    }
    adapter = write_adapter(tmp_path / "dora", use_dora=True, extra_tensors=zeros)
    merged = f"merged {SUM} *"
    expected = (merged, merged, WHOLE, WHOLE, merged, f"bitsandbytes {PEFT}")
    assert pairs_of(model, adapter, fmt="nf4", block_size=64) == expected


@pytest.mark.slow
def test_stored_bases_are_served_as_they_are(model, adapter, tmp_path):
    packed = str(tmp_path / "packed")
    export(model, "bitsandbytes", packed)
    rows = pairs_of(packed, adapter)
    assert rows[0] == rows[1] == f"as it is {VLLM}" and rows[5] == f"as it is {PEFT}"
    out = tmp_path / "served"
    written = export(packed, None, out, adapter, server="vllm")
    assert written.start.startswith(f"vllm serve {packed} --enable-lora")
    assert files_in(out) == ["adapter"]


def kernels(tree):
    return {
        path: [np.asarray(x.codes), np.asarray(x.scales)]
        for path, x in leaves_by_path(tree).items()
        if isinstance(x, ql.QTensor)
    }


def files_in(out):
    return sorted(str(x.relative_to(out)) for x in out.iterdir())


COMMANDS = {
    "vllm": "vllm serve ./base --enable-lora --max-lora-rank 8 --lora-modules "
    "adapter=./adapter",
    "sglang": "--model-path ./base --enable-lora --lora-paths adapter=./adapter",
    "llama.cpp": "llama-server -m ./base.gguf --lora ./adapter.gguf",
    "ollama": "echo FROM ./model.gguf > Modelfile && ollama create adapted ",
    "mlx": "mlx_lm.server --model ./base --adapter-path ./adapter",
    "transformers": "CompressedTensorsConfig(run_compressed=False)); model = peft.Peft",
}


# The port of each server, and the fields of a request that select the adapter.
REQUESTS = {
    "vllm": (8000, {"model": "adapter"}),
    "sglang": (30000, {"model": "./base", "lora_path": "adapter"}),
    "llama.cpp": (8080, {"model": "./base.gguf", "lora": [{"id": 0, "scale": 1.0}]}),
    "ollama": (11434, {"model": "adapted"}),
    "mlx": (8080, {"model": "default_model", "adapters": "./adapter"}),
}
HELLO = {"messages": [{"role": "user", "content": "Hello"}]}


def request_of(written):
    """The URL and the body of the curl command, parsed as a shell does."""
    _, request = written.start.splitlines()
    curl, url, flag, header, data, body = shlex.split(request)
    assert (curl, flag, data) == ("curl", "-H", "-d")
    assert header == "Content-Type: application/json"
    return url, json.loads(body)


def test_a_request_fits_what_is_served(model, adapter, tmp_path):
    """The model has no chat template, and its folder needs quotes in a shell."""
    folder = shutil.copytree(model, tmp_path / "it's a model")
    (folder / "chat_template.jinja").unlink()
    request = {"prompt": "Hello", "max_tokens": 100}
    options = dict(server="vllm", fmt="int4", block_size=64)
    written = export(folder, None, tmp_path / "merged", adapter, **options)
    url = "http://localhost:8000/v1/completions"
    assert request_of(written) == (url, {"model": "./model"} | request)
    assert written.start.startswith("vllm serve ./model\n")
    written = export(folder, None, tmp_path / "apart", adapter, server="sglang")
    _, body = request_of(written)
    assert body == {"model": str(folder), "lora_path": "adapter"} | request


def test_the_path_of_a_model_is_quoted_in_the_command(model, adapter, tmp_path):
    folder = str(shutil.copytree(model, tmp_path / 'it\'s a "model"'))
    commands = {
        server: export(folder, None, tmp_path / server, adapter, server=server).start
        for server in ("vllm", "transformers")
    }
    assert shlex.split(commands["vllm"])[:3] == ["vllm", "serve", folder]
    nodes = ast.walk(ast.parse(commands["transformers"]))
    texts = {node.value for node in nodes if isinstance(node, ast.Constant)}
    assert texts == {folder, "./adapter"}


def test_a_server_gets_a_file_without_a_tokenizer(model, adapter, tmp_path):
    settings = dict(server="llama.cpp", tokenizer=False)
    export(model, None, tmp_path / "served", adapter, **settings)
    fields = gguf.GGUFReader(str(tmp_path / "served" / "base.gguf")).fields
    assert "tokenizer.ggml.tokens" not in fields


@pytest.mark.slow
def test_base_and_adapter_are_written(model, adapter, tmp_path):
    """The model is in float, and training packed it as int4 in groups of 32."""
    settings = ql.QLoRAConfig(fmt="int4_f16", block_size=32, targets=LAYERS)
    _, expected_base = load(model, qlora=settings, progress=False)
    packing = dict(fmt="int4_f16", block_size=32)
    for server, command in COMMANDS.items():
        out = tmp_path / server
        written = export(model, None, out, adapter, server=server, **packing)
        assert command in written.start
        assert ("not exact" in str(written)) == (server == "ollama")
        if server in REQUESTS:
            port, names = REQUESTS[server]
            url = f"http://localhost:{port}/v1/chat/completions"
            assert request_of(written) == (url, names | HELLO)
        if server == "ollama":
            assert files_in(out) == ["model.gguf"]
            continue
        suffix = ".gguf" if server == "llama.cpp" else ""
        assert files_in(out) == [f"adapter{suffix}", f"base{suffix}"]
        if server != "llama.cpp":  # tests/llm/models/test_gguf_out.py reads GGUF files
            _, base = load(out / "base", np.float32, progress=False)
            assert_same_bits(kernels(base), kernels(expected_base))
    with pytest.raises(ValueError, match="`out` must be new"):
        export(model, None, tmp_path, adapter, server="vllm", **packing)
