"""The functions that a row of a chat passes on its way from its file to the loss.

Whoever changes how rows are read has to follow this path, so it should stay short.
`pytest -s` prints it.
"""

import re
import sys
import threading
from collections import Counter

import jax
import numpy as np
from tokenizer_helpers import save_tokenizer, write_rows

import qlora_jax as ql
from qlora_jax.llm import data, train
from qlora_jax.llm.models.config import DecoderConfig
from qlora_jax.llm.models.decoder import Decoder

FILES = re.compile(r".*/qlora_jax/llm/(data/.*)\.py")
# Functions that look at a row and hand nothing on: they check it, measure it, name its
# parts, decide where it goes, or note that it has been read.
LOOKS = re.compile(
    r"omissions|check_|Row\.|Conversation\.messages|_Reader\._hash|draw_splits|"
    r"ordering|BatchSource\.(packs|__len__)|"
    r"Tokenizer\.(has_template|inner)|Chat\.(template|frame)"
)
ROW = {
    "messages": [
        {"role": "user", "content": "What is one and one, and why?"},
        {"role": "assistant", "content": "It is two, as the user can count."},
    ]
}


def count_calls(call):
    """Returns how often `call` enters each function of `FILES`, in order."""
    counts = Counter()

    def profile(frame, event, _):
        code = frame.f_code
        file = FILES.fullmatch(code.co_filename)
        # Functions inside of others are a part of these.
        if event == "call" and file and "<" not in code.co_qualname:
            counts[f"{file[1]}: {code.co_qualname}"] += 1

    threading.setprofile(profile)  # Grain makes batches in threads of its own
    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return counts


def test_a_row_of_a_chat_passes_few_functions_from_its_file_to_the_loss(tmp_path):
    save_tokenizer(tmp_path / "model")
    tokenizer = data.open_tokenizer(tmp_path / "model")
    decoder = Decoder(DecoderConfig(320, 32, 48, 1, num_heads=4, num_kv_heads=2))
    base = decoder.init(jax.random.key(0), np.ones((1, 4), np.int32))["params"]
    loss = train.decoder_loss(ql.linen.wrap(decoder))

    def train_on(count):
        path = write_rows(tmp_path / f"{count}.jsonl", [ROW] * count)
        rows = data.read_dataset(path, tokenizer, vocab_size=320, max_length=64).train
        settings = dict(batch_size=1, max_length=64, seed=0, packing=False)
        for batch in data.batches(rows, **settings, num_epochs=1):
            loss({}, base, batch, None)

    train_on(1)  # opens the tokenizer
    calls, more_calls = (count_calls(lambda n=n: train_on(n)) for n in (2, 3))
    # The functions that another row enters once more.
    entered = [name for name in more_calls if more_calls[name] > calls[name]]
    path = [name for name in entered if not LOOKS.search(name)]
    files = {name.partition(":")[0] for name in path}
    print(f"\n{len(path)} functions in {len(files)} files, and", *path, sep="\n")
    print(f"{len(entered) - len(path)} that look at the row:")
    print(*(name for name in entered if name not in path), sep="\n")
    assert len(path) <= 20 and len(files) <= 8
