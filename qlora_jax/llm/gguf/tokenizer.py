"""Writes a checkpoint's tokenizer into a GGUF file."""

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import gguf
from tokenizers import Tokenizer

from ..models.folder import ModelFolder
from ..models.tokenizer import chat_templates, open_folder_tokenizer
from .pre_tokenizers import PRE_TOKENIZERS, make_pre_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_UNLIKE = "a tokenizer in GGUF must be like llama.cpp's:"
SPACE = "\u2581"  # how SentencePiece writes a space
_BYTE_TOKENS = {f"<0x{byte:02X}>": byte for byte in range(256)}
# Parts of a `tokenizer.json` with SentencePiece's BPE. `_SPLIT` has no effect, since it
# splits at spaces, and `_REPLACE` leaves none.
_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
_PREPEND = {
    "type": "Sequence",
    "normalizers": [{"type": "Prepend", "prepend": SPACE}, _REPLACE],
}
_SPLIT = {
    "type": "Split",
    "pattern": {"String": " "},
    "behavior": "MergedWithPrevious",
    "invert": False,
}


def check_gguf_tokenizer(source: ModelFolder) -> None:
    """Raises if llama.cpp would compute other tokens than a model's tokenizer."""
    raw = _read_tokenizer(open_folder_tokenizer(source.path))
    if _is_spm(raw):
        scores_of(raw)
    else:
        _find_pre_tokenizer(raw)


def _read_tokenizer(tokenizer: "PreTrainedTokenizerFast") -> dict[str, Any]:
    """Returns the `tokenizer.json` of the tokenizer that training uses."""
    reason = None
    if type(tokenizer).__name__ == "LlamaTokenizer":
        reason = (
            "`tokenizer_class` in tokenizer_config.json must not be LlamaTokenizer: "
            "llama.cpp puts a space after each special token, and this class does not. "
            "To train with llama.cpp's tokens, set it to PreTrainedTokenizerFast "
            "before training,"
        )
    elif tokenizer.split_special_tokens:
        reason = "`split_special_tokens` in tokenizer_config.json must be false,"
    if reason:
        raise ValueError(f"{reason} or use tokenizer=False to write the model alone.")
    return json.loads(tokenizer.backend_tokenizer.to_str())


def write_gguf_tokenizer(
    writer: gguf.GGUFWriter, source: ModelFolder, vocab_size: int
) -> None:
    """Adds a tokenizer to a GGUF file.

    Rows of the embedding without a token get placeholders of type UNUSED.
    """
    # 1. Find the ids, texts and types of the tokens.
    folder = source.path
    tokenizer = open_folder_tokenizer(folder)
    raw = _read_tokenizer(tokenizer)
    scores = scores_of(raw) if _is_spm(raw) else None
    added = {t["content"]: t for t in raw.get("added_tokens") or []}
    ids = raw["model"]["vocab"] | {text: t["id"] for text, t in added.items()}
    if (largest := max(ids.values())) >= vocab_size:
        raise ValueError(
            f"the tokenizer's ids must be less than {vocab_size}. Got {largest}."
        )
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [gguf.TokenType.UNUSED] * vocab_size
    for token, index in ids.items():
        tokens[index] = token
        types[index] = _token_type(raw, token, added.get(token), scores is not None)
    # 2. Write the tokenizer's model.
    writer.add_tokenizer_model("gpt2" if scores is None else "llama")
    if scores is None:
        writer.add_tokenizer_pre(_find_pre_tokenizer(raw))
    else:
        writer.add_tokenizer_pre("default")
        writer.add_token_scores([scores.get(token, 0.0) for token in tokens])
        writer.add_add_space_prefix(raw.get("normalizer") == _PREPEND)
        # llama.cpp looks for added tokens before it replaces the spaces of a text, so
        # tokens that Hugging Face finds in normalized text are written with spaces.
        for token, settings in added.items():
            if settings.get("normalized") and not settings.get("special"):
                tokens[ids[token]] = token.replace(SPACE, " ")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    # 3. Merges, special tokens and templates. gguf-py reads the merges from the folder.
    # Special tokens are set here, because gguf-py reads them from one file only.
    # Templates are set here, because gguf-py reads them only if the folder has a
    # `tokenizer_config.json`, and prefers the template in that file to other files.
    special = gguf.SpecialVocab(folder, load_merges=scores is None, n_vocab=vocab_size)
    for name, text in tokenizer.special_tokens_map.items():  # such as "bos_token"
        if name in tokenizer.SPECIAL_TOKENS_ATTRIBUTES and text in ids:
            special.special_token_ids[name.removesuffix("_token")] = ids[text]
    _set_bos_and_eos(special, tokenizer.backend_tokenizer)
    templates = chat_templates(tokenizer)
    special.chat_template = [{"name": k, "template": x} for k, x in templates.items()]
    special.add_to_gguf(writer, quiet=True)


def _token_type(
    raw: Mapping[str, Any], token: str, added: Mapping[str, Any] | None, is_spm: bool
) -> gguf.TokenType:
    kinds = gguf.TokenType
    if is_spm and token == raw["model"].get("unk_token"):
        return kinds.UNKNOWN
    if added is not None:
        return kinds.CONTROL if added.get("special") else kinds.USER_DEFINED
    return kinds.BYTE if is_spm and token in _BYTE_TOKENS else kinds.NORMAL


def _set_bos_and_eos(special: gguf.SpecialVocab, tokenizer: Tokenizer) -> None:
    """Sets whether BOS and EOS are added, so that llama.cpp need not guess."""
    ids = tokenizer.encode("a").ids
    bare = tokenizer.encode("a", add_special_tokens=False).ids
    # Find the ids of the text itself; the others were added before and after it.
    start = next(i for i in range(len(ids) + 1) if ids[i : i + len(bare)] == bare)
    added_ids = {"bos": ids[:start], "eos": ids[start + len(bare) :]}
    for name, added in added_ids.items():
        token_id = special.special_token_ids.get(name)
        if added not in ([], [token_id]):
            raise ValueError(
                f"a tokenizer in GGUF must add `{name}_token` or no token to a text. "
                f"Got the ids {added}; `{name}_token` has the id {token_id}."
            )
        special.add_special_token[name] = bool(added)


def _is_spm(raw: Mapping[str, Any]) -> bool:
    """Whether a `tokenizer.json` is SentencePiece's BPE, as llama.cpp computes it."""
    model = raw.get("model") or {}
    return (
        model.get("type") == "BPE"
        and bool(model.get("byte_fallback"))
        and not model.get("ignore_merges")
        and raw.get("normalizer") in (_REPLACE, _PREPEND)
        and raw.get("pre_tokenizer") in (None, _SPLIT)
    )


def scores_of(raw: Mapping[str, Any]) -> dict[str, float]:
    """Returns the score of each token that a merge forms: later merges score lower.

    Raises a ValueError if no scores would make llama.cpp merge in the same order.
    """
    vocab = raw["model"]["vocab"]
    merges = [  # in older files, a merge is one string
        tuple(merge.split(" ") if isinstance(merge, str) else merge)
        for merge in raw["model"]["merges"]
    ]
    merged = ["".join(pair) for pair in merges]
    scores: dict[str, float] = {}
    for i, token in enumerate(merged):
        if token not in scores:
            scores[token] = -float(len(scores))
        elif merged[i - 1] != token:
            raise ValueError(
                f"{_UNLIKE} the merges that make {token!r} must be consecutive."
            )
    # llama.cpp merges any two tokens that concatenate to a token, with or without a
    # merge that lists them.
    added = {t["content"] for t in raw.get("added_tokens") or []}
    pairs = {p for token in vocab.keys() - added for p in _split_pairs(token, vocab)}
    if missing := sorted(pairs - set(merges)):
        raise ValueError(f"{_UNLIKE} the merges must contain {missing[:3]}.")
    # If a byte has no byte token, llama.cpp uses the token of the character itself. For
    # example, Gemma has no byte token for the tab.
    missing = [
        token
        for token, byte in _BYTE_TOKENS.items()
        if token not in vocab and (byte >= 128 or chr(byte) not in vocab)
    ]
    if missing:
        raise ValueError(f"{_UNLIKE} the tokenizer must have {missing[:3]}.")
    return scores


def _split_pairs(token: str, vocab: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    """Yields the pairs of tokens that concatenate to a token; none for a byte token."""
    if token in _BYTE_TOKENS:
        return
    for i in range(1, len(token)):
        if token[:i] in vocab and token[i:] in vocab:
            yield token[:i], token[i:]


def _find_pre_tokenizer(raw: Mapping[str, Any]) -> str:
    """Returns llama.cpp's name of the pre-tokenizer of a `tokenizer.json`."""
    model = raw.get("model") or {}
    settings = (
        _drop_offsets(raw.get("pre_tokenizer")),
        (raw.get("normalizer") or {}).get("type"),
        bool(model.get("ignore_merges")),
    )
    for name, pre_tokenizer in PRE_TOKENIZERS.items():
        split = _drop_offsets(json.loads(make_pre_tokenizer(name).__getstate__()))
        expected = split, pre_tokenizer.normalizer, pre_tokenizer.ignores_merges
        is_same = settings == expected
        if model.get("type") == "BPE" and is_same:
            return name
    raise ValueError(
        "a tokenizer in GGUF must be SentencePiece's BPE, like Gemma's, or a "
        f"byte-level BPE that splits text like one of {tuple(PRE_TOKENIZERS)}. Got "
        f"{model.get('type')!r} with {settings}. Use tokenizer=False to write the "
        "model alone."
    )


def _drop_offsets(split: Any) -> Any:
    """Drops the settings of a pre-tokenizer's JSON that do not change ids."""
    if isinstance(split, dict):
        return {k: _drop_offsets(v) for k, v in split.items() if k != "trim_offsets"}
    if isinstance(split, list):
        return [_drop_offsets(v) for v in split]
    return split
