"""A toy server, which only needs a record to be listed and exported for.

The first part of this file shows what a new file in qlora_jax/llm/app/servers contains.
"""

from stored import draw_peft, export

from qlora_jax.llm import app
from qlora_jax.llm.app.servers import SERVERS
from qlora_jax.llm.app.servers.server import AWQ, Server
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
    files={"toy.cfg": "{base} and {adapter}"},
    port=1,
    adapter_fields={"with": "{adapter}"},
)

MODULES = {"model.layers.1.mlp.down_proj": (64, 128)}


def test_a_record_is_a_server(tmp_path, monkeypatch):
    monkeypatch.setitem(SERVERS, "toy", TOY)
    model, adapter = save_tiny(tmp_path / "model"), tmp_path / "adapter"
    draw_peft(adapter, MODULES, target_modules=[*MODULES])
    packing = {"fmt": "int4_f16", "block_size": 32}
    *_, pair = app.pairs(app.PairsConfig(model, str(adapter), **packing)).servers
    assert (pair.server, pair.base, pair.adapter) == ("toy", "awq", "peft-portable")
    assert not pair.exact and pair.why == "it has a window of 8"
    out = tmp_path / "served"
    written = export(model, None, out, adapter, server="toy", **packing)
    assert written.pair == pair
    readme = (out / "README.md").read_text()
    assert "    toy ./base --awq --rank 5 --adapter ./adapter\n" in readme
    assert '"with": "./adapter"' in readme and "http://localhost:1/v1/" in readme
    assert (out / "toy.cfg").read_text() == "./base and ./adapter"
    names = sorted(path.name for path in out.iterdir())
    assert names == ["README.md", "adapter", "base", "toy.cfg"]


def test_what_a_server_does_not_load_is_merged(tmp_path, monkeypatch):
    monkeypatch.setitem(SERVERS, "toy", TOY)
    model, adapter = save_tiny(tmp_path / "model"), tmp_path / "adapter"
    draw_peft(adapter, MODULES, target_modules=[*MODULES])
    settings = {"fmt": "nf4", "block_size": 64}
    *_, pair = app.pairs(app.PairsConfig(model, str(adapter), **settings)).servers
    assert (pair.base, pair.adapter) == ("merged", "added to the base")
    assert pair.why.startswith("it does not support nf4 in blocks of 64")
