"""Losses, gradients and metrics of preferences are those of TRL, from the rows on."""

import json
import warnings

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import qlora_jax as ql
from qlora_jax import train
from qlora_jax.models.checkpoint import load
from qlora_jax.models.decoder import Decoder
from qlora_jax.models.decoder_names import decoder_names
from qlora_jax.models.tiny import save_tiny

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("trl")
    import datasets
    import llama
    import peft
    import torch
    import transformers
    import trl
    from trl.experimental import cpo, orpo

pytestmark = pytest.mark.filterwarnings("ignore")
torch.set_num_threads(1)  # its threads wait for each other, and JAX has some too

PAIRS = [
    {"prompt": "ab", "chosen": "cd", "rejected": "efgh"},
    {"prompt": "x", "chosen": "yyyyyy", "rejected": "z"},
    {"prompt": "some", "chosen": " more", "rejected": " mess"},
]
IMPLICIT = [
    {
        "chosen": row["prompt"] + row["chosen"],
        "rejected": row["prompt"] + row["rejected"],
    }
    for row in PAIRS[:2]
]
LABELLED = [
    {"prompt": row["prompt"], "completion": row[name], "label": name == "chosen"}
    for name, row in zip(("chosen", "rejected", "rejected"), PAIRS, strict=True)
]
SIMPO = {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 0.7}
CASES = {
    "dpo": (trl.DPOTrainer, trl.DPOConfig, {}, PAIRS, {}),
    "ipo": (trl.DPOTrainer, trl.DPOConfig, {"loss_type": "ipo"}, IMPLICIT, {}),
    "simpo": (cpo.CPOTrainer, cpo.CPOConfig, SIMPO, PAIRS, {"gamma": 0.7}),
    "orpo": (orpo.ORPOTrainer, orpo.ORPOConfig, {}, PAIRS, {"train_on": "all"}),
    "kto": (trl.KTOTrainer, trl.KTOConfig, {}, LABELLED, {}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("base"))


def train_there(folder, out, trainer, config, settings, rows):
    """Saves a random adapter; returns a batch's loss, gradients and metrics."""
    names = dict(eos_token="<|im_end|>", pad_token="<|im_start|>")
    arguments = config(
        output_dir=str(out / "trl"),
        report_to="none",
        per_device_train_batch_size=len(rows),
        train_sampling_strategy="sequential",
        bf16=False,
        use_cpu=True,
        beta=0.3,
        **settings,
    )
    own = trainer(
        model=transformers.AutoModelForCausalLM.from_pretrained(folder),
        args=arguments,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=transformers.AutoTokenizer.from_pretrained(folder, **names),
        peft_config=peft.LoraConfig(
            r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"]
        ),
    )
    torch.manual_seed(1)
    llama.draw_adapters(own.model)
    own.model.save_pretrained(out / "adapter")
    own.model.train()
    loss = own.compute_loss(own.model, next(iter(own.get_train_dataloader())))
    loss.backward()
    grads = {
        name.replace(".default", ""): parameter.grad.numpy()
        for name, parameter in own.model.named_parameters()
        if parameter.grad is not None
    }
    stored = getattr(own, "_stored_metrics", None) or own._metrics
    return float(loss), grads, {k: v[0] for k, v in stored["train"].items()}


def train_here(folder, out, rows, objective, gamma=0.5, train_on="completions"):
    """The same with the saved adapter."""
    (out / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config, base = load(folder, progress=False)
    data = train.read_dataset(
        out / "rows.jsonl",
        train.open_tokenizer(folder),
        vocab_size=config.vocab_size,
        max_length=64,
        chat=False,
        objective=objective,
        train_on=train_on,
    )
    [batch] = train.eval_batches(data.train, batch_size=len(data.train), max_length=64)
    names = decoder_names(config)
    base, lora, _ = ql.io.load_peft(out / "adapter", base, names)
    model = ql.linen.wrap(Decoder(config))
    loss = train.preference_loss(model, objective, beta=0.3, gamma=gamma)

    def mean(lora):
        total, count, metrics = loss(lora, base, batch, None)
        return total / count, {k: float_of(x) for k, x in metrics.items()}

    float_of = lambda x: x[0] / x[1]
    (value, metrics), grads = jax.jit(jax.value_and_grad(mean, has_aux=True))(lora)
    ql.io.save_peft(out / "grads", base, grads, names)
    grads = load_file(out / "grads" / "adapter_model.safetensors")
    return float(value), grads, metrics


@pytest.mark.parametrize("name", CASES)
def test_equals_trl(folder, tmp_path, name):
    *there, rows, settings = CASES[name]
    loss, grads, metrics = train_there(folder, tmp_path, *there, rows)
    own = train_here(folder, tmp_path, rows, name, **settings)
    assert own[0] == pytest.approx(loss, rel=1e-5, abs=1e-5)
    assert own[1].keys() == grads.keys() and len(grads) == 8
    for key, grad in grads.items():
        np.testing.assert_allclose(own[1][key], grad, rtol=1e-5, atol=1e-5)
    assert max(np.abs(grad).max() for grad in grads.values()) > 1e-3
    assert len(own[2]) == 4
    for key, value in own[2].items():
        assert float(value) == pytest.approx(metrics[key], rel=1e-5, abs=1e-5), key
