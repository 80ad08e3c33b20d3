"""A tiny random model of text and images: Gemma 3 with its vision tower."""

import numpy as np
import torch
import transformers

IMAGE, BEGIN, END = 5, 6, 7  # the tokens of an image, and those around it
TOKENS_PER_IMAGE = 4
TEXT = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    # Shorter than an image with its text, so that windows cut through images.
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
    "vision_use_head": False,
}


def image_model(**text):
    """Returns a model with random weights, in evaluation mode."""
    config = transformers.Gemma3Config(
        text_config=TEXT | text,
        vision_config=VISION,
        mm_tokens_per_image=TOKENS_PER_IMAGE,
        image_token_index=IMAGE,
        boi_token_index=BEGIN,
        eoi_token_index=END,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(
        config, attn_implementation="eager"
    )
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:  # larger weights, and none that are zero
                weight.mul_(2).add_(0.05 * torch.randn_like(weight))
    return model.eval()


def image_inputs():
    """Returns rows with one image each, as arrays."""
    generator = np.random.default_rng(0)
    ids = generator.integers(10, 100, (2, 14))
    for row, start in enumerate([2, 5]):  # the images are at different positions
        stop = start + 1 + TOKENS_PER_IMAGE
        ids[row, start], ids[row, stop] = BEGIN, END
        ids[row, start + 1 : stop] = IMAGE
    size = VISION["image_size"]
    pixels = generator.normal(size=(2, 3, size, size)).astype(np.float32)
    return ids, {"pixel_values": pixels, "token_type_ids": (ids == IMAGE) * 1}
