"""Makes fixed-shape batches of examples: tokens, and positions of the answers."""

from typing import Any, NamedTuple

import numpy as np
import tasks


class Batch(NamedTuple):
    """Arrays of one step.

    Attributes:
        tokens: `[B, T]`, prompt and answer, padded on the right.
        select: `[B, A]`, index of the token before each answer token.
        targets: `[B, A]`, the answer's tokens, the end token included.
        mask: `[B, A]`, 1 where there is an answer token.
    """

    tokens: np.ndarray
    select: np.ndarray
    targets: np.ndarray
    mask: np.ndarray

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompts and answers, without padding."""
        return int(np.sum(self.select.max(axis=1) + 2))


class Encoder:
    """Turns examples into batches with a tokenizer.

    Attributes:
        tokenizer: A `tokenizers.Tokenizer`.
        end: Id of the token that ends a turn; also the padding.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.end = tokenizer.token_to_id(tasks.END)
        tokens = tasks.START, tasks.END
        if missing := [t for t in tokens if tokenizer.token_to_id(t) is None]:
            raise ValueError(
                f"The tokenizer must have ChatML's tokens {tokens}. Missing: {missing}."
            )

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def pair(self, example: tasks.Example) -> tuple[list[int], list[int]]:
        """Tokens of the prompt, and of the answer with its end."""
        answer = [*self.encode(example.answer), self.end]
        return self.encode(tasks.prompt(example)), answer

    def prompts(self, examples, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Prompts `[B, length]`, padded on the right, and their lengths."""
        encoded = [self.encode(tasks.prompt(example)) for example in examples]
        tokens = np.full((len(encoded), length), self.end, np.int32)
        for row, ids in zip(tokens, encoded, strict=True):
            row[: len(ids)] = ids
        return tokens, np.array([len(ids) for ids in encoded], np.int32)


def collate(pairs, multiple: int, answer_length: int, pad: int) -> Batch:
    """Pads pairs to the next multiple of their longest, so that few shapes compile."""
    longest = max(len(prompt) + len(answer) for prompt, answer in pairs)
    width = -(-longest // multiple) * multiple
    tokens = np.full((len(pairs), width), pad, np.int32)
    select = np.zeros((len(pairs), answer_length), np.int32)
    targets = np.full((len(pairs), answer_length), pad, np.int32)
    mask = np.zeros((len(pairs), answer_length), np.float32)
    for row, (prompt, answer) in enumerate(pairs):
        tokens[row, : len(prompt) + len(answer)] = prompt + answer
        select[row, : len(answer)] = np.arange(len(answer)) + len(prompt) - 1
        targets[row, : len(answer)] = answer
        mask[row, : len(answer)] = 1
    return Batch(tokens, select, targets, mask)


class LengthBatches:
    """Batches of similar length; `batches[step]` depends on the seed and the step only.

    Each epoch orders the examples by padded length, ties at random, cuts the order into
    batches and shuffles the batches.
    """

    def __init__(self, pairs, batch_size: int, pad: int, seed: int, multiple: int = 16):
        self.pairs, self.size, self.pad, self.seed = pairs, batch_size, pad, seed
        self.multiple = multiple
        self.answer_length = max(len(answer) for _, answer in pairs)
        lengths = np.array([len(prompt) + len(answer) for prompt, answer in pairs])
        self.widths = -(-lengths // multiple)
        self.per_epoch = len(pairs) // batch_size
        if not self.per_epoch:
            raise ValueError(
                f"`batch_size` must not exceed the {len(pairs)} examples. "
                f"Got {batch_size}."
            )
        self._epoch: tuple[int, list[np.ndarray]] = (-1, [])

    def __getitem__(self, step: int) -> Batch:
        epoch, place = divmod(step, self.per_epoch)
        if self._epoch[0] != epoch:
            rng = np.random.default_rng([self.seed, epoch])
            shuffled = rng.permutation(len(self.pairs))
            order = shuffled[np.argsort(self.widths[shuffled], kind="stable")]
            rows = order[: self.per_epoch * self.size].reshape(-1, self.size)
            self._epoch = epoch, list(rng.permutation(rows))
        chosen = [self.pairs[i] for i in self._epoch[1][place]]
        return collate(chosen, self.multiple, self.answer_length, self.pad)
