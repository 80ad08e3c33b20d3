"""The chat templates of a model."""

import datetime
import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .model_files import ModelError

if TYPE_CHECKING:
    from .sandbox import Rendering, Template

_REASONING = ("reasoning_content", "thinking", "reasoning")


class Chat:
    """Chat templates, with the special tokens that they write."""

    def __init__(
        self,
        owner: str,
        sources: Mapping[str, str],
        special: Mapping[str, Any],
        now: datetime.datetime | None,
    ):
        """Takes what the model's files say; compiles nothing yet.

        Args:
            owner: The model, for errors.
            sources: The templates by name.
            special: Special tokens by name.
            now: What `strftime_now` says.
        """
        self.owner, self.sources, self.special, self.now = owner, sources, special, now

    @functools.cached_property
    def _templates(self) -> "dict[str, Template]":
        try:
            from .sandbox import Template
        except ImportError as error:
            raise ImportError(
                "chat templates need: pip install 'qlora-jax[train]'"
            ) from error
        return {name: Template(text, self.now) for name, text in self.sources.items()}

    def template(self, tools: Sequence[Any] | None) -> "Template":
        """Returns the template for messages with such tools.

        Raises:
            ModelError: If there is none.
        """
        for name in ("tool_use", "default") if tools else ("default",):
            if name in self.sources:
                return self._templates[name]
        has = "has none"
        if self.sources:
            has = f"has templates {sorted(self.sources)}, but no default"
        raise ModelError(
            f"messages need a chat template: {self.owner} {has}. Give a file with one, "
            "or rows of `prompt` and `completion`."
        )

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any] | None = None,
        add_generation_prompt: bool = False,
    ) -> "Rendering":
        """Returns what a template makes of messages, with the answers that it marks.

        Raises:
            ValueError: As `Template.render`, or if there is no template.
        """
        return self.template(tools).render(
            {
                **self.special,
                "messages": [_plain(message) for message in messages],
                "tools": tools,
                "documents": None,
                "add_generation_prompt": add_generation_prompt,
            }
        )


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves out what is None, and names reasoning as templates do."""
    found = {key: value for key, value in message.items() if value is not None}
    reasoning = next((found[key] for key in _REASONING if key in found), None)
    if reasoning is not None:
        found = {"thinking": reasoning, **found, "reasoning_content": reasoning}
    return found
