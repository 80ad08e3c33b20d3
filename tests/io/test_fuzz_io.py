"""Broken files for every reader of the package: only our own errors may come out.

Starts from valid files, and changes bytes, truncates, or changes values in their JSON.
For a long run: QLORA_JAX_CASES=1000 pytest tests/io/test_fuzz_io.py
"""

import contextlib
import dataclasses
import gzip
import json
import os
import pathlib
import random
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from helpers import SEED
from test_packed_readers import FILES, changed

import qlora_jax as ql
from qlora_jax.io import CheckpointError, native
from qlora_jax.io.files import read_json
from qlora_jax.io.named_leaves import find_leaves
from qlora_jax.io.stored_weight import StoredWeight, in_float
from qlora_jax.llm.data import Tokenizer, read_dataset
from qlora_jax.llm.models.config import DecoderConfig
from qlora_jax.llm.models.families import config_from_hf
from qlora_jax.llm.models.tiny import save_tiny
from qlora_jax.llm.reading import ModelError

SIZES = {
    "vocab_size": 48, "hidden_size": 32, "intermediate_size": 64, "head_dim": 8,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64, "tie_word_embeddings": True,
}  # fmt: skip
LONGROPE = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}
WINDOWS = {"layer_types": ["sliding_attention", "full_attention"]}
WINDOWS |= {"sliding_window": 8, "use_sliding_window": True}
CONFIGS = [
    {"model_type": "llama", **SIZES},
    {"model_type": "mistral", **SIZES, "sliding_window": 8, "rope_theta": 1e6},
    {"model_type": "qwen2", **SIZES, **WINDOWS, "rope_scaling": YARN},
    {"model_type": "qwen3", **SIZES, **WINDOWS, "max_window_layers": 1},
    {"model_type": "gemma2", **SIZES, "query_pre_attn_scalar": 16},
    {"model_type": "gemma3_text", **SIZES, "rope_local_base_freq": 1e4},
    {"model_type": "smollm3", **SIZES, "no_rope_layers": [1, 0]},
    {"model_type": "phi3", **SIZES, "rope_scaling": LONGROPE},
]
SETTINGS = [settings for _, settings, *_ in FILES.values() if settings]
SETTINGS += [{"quant_method": "compressed-tensors", "config_groups": {"a": {}}}]
CASES = int(os.environ.get("QLORA_JAX_CASES", "60"))  # of each reader
SECONDS, BYTES = 1.0, 200 << 20
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
# Patterns that are matched with names: invalid, slow, or matching everything.
PATTERNS = ["(", "(a+)+b", ".*" * 9, "(a|a)*c", ".*", "up|head", "x" * 5000]
PATTERNS += ["a{1,99}" * 9]
ASK = {"role": "user", "content": "one and é?"}
ANSWER = {"role": "assistant", "content": "two"}
PARTS = ANSWER | {"content": [{"type": "text", "text": "two"}]}
TALK = [{"from": "human", "value": "one?"}, {"from": "gpt", "value": "two"}]
MESSAGES = [
    {"messages": [ASK, ANSWER, ASK, ANSWER | {"tool_calls": [{"a": 1}]}]},
    {"messages": [ASK, ANSWER | {"content": [{"type": "text"}]}], "tools": "[]"},
]
ROWS = [
    MESSAGES,
    [{"messages": [ASK, PARTS]}],
    [{"conversations": TALK, "system": "s"}],
    [{"prompt": "one?", "completion": "two"}] * 2,
    [{"prompt": [ASK], "completion": [ANSWER], "tools": [{"name": "f"}]}] * 2,
    [{"instruction": "a", "input": "", "output": "b"}] * 2,
    [{"text": "one and é"}, {"text": "two\n"}],
    [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, {"input_ids": [5, 6]}],
]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content | trim }}"
    "{% if m.tool_calls is defined %}{{ m.tool_calls | tojson(indent=2) }}{% endif %}"
    "{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>"
    "assistant: {% endif %}"
)
# Templates that try to reach Python objects, or are broken.
TEMPLATES = [
    "{{ messages[0].content.__class__ }}",
    "{% generation %}{{ messages[0].content }}",
    "{{ raise_exception(messages) }}",
]
WEIRD = [
    None, True, -1, 0, 1, 3, 1 << 31, 1 << 40, 1 << 70, 0.5, 1e308, "", "x", "../x",
    "/etc/passwd", "model.safetensors", "F32", "U8", "nf4", "\x00", [], {}, [[]],
    [1 << 40] * 3, {"a": 1}, "9" * 5000, [0] * 1000,
]  # fmt: skip


def change_json(rng: random.Random, value):
    """Returns a value with one thing changed, somewhere inside."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        value = dict(value)
        key = rng.choice([*value])
        kind = rng.random()
        if kind < 0.1:
            del value[key]
        elif kind < 0.2:
            value[rng.choice(["", "x", "__metadata__", key + ".absmax"])] = value[key]
        elif kind < 0.3:
            value[rng.choice([*value])] = value[key]
        else:
            value[key] = change_json(rng, value[key])
        return value
    if isinstance(value, list) and value and rng.random() < 0.7:
        value = list(value)
        index = rng.randrange(len(value))
        value[index] = change_json(rng, value[index])
        return value
    if type(value) is int and rng.random() < 0.5:
        return value + rng.choice([-64, -8, -1, 1, 2, 8, 64])
    return rng.choice(WEIRD)


def change_bytes(rng: random.Random, data: bytes) -> bytes:
    """Returns bytes with some changed, cut out, doubled or appended."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        if not changed:
            break
        start = rng.randrange(min(len(changed), rng.choice([9, 300, 1 << 30])))
        stop = min(len(changed), start + rng.choice([1, 1, 1, 4, 50]))
        kind = rng.randrange(5)
        if kind < 2:
            changed[start] ^= 1 << rng.randrange(8)
        elif kind == 2:
            changed[start:stop] = rng.randbytes(stop - start)
        elif kind == 3:
            del changed[start:stop]
        else:
            changed[start:start] = changed[start:stop]
    stop = rng.randrange(len(changed) + 1) if rng.random() < 0.1 else None
    return bytes(changed[:stop])


def split(data: bytes) -> tuple[dict, bytes]:
    """Returns a file's header and its tensors' bytes."""
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def join(header, tensors: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + tensors


def change_file(rng: random.Random, data: bytes) -> bytes:
    if rng.random() < 0.4:
        return change_bytes(rng, data)
    header, tensors = split(data)
    for _ in range(rng.randint(1, 3)):
        header = change_json(rng, header)
    return join(header, tensors)


class Files:
    """Valid files, and a folder to write broken copies to."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.path = folder / "model.safetensors"
        rng = np.random.default_rng(0)
        floats = {
            "up.weight": rng.normal(size=(4, 64)).astype(np.float32),
            "norm.weight": np.ones(4, jnp.bfloat16),
        }
        self.floats = self.written(floats)
        weight_map = dict.fromkeys(floats, "a.safetensors")
        index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        self.index = json.dumps(index).encode()
        (folder / "index").mkdir()
        (folder / "index" / "a.safetensors").write_bytes(self.floats)
        packed = {}
        for i, double_quant in enumerate((True, False)):
            w = jnp.asarray(rng.normal(size=(64, 4)), jnp.float32)
            base = {"up": {"kernel": ql.quantize(w, double_quant=double_quant)}}
            names, path = ql.io.Names({"up/kernel": f"{i}.weight"}), folder / str(i)
            ql.io.save_bitsandbytes(path, base, names, CONFIGS[0], progress=False)
            stored = ql.io.open_safetensors(path)
            packed |= {name: np.asarray(x) for name, x in stored.items()}
        for maker, (tensors, *_) in FILES.items():
            changed_tensors = changed(tensors).items()
            packed |= {key.replace("up", maker, 1): x for key, x in changed_tensors}
        packed["e_blocks"] = rng.integers(0, 256, (2, 4, 1, 16), np.uint8)
        packed["e_scales"] = np.full((2, 4, 1), 120, "u1")
        self.packed = self.written(packed)
        params = {"a": [{"kernel": jnp.ones((64, 4))}], "b": jnp.ones(2)}
        config = ql.QLoRAConfig(rank=2, rank_pattern={"a/.*": 3})
        base, lora = ql.init(jax.random.key(0), params, config)
        native.save(self.path, {"base": base, "lora": lora}, config)
        self.native = self.path.read_bytes()
        self.base = {"up": {"kernel": jnp.ones((2, 64, 4))}, "head": jnp.ones((4, 2))}
        roles = {"head": ql.io.Entry("head.weight", "kn")}
        self.names = ql.io.Names({"up/kernel": "layers.{layer}.up.weight", **roles})
        config = ql.QLoRAConfig(rank=2, fmt=None, targets="up/kernel")
        _, lora = ql.init(jax.random.key(0), self.base, config)
        trees = self.base, lora, self.names
        settings = ql.io.peft_config(*trees, modules_to_save=["head"])
        ql.io.save_peft(folder / "adapter", *trees, settings)
        self.adapter = [(folder / "adapter" / n).read_bytes() for n in ADAPTER]
        config = DecoderConfig(48, 32, 64, 2, num_heads=4, num_kv_heads=2)
        tiny = pathlib.Path(save_tiny(folder / "tiny"))
        (tiny / "tokenizer.json").rename(folder / "tokenizer.json")
        (folder / "config.json").write_text(json.dumps(CONFIGS[0]))

    def written(self, tensors) -> bytes:
        ql.io.write_safetensors(self.path, tensors, metadata={"format": "pt"})
        return self.path.read_bytes()


@contextlib.contextmanager
def refusals(word="", *, length=1000):
    """Treats a ValueError as a refusal: the file is intact, but its content invalid."""
    try:
        yield
    except CheckpointError:
        raise
    except ValueError as error:
        assert type(error) in (ValueError, ModelError) and word in str(error), error
        raise CheckpointError(str(error)[:length]) from None


def read_file(files: Files, rng: random.Random):
    files.path.write_bytes(change_file(rng, files.floats))
    path = rng.choice([files.path, files.folder])
    for tensor in ql.io.open_safetensors(path).values():
        np.asarray(tensor)


def read_index(files: Files, rng: random.Random):
    data = files.index
    if rng.random() < 0.5:
        data = change_bytes(rng, data)
    else:
        data = json.dumps(change_json(rng, json.loads(data))).encode()
    (files.folder / "index" / "model.safetensors.index.json").write_bytes(data)
    for tensor in ql.io.open_safetensors(files.folder / "index").values():
        np.asarray(tensor)


def read_packed(files: Files, rng: random.Random):
    """Weights in 4 bits: broken files, and files with broken descriptions."""
    data = files.packed
    if rng.random() < 0.5:
        data = change_file(rng, data)
    files.path.write_bytes(data)
    opened = ql.io.open_safetensors(files.path)
    if rng.random() < 0.3:
        config = {"quantization_config": change_json(rng, rng.choice(SETTINGS))}
        (files.folder / "config.json").write_text(json.dumps(config))
        opened = ql.io.open_safetensors(files.folder)
    is_own = rng.random() < 0.5  # weights of bitsandbytes, which are named 0 and 1
    tensors = {n: x for n, x in opened.items() if (n[:2] in ("0.", "1.")) == is_own}
    for name in tensors:
        if ".quant_state" in name and rng.random() < 0.7:
            state = np.asarray(tensors[name]).tobytes()
            if rng.random() < 0.3:
                state = change_bytes(rng, state)
            else:
                with contextlib.suppress(ValueError):
                    state = json.dumps(change_json(rng, json.loads(state))).encode()
            tensors[name] = np.frombuffer(state, np.uint8)
    tensors = dataclasses.replace(opened, _tensors=tensors)
    for tensor in ql.io.packed_tensors(tensors).values():
        if not isinstance(tensor, StoredWeight):
            continue
        in_float(tensor)[:, :]
        movable = tensor if tensor.problem is None else tensor.reblocked()
        for x in movable.codes_and_scales() if movable else ():
            x[slice(0, x.shape[0]), slice(0, x.shape[1])]


def read_leaves(files: Files, rng: random.Random):
    files.path.write_bytes(change_file(rng, files.floats))
    names = ql.io.Names({"up/kernel": "up.weight", "norm": "norm.weight"})
    like = {"up": {"kernel": np.ones((64, 4))}, "norm": np.ones(4)}
    find_leaves(ql.io.packed_tensors(ql.io.open_safetensors(files.path)), names, like)


def read_native(files: Files, rng: random.Random):
    """Our own files with changed bytes, with the old checksum or a corrected one."""
    data = change_file(rng, files.native)
    if rng.random() < 0.8:
        header, tensors = split(files.native)
        metadata = header["__metadata__"]
        for key in rng.sample(["leaves", "config"], rng.randint(1, 2)):
            value = change_json(rng, json.loads(metadata[key]))
            metadata[key] = json.dumps(value)
        metadata["checksum"] = native.CHECKSUM_PLACEHOLDER
        data = join(header, tensors)
        checksum = native.hashlib.sha256(data).hexdigest()
        data = data.replace(native.CHECKSUM_PLACEHOLDER.encode(), checksum.encode(), 1)
    files.path.write_bytes(data)
    native.restore(files.path)


def read_config(files: Files, rng: random.Random):
    path = files.folder / "config.json"
    path.write_bytes(change_bytes(rng, b'{"model_type": "llama", "a": [1, 2, {}]}'))
    read_json(path)


def read_adapter(files: Files, rng: random.Random):
    """Adapters of PEFT: broken files, and settings with one thing changed."""
    config, tensors = files.adapter
    kind = rng.random()
    if kind < 0.3:
        tensors = change_file(rng, tensors)
    elif kind < 0.4:
        config = change_bytes(rng, config)
    else:
        settings = json.loads(config)
        for _ in range(rng.randint(1, 2)):
            settings = change_json(rng, settings)
        if isinstance(settings, dict) and rng.random() < 0.5:
            pattern = rng.choice(PATTERNS)
            keys = {"rank_pattern": {pattern: 2}, "layers_pattern": [pattern]}
            keys |= {"target_modules": pattern, "exclude_modules": pattern}
            keys |= {"modules_to_save": [pattern], "layers_to_transform": [0]}
            chosen = rng.sample(sorted(keys), rng.randint(1, 2))
            settings |= {key: keys[key] for key in chosen}
        config = json.dumps(settings).encode()
    folder = files.folder / "adapter"
    for name, data in zip(ADAPTER, (config, tensors), strict=True):
        (folder / name).write_bytes(data)
    ql.io.load_peft(folder, files.base, files.names)


def read_model_config(files: Files, rng: random.Random):
    """Model configs, as a model family reads them and a decoder checks them."""
    raw = dict(rng.choice(CONFIGS))
    for _ in range(rng.randint(1, 3)):
        raw = change_json(rng, raw)
    with refusals("must"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "These keys of config.json are unknown")
        hash(config_from_hf(raw)) if isinstance(raw, dict) else None


def read_rows(files: Files, rng: random.Random):
    """Data files with rows of all kinds, and templates that may be hostile."""
    rows = rng.choice(ROWS)
    lines = [json.dumps(row, ensure_ascii=False).encode() for row in rows]
    for number in range(len(lines)):
        if rng.random() < 0.2:
            lines[number] = change_bytes(rng, lines[number])
        elif rng.random() < 0.4:
            row = change_json(rng, json.loads(lines[number]))
            lines[number] = json.dumps(row).encode()
    suffix = rng.choice([".jsonl"] * 3 + [".json", ".csv", ".txt", ".json.gz"])
    data = b"\n".join(lines)
    if suffix.startswith(".json") and suffix != ".jsonl" and rng.random() < 0.7:
        data = b"[" + b",".join(lines) + b"]"
    data = gzip.compress(data) if suffix.endswith(".gz") else data
    path = files.folder / f"rows{suffix}"
    path.write_bytes(change_bytes(rng, data) if rng.random() < 0.1 else data)
    settings = {"max_length": 200, "train_on": rng.choice(["completions", "all"])}
    settings |= {"too_long": rng.choice(["error", "drop", "truncate", "split"])}
    template = TEMPLATE if rng.random() < 0.7 else rng.choice(TEMPLATES)
    _read_dataset(path, Tokenizer(files.folder, template=template), settings)


def read_template(files: Files, rng: random.Random):
    """Tokenizer configs and chat templates of a model, some of them broken."""
    settings = {"eos_token": "<|im_end|>", "chat_template": TEMPLATE}
    if rng.random() < 0.3:
        settings["chat_template"] = [{"name": "default", "template": TEMPLATE}]
    if rng.random() < 0.7:
        text = change_bytes(rng, TEMPLATE.encode()).decode("utf-8", "replace")
        settings["chat_template"] = text
    data = json.dumps(change_json(rng, settings)).encode()
    if rng.random() < 0.2:
        data = change_bytes(rng, data)
    (files.folder / "tokenizer_config.json").write_bytes(data)
    path = files.folder / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, MESSAGES)))
    try:
        _read_dataset(path, Tokenizer(files.folder), {"max_length": 500})
    finally:
        (files.folder / "tokenizer_config.json").unlink()


def _read_dataset(path: pathlib.Path, tokenizer: Tokenizer, settings: dict):
    with refusals(length=5000):
        read_dataset(path, tokenizer, vocab_size=300, **settings)


READERS = [read_rows, read_template, read_adapter, read_model_config]
READERS += [read_file, read_index, read_packed, read_leaves]
READERS += [read_native, read_config]


def resident() -> int:
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_only_our_own_errors_come_out(tmp_path):
    """Each file is read or refused within a second and with little memory."""
    counts, files = {reader.__name__: [0, 0] for reader in READERS}, Files(tmp_path)
    for case in range(CASES * len(READERS)):
        reader, rng = READERS[case % len(READERS)], random.Random(f"{SEED}-{case}")
        start, before, refused = time.process_time(), resident(), True
        name = f"case {case} of {reader.__name__}, seed {SEED}"
        try:
            reader(files, rng)
            refused = False
        except CheckpointError as error:
            assert len(str(error)) < 20_000, f"{name}: a huge message"
        except Exception as error:
            raise AssertionError(name) from error
        counts[reader.__name__][refused] += 1
        seconds, growth = time.process_time() - start, resident() - before
        assert seconds < SECONDS, f"{name}: {seconds:.1f} s"
        assert growth < BYTES, f"{name}: {growth >> 20} MiB"
        (files.folder / "config.json").unlink(missing_ok=True)
    assert all(refused > CASES // 12 for _, refused in counts.values()), counts
