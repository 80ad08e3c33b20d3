"""transformers with PEFT."""

from .server import BITSANDBYTES, E2M1, INT4_FMTS, Server

# PEFT silently skips packed modules, so transformers must decode them.
_DECODED = (
    ", quantization_config=transformers.CompressedTensorsConfig(run_compressed=False)"
)
TRANSFORMERS = Server(
    name="transformers",
    reads=("float", "bitsandbytes", "compressed-tensors"),
    bases={**BITSANDBYTES, **dict.fromkeys(INT4_FMTS, "compressed-tensors"), **E2M1},
    adapter="peft",
    command="model = transformers.AutoModelForCausalLM.from_pretrained({base}{flags})",
    quote=repr,  # as Python string literals
    option="; model = peft.PeftModel.from_pretrained(model, {adapter})",
    flags=dict.fromkeys(("compressed-tensors", *E2M1), _DECODED),
)
