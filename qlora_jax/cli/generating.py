"""`qlora-jax generate`: text from a prompt, or a chat."""

import contextlib
import dataclasses
import importlib
import json
import pathlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

import qlora_jax as ql

from ..models.decoder import Decoder
from ..models.sampling import Sampling
from ..models.stream import Stream, TextStream
from ..train.answers import answers
from .base_model import open_adapted, read_as_trained
from .configs import GenerateConfig
from .prompts import Prompt, check_ids, read_prompts
from .run_folder import write_text

_MARK = ">>> "  # before what a user types


@dataclass(frozen=True)
class Answer:
    """A model's answer to a text.

    Attributes:
        prompt: The text, or the messages of a file.
        text: The answer.
        prompt_tokens: Tokens before the answer, with earlier turns of a conversation.
        new_tokens: Tokens of the answer, including the one that ended it.
        finished: Whether a token ended it, and not `max_new_tokens` or the user.
        seconds: Time that it took; for a file, that of all over their number.
        adapter: The adapter, where there are several.

    Example:
        >>> from qlora_jax import cli
        >>> cli.Answer("Hello", "Hi!", 9, 3, True, 0.1).text
        'Hi!'
    """

    prompt: str | list[Any]
    text: str
    prompt_tokens: int
    new_tokens: int
    finished: bool
    seconds: float
    adapter: str | None = None

    def __str__(self):
        return self.text if self.adapter is None else f"{self.adapter}:\n{self.text}"


@dataclass(frozen=True)
class Generated:
    """The result of `generate`; `str` is the answers, one below the other.

    Attributes:
        answers: The answers, one for each text.

    Example:
        >>> from qlora_jax import cli
        >>> print(cli.Generated((cli.Answer("Hello", "Hi!", 9, 3, True, 0.1),)))
        Hi!
    """

    answers: tuple[Answer, ...]

    def __str__(self):
        return "\n".join(map(str, self.answers))


def generate(
    config: GenerateConfig, write: Callable[[str], Any] | None = None
) -> Generated:
    """Returns a model's answers to a text, or to what a user types on a terminal.

    The settings, tokenizer, chat template, first text and adapter are checked before
    the model's weights are read.

    Args:
        config: The model, the text and the sampling.
        write: Called with pieces of the answers as they are made; for a file of prompts
            with the lines of all, unless they are written to `out`.

    Raises:
        ValueError: If the model, its template or the adapter cannot be read or do not
            fit, if there is no text, or if rows of a file are wrong: all are named.

    Example:
        >>> import tempfile
        >>> from qlora_jax import cli
        >>> from qlora_jax.models.tiny import save_tiny
        >>> model = save_tiny(tempfile.mkdtemp())
        >>> config = cli.GenerateConfig(model, prompt="Hello", max_new_tokens=2)
        >>> [answer] = cli.generate(config).answers
        >>> answer.new_tokens <= 2
        True
    """
    out = config.out and pathlib.Path(config.out)
    if out and out.exists():
        raise ValueError(f"`out` must be new. Got {config.out!r}, which exists.")
    sampling = Sampling(config.temperature, config.top_k, config.top_p)
    model, several, how = open_adapted(config)
    texts = _Texts(config, ql.train.open_tokenizer(model.path))
    rows, vocab_size = [], model.config.vocab_size
    if config.prompts is not None:
        rows = read_prompts(config, texts.tokenizer, texts.is_chat, vocab_size)
    prompts = [] if rows else _prompts(config)
    known = prompts if isinstance(prompts, list) else ["Hello"]
    if several and known is not prompts:
        raise ValueError("`prompt` must be given with several adapters. Got none.")
    texts.check(known, vocab_size)
    dtype = jnp.dtype(config.dtype)
    model = read_as_trained(model, how, dtype)
    decoder = Decoder(model.config, dtype=dtype)
    wrapped = ql.linen.wrap(decoder, scanned=decoder.scanned)
    stream = Stream(wrapped, {"params": model.base, "lora": model.lora}, sampling)
    answers, write = [], write or (lambda text: None)
    for adapter, lora in (several or {None: model.lora}).items():
        texts, found = _Texts(config, texts.tokenizer), stream.with_lora(lora)
        if rows:
            made = texts.answer_all(rows, wrapped, found.variables, sampling)
            answers += [dataclasses.replace(x, adapter=adapter) for x in made]
        if not rows and adapter is not None:
            write(f"{adapter}:\n")
        for index, prompt in enumerate(prompts):
            key = None  # nothing is drawn: two programs less to compile
            if not sampling.is_greedy:
                key = jax.random.fold_in(jax.random.key(config.seed), index)
            answer = texts.answer(prompt, found, key, write)
            answers.append(dataclasses.replace(answer, adapter=adapter))
    if rows:
        lines = "".join(map(_line, answers))
        write_text(out, lines) if out else write(lines)
    return Generated(tuple(answers))


def _line(answer: Answer) -> str:
    row = dataclasses.asdict(answer)
    del row["seconds"]
    if answer.adapter is None:
        del row["adapter"]
    return json.dumps(row) + "\n"


def _prompts(config: GenerateConfig) -> Iterable[str]:
    """Returns the texts: a list if they are known, else an iterator of typed lines."""
    if config.prompt is not None:
        return [config.prompt]
    if sys.stdin.isatty():
        return _typed()
    text = sys.stdin.read().rstrip("\n")
    if not text.strip():
        raise ValueError("`prompt` must be given, or text on stdin. Got none.")
    return [text]


def _typed() -> Iterator[str]:
    with contextlib.suppress(ImportError):  # not on Windows
        importlib.import_module("readline")  # `input` edits lines with it
    print("Ctrl-D ends the conversation, Ctrl-C an answer.", file=sys.stderr)
    while True:
        mark = _MARK
        if not sys.stdout.isatty():  # `input` would write it there
            print(mark, end="", file=sys.stderr, flush=True)
            mark = ""
        try:
            # `input` resets the terminal where the handler raises.
            with _on_interrupt(signal.default_int_handler):
                text = input(mark)
        except EOFError:
            return
        if text.strip():
            yield text


@contextlib.contextmanager
def _on_interrupt(handler: Callable[[int, Any], Any]) -> Iterator[None]:
    """Calls a handler at SIGINT in the block, if this is the main thread."""
    is_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, handler) if is_main else None
    try:
        yield
    finally:
        if is_main:
            signal.signal(signal.SIGINT, before or signal.SIG_DFL)


class _Texts:
    """The texts of a conversation, or single ones, and their tokens."""

    def __init__(self, config: GenerateConfig, tokenizer: "ql.train.Tokenizer"):
        self.config, self.tokenizer = config, tokenizer
        self.is_chat = tokenizer.has_template if config.chat is None else config.chat
        self.messages: list[dict[str, str]] = []
        if config.system is not None:
            self.messages.append({"role": "system", "content": config.system})

    def check(self, prompts: Iterable[str], vocab_size: int) -> None:
        """Refuses texts without tokens, a missing template, and ids out of range."""
        why = "the model has no chat template"
        if self.config.system is not None and not self.is_chat:
            raise ValueError(f"`system` must be left out: {why}.")
        if self.is_chat and not self.tokenizer.has_template:
            raise ValueError(f"`chat` must be false: {why}.")
        for prompt in prompts:
            check_ids(self._tokens(prompt), prompt, vocab_size)

    def _tokens(self, prompt: str) -> list[int]:
        if not self.is_chat:
            return self.tokenizer.encode(prompt)
        messages = [*self.messages, {"role": "user", "content": prompt}]
        text = self.tokenizer.render(messages, add_generation_prompt=True)
        return self.tokenizer.encode(text, add_special_tokens=False)

    def answer(
        self, prompt: str, stream: Stream, key: Any, write: Callable[[str], Any]
    ) -> Answer:
        """Returns the answer to a text; in a conversation, to its next turn."""
        began, end_ids = time.perf_counter(), self.tokenizer.end_ids
        tokens, pieces = self._tokens(prompt), TextStream(self.tokenizer.decode)
        count, finished, text = 0, False, ""
        is_conversation = self.config.prompt is None and sys.stdin.isatty()
        # In a conversation Ctrl-C ends an answer only.
        interrupts: list[int] = []
        add = lambda number, frame: interrupts.append(number)
        with _on_interrupt(add) if is_conversation else contextlib.nullcontext():
            for token in stream(
                tokens,
                max_new_tokens=self.config.max_new_tokens,
                eos_ids=end_ids,
                key=key,
            ):
                if interrupts:
                    break
                count, finished = count + 1, token in end_ids
                if not finished:
                    text += (piece := pieces.add(token))
                    write(piece)
        text += (piece := pieces.flush())
        write(piece + "\n")
        if self.is_chat:
            self.messages.append({"role": "user", "content": prompt})
            self.messages.append({"role": "assistant", "content": text})
        seconds = time.perf_counter() - began
        return Answer(prompt, text, len(tokens), count, finished, seconds)

    def answer_all(
        self, prompts: list[Prompt], model: Any, variables: Any, sampling: Sampling
    ) -> list[Answer]:
        """Returns the answers to the prompts of a file."""
        config, began, ends = self.config, time.perf_counter(), self.tokenizer.end_ids
        found = answers(
            model,
            variables,
            self.tokenizer,
            [ql.train.Example(prompt.ids, "", ends) for prompt in prompts],
            max_new_tokens=config.max_new_tokens,
            batch_size=config.batch_size,
            sampling=sampling,
            key=None if sampling.is_greedy else jax.random.key(config.seed),
        )
        seconds = (time.perf_counter() - began) / len(prompts)
        return [
            Answer(x.value, y.text, len(x.ids), y.new_tokens, y.finished, seconds)
            for x, y in zip(prompts, found, strict=True)
        ]
