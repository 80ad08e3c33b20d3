"""Eight virtual CPU devices, strict promotion, steady hypothesis, checked shapes."""

import jax
import jaxtyping
from hypothesis import settings

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

settings.register_profile("steady", derandomize=True, deadline=None, max_examples=40)
settings.load_profile("steady")

# Shapes in the annotations of what takes plain arrays are checked at every call.
# Elsewhere arguments come from users, and are told apart by our own errors.
CHECKED = [
    "qlora_jax.matmul.backends.reference",
    "qlora_jax.matmul.backends.tiled",
    "qlora_jax.matmul.collectives",
    "qlora_jax.quant.blockwise",
    "qlora_jax.quant.packing",
    "qlora_jax.quant.scales",
]
jaxtyping.install_import_hook(CHECKED, "beartype.beartype")
