"""A folder's tokenizer gives the tokens of transformers, or raises a named error."""

import ast
import contextlib
import functools
import inspect
import itertools
import json
import textwrap

import numpy as np
import pytest
import transformers
from helpers import SEED
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from qlora_jax.llm.data import open_tokenizer
from qlora_jax.llm.data.model_files import read_model_files

SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<|user|>", "<|endoftext|>", "<bos>"]
CORPUS = ["the user and the system  answer\n\nwhat is one and one? two 12 a.b", "’é 漢"]
TEXTS = [
    "one and two",
    " one",
    "  two  spaces\tand",
    "\n\nuser",
    "a\n\n1. b 12 345",
    "<s>one</s> two<|user|>\nthe </s>\n<pad>",
    "one<new>two <late> <|endoftext|>the",
    "e\u0301 é 漢 🙂 x\u200b",
    "q\u0323q \u0323one",
    "▁one ▁two",
    "it's THE user's",
    "",
]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|user|>' if m.role == 'user' else "
    "'[' + m.role + '] ' }}{{ m.content + eos_token|default('', true) }} {% endfor %}"
    "{{ pad_token }}{{ unk_token }}{{ image_token }}"
)
MESSAGES = [
    {"role": "user", "content": " one and one? "},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "<new>\n\n1 the user"},
    {"role": "assistant", "content": "the </s> system"},
]


@functools.cache
def file_of(kind, begins=True):
    """The text of a `tokenizer.json`."""
    is_spm = kind in ("llama", "gemma")
    tokenizer = Tokenizer(
        models.BPE(byte_fallback=is_spm, fuse_unk=is_spm, unk_token="<unk>" * is_spm)
    )
    replace = normalizers.Replace(" ", "▁")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet, special = [], SPECIAL
    if kind == "llama":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace])
        tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    elif kind == "gemma":
        tokenizer.normalizer = replace
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
        tokenizer.decoder = decoders.Sequence(steps)
    else:
        first = pre_tokenizers.Digits(individual_digits=True)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([first, byte_level])
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if is_spm:
        special = SPECIAL + [f"<0x{i:02X}>" for i in range(256)]
    settings = dict(vocab_size=420, special_tokens=special, show_progress=False)
    trainer = trainers.BpeTrainer(initial_alphabet=alphabet, **settings)
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    raw = json.loads(tokenizer.to_str())
    # Byte tokens belong to the vocabulary, and `</s>` to the tokens of other files.
    raw["added_tokens"] = [t for t in raw["added_tokens"] if t["content"] in SPECIAL]
    tokenizer = Tokenizer.from_str(json.dumps(raw))
    if begins:
        begin = dict(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)])
        tokenizer.post_processor = processors.TemplateProcessing(**begin)
    return tokenizer.to_str()


# Published files: model_type, `tokenizer_class`, kind of tokenizer.json, other keys.
TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
FLAGS = dict(lstrip=False, normalized=False, rstrip=False, single_word=False)
ADDED = {
    str(i): {"content": text, "special": True, **FLAGS}
    for i, text in enumerate(SPECIAL)
}
AS_DICT = {
    k: {"__type": "AddedToken", "content": x, **FLAGS} for k, x in TOKENS.items()
}
OFTEN = dict(clean_up_tokenization_spaces=False, model_max_length=4096)
LLAMA = OFTEN | {"legacy": False, "padding_side": "left", "sp_model_kwargs": {}}
LLAMA |= {"add_bos_token": True, "add_eos_token": False, "pad_token": None}
LLAMA |= {"use_default_system_prompt": False, "spaces_between_special_tokens": False}
QWEN = OFTEN | {"bos_token": None, "eos_token": "</s>", "pad_token": "<|endoftext|>"}
QWEN |= {"errors": "replace", "split_special_tokens": False, "unk_token": None}
QWEN |= {
    "add_prefix_space": False,
    "add_bos_token": False,
    "added_tokens_decoder": ADDED,
}
QWEN |= {"additional_special_tokens": ["<|user|>"]}
GPT2 = OFTEN | dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
GPT2 |= {"add_prefix_space": False, "vocab_size": 420, "added_tokens_decoder": ADDED}
PUBLISHED = {
    "llama2": ("llama", "LlamaTokenizer", "llama", LLAMA | AS_DICT),
    "tinyllama": (
        "llama",
        "LlamaTokenizer",
        "llama",
        LLAMA | TOKENS | {"pad_token": "</s>", "added_tokens_decoder": ADDED},
    ),
    "llama3": (
        "llama",
        "PreTrainedTokenizerFast",
        "bytes",
        OFTEN
        | {"clean_up_tokenization_spaces": True, "bos_token": "<s>"}
        | {"eos_token": "</s>", "added_tokens_decoder": ADDED}
        | {"model_input_names": ["input_ids", "attention_mask"]},
    ),
    "mistral": (
        "mistral",
        "LlamaTokenizer",
        "llama",
        LLAMA | TOKENS | {"added_tokens_decoder": ADDED, "add_prefix_space": None},
    ),
    "mixtral": (
        "mixtral",
        "LlamaTokenizer",
        "llama",
        LLAMA | TOKENS | {"legacy": True},
    ),
    "qwen2": ("qwen2", "Qwen2Tokenizer", "bytes", QWEN),
    "qwen3": ("qwen3", "Qwen2Tokenizer", "bytes", QWEN | {"extra_special_tokens": {}}),
    "qwen3.5": ("qwen3_5", "Qwen2Tokenizer", "bytes", QWEN),
    "qwen3.5, text": ("qwen3_5_text", "Qwen3_5Tokenizer", "bytes", QWEN),
    "distilled": ("qwen2", "LlamaTokenizerFast", "bytes", QWEN | TOKENS),
    "gemma2": (
        "gemma2",
        "GemmaTokenizer",
        "gemma",
        LLAMA | TOKENS | {"bos_token": "<bos>", "added_tokens_decoder": ADDED},
    ),
    "gemma3": (
        "gemma3",
        "GemmaTokenizer",
        "gemma",
        LLAMA
        | TOKENS
        | {"added_tokens_decoder": ADDED, "processor_class": "Gemma3Processor"}
        | {"image_token": "<|user|>", "boi_token": "<|user|>", "eoi_token": "<pad>"}
        | {
            "extra_special_tokens": {"image_token": "<|user|>"},
            "sp_model_kwargs": None,
        },
    ),
    "phi3": (
        "phi3",
        "LlamaTokenizer",
        "llama",
        LLAMA
        | TOKENS
        | {
            "added_tokens_decoder": {
                i: t | {"rstrip": t["content"] == "<|user|>"} for i, t in ADDED.items()
            }
        },
    ),
    "phi4": ("phi3", "GPT2Tokenizer", "bytes", GPT2),
    "smollm2": (
        "llama",
        "GPT2Tokenizer",
        "bytes",
        GPT2 | {"additional_special_tokens": ["<|user|>"]},
    ),
    "smollm3": (
        "smollm3",
        "PreTrainedTokenizerFast",
        "bytes",
        OFTEN
        | {"bos_token": None, "eos_token": "</s>", "fast": False}
        | {"added_tokens_decoder": ADDED, "extra_special_tokens": {}},
    ),
    "olmoe": ("olmoe", "GPTNeoXTokenizer", "bytes", GPT2 | {"trim_offsets": True}),
    "gpt_oss": (
        "gpt_oss",
        "PreTrainedTokenizerFast",
        "bytes",
        OFTEN
        | {"bos_token": "<s>", "eos_token": "</s>", "extra_special_tokens": {}}
        | {"added_tokens_decoder": ADDED, "pad_token": "<|endoftext|>"},
    ),
    "no class": ("qwen3", None, "bytes", OFTEN | {"eos_token": "</s>"}),
    "no class, llama": ("llama", None, "llama", TOKENS),
    "bytes as llama": ("llama", "LlamaTokenizerFast", "bytes", TOKENS),
    "code": ("llama", "CodeLlamaTokenizer", "llama", LLAMA | TOKENS),
}


def new(text, **flags):
    return {"content": text, "special": False, **FLAGS} | flags


# Edits of the files; None removes a key.
NEXT = "420"
EDITS = {
    "nothing": {},
    "legacy": {"legacy": True},
    "not legacy": {"legacy": False},
    "legacy null": {"legacy": None},
    "space": {"add_prefix_space": True},
    "no space": {"add_prefix_space": False},
    "splits special": {"split_special_tokens": True},
    "cleans": {"clean_up_tokenization_spaces": True},
    "adds ends": {"add_bos_token": True, "add_eos_token": True},
    "late token": {"added_tokens_decoder": {**ADDED, NEXT: new("<late>")}},
    "sparse token": {"added_tokens_decoder": {**ADDED, "500": new("<late>")}},
    "few tokens": {"added_tokens_decoder": {"2": ADDED["2"]}},
    "no tokens": {"added_tokens_decoder": {}},
    "stripping": {
        "added_tokens_decoder": {**ADDED, "2": ADDED["2"] | {"lstrip": True}}
    },
    "normalized": {
        "added_tokens_decoder": {**ADDED, "2": new("</s>", normalized=True)}
    },
    "word": {"added_tokens_decoder": {**ADDED, "300": new("the", single_word=True)}},
    "end not in file": {"eos_token": "<new>"},
    "beginning not in file": {"bos_token": "<new>"},
    "end is a word": {"eos_token": "the"},
    "no end": {"eos_token": "remove"},
    "end null": {"eos_token": None},
    "extra list": {"extra_special_tokens": ["<new>", "<late>"]},
    "extra names": {"extra_special_tokens": {"image_token": "<new>"}},
    "additional": {"additional_special_tokens": ["<new>", "<s>", "user"]},
    "named": {"image_token": "<new>"},
    "older map": {
        "added_tokens_decoder": "remove",
        "special_tokens_map.json": {
            "eos_token": {"content": "<pad>", **FLAGS, "rstrip": True},
            "pad_token": "<new>",
            "additional_special_tokens": ["<late>"],
        },
    },
    "newer map": {
        "special_tokens_map.json": {
            "eos_token": "<pad>",
            "image_token": "<new>",
            "additional_special_tokens": ["<late>"],
        },
    },
    "map of extras": {"special_tokens_map.json": {"extra_special_tokens": ["<new>"]}},
    "older map of names": {
        "added_tokens_decoder": "remove",
        "special_tokens_map.json": {"extra_special_tokens": {"image_token": "<late>"}},
    },
    "older tokens": {
        "added_tokens_decoder": "remove",
        "added_tokens.json": {"<late>": 420, "<new>": 421, "the": 300},
        "eos_token": "<new>",
    },
    "unread tokens": {"added_tokens.json": {"<late>": 420}},
    "class of others": {"tokenizer_class": "BertTokenizer"},
    "as in the file": {"tokenizer_class": "PreTrainedTokenizerFast"},
    "new name": {"tokenizer_class": "TokenizersBackend"},
    "slow name": {"tokenizer_class": "PreTrainedTokenizer"},
    "llama's": {"tokenizer_class": "LlamaTokenizer"},
    "gemma's": {"tokenizer_class": "GemmaTokenizerFast"},
    "qwen's": {"tokenizer_class": "Qwen2TokenizerFast"},
    "gpt2's": {"tokenizer_class": "GPT2TokenizerFast"},
    "neox's": {"tokenizer_class": "GPTNeoXTokenizerFast"},
    "unknown class": {"tokenizer_class": "MyTokenizer"},
    "config's class": {
        "tokenizer_class": "remove",
        "config.json": {"tokenizer_class": "LlamaTokenizer"},
    },
    "remote code": {"auto_map": {"AutoTokenizer": ["x.X", None]}},
    "padding": {"tokenizer.json": {"padding": "<late>"}},
    "no ends": {"tokenizer.json": {"post_processor": None}},
    "truncation": {
        "tokenizer.json": {
            "truncation": dict(
                max_length=3, strategy="LongestFirst", stride=0, direction="Right"
            )
        }
    },
    "ignores merges": {"tokenizer.json": {"ignore_merges": True}},
    "other model": {"tokenizer.json": {"type": "WordLevel"}},
    "mistral's": {"fix_mistral_regex": True},
    "versions": {"fast_tokenizer_files": ["tokenizer.json", "tokenizer.4.0.json"]},
    "inputs": {"init_inputs": [{"a": 1}]},
}


def write(folder, published, edits):
    """Writes a folder's files."""
    model_type, name, kind, settings = PUBLISHED[published]
    files = {"config.json": {"model_type": model_type}, "tokenizer_config.json": {}}
    config = files["tokenizer_config.json"]
    config |= {"chat_template": TEMPLATE, **settings}
    config |= {"tokenizer_class": name} if name else {}
    files["tokenizer.json"] = raw = json.loads(file_of(kind))
    for edit in edits:
        for key, value in EDITS[edit].items() if isinstance(edit, str) else [edit]:
            if key == "tokenizer.json":
                change_file(raw, value)
            elif key.endswith(".json"):
                files[key] = files.get(key, {}) | value
            elif value == "remove":
                config.pop(key, None)
            else:
                config[key] = value
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content), "utf-8")


def change_file(raw, change):
    for key, value in change.items():
        if key == "padding":
            pad = dict(strategy="BatchLongest", direction="Left", pad_id=3)
            pad |= dict(pad_to_multiple_of=8, pad_type_id=0, pad_token=value)
            raw["padding"] = pad
        elif key == "ignore_merges":
            raw["model"][key] = value
        elif key == "type":
            vocab = raw["model"]["vocab"]
            raw["model"] = {"type": value, "vocab": vocab, "unk_token": "<unk>"}
        else:
            raw[key] = value


def read_by_transformers(folder):
    """Returns the results of transformers, or None if it fails."""
    try:
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        texts = [theirs.apply_chat_template(MESSAGES, tokenize=False)]
        ids = [theirs(x, add_special_tokens=False).input_ids for x in [*TEXTS, *texts]]
        ids += [theirs(text).input_ids for text in TEXTS]
        texts += [
            theirs.decode(x, skip_special_tokens=skip)
            for x in ids
            for skip in (True, False)
        ]
    except Exception:
        return None
    special = theirs.special_tokens_map
    values = special, [getattr(theirs, f"{name}_id") for name in special]
    return *values, theirs.eos_token_id, ids, texts


def read_by_us(folder):
    ours = open_tokenizer(folder)
    texts = [ours.render(MESSAGES)]
    ids = [ours.encode(x, add_special_tokens=False) for x in [*TEXTS, *texts]]
    ids += [ours.encode(text) for text in TEXTS]
    texts += [
        ours.decode(x, skip_special_tokens=skip) for x in ids for skip in (True, False)
    ]
    special = read_model_files(folder).special
    values = special, [ours.inner.token_to_id(text) for text in special.values()]
    return *values, ours.eos_id, ids, texts


def difference(folder, keys):
    """Returns the names of differing results, or None for a named error."""
    with contextlib.suppress(ValueError):  # nothing else is raised
        assert open_tokenizer(folder).has_template
    theirs = read_by_transformers(folder)
    if theirs is None:
        return None
    try:
        ours = read_by_us(folder)
    except ValueError as error:
        is_named = any(f"`{key}`" in str(error) for key in keys)
        return None if is_named else f"refused without a name: {error}"
    names = "special ids eos tokens texts".split()
    differing = [name for name, x, y in zip(names, ours, theirs, strict=True) if x != y]
    return " ".join(differing)


def edited_keys(edits):
    keys = {"tokenizer_class"}
    for key, value in itertools.chain(*(EDITS[edit].items() for edit in edits)):
        keys |= {key} | ({*value} if isinstance(value, dict) else set())
    return keys


@pytest.mark.parametrize("published", PUBLISHED)
def test_each_setting_of_each_family(tmp_path, published):
    wrong, read = {}, 0
    for i, name in enumerate(EDITS):
        write(tmp_path / str(i), published, [name])
        result = difference(tmp_path / str(i), edited_keys([name]))
        read += result is not None
        if result or (name == "nothing" and result is None and published != "code"):
            wrong[name] = result
    assert not wrong
    assert read > (0 if published == "code" else 20)


@pytest.mark.parametrize("seed", range(2))
def test_settings_at_random(tmp_path, seed):
    rng = np.random.default_rng([SEED, seed])
    wrong = {}
    for i in range(60):
        edits = tuple(rng.choice([*EDITS], 3, replace=False).tolist())
        published = str(rng.choice([*PUBLISHED]))
        write(tmp_path / str(i), published, edits)
        if result := difference(tmp_path / str(i), edited_keys(edits)):
            wrong[published, edits] = result
    assert not wrong


def words_of(function):
    """The names of the parameters, and the strings that may be keys."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    words = {x.value for x in nodes if isinstance(x.value, str)}
    words |= {*inspect.signature(function).parameters}
    return {word for word in words if word.isidentifier() and word.islower()}


@pytest.mark.slow
def test_each_key_that_transformers_reads(tmp_path):
    backend = transformers.PreTrainedTokenizerFast
    base = backend.__mro__[1]
    functions = [transformers.AutoTokenizer.from_pretrained, base.__init__]
    functions += [base.from_pretrained, base._from_pretrained, backend.__init__]
    functions += [backend.convert_to_native_format, backend._patch_mistral_regex]
    names = "Llama Gemma Qwen2 GPT2 GPTNeoX".split()
    classes = [getattr(transformers, f"{name}Tokenizer") for name in names]
    keys = set().union(*map(words_of, [*functions, *[c.__init__ for c in classes]]))
    assert {"legacy", "split_special_tokens", "fast_tokenizer_files"} < keys
    wrong, values = {}, [True, "the", ["<new>"]]
    families = itertools.cycle(
        ["llama2", "gemma2", "qwen2", "smollm2", "olmoe", "llama3", "mistral"]
    )
    for i, (key, value) in enumerate(itertools.product(sorted(keys), values)):
        folder, family = tmp_path / str(i), next(families)
        write(folder, family, [(key, value)])
        if result := difference(folder, {key}):
            wrong[key, str(value), family] = result
    assert not wrong
