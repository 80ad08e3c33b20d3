"""Evaluates a run on its validation rows: loss, answers and samples."""

import json
import math
import sys
from typing import Any

from jaxtyping import PyTree
from tqdm import tqdm

from ...reading import reading
from ...train.answers import exact_match, generate_answers
from ...train.means import make_means
from ...train.objectives import find_objective
from ...train.step import State
from ..merge_aware import pack_as_trained
from ..processes import is_first
from ..run_folder import ANSWERS, write_text
from .program import Program, make_batch_placer
from .run import Run, make_eval_batches

_EXTRA_TOKENS = 16  # how much longer an answer may be than the longest expected one
_PROMPTS_AT_A_TIME = 60
_SHOWN_ANSWERS = 3
_SHOWN_CHARACTERS = 200  # the printed part of a prompt or an answer


def sample_batches(batches: list[Any], num_training_batches: int) -> list[Any]:
    """Returns the batches for evaluations during training; [] means all batches."""
    # One validation batch for each 100 training batches, and at least one. Ten such
    # evaluations add only a few percent to the time. The batches are spread evenly,
    # because neighbouring rows may be alike.
    num_batches, size = len(batches), max(1, num_training_batches // 100)
    if size >= num_batches:
        return []
    return [batches[(2 * i + 1) * num_batches // (2 * size)] for i in range(size)]


class Evaluation:
    """Evaluates an adapter on the validation rows of a run."""

    def __init__(self, run: Run, program: Program, base: PyTree, frozen: PyTree):
        """Prepares the batches and the prompts.

        `frozen` is the second argument of a loss: the base, or the base and a teacher.
        """
        config, self._tokenizer = run.config, run.tokenizer
        self._config, self._model = config, program.model
        self._base, self._frozen = base, frozen
        self._compute_means = make_means(program.eval_loss)
        self._path = run.folder / ANSWERS
        batches = make_eval_batches(config, run.data.valid)
        self._batches = [*map(make_batch_placer(run.mesh), batches)]
        num_training_batches = (config.steps or 0) * config.accumulation
        # The sample is empty if every evaluation uses all batches.
        self._sample = []
        if not (config.eval_every or config.keep_best):
            self._sample = sample_batches(self._batches, num_training_batches)
        self._examples = run.data.valid_examples[: config.eval_examples]
        self._prompts = [self._tokenizer.decode(x.prompt) for x in self._examples]
        expected_ids = (
            self._tokenizer.encode(x.answer, add_special_tokens=False)
            for x in self._examples
        )
        longest = max(map(len, expected_ids), default=0)
        self._max_new_tokens = longest + _EXTRA_TOKENS

    def __call__(self, state: State, is_full: bool = False) -> dict[str, float]:
        """Returns the losses, the perplexity and the share of exact answers.

        Between the first and the last step, unless `is_full` is set, it may use only a
        sample of the batches and generate no answers. Some answers are printed.
        """
        metrics, step, config = {}, int(state.step), self._config
        is_full = is_full or step in (0, config.steps)
        if self._sample:
            means = self._compute_means(self._frozen, state.lora, self._sample)
            metrics |= {f"valid_sample_{name}": mean for name, mean in means.items()}
        if is_full or not self._sample:
            means = self._compute_means(self._frozen, state.lora, self._batches)
            metrics |= {f"valid_{name}": mean for name, mean in means.items()}
            loss = metrics["valid_loss"]
            if find_objective(config.objective).is_cross_entropy:
                # `math.exp` raises OverflowError above 709.8.
                metrics["valid_perplexity"] = math.exp(loss) if loss < 700 else math.inf
        # Answers take long, so by default only full evaluations generate them.
        if self._examples and (is_full or config.eval_every):
            metrics["exact_match"] = self._evaluate_answers(state)
        return metrics

    def _evaluate_answers(self, state: State) -> float:
        """Returns the share of exact answers. Prints a few answers, and writes all."""
        step = int(state.step)
        base, lora = pack_as_trained(self._base, state.lora)
        generated = generate_answers(
            self._model,
            {"params": base, "lora": lora},
            self._tokenizer,
            [example.prompt for example in self._examples],
            max_new_tokens=self._max_new_tokens,
            batch_size=_PROMPTS_AT_A_TIME,
            progress=is_first(),
        )
        texts = [answer.text for answer in generated]
        share = exact_match(texts, self._examples)
        if is_first():  # all processes have generated all answers
            self._show(texts, f"step {step}: {share:.1%} of the answers are exact")
            self._write(texts, "before" if step == 0 else "after")
        return share

    def _show(self, texts: list[str], title: str) -> None:
        lines, rows = [title], zip(self._examples, self._prompts, texts, strict=True)
        for example, prompt, text in [*rows][:_SHOWN_ANSWERS]:
            verdict = "exact" if text.strip() == example.answer.strip() else "wrong"
            prompt = prompt.strip()[-_SHOWN_CHARACTERS:]
            answer = text[:_SHOWN_CHARACTERS]
            lines.append(f"  ... {prompt!r}\n    {verdict}: {answer!r}")
        tqdm.write("\n".join(lines), file=sys.stderr)  # above the progress bar

    def _write(self, texts: list[str], key: str) -> None:
        """Writes the answers to a file with a row for each prompt, under `key`.

        If the file already has answers to the same rows, their other entries are kept,
        so that answers before and after training are side by side.
        """
        pairs = zip(self._prompts, self._examples, strict=True)
        rows = [{"prompt": prompt, "right": x.answer} for prompt, x in pairs]
        if self._path.is_file():
            with reading(self._path):
                lines = self._path.read_text("utf-8").splitlines()
                old_rows = [json.loads(line) for line in lines]
                if [row["right"] for row in old_rows] == [row["right"] for row in rows]:
                    rows = old_rows
        rows = [row | {key: text} for row, text in zip(rows, texts, strict=True)]
        write_text(self._path, "".join(json.dumps(row) + "\n" for row in rows))
