"""Small tokenizers, and chat templates."""

import json

import tokenizers
from tokenizers import (
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from qlora_jax.llm.data import read_dataset
from qlora_jax.llm.gguf.pre_tokenizers import PRE_TOKENIZERS

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>"]
TEXTS = ["the assistant answers the user and the system", "what is one and one? two"]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + "
    "'<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def save_tokenizer(
    folder,
    *,
    template=CHATML,
    eos="<|im_end|>",
    bos=False,
    sentencepiece=False,
    class_name="PreTrainedTokenizerFast",
):
    """Writes a tokenizer's files and returns it.

    It is a byte-level tokenizer like GPT-2's, whose offsets leave out a leading space,
    or one of characters like Llama 2's, which writes "▁" for spaces and at the start.
    """
    folder.mkdir(exist_ok=True)
    tokenizer = tokenizers.Tokenizer(models.BPE(byte_fallback=sentencepiece))
    ends = []
    if sentencepiece:
        alphabet = []
        spaces = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        tokenizer.normalizer = normalizers.Sequence(spaces)
    else:
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        ends.append(processors.ByteLevel(trim_offsets=True))
    trainer = trainers.BpeTrainer(
        vocab_size=320 + 80 * sentencepiece,
        special_tokens=SPECIAL + sentencepiece * [f"<0x{i:02X}>" for i in range(256)],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 4, trainer)
    if bos:
        begin = [("<s>", SPECIAL.index("<s>"))]
        ends.append(
            processors.TemplateProcessing(single="<s> $A", special_tokens=begin)
        )
    tokenizer.post_processor = processors.Sequence(ends)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": eos, "bos_token": "<s>"}
    settings["tokenizer_class"] = class_name
    if template is not None:
        settings["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return tokenizer


def save_split_tokenizer(folder, pre="qwen2"):
    """A byte-level BPE with two merges and two added tokens."""
    splits = pre_tokenizers
    vocab = {t: i for i, t in enumerate(sorted(splits.ByteLevel.alphabet()))}
    vocab |= {"he": len(vocab), "ll": len(vocab) + 1}
    skips = PRE_TOKENIZERS[pre].ignores_merges
    merges = [("h", "e"), ("l", "l")]
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=merges, ignore_merges=skips)
    )
    # Settings of the tokenizers of real models.
    first = splits.Digits(individual_digits=True)
    if pre not in ("gpt-2", "smollm"):
        digits = {
            "llama-bpe": r"\p{N}{1,3}",
            "smaug-bpe": r"\p{N}{1,3}",
            "qwen2": r"\p{N}",
            "qwen35": r"\p{N}",
        }[pre]
        marks = r"\p{M}" if pre == "qwen35" else ""
        letters = rf"[\p{{L}}{marks}]+" if marks else r"\p{L}+"
        expression = (
            rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?{letters}|{digits}"
            rf"| ?[^\s\p{{L}}{marks}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        )
        first = splits.Split(tokenizers.Regex(expression), "isolated")
    by_regex = pre in ("gpt-2", "smollm")
    second = splits.ByteLevel(add_prefix_space=False, use_regex=by_regex)
    both = splits.Sequence([first, second])
    tokenizer.pre_tokenizer = second if pre == "gpt-2" else both
    if pre in ("qwen2", "qwen35"):
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([tokenizers.AddedToken("<|end|>", special=True)])
    tokenizer.add_tokens(
        [tokenizers.AddedToken("<tool>", special=False, normalized=False)]
    )
    end = {"eos_token": "<|end|>", "chat_template": "{{ messages }}"}
    end["tokenizer_class"] = "PreTrainedTokenizerFast"  # loads the file unchanged
    if pre == "llama-bpe":  # texts begin with a BOS token
        end["bos_token"] = "<|end|>"
        ends = [("<|end|>", tokenizer.token_to_id("<|end|>"))]
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|end|> $A", special_tokens=ends
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(end))
    return tokenizer


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def read(tokenizer, path, **settings):
    settings = {"vocab_size": 320, "max_length": 200} | settings
    return read_dataset(path, tokenizer, **settings)


def read_rows_of(tokenizer, folder, *rows, **settings):
    """Returns the rows that are read from a file."""
    return read(tokenizer, write_rows(folder / "d.jsonl", rows), **settings)
