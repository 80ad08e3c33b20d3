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
from collections.abc import Mapping
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


class _Renderer:
    """The other process, which the first request starts."""

    def __init__(self):
        self._lock = threading.Lock()
        self._process: Any = None

    def render(
        self, arguments: Mapping[str, Any], now: datetime.datetime | None
    ) -> Rendering:
        """Renders messages as transformers' `render_jinja_template` does."""
        request = [arguments, now and now.isoformat(), MAX_SECONDS]
        line, answer = json.dumps(request, default=str), ""
        with self._lock:
            self._process = process = self._process or self._start()
            try:
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.write(f"{line}\n")
                    process.stdin.flush()
                answer = process.stdout.readline()
            finally:
                if not answer:  # a late one must not become that to another request
                    self.stop()
        # There is no answer if the process is out of memory or time.
        result: Any = json.loads(answer) if answer else ("MemoryError", "")
        problem, value = result
        # A broken template is a fault of the model. Other errors are faults of a row.
        if fault := _FAULTS.get(problem):
            raise ModelError(f"the chat template {fault}. {value:.500}".rstrip())
        if problem is not None:
            raise ValueError(f"the chat template rejects the messages: {value:.500}")
        text, answers = value
        return Rendering(text, [(start, end) for start, end in answers if start < end])

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


renderer = _Renderer()
atexit.register(renderer.stop)
