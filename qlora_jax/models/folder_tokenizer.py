"""Builds the tokenizer of a model's folder as transformers 5.24 does.

transformers takes `tokenizer.json` as it is for some values of `tokenizer_class` only.
For the others it keeps the vocabulary, the merges and the post-processor, and splits
text as the class does. It then adds the tokens that the other files name.
"""

import json
import pathlib
from typing import TYPE_CHECKING, Any

import qlora_jax as ql

from .gguf.spm import SPACE, split_as_gemma, spm_decoder
from .gguf.tokenizer_in import make_pre_tokenizer

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token")
NAMED += ("cls_token", "mask_token")
AS_IN_FILE = "PreTrainedTokenizerFast"
_ALIASES = ("", "PreTrainedTokenizer", "TokenizersBackend", "PythonBackend")
# The special tokens that a class has where the files do not name them.
_END = "<|endoftext|>"
_GPT2 = dict.fromkeys(("unk_token", "bos_token", "eos_token"), _END)
_DEFAULTS: dict[str, dict[str, str | None]] = {
    AS_IN_FILE: {},
    "LlamaTokenizer": {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
    "GemmaTokenizer": {f"{x}_token": f"<{x}>" for x in "unk bos eos pad mask".split()},
    "Qwen2Tokenizer": dict.fromkeys(("unk_token", "eos_token", "pad_token"), _END),
    "GPT2Tokenizer": _GPT2 | {"pad_token": None},
    "GPTNeoXTokenizer": _GPT2 | {"pad_token": "<|padding|>"},
}
# The class that transformers prefers for a `model_type`.
_REGISTERED = dict.fromkeys(("mistral", "mixtral", "phi3"), AS_IN_FILE)
_REGISTERED |= dict.fromkeys(("gemma2", "gemma3", "gemma3_text"), "GemmaTokenizer")
_REGISTERED |= dict.fromkeys(("qwen2", "qwen3", "qwen3_moe"), "Qwen2Tokenizer")
_REGISTERED |= {"olmoe": "GPTNeoXTokenizer"}
# The types for which transformers does not trust `tokenizer_class`.
_DISTRUSTED = ("phi3", "qwen2")
# Settings that change tokens in transformers and are not supported.
_REFUSED = ("auto_map", "fast_tokenizer_files", "fix_mistral_regex", "init_inputs")
_REFUSED += ("model_specific_special_tokens", "post_processor", "tokenizer_object")
_REFUSED += ("trust_remote_code",)
_EXTRA, _OLDER_EXTRA = "extra_special_tokens", "additional_special_tokens"


def read_text(path: pathlib.Path) -> str:
    """Returns the UTF-8 text of a file."""
    if not path.is_file():
        raise ValueError(f"{path} must be a file.")
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be text in UTF-8. {error}") from error


def read_object(path: pathlib.Path) -> dict[str, Any]:
    """Returns the JSON object of a file; an empty one if there is no file."""
    if not path.exists():
        return {}
    value = ql.io.parse_json(read_text(path).encode(), str(path))
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object.")
    return value


class FolderTokenizer:
    """The special tokens of a folder, and how its tokenizer is built.

    Attributes:
        class_name: The class that transformers uses.
        special: The text of each special token by its name, such as `eos_token`.
    """

    def __init__(self, folder: pathlib.Path):
        """Reads the settings, and `tokenizer.json` if there is one.

        Raises:
            ValueError: If a setting would change tokens and is not supported.
        """
        file = folder / "tokenizer.json"
        self._text = read_text(file) if file.exists() else "{}"
        self._raw = json.loads(self._text)
        self._settings = _parse_tokens(read_object(folder / "tokenizer_config.json"))
        config = read_object(folder / "config.json")
        self.class_name = _find_class(self._settings, config, self._text)
        self._read_tokens(folder)
        self.special = {name: str(token) for name, token in self._named.items()}

    def _read_tokens(self, folder: pathlib.Path) -> None:
        """Finds the tokens to add, in the order in which transformers reads files."""
        settings = self._settings
        for name in ("add_bos_token", "add_eos_token"):  # tokenizer.json counts
            settings.pop(name, None)
        if _OLDER_EXTRA in settings and not settings.get(_EXTRA):
            settings[_EXTRA] = settings.pop(_OLDER_EXTRA)
        model_named = _take_model_named(settings) | _take_extra_names(settings)
        if "added_tokens_decoder" in settings:
            decoder = settings["added_tokens_decoder"]
            self._added = {int(index): token for index, token in decoder.items()}
        else:
            self._added = self._read_older_files(folder)
        model_named = _take_model_named(settings) | model_named
        model_named |= _take_extra_names(settings)
        self._refuse_settings()
        by_text = {str(token): token for token in self._added.values()}
        padding = self._raw.get("padding") or {}
        values = {"pad_token": padding.get("pad_token")} | _DEFAULTS[self.class_name]
        values |= {k: x for k, x in settings.items() if k in NAMED}
        named = {name: values.get(name) for name in NAMED} | model_named
        self._named = {k: by_text.get(str(x), x) for k, x in named.items() if x}
        self._extra = settings.get(_EXTRA, settings.get(_OLDER_EXTRA)) or []
        for token in [*named.values(), *self._extra]:
            if token is not None and not _is_token(token):
                raise ValueError(f"a special token must be text. Got {token!r:.40}.")

    def _read_older_files(self, folder: pathlib.Path) -> "dict[int, AddedToken]":
        """Returns added tokens by index, and updates the settings."""
        from tokenizers import AddedToken

        settings = self._settings
        older = read_object(folder / "special_tokens_map.json")
        for key, value in older.items():
            if isinstance(value, dict) and key != _EXTRA:
                value |= {"special": True}
        for key, value in _parse_tokens(older).items():
            if key == _EXTRA and isinstance(value, list):
                value = list(dict.fromkeys([*(settings.get(_EXTRA) or ()), *value]))
            settings[key] = value
        special = [settings.get(name) for name in NAMED]
        special = {str(x) for x in [*special, *(settings.get(_EXTRA) or ())]}
        added = {}
        for text, index in read_object(folder / "added_tokens.json").items():
            is_special = text in special
            flags = {"special": is_special, "normalized": not is_special}
            added[index] = AddedToken(text, **flags)
        for token in self._raw.get("added_tokens") or ():
            flags = {name: x for name, x in token.items() if name != "id"}
            added[token["id"]] = _parse_tokens(flags)
        return added

    def _refuse_settings(self) -> None:
        settings, model = self._settings, self._raw.get("model") or {}
        is_bpe = model.get("type", "BPE") == "BPE"
        cleanup = "clean_up_tokenization_spaces"
        forced = f"{cleanup}_for_bpe_even_though_it_will_corrupt_output"
        refused = [key for key in _REFUSED if settings.get(key)]
        if settings.get(cleanup) and (not is_bpe or settings.get(forced)):
            refused.append(cleanup)  # changes decoded text
        is_rebuilt = self.class_name != AS_IN_FILE
        if self.class_name not in _DEFAULTS or (is_rebuilt and not is_bpe):
            refused.append("tokenizer_class")
        if refused:
            names = " and ".join(f"`{key}`" for key in refused)
            values = {key: settings.get(key) for key in refused}
            raise ValueError(
                f"{names} in tokenizer_config.json would change tokens in a way that "
                f"is not supported. Got {values}. If tokenizer.json is right as it is, "
                f"remove {names}, or set `tokenizer_class` to {AS_IN_FILE}."
            )

    def build(self) -> "Tokenizer":
        """Returns the tokenizer."""
        from tokenizers import AddedToken, Tokenizer

        if not self._raw:
            raise ValueError("there must be a file tokenizer.json.")
        is_rebuilt = self.class_name != AS_IN_FILE
        tokenizer = self._rebuild() if is_rebuilt else Tokenizer.from_str(self._text)
        # Tokens that are in the vocabulary keep their ids, others are numbered here.
        tokens: list[Any] = [self._added[index] for index in sorted(self._added)]
        texts = {t.content for t in tokenizer.get_added_tokens_decoder().values()}
        texts |= {str(token) for token in tokens}
        special = [*self._named.values(), *self._extra]
        tokens += [token for token in special if str(token) not in texts]
        for i, token in enumerate(tokens):
            if isinstance(token, str):
                tokens[i] = AddedToken(token, special=True)
            elif token.content in self.special.values():
                token.special = True
        tokenizer.add_tokens(tokens)
        if self.class_name == "Qwen2Tokenizer":
            again = dict.fromkeys(str(token) for token in special)
            tokenizer.add_tokens([AddedToken(text, special=True) for text in again])
        tokenizer.encode_special_tokens = bool(
            self._settings.get("split_special_tokens")
        )
        return tokenizer

    def _rebuild(self) -> "Tokenizer":
        """Returns the file's vocabulary and merges, with the parts of the class."""
        from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers

        name, space = self.class_name, self._settings.get("add_prefix_space")
        is_spm = name in ("LlamaTokenizer", "GemmaTokenizer")
        model = dict(self._raw["model"], dropout=None, ignore_merges=False)
        model |= {"fuse_unk": is_spm, "byte_fallback": is_spm, "unk_token": None}
        if name == "GemmaTokenizer":
            model["unk_token"] = self.special.get("unk_token")
        parts = ("normalizer", "pre_tokenizer", "decoder", "padding", "truncation")
        parts += ("post_processor",) * (name == "GPTNeoXTokenizer")
        raw = self._raw | dict.fromkeys(parts) | {"model": model, "added_tokens": []}
        tokenizer = Tokenizer.from_str(json.dumps(raw))
        if name == "LlamaTokenizer":
            space = space is None or bool(space)
            scheme = "always" if self._settings.get("legacy") else "first"
            scheme = scheme if space else "never"
            metaspace = pre_tokenizers.Metaspace(SPACE, scheme, split=False)
            tokenizer.pre_tokenizer = metaspace
            tokenizer.decoder = spm_decoder(space)
        elif name == "GemmaTokenizer":
            split_as_gemma(tokenizer)
        else:
            split = pre_tokenizers.ByteLevel(add_prefix_space=bool(space))
            if name == "Qwen2Tokenizer":
                split = make_pre_tokenizer("qwen2", bool(space))
            if name != "GPT2Tokenizer":
                tokenizer.normalizer = normalizers.NFC()
            tokenizer.pre_tokenizer, tokenizer.decoder = split, decoders.ByteLevel()
        return tokenizer


def _is_token(value: Any) -> bool:
    from tokenizers import AddedToken

    return isinstance(value, str | AddedToken)


def _parse_tokens(value: Any) -> Any:
    """Makes an AddedToken of each object with a `content`."""
    from tokenizers import AddedToken

    if isinstance(value, list):
        return [_parse_tokens(x) for x in value]
    if not isinstance(value, dict):
        return value
    if "content" not in value:
        return {key: _parse_tokens(x) for key, x in value.items()}
    try:
        return AddedToken(**{key: x for key, x in value.items() if key != "__type"})
    except TypeError as error:
        raise ValueError(f"{value} must be a token. {error}") from error


def _take_model_named(settings: dict[str, Any]) -> dict[str, Any]:
    """Removes the special tokens of this model alone, such as `image_token`."""
    is_named = lambda k, x: k.endswith("_token") and k not in NAMED and _is_token(x)
    names = [key for key, value in settings.items() if is_named(key, value)]
    return {key: settings.pop(key) for key in names}


def _take_extra_names(settings: dict[str, Any]) -> dict[str, Any]:
    return settings.pop(_EXTRA) if isinstance(settings.get(_EXTRA), dict) else {}


def _find_class(settings: dict[str, Any], config: dict[str, Any], text: str) -> str:
    """Returns the class that transformers' AutoTokenizer chooses."""
    kind = config.get("model_type")
    declared = settings.get("tokenizer_class") or config.get("tokenizer_class") or ""
    name = AS_IN_FILE if declared in _ALIASES else declared
    name = name if name == AS_IN_FILE else name.removesuffix("Fast")
    is_bytes = '"ByteLevel"' in text
    if name == "LlamaTokenizer" and is_bytes and kind not in _DISTRUSTED:
        return AS_IN_FILE
    registered = _REGISTERED.get(kind)
    if registered == AS_IN_FILE or (
        registered and (not declared or kind in _DISTRUSTED)
    ):
        return registered
    return name
