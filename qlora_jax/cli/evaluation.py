"""Evaluates a run on its validation rows: loss, answers, samples."""

import copy
import functools
import itertools
import json
import math
import sys
from typing import Any

from tqdm import tqdm

import qlora_jax as ql

from ..train.answers import answers, exact_match
from ..train.objective import make_means
from .processes import is_first
from .program import Program, make_put
from .run import Run
from .run_folder import ANSWERS, write_text

_SPARE = 16  # tokens that an answer may have more than the longest right one
_SHOWN = 200  # characters of a prompt or an answer


def sample(batches: list[Any], trained: int) -> list[Any]:
    """Returns a few batches for evaluations while `trained` are trained; [] for all."""
    # At most a hundredth of those, so that ten evaluations (forward passes) cost a few
    # percent; spread, since batches are ordered by length.
    count, size = len(batches), max(1, trained // 100)
    if size >= count:
        return []
    return [batches[(2 * i + 1) * count // (2 * size)] for i in range(size)]


class Evaluation:
    """Evaluates an adapter on the validation rows of a run."""

    def __init__(self, run: Run, program: Program):
        """Makes the batches."""
        config, tokenizer = run.config, run.tokenizer
        self._ends, self._answers_always = (0, config.steps), config.eval_every
        self._means = make_means(program.measured)
        self._is_sft = config.objective == "sft"
        batches = ql.train.eval_batches(
            run.data.valid, batch_size=config.batch_size, max_length=config.max_length
        )
        self._batches = [*map(make_put(run.mesh), batches)]
        # Empty where all evaluations are of all rows, or there are few batches.
        trained = (config.steps or 0) * config.accumulation
        is_full = config.eval_every or config.keep_best
        self._sample = [] if is_full else sample(self._batches, trained)
        self._examples = run.data.valid_examples[: config.eval_examples]
        encode = lambda text: tokenizer.encode(text, add_special_tokens=False)
        longest = max((len(encode(x.answer)) for x in self._examples), default=0)
        self._answers = functools.partial(
            answers,
            program.model,
            tokenizer=tokenizer,
            examples=self._examples,
            max_new_tokens=config.max_new_tokens or longest + _SPARE,
            batch_size=config.eval_batch_size,
            progress=is_first(),
        )
        prompts = [tokenizer.decode(example.prompt) for example in self._examples]
        self._prompts, self._shown = prompts, config.samples
        self._path = run.folder / ANSWERS

    def for_run(self, run: Run) -> "Evaluation":
        """Returns the same for another run on the same rows."""
        other = copy.copy(self)
        other._path = run.folder / ANSWERS
        return other

    def __call__(
        self, base: Any, state: "ql.train.State", is_end: bool = False
    ) -> dict[str, float]:
        """Returns losses, perplexity and exact match; prints samples on stderr."""
        found, is_end = {}, is_end or int(state.step) in self._ends
        if self._sample:
            found |= self._mean(base, state, self._sample, "valid_sample_")
        if is_end or not self._sample:
            found |= self._mean(base, state, self._batches, "valid_")
            loss = found["valid_loss"]
            if self._is_sft:
                found["valid_perplexity"] = math.exp(loss) if loss < 700 else math.inf
        if self._examples and (is_end or self._answers_always):
            found["exact_match"] = self._answer(base, state)
        return found

    def _mean(
        self, base: Any, state: Any, batches: list[Any], prefix: str
    ) -> dict[str, float]:
        means = self._means(base, state.lora, batches)
        return {prefix + name: mean for name, mean in means.items()}

    def _answer(self, base: Any, state: "ql.train.State") -> float:
        found = self._answers({"params": base, "lora": state.lora})
        texts = [answer.text for answer in found]
        share, step = exact_match(texts, self._examples), int(state.step)
        if is_first():
            self._show(texts, f"step {step}: {share:.1%} of the answers are exact")
            self._write(texts, "before" if not step else "after")
        return share

    def _show(self, texts: list[str], title: str) -> None:
        lines, rows = [title], zip(self._examples, self._prompts, texts, strict=True)
        for example, prompt, text in itertools.islice(rows, self._shown):
            mark = "exact" if text.strip() == example.answer.strip() else "wrong"
            prompt = prompt.strip()[-_SHOWN:]
            lines.append(f"  ... {prompt!r}\n    {mark}: {text[:_SHOWN]!r}")
        tqdm.write("\n".join(lines), file=sys.stderr)

    def _write(self, texts: list[str], when: str) -> None:
        """Writes the answers next to those of earlier evaluations."""
        pairs = zip(self._prompts, self._examples, strict=True)
        rows = [{"prompt": x, "right": example.answer} for x, example in pairs]
        if self._path.is_file():
            old = [json.loads(x) for x in self._path.read_text("utf-8").splitlines()]
            if [x["right"] for x in old] == [x["right"] for x in rows]:
                rows = old
        rows = [row | {when: text} for row, text in zip(rows, texts, strict=True)]
        write_text(self._path, "".join(json.dumps(row) + "\n" for row in rows))
