"""GRPO on one packed base: google-tunix's learner trains an adapter by rewards.

    pip install '.[outside]' && python examples/tunix_grpo.py

A small Tunix Llama learns to add: a correct answer has reward 1, and Tunix's
`GRPOLearner` trains the adapter (Shao et al. 2024, "DeepSeekMath"). Actor, rollout and
reference share one base in 4 bits. The reference is the base alone, and the rollout
reads the actor's variables, so nothing is copied. It takes minutes, and 60 steps with
`--tiny`.

The task has the interface of a data set of reasoning-gym, which is not required: it
brings 17 packages, of which one is compiled from C.
"""

import argparse
import pathlib

import jax
import numpy as np
import optax
from flax import nnx
from name_tables import tunix_names
from tunix.rl import rl_cluster
from tunix.rl.grpo import grpo_learner
from tunix.rl.rollout import base_rollout
from tunix.sft import peft_trainer
from tunix_finetune import TARGETS, VOCABULARY, make_model, model_inputs

import qlora_jax as ql


class Sums(list):
    """Sums up to 9: a data set of questions with a score function for answers."""

    def __init__(self):
        pairs = [(a, b) for a in range(10) for b in range(10 - a)]
        super().__init__(
            {"question": f"{a} + {b} =", "answer": str(a + b)} for a, b in pairs
        )

    def score_answer(self, answer, entry) -> float:
        return float(answer == entry["answer"])


class Words:
    """A tokenizer of the task's words, with the methods that Tunix's sampler calls."""

    pad_id, bos_id, eos_id = (lambda self: 0), (lambda self: 1), (lambda self: 2)

    def __init__(self, task):
        texts = " ".join(f"{e['question']} {e['answer']}" for e in task)
        self.words = ["<pad>", "<bos>", "<eos>", *sorted(set(texts.split()))]
        self.words += ["<unused>"] * (VOCABULARY - len(self.words))

    def encode(self, text: str) -> list[int]:
        return [self.words.index(word) for word in text.split()]

    def decode(self, ids: list[int]) -> str:
        return " ".join(self.words[i] for i in ids)


def make_base(task, words: Words, dim: int, depth: int, steps: int) -> nnx.Module:
    """Returns a float model that is bad at the task: it learns half random answers."""
    model = make_model(dim, depth)
    rng = np.random.default_rng(0)

    def batches():
        for _ in range(steps):
            questions, drawn_answers = rng.integers(len(task), size=(2, 64))
            answered = np.where(rng.random(64) < 0.5, questions, drawn_answers)
            pairs = zip(questions.tolist(), answered.tolist(), strict=True)
            texts = [f"{task[i]['question']} {task[j]['answer']}" for i, j in pairs]
            tokens = np.array([[words.bos_id(), *words.encode(text)] for text in texts])
            yield peft_trainer.TrainingInput(tokens, np.ones(tokens.shape, bool))

    config = peft_trainer.TrainingConfig(eval_every_n_steps=steps, max_steps=steps)
    trainer = peft_trainer.PeftTrainer(model, optax.adamw(3e-3), config)
    trainer.with_gen_model_input_fn(model_inputs).train(batches())
    return model


def make_cluster(actor: nnx.Module, words: Words, length: int, steps: int):
    """The actor, its rollout and its reference, on the device where the actor is."""
    # Adapters are disabled in the graph definition of the second. Arrays are shared.
    with ql.nnx.disable_adapters(actor):
        reference = nnx.merge(*nnx.split(actor))
    mesh = jax.sharding.Mesh(np.empty((), object), ())  # no axes, so nothing moves
    roles = rl_cluster.Role.ACTOR, rl_cluster.Role.REFERENCE, rl_cluster.Role.ROLLOUT
    config = rl_cluster.ClusterConfig(
        role_to_mesh=dict.fromkeys(roles, mesh),
        training_config=rl_cluster.RLTrainingConfig(
            actor_optimizer=optax.adamw(5e-3), eval_every_n_steps=steps, max_steps=steps
        ),
        rollout_config=base_rollout.RolloutConfig(
            max_tokens_to_generate=1,
            max_prompt_length=length,
            kv_cache_size=length + 1,
            temperature=1.0,
        ),
    )
    return rl_cluster.RLCluster(
        actor=actor, reference=reference, tokenizer=words, cluster_config=config
    )


def train(base: nnx.Module, task, words: Words, steps: int, seed: int = 0):
    """Packs and trains; returns the cluster and the mean reward of each step."""
    config = ql.QLoRAConfig(rank=16, targets=TARGETS)
    actor = ql.nnx.wrap(base, config, rngs=nnx.Rngs(1))
    length = 1 + max(len(words.encode(entry["question"])) for entry in task)
    cluster = make_cluster(actor, words, length, steps)
    rewards = []

    def reward(prompts, completions, index, **_):
        pairs = zip(completions, index.tolist(), strict=True)
        scores = [task.score_answer(text, task[i]) for text, i in pairs]
        rewards.append(np.mean(scores))
        return scores

    def batches():
        rng = np.random.default_rng(seed)
        for _ in range(steps):
            # Without a new seed Tunix's sampler draws the same noise at each step.
            cluster.cluster_config.rollout_config.seed = int(rng.integers(2**31))
            index = rng.integers(len(task), size=16)
            questions = np.array([task[i]["question"] for i in index.tolist()])
            yield {"prompts": questions, "index": index}

    config = grpo_learner.GRPOConfig(num_generations=16, kl_loss_mode="low_var_kl")
    grpo_learner.GRPOLearner(cluster, config, reward).train(batches())
    return cluster, np.array(rewards)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="a few steps")
    parser.add_argument("--out", type=pathlib.Path, default="runs/tunix_grpo/adapter")
    args = parser.parse_args(argv)
    task, steps = Sums(), 60 if args.tiny else 300
    words = Words(task)
    base = make_base(task, words, 64, 2, 300 if args.tiny else 1000)
    cluster, rewards = train(base, task, words, steps)
    trees = ql.nnx.split(cluster.actor_trainer.model)
    print(ql.summary(*trees))
    print(f"reward {rewards[:10].mean():.2f} at first, {rewards[-10:].mean():.2f} last")
    ql.io.save_peft(args.out, *trees, tunix_names("llama3"))
    print(f"an adapter for PEFT: {args.out}")


if __name__ == "__main__":
    main()
