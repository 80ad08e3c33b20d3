"""Renders chat templates with transformers, in a process that can be stopped.

A template comes from a file, which may be hostile: it may compute without end, or fill
the memory, and nothing can stop it in the process that trains.
"""

import atexit
import contextlib
import datetime
import json
import pathlib
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..reading import ModelError

MAX_SECONDS, MAX_BYTES = 10, 512 << 20  # of one rendering
_FAULTS = {
    "MemoryError": f"must take at most {MAX_SECONDS} s and {MAX_BYTES >> 20} MiB",
    "SecurityError": "must not reach outside its sandbox",
    "TemplateSyntaxError": "must be Jinja",
}
_PROGRAM = pathlib.Path(__file__).with_name("rendering_process.py")


class Rendering(NamedTuple):
    """A rendered text, and the start and end of each `{% generation %}` in it."""

    text: str
    answers: list[tuple[int, int]]


def render_template(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Any] | None,
    add_generation_prompt: bool,
    special: Mapping[str, str],
    now: datetime.datetime | None,
) -> Rendering:
    """Renders messages as transformers' `apply_chat_template` does.

    `special` are the special tokens by their variables in templates.
    """
    arguments = {
        "conversations": [messages],
        "tools": tools,
        "chat_template": template,
        "return_assistant_tokens_mask": True,
        "add_generation_prompt": add_generation_prompt,
        **special,
    }
    request = [arguments, now and now.isoformat(), MAX_SECONDS]
    problem, value = _renderer.ask(request)
    # A broken template is a fault of the model. All other errors are faults of a row.
    if problem in _FAULTS:
        raise ModelError(f"the chat template {_FAULTS[problem]}. {value:.500}".rstrip())
    if problem is not None:
        raise ValueError(f"the chat template rejects the messages: {value:.500}")
    text, answers = value
    return Rendering(text, [(start, end) for start, end in answers if start < end])


class _Renderer:
    """The other process, which the first request starts."""

    def __init__(self):
        self._lock = threading.Lock()
        self._process: Any = None

    def ask(self, request: Any) -> Any:
        """Returns the answer, or that of a process that is out of memory or time."""
        line = json.dumps(request, default=str)
        with self._lock:
            self._process = process = self._process or self._start()
            answer = ""
            try:
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.write(f"{line}\n")
                    process.stdin.flush()
                answer = process.stdout.readline()
            finally:
                if not answer:  # a late one must not become that to another request
                    self.stop()
        return json.loads(answer) if answer else ("MemoryError", "")

    def stop(self) -> None:
        """Ends the process, if it has been started."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()

    def _start(self) -> Any:
        # `-P`: nothing is imported from the current folder. Ctrl-C reaches only the
        # processes of this session.
        process: Any = subprocess.Popen(
            [sys.executable, "-P", str(_PROGRAM), str(MAX_BYTES)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            text=True,
        )
        if not process.stdout.readline():  # written as soon as it has started
            raise RuntimeError(f"{_PROGRAM} must run with {sys.executable}.")
        return process


_renderer = _Renderer()
atexit.register(_renderer.stop)
