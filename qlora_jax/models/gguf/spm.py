"""SentencePiece's BPE (Gemma, Llama 2, Phi-3), which GGUF calls "llama".

A `tokenizer.json` orders the merges. GGUF scores the tokens: the pair that makes the
token of the highest score is merged first.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

SPACE = "\u2581"
_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
_PREPEND = {
    "type": "Sequence",
    "normalizers": [{"type": "Prepend", "prepend": SPACE}, _REPLACE],
}
_SPLIT = {  # at spaces, of which `_REPLACE` left none
    "type": "Split",
    "pattern": {"String": " "},
    "behavior": "MergedWithPrevious",
    "invert": False,
}
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
BYTE, UNKNOWN = 6, 2  # token types of llama.cpp


def is_spm(raw: Mapping[str, Any]) -> bool:
    """Whether a `tokenizer.json` is SentencePiece's BPE, as llama.cpp computes it."""
    model = raw.get("model") or {}
    return (
        model.get("type") == "BPE"
        and bool(model.get("byte_fallback"))
        and not model.get("ignore_merges")
        and raw.get("normalizer") in (_REPLACE, _PREPEND)
        and raw.get("pre_tokenizer") in (None, _SPLIT)
    )


def adds_space(raw: Mapping[str, Any]) -> bool:
    """Whether the tokenizer puts a space before a text."""
    return raw.get("normalizer") == _PREPEND


def scores_of(raw: Mapping[str, Any]) -> dict[str, float]:
    """Returns the score of each token that merges make; later ones score less."""
    vocab = raw["model"]["vocab"]
    split = lambda merge: merge.split(" ") if isinstance(merge, str) else merge
    merges = [tuple(split(merge)) for merge in raw["model"]["merges"]]
    made = ["".join(pair) for pair in merges]
    scores: dict[str, float] = {}
    for i, token in enumerate(made):
        if token not in scores:
            scores[token] = -float(len(scores))
        elif made[i - 1] != token:
            raise ValueError(f"the merges that make {token!r} must follow each other.")
    added = {t["content"] for t in raw.get("added_tokens") or []}
    whole = {pair for token in vocab.keys() - added for pair in _pairs(token, vocab)}
    if missing := sorted(whole - set(merges)):
        raise ValueError(f"the merges must hold {missing[:3]}.")
    # llama.cpp takes the character itself where a byte has no token: Gemma's tab.
    has = lambda i: _BYTES[i] in vocab or (i < 128 and chr(i) in vocab)
    if missing := [byte for i, byte in enumerate(_BYTES) if not has(i)]:
        raise ValueError(f"the tokenizer must have {missing[:3]}.")
    return scores


def kinds_of(raw: Mapping[str, Any]) -> dict[str, int]:
    """Returns llama.cpp's types of the byte tokens and the unknown token."""
    unknown = raw["model"].get("unk_token")
    return dict.fromkeys(_BYTES, BYTE) | ({unknown: UNKNOWN} if unknown else {})


def spm_tokenizer(
    tokens: Sequence[str],
    scores: Sequence[float],
    unknown: str | None,
    left_out: set[str],
    space: bool,
) -> Any:
    """Returns a `tokenizers.Tokenizer` whose merges make all but `left_out`."""
    from tokenizers import Tokenizer, models, normalizers

    vocab = {token: i for i, token in enumerate(tokens)}
    pairs = [p for t in vocab.keys() - left_out for p in _pairs(t, vocab)]
    order = lambda p: (scores[vocab["".join(p)]], len(p[0]), len(p[1]))
    pairs.sort(key=order, reverse=True)
    bpe = models.BPE(
        vocab=vocab, merges=pairs, unk_token=unknown, fuse_unk=True, byte_fallback=True
    )
    tokenizer = Tokenizer(bpe)
    if space:
        replace = normalizers.Replace(" ", SPACE)
        prepend = normalizers.Prepend(SPACE)
        tokenizer.normalizer = normalizers.Sequence([prepend, replace])
        tokenizer.decoder = spm_decoder(strips=True)
    else:
        split_as_gemma(tokenizer)
    return tokenizer


def spm_decoder(strips: bool) -> Any:
    """Returns a decoder, which may leave out a space before the text."""
    from tokenizers import decoders

    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * strips)


def split_as_gemma(tokenizer: Any) -> None:
    """Makes a tokenizer write spaces as Gemma's does, without one before the text."""
    from tokenizers import normalizers, pre_tokenizers

    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = spm_decoder(strips=False)


def _pairs(token: str, vocab: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    """Yields the pairs of tokens that make a token; none for a byte token."""
    if token.startswith("<0x") and token in _BYTES:
        return
    for i in range(1, len(token)):
        if token[:i] in vocab and token[i:] in vocab:
            yield token[:i], token[i:]
