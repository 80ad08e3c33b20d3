"""The pre-tokenizers of llama.cpp, which split a text before byte-level BPE."""

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from tokenizers.pre_tokenizers import PreTokenizer

# The expression by which Llama 3 and Qwen2 split text; %s is the part for numbers.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# In Qwen3.5, marks belong to letters.
_WORDS_WITH_MARKS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class _PreTokenizer(NamedTuple):
    expression: str | None  # splits text; None for GPT-2's expression
    normalizer: str | None = None  # its name in `tokenizers`
    ignores_merges: bool = False  # whether a word that is itself a token skips them
    splits_digits: bool = False  # whether each digit is split off first


# By llama.cpp's names.
PRE_TOKENIZERS = {
    "gpt-2": _PreTokenizer(None),
    "smollm": _PreTokenizer(None, splits_digits=True),
    "llama-bpe": _PreTokenizer(_WORDS % r"\p{N}{1,3}", ignores_merges=True),
    "smaug-bpe": _PreTokenizer(_WORDS % r"\p{N}{1,3}"),
    "qwen2": _PreTokenizer(_WORDS % r"\p{N}", "NFC"),
    "qwen35": _PreTokenizer(_WORDS_WITH_MARKS, "NFC"),
}


def make_pre_tokenizer(name: str) -> "PreTokenizer":
    """Returns the pre-tokenizer that has this name in llama.cpp."""
    from tokenizers import Regex, pre_tokenizers

    settings = PRE_TOKENIZERS[name]
    # `use_regex` splits by GPT-2's expression.
    byte_level = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=settings.expression is None
    )
    if settings.splits_digits:
        splitter = pre_tokenizers.Digits(individual_digits=True)
    elif settings.expression is not None:
        splitter = pre_tokenizers.Split(Regex(settings.expression), "isolated")
    else:
        return byte_level
    return pre_tokenizers.Sequence([splitter, byte_level])
