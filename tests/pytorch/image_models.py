"""A tiny random model of text and images: Gemma 3 with its vision tower."""

import numpy as np
import torch
import transformers
from torch_helpers import SIZES

from qlora_jax.llm.models.tiny import byte_tokenizer

IMAGE, BEGIN, END = 5, 6, 7  # the token of an image, and those before and after it
TOKENS_PER_IMAGE = 4
TEXT = SIZES | {
    # Shorter than an image with its text, so that windows cut through images.
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention"],
}
VISION = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
    "vision_use_head": False,
}


# The texts of the token of an image, and of those before and after it.
EXTRA_TOKENS = {
    "image_token": "<image>",
    "boi_token": "<begin>",
    "eoi_token": "<end>",
}
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}"
    "{{ m.content }}{% else %}{% for part in m.content %}{% if part.type == 'image' %}"
    "<begin>{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def image_model(image=IMAGE, begin=BEGIN, end=END, **text):
    """Returns a model with random weights, in evaluation mode."""
    config = transformers.Gemma3Config(
        text_config=TEXT | text,
        vision_config=VISION,
        mm_tokens_per_image=TOKENS_PER_IMAGE,
        image_token_index=image,
        boi_token_index=begin,
        eoi_token_index=end,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(
        config, attn_implementation="eager"
    )
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:  # make weights larger, and none of them zero
                weight.mul_(2).add_(0.05 * torch.randn_like(weight))
    return model.eval()


def image_inputs():
    """Returns the token ids of two rows with one image each, and further inputs."""
    generator = np.random.default_rng(0)
    ids = generator.integers(10, 100, (2, 14))
    for row, start in enumerate([2, 5]):  # the images are at different positions
        stop = start + 1 + TOKENS_PER_IMAGE
        ids[row, start], ids[row, stop] = BEGIN, END
        ids[row, start + 1 : stop] = IMAGE
    size = VISION["image_size"]
    pixels = generator.normal(size=(2, 3, size, size)).astype(np.float32)
    return ids, {"pixel_values": pixels, "token_type_ids": (ids == IMAGE) * 1}


def save_image_model(folder):
    """Writes a random model and its processor to a folder. Returns the processor."""
    inner = byte_tokenizer()
    inner.add_special_tokens([*EXTRA_TOKENS.values()])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        extra_special_tokens=EXTRA_TOKENS,
    )
    side = VISION["image_size"]
    processor = transformers.Gemma3Processor(
        transformers.Gemma3ImageProcessorPil(size={"height": side, "width": side}),
        tokenizer,
        chat_template=TEMPLATE,
        image_seq_length=TOKENS_PER_IMAGE,
    )
    processor.save_pretrained(folder)
    ids = [inner.token_to_id(text) for text in EXTRA_TOKENS.values()]
    special = {"pad_token_id": 0, "eos_token_id": inner.token_to_id("<|im_end|>")}
    model = image_model(*ids, vocab_size=inner.get_vocab_size(), **special)
    model.save_pretrained(folder)
    return processor
