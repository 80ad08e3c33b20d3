"""A small byte-level tokenizer with ChatML's tokens, and chat templates."""

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

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>"]
TEXTS = ["the assistant answers the user and the system", "what is one and one? two"]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + "
    "'<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def save_tokenizer(
    folder, *, template=CHATML, eos="<|im_end|>", bos=False, sentencepiece=False
):
    """Writes a tokenizer's files and returns it.

    It is one of bytes, as GPT-2's, whose tokens' places leave out their first space; or
    one of characters with "▁" for a space, which it puts at the start, as Llama 2's.
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
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if template is not None:
        settings["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return tokenizer


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path
