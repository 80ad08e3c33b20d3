"""`qlora-jax generate`: text from a prompt, or a chat."""

import contextlib
import dataclasses
import importlib
import json
import pathlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from ...data.chat_tokenizer import Tokenizer
from ...data.kinds import check_text, to_conversation
from ...data.readers import convert_rows, open_file
from ...models.sampling import Sampling
from ...models.stream import Stream, TextStream
from ...train.answers import generate_answers
from ..as_trained import open_model_for, read_as_trained, training_load_options
from ..configs import GenerateConfig
from ..merge_aware import note_packing
from ..processes import log
from ..row_settings import find_system_message, open_tokenizer_like_run
from ..run_folder import write_text

_TERMINAL_PROMPT = ">>> "


@dataclass(frozen=True)
class Answer:
    """A model's answer to a text.

    Attributes:
        prompt: The text, or the messages of a row.
        text: The answer.
        prompt_tokens: The number of tokens before the answer, including earlier turns.
        new_tokens: The number of tokens of the answer, including the end token.
        finished: Whether the model ended the answer with an end token.
        seconds: The time that the answer took; for a file, the mean over all answers.
    """

    prompt: str | list[Any]
    text: str
    prompt_tokens: int
    new_tokens: int
    finished: bool
    seconds: float

    def __str__(self):
        return self.text


@dataclass(frozen=True)
class Generated:
    """The result of `generate`; `str` prints the answers one below the other.

    Attributes:
        answers: The answers, one for each text.
    """

    answers: tuple[Answer, ...]

    def __str__(self):
        return "\n".join(map(str, self.answers))


def generate(
    config: GenerateConfig, write: Callable[[str], Any] | None = None
) -> Generated:
    """Returns a model's answers to a text, a file of prompts, or a user's input.

    The settings, the tokenizer, the chat template, the first text and the adapter are
    checked before the model's weights are read.

    Args:
        config: The model, the text and the sampling settings.
        write: Called with each piece of an answer as soon as it is generated. For a
            file of prompts, it is called once, with the JSON lines of all answers, and
            not at all if `out` is set.

    Raises:
        ValueError: If the model, its template or the adapter cannot be read, if they do
            not fit each other, if there is no text, or if rows are wrong. The message
            lists the wrong rows.

    Example:
        >>> import tempfile
        >>> from qlora_jax.llm import app
        >>> from qlora_jax.llm.models.tiny import save_tiny
        >>> model = save_tiny(tempfile.mkdtemp())
        >>> config = app.GenerateConfig(model, prompt="Hello", max_new_tokens=2)
        >>> [answer] = app.generate(config).answers
        >>> answer.new_tokens <= 2
        True
    """
    out = config.out and pathlib.Path(config.out)
    if out and out.exists():
        raise ValueError(f"`out` must be new. Got {config.out!r}, which exists.")
    # Everything is checked before the weights are read.
    sampling = Sampling(config.temperature, config.top_k, config.top_p)
    model = open_model_for(config)
    load_options = training_load_options(config, model)
    note_packing(model.lora)
    if (problem := model.engine.generation_problem) is not None:
        raise ValueError(
            f"`model` must be able to generate tokens in JAX. Got {model.name}: "
            f"{problem}"
        )
    tokenizer = open_tokenizer_like_run(config, model)[0]
    is_chat = tokenizer.has_template if config.chat is None else config.chat
    if config.system is None and is_chat:
        system = find_system_message(config)
        config = dataclasses.replace(config, system=system)
        if system is not None:
            log(f'system message of the run: {system!r} (`--system ""` for none)')
    conversation = _Conversation(config, tokenizer)
    file_prompts, prompts = [], []
    if config.prompts is not None:
        file_prompts = _read_prompts(config, conversation, model.engine.vocab_size)
    else:
        prompts = _open_prompts(config)
    is_typed = not isinstance(prompts, list)
    # Prompts of a file are checked already; a placeholder stands for those to be typed.
    conversation.check(["Hello"] if is_typed else prompts, model.engine.vocab_size)
    dtype = jnp.dtype(config.dtype)
    model = read_as_trained(model, load_options, dtype)
    variables = {"params": model.base, "lora": model.lora}
    stream = Stream(model.engine.make_model(dtype=dtype), variables, sampling)
    write = write or (lambda text: None)
    if not file_prompts:
        return Generated(
            tuple(
                conversation.answer(prompt, index, stream, write)
                for index, prompt in enumerate(prompts)
            )
        )
    answers = _answer_file(config, tokenizer, file_prompts, stream)
    lines = "".join(map(_to_json_line, answers))
    write_text(out, lines) if out else write(lines)
    return Generated(tuple(answers))


def _to_json_line(answer: Answer) -> str:
    row = dataclasses.asdict(answer)
    del row["seconds"]  # a mean, which is the same for all answers
    return json.dumps(row) + "\n"


class _Conversation:
    """Answers the turns of a conversation, or a single text."""

    def __init__(self, config: GenerateConfig, tokenizer: Tokenizer):
        self.config, self.tokenizer = config, tokenizer
        self.is_chat = tokenizer.has_template if config.chat is None else config.chat
        self.messages: list[dict[str, str]] = []
        if config.system:  # an empty one replaces that of the run
            self.messages.append({"role": "system", "content": config.system})

    def check(self, prompts: Iterable[str], vocab_size: int) -> None:
        """Raises ValueError if texts cannot be rendered or encoded."""
        reason = "the model has no chat template"
        if self.config.system and not self.is_chat:
            raise ValueError(f"`system` must be left out: {reason}.")
        if self.is_chat and not self.tokenizer.has_template:
            raise ValueError(f"`chat` must be false: {reason}.")
        for prompt in prompts:
            _check_ids(self.encode(prompt), prompt, vocab_size)

    def encode(self, prompt: str) -> list[int]:
        """Returns the tokens of a text; in a chat, with all earlier turns."""
        if not self.is_chat:
            return self.tokenizer.encode(prompt)
        messages = [*self.messages, {"role": "user", "content": prompt}]
        return _encode_rendered(self.tokenizer, messages)

    def answer(
        self, prompt: str, index: int, stream: Stream, write: Callable[[str], object]
    ) -> Answer:
        """Returns the answer to a text, or to the user's next turn in a chat.

        `index` is the number of the text or turn, which selects the random numbers.
        """
        config, end_ids = self.config, self.tokenizer.end_ids
        start = time.perf_counter()
        ids, pieces = self.encode(prompt), TextStream(self.tokenizer.decode)
        num_new, is_finished, text = 0, False, ""
        key = None  # greedy sampling without a key compiles two fewer programs
        if not stream.sampling.is_greedy:
            key = jax.random.fold_in(jax.random.key(config.seed), index)
        is_typed = config.prompt is None and sys.stdin.isatty()
        limit = config.max_new_tokens
        try:
            for token in stream(ids, max_new_tokens=limit, eos_ids=end_ids, key=key):
                num_new, is_finished = num_new + 1, token in end_ids
                if not is_finished:
                    piece = pieces.add(token)
                    text += piece
                    write(piece)
        except KeyboardInterrupt:
            # On a terminal, Ctrl-C stops the answer and not the program.
            if not is_typed:
                raise
        piece = pieces.flush()  # the bytes of a character that was cut off
        text += piece
        write(piece + "\n")
        if self.is_chat:  # the next prompt is rendered with all turns before it
            self.messages.append({"role": "user", "content": prompt})
            self.messages.append({"role": "assistant", "content": text})
        seconds = time.perf_counter() - start
        return Answer(prompt, text, len(ids), num_new, is_finished, seconds)


def _encode_rendered(
    tokenizer: Tokenizer, messages: list[Any], tools: list[Any] | None = None
) -> list[int]:
    text = tokenizer.render(messages, tools, add_generation_prompt=True)
    # The template has already added the special tokens.
    return tokenizer.encode(text, add_special_tokens=False)


def _open_prompts(config: GenerateConfig) -> list[str] | Iterator[str]:
    """Returns a list of texts, or an iterator over the lines that a user types."""
    if config.prompt is not None:
        return [config.prompt]
    if sys.stdin.isatty():
        return _read_typed_lines()
    text = sys.stdin.read().rstrip("\n")
    if not text.strip():
        raise ValueError("`prompt` must be given, or text on stdin. Got none.")
    return [text]


def _read_typed_lines() -> Iterator[str]:
    with contextlib.suppress(ImportError):  # Windows has no readline
        importlib.import_module("readline")  # lets `input` edit lines
    print("Ctrl-C stops an answer, Ctrl-D ends the conversation.", file=sys.stderr)
    while True:
        prompt = _TERMINAL_PROMPT
        if not sys.stdout.isatty():
            # `input` would write its prompt into the output.
            print(prompt, end="", file=sys.stderr, flush=True)
            prompt = ""
        try:
            text = input(prompt)
        except EOFError:
            return
        if text.strip():
            yield text


# A prompt of a file: a text or messages, and their tokens.
_FilePrompt = tuple[str | list[Any], list[int]]


def _read_prompts(
    config: GenerateConfig, conversation: _Conversation, vocab_size: int
) -> list[_FilePrompt]:
    """Returns the prompts of a file; an error lists all rows that are wrong."""
    tokenizer = conversation.tokenizer

    def convert_row(_: int, row: dict[str, Any]) -> _FilePrompt:
        value: Any = row.get("prompt")
        if value is None:  # missing, or empty in a table that also has messages
            value = row.get("messages")
        if conversation.is_chat or not isinstance(value, str):
            ids = _encode_messages(value, row, config.system, tokenizer)
        elif used := [name for name in ("system", "tools") if row.get(name)]:
            raise ValueError(f"the row must not have {used} without a chat template.")
        else:
            ids = tokenizer.encode(check_text("prompt", value))
        return value, _check_ids(ids, value, vocab_size)

    return [*convert_rows(open_file(str(config.prompts), "prompts"), convert_row)]


def _encode_messages(
    value: Any,  # from JSON
    row: Mapping[str, Any],
    system: str | None,
    tokenizer: Tokenizer,
) -> list[int]:
    if value is None:
        keys = f"{[*row]!s:.200}"
        raise ValueError(f"the row must have `prompt` or `messages`. Got {keys}.")
    if isinstance(value, str):
        value = [{"role": "user", "content": check_text("prompt", value)}]
    values = {"system": row.get("system") or system, "tools": row.get("tools")}
    conversation = to_conversation({"messages": value}, values)
    messages, tools = conversation.messages, conversation.tools
    if messages[-1]["role"] == "assistant":
        raise ValueError("the last message of the row must not be an answer.")
    tokenizer.chat.check_roles(conversation.groups, tools)
    return _encode_rendered(tokenizer, messages, tools)


def _check_ids(ids: list[int], prompt: object, vocab_size: int) -> list[int]:
    if not ids:
        raise ValueError(f"`prompt` must have tokens. Got {prompt!r}.")
    if max(ids) >= vocab_size:
        raise ValueError(
            f"the tokenizer's ids must be less than {vocab_size}, the size of the "
            f"model's vocabulary. Got {max(ids)}."
        )
    return ids


def _answer_file(
    config: GenerateConfig,
    tokenizer: Tokenizer,
    prompts: list[_FilePrompt],
    stream: Stream,
) -> list[Answer]:
    """Returns the answers to the prompts of a file, generated in batches."""
    start = time.perf_counter()
    generated = generate_answers(
        stream.model,
        stream.variables,
        tokenizer,
        [ids for _, ids in prompts],
        max_new_tokens=config.max_new_tokens,
        batch_size=config.batch_size,
        sampling=stream.sampling,
        key=None if stream.sampling.is_greedy else jax.random.key(config.seed),
    )
    seconds = (time.perf_counter() - start) / len(prompts)
    return [
        Answer(value, x.text, len(ids), x.new_tokens, x.finished, seconds)
        for (value, ids), x in zip(prompts, generated, strict=True)
    ]
