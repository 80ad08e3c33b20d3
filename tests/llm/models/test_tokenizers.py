"""A folder's tokenizer gives the tokens and texts of transformers."""

import functools
import json

import pytest
import transformers
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


# Edits of the files, of which some concern what is done after transformers.
NEXT = "420"
EDITS = {
    "nothing": {},
    "splits special": {"split_special_tokens": True},
    "late token": {"added_tokens_decoder": {**ADDED, NEXT: new("<late>")}},
    "end not in file": {"eos_token": "<new>"},
    "no end": {"eos_token": None},
    "extra names": {"extra_special_tokens": {"image_token": "<new>"}},
    "unknown class": {"tokenizer_class": "MyTokenizer"},
    "no ends": {"tokenizer.json": {"post_processor": None}},
    "padding and truncation": {
        "tokenizer.json": {
            "truncation": dict(
                max_length=3, strategy="LongestFirst", stride=0, direction="Right"
            ),
            "padding": dict(
                strategy="BatchLongest", direction="Left", pad_id=3, pad_type_id=0
            )
            | dict(pad_to_multiple_of=8, pad_token="<late>"),
        }
    },
}


def write(folder, published, edit):
    """Writes a folder's files."""
    model_type, name, kind, settings = PUBLISHED[published]
    changes = dict(EDITS[edit])
    raw = json.loads(file_of(kind)) | changes.pop("tokenizer.json", {})
    config = {"chat_template": TEMPLATE, **settings}
    config |= ({"tokenizer_class": name} if name else {}) | changes
    folder.mkdir()
    for name, content in (
        ("config.json", {"model_type": model_type}),
        ("tokenizer_config.json", config),
        ("tokenizer.json", raw),
    ):
        (folder / name).write_text(json.dumps(content), "utf-8")


@pytest.mark.parametrize("published", PUBLISHED)
def test_tokens_and_texts_of_each_family_are_those_of_transformers(tmp_path, published):
    for edit in EDITS:
        folder = tmp_path / edit
        write(folder, published, edit)
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        ours = open_tokenizer(folder)
        chat = theirs.apply_chat_template(MESSAGES, tokenize=False)
        assert ours.render(MESSAGES) == chat
        assert ours.eos_id == theirs.eos_token_id
        for text in [*TEXTS, chat]:
            for special in (False, True):
                ids = theirs(text, add_special_tokens=special).input_ids
                assert ours.encode(text, add_special_tokens=special) == ids, edit
                decoded = theirs.decode(ids, skip_special_tokens=special)
                assert ours.decode(ids, skip_special_tokens=special) == decoded
