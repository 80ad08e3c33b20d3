"""Losses, gradients and metrics of preferences equal those of TRL on the same rows."""

import warnings

import datasets
import jax
import jax.numpy as jnp
import llama
import numpy as np
import peft
import pytest
import torch
import transformers
from stored import tensors_of
from tokenizer_helpers import read, write_rows
from tolerances import assert_close

import qlora_jax as ql
from qlora_jax.llm import data as llm_data
from qlora_jax.llm import train
from qlora_jax.llm.models.checkpoint import load
from qlora_jax.llm.models.decoder import Decoder
from qlora_jax.llm.models.decoder_names import decoder_names
from qlora_jax.llm.models.tiny import save_tiny

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import trl
    from trl.experimental import cpo, orpo

pytestmark = pytest.mark.filterwarnings("ignore")

PAIRS = [
    {"prompt": "ab", "chosen": "cd", "rejected": "efgh"},
    {"prompt": "x", "chosen": "yyyyyy", "rejected": "z"},
    {"prompt": "some", "chosen": " more", "rejected": " mess"},
]
IMPLICIT = [
    {name: row["prompt"] + row[name] for name in ("chosen", "rejected")}
    for row in PAIRS[:2]
]
LABELLED = [
    {"prompt": row["prompt"], "completion": row[name], "label": name == "chosen"}
    for name, row in zip(("chosen", "rejected", "rejected"), PAIRS, strict=True)
]
LONG = [
    {"prompt": "abc", "completion": "defghijk", "label": True},
    {"prompt": "x", "completion": "yyyyyyy", "label": False},
    {"prompt": "some", "completion": " more", "label": True},
]
CUT = {"max_length": 7}
SIMPO = {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 0.7}
CASES = {
    "dpo": (trl.DPOTrainer, trl.DPOConfig, {}, PAIRS, {}),
    "ipo": (trl.DPOTrainer, trl.DPOConfig, {"loss_type": "ipo"}, IMPLICIT, {}),
    "simpo": (cpo.CPOTrainer, cpo.CPOConfig, SIMPO, PAIRS, {"gamma": 0.7}),
    "orpo": (orpo.ORPOTrainer, orpo.ORPOConfig, {}, PAIRS, {"train_on": "all"}),
    "kto": (trl.KTOTrainer, trl.KTOConfig, {}, LABELLED, {}),
    "kto, cut": (trl.KTOTrainer, trl.KTOConfig, CUT, LONG, CUT),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("base"))


def train_there(folder, out, trainer, config, settings, rows):
    """Saves a random adapter; returns TRL's loss, gradients and metrics of a batch."""
    names = dict(eos_token="<|im_end|>", pad_token="<|im_start|>")
    options = dict(report_to="none", train_sampling_strategy="sequential", beta=0.3)
    options |= dict(bf16=False, use_cpu=True, per_device_train_batch_size=len(rows))
    arguments = config(output_dir=str(out / "trl"), **options, **settings)
    trl_trainer = trainer(
        model=transformers.AutoModelForCausalLM.from_pretrained(folder),
        args=arguments,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=transformers.AutoTokenizer.from_pretrained(folder, **names),
        peft_config=peft.LoraConfig(
            r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"]
        ),
    )
    torch.manual_seed(1)
    llama.draw_adapters(trl_trainer.model)
    trl_trainer.model.save_pretrained(out / "adapter")
    trl_trainer.model.train()
    loss = trl_trainer.compute_loss(
        trl_trainer.model, next(iter(trl_trainer.get_train_dataloader()))
    )
    loss.backward()
    stored = getattr(trl_trainer, "_stored_metrics", None) or trl_trainer._metrics
    metrics = {k: v[0] for k, v in stored["train"].items()}
    return float(loss), llama.gradients_of(trl_trainer.model), metrics


def train_here(
    folder, out, rows, name, train_on="completions", max_length=64, **settings
):
    """Returns the same from qlora_jax, with the saved adapter."""
    objective = train.find_objective(name)
    config, base = load(folder, progress=False)
    path, tokenizer = write_rows(out / "d.jsonl", rows), llm_data.open_tokenizer(folder)
    options = dict(chat=False, rows=objective.rows, train_on=train_on)
    options |= dict(max_length=max_length, too_long="truncate")
    data = read(tokenizer, path, vocab_size=config.vocab_size, **options)
    [batch] = llm_data.eval_batches(
        data.train, batch_size=len(data.train), max_length=max_length
    )
    names = decoder_names(config)
    base, lora, _ = ql.io.load_peft(out / "adapter", base, names)
    model = ql.linen.wrap(Decoder(config))
    loss = objective.loss(model, beta=0.3, **settings)

    def mean_loss(lora):
        total, count, metrics = loss(lora, base, batch, None)
        return jnp.sum(total / count), {k: x / n for k, (x, n) in metrics.items()}

    (value, metrics), grads = jax.jit(jax.value_and_grad(mean_loss, has_aux=True))(lora)
    ql.io.save_peft(out / "grads", base, grads, names)
    return float(value), tensors_of(out / "grads"), metrics


@pytest.mark.parametrize("case", CASES)
def test_equals_trl(folder, tmp_path, case):
    name, (*trl_arguments, rows, settings) = case.partition(",")[0], CASES[case]
    loss, grads, metrics = train_there(folder, tmp_path, *trl_arguments, rows)
    our_loss, our_grads, our_metrics = train_here(
        folder, tmp_path, rows, name, **settings
    )
    assert_close(our_loss, loss)
    assert len(grads) == 8
    assert_close(our_grads, grads)
    assert max(np.abs(grad).max() for grad in grads.values()) > 1e-3
    assert len(our_metrics) == 4
    assert {*our_metrics} == {*train.find_objective(name).metrics}
    expected_metrics = {key: metrics[key] for key in our_metrics}
    assert_close(our_metrics, expected_metrics)
