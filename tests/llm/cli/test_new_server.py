"""A toy server, which only needs a record to be listed and exported for.

The first part of this file shows what a new record in `servers.py` contains.
"""

from stored import draw_peft, export

from qlora_jax.llm.app.servers import AWQ, SERVERS, Server
from qlora_jax.llm.models.tiny import save_tiny


def _find_difference(raw, config, fmt):
    return "it has a window of 8" if raw.get("model_type") == "llama" else None


TOY = Server(
    name="toy",
    reads=("awq",),
    bases=AWQ,
    adapter="peft-portable",
    find_difference=_find_difference,
    command="toy {base}{flags}",
    option=" --rank {rank} --adapter {adapter}",
    ranks=(3, 5),
    flags={"awq": " --awq"},
    port=1,
    adapter_fields={"with": "{adapter}"},
)

MODULES = {"model.layers.1.mlp.down_proj": (64, 128)}


def test_a_record_is_a_server(tmp_path, monkeypatch):
    monkeypatch.setitem(SERVERS, "toy", TOY)
    model, adapter = save_tiny(tmp_path / "model"), tmp_path / "adapter"
    draw_peft(adapter, MODULES, target_modules=[*MODULES])
    packing = {"fmt": "int4_f16", "block_size": 32}
    out = tmp_path / "served"
    written = export(model, None, out, adapter, server="toy", **packing)
    pair, lines = written.pair, written.start.splitlines()
    assert (pair.server, pair.base, pair.adapter) == ("toy", "awq", "peft-portable")
    assert not pair.exact and pair.why == "it has a window of 8"
    assert lines[0] == "toy ./base --awq --rank 5 --adapter ./adapter"
    assert '"with": "./adapter"' in lines[1] and "http://localhost:1/v1/" in lines[1]
    assert sorted(path.name for path in out.iterdir()) == ["adapter", "base"]


def test_what_a_server_does_not_load_is_merged(tmp_path, monkeypatch):
    monkeypatch.setitem(SERVERS, "toy", TOY)
    model, adapter = save_tiny(tmp_path / "model"), tmp_path / "adapter"
    draw_peft(adapter, MODULES, target_modules=[*MODULES])
    settings = {"fmt": "nf4", "block_size": 64}
    pair = export(model, None, tmp_path / "x", adapter, server="toy", **settings).pair
    assert (pair.base, pair.adapter) == ("merged", "added to the base")
    assert pair.why.startswith("it does not support nf4 in blocks of 64")
