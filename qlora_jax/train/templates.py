"""A model's tokenizer with its chat template."""

import datetime
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import qlora_jax as ql

from ..models.gguf_in import field, open_gguf
from ..models.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from .sandbox import Template

_MAX_BYTES = 32 << 20
_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token")
_SPECIAL += ("cls_token", "mask_token", "additional_special_tokens")
_REASONING = ("reasoning_content", "thinking", "reasoning")


class Spans(NamedTuple):
    """Tokens, and which characters of the text each covers.

    Attributes:
        ids: The tokens.
        starts: The first character of each; where it begins with white space that the
            tokenizer counts out, that of the space.
        ends: The character behind the last.
        added: Whether the tokenizer added it: no text stands for it.
    """

    ids: list[int]
    starts: list[int]
    ends: list[int]
    added: list[bool]


class _Files(NamedTuple):
    """What the files of a model say beside the tokenizer itself."""

    templates: dict[str, str]
    special: dict[str, Any]
    end_ids: tuple[int, ...]


class Tokenizer:
    """A tokenizer, and the chat template that its model was trained with.

    It is made by `open_tokenizer`, and read from the disk on first use.

    Example:
        >>> import json, pathlib, tempfile, tokenizers
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> words = tokenizers.models.WordLevel({"hi": 0, "you": 1, "</s>": 2}, "</s>")
        >>> tokenizers.Tokenizer(words).save(str(folder / "tokenizer.json"))
        >>> template = "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
        >>> settings = {"eos_token": "</s>", "chat_template": template}
        >>> path = folder / "tokenizer_config.json"
        >>> _ = path.write_text(json.dumps(settings))
        >>> tokenizer = open_tokenizer(folder)
        >>> tokenizer.render([{"role": "user", "content": "hi"}])
        'hi</s>'
        >>> tokenizer.end_ids
        (2,)
    """

    def __init__(
        self,
        path: str | pathlib.Path,
        *,
        template: str | None = None,
        now: datetime.datetime | None = None,
    ):
        """Names what is read later.

        Args:
            path: A model's folder or `.gguf` file.
            template: A chat template, in place of the model's.
            now: What a template's `strftime_now` says.
        """
        self._path, self._template, self._now = pathlib.Path(path), template, now

    @functools.cached_property
    def _tokenizer(self) -> Any:
        try:
            tokenizer = load_tokenizer(self._path)
        except ValueError:
            raise
        except Exception as error:  # tokenizers raises no other kind
            raise ValueError(
                f"{self._path} must have a tokenizer that can be read. {error}"
            ) from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    @functools.cached_property
    def _files(self) -> _Files:
        is_gguf = self._path.suffix == ".gguf"
        return (_read_gguf if is_gguf else _read_folder)(self._path)

    @functools.cached_property
    def _templates(self) -> "dict[str, Template]":
        sources = self._files.templates
        if self._template is not None:
            sources = {"default": self._template}
        if not sources:
            return {}
        try:
            from .sandbox import Template
        except ImportError as error:
            raise ImportError(
                "chat templates need: pip install 'qlora-jax[train]'"
            ) from error
        return {name: Template(text, self._now) for name, text in sources.items()}

    @property
    def has_template(self) -> bool:
        """Whether there is a chat template."""
        return self._template is not None or bool(self._files.templates)

    @functools.cached_property
    def eos_id(self) -> int | None:
        """The token that ends a text, if the model names one."""
        token = self._files.special.get("eos_token")
        found = self._tokenizer.token_to_id(token) if token else None
        return found if found is not None else next(iter(self._files.end_ids), None)

    @property
    def pad_id(self) -> int:
        """The token for padding: the model's, or the one that ends a text, or 0."""
        token = self._files.special.get("pad_token")
        found = self._tokenizer.token_to_id(token) if token else None
        return found if found is not None else self.eos_id or 0

    @functools.cached_property
    def end_ids(self) -> tuple[int, ...]:
        """The tokens that end an answer: those of the files, and the template's."""
        found = [self.eos_id, *self._files.end_ids, self._turn_end()]
        return tuple(dict.fromkeys(x for x in found if x is not None))

    def _turn_end(self) -> int | None:
        """Returns the special token that the template writes behind an answer."""
        ask, answer = ({"role": r, "content": "a"} for r in ("user", "assistant"))
        if not self.has_template:
            return None
        try:
            before = self.render([ask], add_generation_prompt=True)
            whole = self.render([ask, answer])
        except ValueError:
            return None
        if not whole.startswith(before):
            return None
        added = self._tokenizer.get_added_tokens_decoder()
        ids = self.encode(whole[len(before) :], add_special_tokens=False)
        special = [i for i in ids if i in added and added[i].special]
        return special[-1] if special else None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Returns the tokens of a text.

        Args:
            text: The text.
            add_special_tokens: Whether to add those that the tokenizer adds, such as
                one for the beginning. Not for what `render` returns: the template has
                written them.
        """
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def spans(self, text: str, *, add_special_tokens: bool = True) -> Spans:
        """Returns the tokens of a text, and where they stand in it.

        Args:
            text: The text.
            add_special_tokens: As for `encode`.
        """
        found = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        added = [
            bool(mask) and start == end
            for mask, (start, end) in zip(
                found.special_tokens_mask, found.offsets, strict=True
            )
        ]
        starts, ends, last = [], [], 0
        for is_added, (start, end) in zip(added, found.offsets, strict=True):
            if is_added:
                start = end = last
            starts.append(min(start, last))
            last = max(last, end)
            ends.append(last)
        return Spans(found.ids, starts, ends, added)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Returns the text of tokens.

        Args:
            ids: The tokens.
            skip_special_tokens: Whether to leave out those that stand for no text.
        """
        return self._tokenizer.decode(
            [*map(int, ids)], skip_special_tokens=skip_special_tokens
        )

    def template_for(self, tools: Sequence[Any] | None) -> "Template":
        """Returns the chat template for messages with such tools.

        Raises:
            ValueError: If there is none.
        """
        names = [*(["tool_use"] if tools else []), "default"]
        for name in names:
            if name in self._templates:
                return self._templates[name]
        has = f" It has {sorted(self._templates)}." if self._templates else ""
        raise ValueError(f"the model must have a chat template, or name one.{has}")

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
    ) -> str:
        """Returns messages as the model's chat template writes them.

        Args:
            messages: The messages, each with a `role` and mostly a `content`.
            tools: Descriptions of tools.
            add_generation_prompt: Whether to write what comes before an answer.

        Raises:
            ValueError: If there is no template, or it refuses the messages.
        """
        text = self.render_marked(messages, tools, add_generation_prompt)
        if self.template_for(tools).marks_answers:
            text, _ = unmarked(text)
        return text

    def render_marked(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
    ) -> str:
        """As `render`, with marks around what the template says the model writes."""
        return self.template_for(tools).render(
            {
                **self._files.special,
                "messages": [_plain_message(message) for message in messages],
                "tools": tools,
                "documents": None,
                "add_generation_prompt": add_generation_prompt,
            }
        )


def open_tokenizer(
    path: str | pathlib.Path,
    *,
    template: str | pathlib.Path | None = None,
    now: datetime.datetime | None = None,
) -> Tokenizer:
    """Returns the tokenizer of a model, with its chat template.

    Args:
        path: A folder with tokenizer.json, and perhaps tokenizer_config.json and
            chat_template.jinja; or a `.gguf` file.
        template: A file with a chat template, in place of the model's.
        now: What a template that writes the date takes for it; by default the time of
            the rendering.

    Returns:
        The tokenizer. It is read when it is first used.

    Raises:
        ValueError: If `template` cannot be read.

    Example:
        >>> ql.train.open_tokenizer("folder").has_template  # doctest: +SKIP
        True
    """
    source = None if template is None else _read_text(pathlib.Path(template))
    return Tokenizer(path, template=source, now=now)


def unmarked(marked: str) -> tuple[str, list[tuple[int, int]]]:
    """Takes the marks out of what `Tokenizer.render_marked` returns.

    Returns:
        The text, and the first character and the end of each part that was marked.

    Raises:
        ValueError: If marks do not come in pairs.
    """
    from .sandbox import END, START

    parts, answers, length = [], [], 0
    for index, piece in enumerate(marked.split(START)):
        inside, mark, rest = piece.partition(END)
        if bool(mark) != (index > 0) or END in rest:
            raise ValueError(
                "texts must not hold the noncharacters U+FDD0 and U+FDD1, nor a chat "
                "template an answer in an answer."
            )
        if mark:
            answers.append((length, length + len(inside)))
        parts += [inside, rest]
        length += len(inside) + len(rest)
    return "".join(parts), [(a, b) for a, b in answers if b > a]


def _plain_message(message: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves out what is None, and names reasoning as templates do."""
    found = {key: value for key, value in message.items() if value is not None}
    reasoning = next((found[key] for key in _REASONING if key in found), None)
    if reasoning is not None:
        found = {"thinking": reasoning, **found, "reasoning_content": reasoning}
    return found


def _read_text(path: pathlib.Path) -> str:
    if not path.is_file():
        raise ValueError(f"{path} must be a file.")
    with path.open("rb") as file:
        data = file.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise ValueError(f"{path} must have at most {_MAX_BYTES} bytes.")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be text in UTF-8. {error}") from error


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    found = ql.io.parse_json(_read_text(path).encode(), str(path))
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold a JSON object.")
    return found


def _read_folder(folder: pathlib.Path) -> _Files:
    settings = _read_json(folder / "tokenizer_config.json")
    older = _read_json(folder / "special_tokens_map.json")
    special = {}
    for name in _SPECIAL:
        value = settings.get(name, older.get(name))
        if isinstance(value, list):
            special[name] = [_token(x) for x in value]
        elif value is not None:
            special[name] = _token(value)
    end_ids: list[Any] = []
    for name in ("generation_config.json", "config.json"):
        found = _read_json(folder / name).get("eos_token_id")
        end_ids += found if isinstance(found, list) else [found]
    end_ids = [x for x in end_ids if type(x) is int and x >= 0]
    return _Files(
        _find_templates(folder, settings), special, (*dict.fromkeys(end_ids),)
    )


def _token(value: Any) -> str:
    found = value.get("content") if isinstance(value, dict) else value
    if not isinstance(found, str):
        raise ValueError(f"a special token must be text. Got {value!r:.40}.")
    return found


def _find_templates(folder: pathlib.Path, settings: dict[str, Any]) -> dict[str, str]:
    """Returns a folder's chat templates by name."""
    found: dict[str, str] = {}
    template = settings.get("chat_template")
    if isinstance(template, str):
        found = {"default": template}
    elif isinstance(template, list):
        for item in template:
            named = isinstance(item, dict) and (item.get("name"), item.get("template"))
            if not named or not all(isinstance(x, str) for x in named):
                raise ValueError(
                    "`chat_template` must be text, or a list of named ones."
                )
            found[item["name"]] = item["template"]
    elif template is not None:
        raise ValueError(f"`chat_template` must be text. Got {template!r:.40}.")
    if (file := folder / "chat_template.jinja").exists():
        found = {"default": _read_text(file)}
        more = folder / "additional_chat_templates"
        for file in sorted(more.glob("*.jinja")) if more.is_dir() else ():
            found[file.stem] = _read_text(file)
    return found


def _read_gguf(path: pathlib.Path) -> _Files:
    reader = open_gguf(path)
    templates = {}
    key = "tokenizer.chat_template"
    if (template := field(reader, key)) is not None:
        templates["default"] = template
    for name in field(reader, f"{key}s") or []:
        if (template := field(reader, f"{key}.{name}")) is not None:
            templates[name] = template
    tokens = field(reader, "tokenizer.ggml.tokens") or []
    special, end_ids = {}, []
    for name in ("bos", "eos", "unknown", "padding", "eot"):
        index = field(reader, f"tokenizer.ggml.{name}_token_id")
        if index is None or not 0 <= int(index) < len(tokens):
            continue
        if name in ("eos", "eot"):
            end_ids.append(int(index))
        known = {"unknown": "unk", "padding": "pad"}.get(name, name)
        if f"{known}_token" in _SPECIAL:
            special[f"{known}_token"] = tokens[int(index)]
    wrong = [name for name, text in templates.items() if not isinstance(text, str)]
    if wrong:
        raise ValueError(f"{path} must have text as its chat templates. Got {wrong}.")
    return _Files(templates, special, tuple(end_ids))
