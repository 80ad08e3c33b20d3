"""The program that renders chat templates, in a process that can be stopped.

`rendering` starts it as a script, so it imports no module of this package.
"""

import datetime
import json
import signal
import sys
from typing import Any


def _serve(max_bytes: int) -> None:
    """Answers the requests on standard input, in the other process."""
    from transformers.utils import chat_template_utils

    # `strftime_now` of templates takes the time from this name.
    chat_template_utils.datetime = _Clock  # type: ignore
    if sys.platform == "linux":  # elsewhere, only the time is limited
        import resource

        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + max_bytes, used + max_bytes))
    print(flush=True)
    for line in sys.stdin:
        arguments, now, seconds = json.loads(line)
        _Clock.stopped_at = now and datetime.datetime.fromisoformat(now)
        # The alarm ends this process, even inside of a function that is not Python.
        signal.setitimer(signal.ITIMER_REAL, seconds)
        answer = _render(chat_template_utils, arguments)
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(answer, flush=True)


# Classes of errors that `rendering` tells apart. Those of Jinja go by their names.
_PROBLEMS = ("MemoryError", "SecurityError", "TemplateSyntaxError", "Exception")


class _Clock(datetime.datetime):
    """A clock that may be stopped."""

    stopped_at: datetime.datetime | None = None

    @classmethod
    def now(cls, tz: Any = None) -> Any:
        return cls.stopped_at or datetime.datetime.now(tz)


def _render(chat_template_utils: Any, arguments: dict[str, Any]) -> str:
    """Returns, as JSON, null and a rendering, or a problem and its description."""
    try:
        texts, answers = chat_template_utils.render_jinja_template(**arguments)
        return json.dumps([None, [texts[0], answers[0]]])
    except Exception as error:  # expressions in templates raise any error of Python
        names = [x.__name__ for x in type(error).__mro__]
        description = str(error) or names[0]
        if "TemplateSyntaxError" in names:
            description = f"Line {error.lineno}: {description}"  # type: ignore
        return json.dumps([next(x for x in names if x in _PROBLEMS), description])


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
