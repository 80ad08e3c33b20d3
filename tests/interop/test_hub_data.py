"""Data sets of the hub and Parquet files give the rows of the JSONL file."""

import tracemalloc

import datasets
import numpy as np
import pyarrow
import pytest
from pyarrow import parquet
from tokenizer_helpers import save_tokenizer, write_rows

from qlora_jax.llm.data import open_tokenizer, read_dataset

ASK = {"role": "user", "content": "one?"}
# Arrow gives each message the keys of all messages.
ROWS = [
    {"messages": [ASK, {"role": "assistant", "content": "two", "reasoning": "1 + 1"}]},
    {"messages": [ASK, {"role": "assistant", "content": "two"}]},
]
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}{% if m.reasoning is defined %}({{ m.reasoning "
    "}}){% endif %}{{ m.content }}<|im_end|>{% endfor %}"
)


def test_rows_are_those_of_the_file(tmp_path, monkeypatch):
    save_tokenizer(tmp_path / "model", template=TEMPLATE)
    tokenizer = open_tokenizer(tmp_path / "model")
    loaded = []

    def load_dataset(*name):
        loaded.append(name)
        rows = datasets.Dataset.from_list(ROWS)
        assert rows[1]["messages"][1]["reasoning"] is None
        return datasets.DatasetDict({"train": rows, "validation": rows})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    settings = dict(vocab_size=400, max_length=99)
    path = write_rows(tmp_path / "d.jsonl", ROWS)
    expected = read_dataset(path, tokenizer, **settings).train
    path = tmp_path / "d.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), path, row_group_size=1)
    parquet_rows = read_dataset(path, tokenizer, **settings).train
    assert parquet_rows[1].place == f"{path}:1"
    data = read_dataset("user/name:subset", tokenizer, **settings)
    assert loaded == [("user/name", "subset")]
    for source_rows in (data.train, data.valid, parquet_rows):
        for x, y in zip(source_rows, expected, strict=True):
            np.testing.assert_array_equal(x.ids, y.ids)
            np.testing.assert_array_equal(x.labels, y.labels)
    assert data.train[1].place == "user/name:subset/train:1"


def test_an_error_of_the_hub_is_reported(tmp_path, monkeypatch):
    def load_dataset(*name):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    tokenizer = open_tokenizer(tmp_path)
    with pytest.raises(
        ValueError, match="Got 'user/name', which is missing. .* hub .*Connec.*: no net"
    ):
        read_dataset("user/name", tokenizer, vocab_size=4, max_length=9)


def test_a_parquet_file_takes_little_memory(tmp_path):
    # 40 rows of 1 MB, which the file stores once. One is tokenized at a time.
    save_tokenizer(tmp_path / "model")
    indices = pyarrow.array([0] * 40, pyarrow.int32())
    texts = pyarrow.DictionaryArray.from_arrays(indices, ["the user " * 110_000])
    path = tmp_path / "d.parquet"
    table = pyarrow.table({"text": texts})
    parquet.write_table(table, path, compression="zstd", store_schema=False)
    assert path.stat().st_size < 10_000
    assert parquet.ParquetFile(path).schema_arrow.field("text").type == "string"
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="`max_length` = 99"):
            read_dataset(
                path,
                open_tokenizer(tmp_path / "model"),
                vocab_size=400,
                max_length=99,
            )
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 30e6
    # The peak of Arrow's own memory since the process started. The rows have 40 MB.
    assert pyarrow.default_memory_pool().max_memory() < 30e6


@pytest.mark.parametrize("keep", [0, 20, -4])
def test_a_damaged_parquet_file_is_named(tmp_path, keep):
    path = tmp_path / "d.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="d.parquet must be a .parquet file"):
        read_dataset(path, open_tokenizer(tmp_path), vocab_size=4, max_length=9)
