"""Images in messages, and the processor of transformers that prepares them."""

import functools
import hashlib
import importlib
import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from .chat_tokenizer import AnswerSpans, MessageGroups, Messages
from .model_files import ModelError

# The keys of a part of a message that may name the file of an image.
_FILE_KEYS = ("image", "path", "url")
# The names that processors give to the output with the types of tokens.
_TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")
# The outputs that a processor may have. If there are others, such as the sizes of
# images, the number of tokens of an image depends on the image.
_OUTPUTS = {"input_ids", "attention_mask", "pixel_values", "text_replacement_offsets"}
_OUTPUTS |= {*_TOKEN_TYPES}


@dataclass(frozen=True)
class Images:
    """The images of a row. They stay in their files until a batch needs them.

    Attributes:
        processor: The processor of the model.
        paths: The files, in the order of their placeholders in the text.
        hash: A hash of the pixels, which shows whether a file has changed.
    """

    processor: "ImageProcessor"
    paths: tuple[pathlib.Path, ...]
    hash: str

    def load(self) -> np.ndarray:
        """Returns the pixels as the model reads them, `[images, channels, H, W]`.

        Raises ValueError if a file has changed since the row was checked.
        """
        text = self.processor.placeholders(len(self.paths))
        pixels = self.processor.process(text, self.paths).pixels
        if _hash_pixels(pixels) != self.hash:
            names = ", ".join(map(str, self.paths))
            raise ValueError(f"images must not change during a run. Got new {names}.")
        return pixels


class ProcessedText(NamedTuple):
    """What a processor returns for a text with images."""

    ids: list[int]
    pixels: np.ndarray  # [images, channels, height, width]
    # For each placeholder: its start and end in the text, and the text replacing it.
    replacements: list[tuple[int, int, str]]
    token_types: list[int] | None  # 1 for tokens of images, 0 for others


@dataclass(frozen=True)
class ImageProcessor:
    """The processor of transformers for a model that reads text and images.

    Attributes:
        path: The folder of the model.
        token_id: The id of the token that stands for a part of an image in the text.
    """

    path: pathlib.Path
    token_id: int

    @functools.cached_property
    def _inner(self) -> Any:
        try:
            import PIL.Image  # noqa: F401  (transformers needs it to read images)

            transformers = importlib.import_module("transformers")
        except ImportError as error:
            raise ImportError(
                f"images need: pip install 'qlora-jax[train,torch]'. {error}"
            ) from error
        try:
            processor: Any = transformers.AutoProcessor.from_pretrained(
                self.path, trust_remote_code=False
            )
        except (OSError, ValueError) as error:
            raise ModelError(
                f"{self.path} must have a processor of images. {error}"
            ) from error
        if not isinstance(getattr(processor, "image_token", None), str):
            raise ModelError(
                f"{self.path} must have a processor that names the placeholder of "
                f"images. Got {type(processor).__name__}."
            )
        return processor

    @functools.cached_property
    def _blank(self) -> ProcessedText:
        # All images have the same size and the same number of tokens. A blank image
        # shows what these are.
        import PIL.Image

        image = PIL.Image.new("RGB", (64, 64))
        return self._call(self._inner.image_token, [image])

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the pixels of an image: channels, height and width."""
        return self._blank.pixels.shape[1:]

    @property
    def tokens_per_image(self) -> int:
        """The number of tokens in the text that stand for an image."""
        return self._blank.ids.count(self.token_id)

    def placeholders(self, count: int) -> str:
        """Returns a text that consists of the placeholders of `count` images."""
        return self._inner.image_token * count

    def process(self, text: str, paths: Sequence[pathlib.Path]) -> ProcessedText:
        """Returns the tokens of a text, and the pixels of the images in it.

        Raises ValueError if files are not images, or if there are more or fewer of them
        than placeholders in the text.
        """
        return self._call(text, _open_images(paths))

    def _call(self, text: str, images: list) -> ProcessedText:
        output = self._inner(
            text=[text],
            images=[images],  # transformers takes one list for each text
            add_special_tokens=False,  # the chat template has written them
            return_text_replacement_offsets=True,
            return_mm_token_type_ids=True,
        )
        if unknown := sorted({*output} - _OUTPUTS):
            raise ModelError(
                "images are only supported for models that give all of them the same "
                f"size. The processor of {self.path} also returns {unknown}."
            )
        values = [np.asarray(x, np.float32) for x in output["pixel_values"]]
        shapes = {x.shape for x in values}
        if len(values) != len(images) or len(shapes) != 1 or values[0].ndim != 3:
            raise ModelError(
                "images are only supported for models that read one array for each "
                f"image. The processor of {self.path} returns {len(values)} arrays of "
                f"shapes {sorted(shapes)} for {len(images)} images."
            )
        replacements = [
            (*offset["span"], offset["replacement"])
            for offset in output["text_replacement_offsets"][0]
        ]
        types = next((output[x][0] for x in _TOKEN_TYPES if x in output), None)
        ids = output["input_ids"][0]
        return ProcessedText(ids, np.stack(values), replacements, types)

    def expand(
        self, located: AnswerSpans, paths: Sequence[pathlib.Path]
    ) -> tuple[AnswerSpans, Images, list[int]]:
        """Replaces the placeholders of images in a text by the tokens of the images.

        Also returns the images, and the token ids that the processor of transformers
        computes for the new text. `paths` has the order of the placeholders.

        Raises:
            ModelError: If the model's images are not supported.
            ValueError: As `process`; or if the text has more or fewer tokens of images
                than its images need.
        """
        processed = self.process(located.text, paths)
        is_image = [int(x == self.token_id) for x in processed.ids]
        if processed.token_types not in (None, is_image):
            raise ModelError(
                f"the processor of {self.path} must mark the tokens of images alone. "
                f"Got other types than those of the token {self.token_id}."
            )
        if sum(is_image) != len(paths) * self.tokens_per_image:
            raise ValueError(
                f"the text must have {self.tokens_per_image} tokens for each of its "
                f"{len(paths)} images. Got {sum(is_image)}."
            )
        text, pieces, previous_end = located.text, [], 0
        for start, end, replacement in processed.replacements:
            pieces += [text[previous_end:start], replacement]
            previous_end = end

        def move_position(position: int) -> int:
            """Returns where a position in the old text is in the new text."""
            return position + sum(
                len(new) - (end - start)
                for start, end, new in processed.replacements
                if end <= position
            )

        answers = [
            (move_position(start), move_position(end)) for start, end in located.answers
        ]
        text = "".join([*pieces, text[previous_end:]])
        expanded = AnswerSpans(text, answers, located.is_rendered)
        images = Images(self, tuple(paths), _hash_pixels(processed.pixels))
        return expanded, images, processed.ids


def _hash_pixels(pixels: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest()[:16]


def _open_images(paths: Sequence[pathlib.Path]) -> list:
    import PIL.Image

    images, problems = [], []
    for path in paths:
        try:
            with PIL.Image.open(path) as image:
                images.append(image.convert("RGB"))
        except (OSError, ValueError, PIL.Image.DecompressionBombError) as error:
            problems.append(f"{path} ({type(error).__name__})")
    if problems:
        raise ValueError(f"images must be files of images. Got {', '.join(problems)}.")
    return images


def find_image(groups: MessageGroups) -> str | None:
    """Returns the name of the first image in the messages; None if there is none."""
    for name, group in groups.items():
        for number, message in enumerate(group):
            for index, part in enumerate(_parts_of(message)):
                if _is_image(part):
                    return f"{name}[{number}].content[{index}]"
    return None


def take_images(
    groups: MessageGroups, folder: pathlib.Path
) -> tuple[dict[str, Messages], list[pathlib.Path]]:
    """Returns the messages with images as `{"type": "image"}`, and the image files.

    Relative paths start from `folder`. Raises ValueError if an image is not a file on
    this machine.
    """
    new_groups: dict[str, Messages] = {}
    paths: list[pathlib.Path] = []
    for name, group in groups.items():
        new_groups[name] = messages = []
        for number, message in enumerate(group):
            parts = []
            for index, part in enumerate(_parts_of(message)):
                if _is_image(part):
                    part_name = f"{name}[{number}].content[{index}]"
                    paths.append(folder / _file_of(part_name, part))
                    part = {"type": "image"}
                parts.append(part)
            messages.append({**message, "content": parts} if parts else message)
    return new_groups, paths


def _parts_of(message: Mapping[str, Any]) -> list:
    content = message.get("content")
    return content if isinstance(content, list) else []


def _is_image(part: object) -> bool:
    # OpenAI's "image_url" is not supported: `_file_of` rejects it, with an example.
    return isinstance(part, dict) and part.get("type") in ("image", "image_url")


def _file_of(name: str, part: Mapping[str, Any]) -> str:
    values = {key: value for key, value in part.items() if value is not None}
    file_keys = [key for key in _FILE_KEYS if key in values]
    file = values[file_keys[0]] if file_keys else None
    is_file = isinstance(file, str) and "://" not in file.removeprefix("file://")
    # Another key, such as "detail", could be something that the model should see.
    if part["type"] != "image" or not is_file or {*values} != {"type", *file_keys[:1]}:
        raise ValueError(
            f"`{name}` must be an image in a file on this machine, as in "
            f'{{"type": "image", "path": "a.png"}}. Got {part!r:.100}.'
        )
    return str(file).removeprefix("file://")
