"""Tokenizers of checkpoints: from `tokenizer.json`, or from a GGUF file's metadata."""

import pathlib
from typing import Any

_SPECIAL = 3  # llama.cpp's token types: 1 normal, 3 control, 4 user-defined
_USER_DEFINED = 4


def load_tokenizer(path: str | pathlib.Path) -> Any:
    """Returns a `tokenizers.Tokenizer`.

    Args:
        path: A folder with `tokenizer.json`, or a `.gguf` file whose tokenizer is a
            byte-level BPE with a pre-tokenizer that we know.
    """
    import tokenizers

    path = pathlib.Path(path)
    if path.suffix == ".gguf":
        return _from_gguf(path)
    return tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))


def _from_gguf(path: pathlib.Path):
    import gguf
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    fields = gguf.GGUFReader(str(path)).fields
    get = lambda key: fields[f"tokenizer.ggml.{key}"].contents()
    kind = get("model"), get("pre")
    if kind != ("gpt2", "smollm"):
        raise ValueError(
            'The GGUF tokenizer must be "gpt2" with pre-tokenizer "smollm". '
            f"Got {kind}. Use a folder with tokenizer.json."
        )
    tokens, kinds = get("tokens"), get("token_type")
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ", 1)) for merge in get("merges")]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    added = lambda kind: [
        AddedToken(t, special=kind == _SPECIAL, normalized=False)
        for t, k in zip(tokens, kinds, strict=True)
        if k == kind
    ]
    tokenizer.add_special_tokens(added(_SPECIAL))
    tokenizer.add_tokens(added(_USER_DEFINED))
    return tokenizer
