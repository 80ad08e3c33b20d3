"""A drop-in Dense layer with a packed kernel and an adapter."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from flax.typing import Dtype, Initializer, PrecisionLike
from jaxtyping import Array, Float

from ..adapters.base import Adapter
from ..adapters.call import DENSE, ModuleCall, adapted_call, promote_to_kernel
from ..adapters.config import QLoRAConfig, check_layer_config
from ..adapters.create import new_adapter
from ..quant.geometry import Geometry
from ..quant.kernel import FloatKernel, as_kernel
from ..trees.paths import Leaf
from ..trees.quantize import as_base_leaf


def module_call(module: nn.Module, kernel: str, equation: str, x: Array) -> ModuleCall:
    """Describes the call of a module as a ModuleCall."""
    # Registered classes may lack the bias, `promote_dtype` and `precision`.
    has_bias = getattr(module, "use_bias", True)
    bias = module.variables.get("params", {}).get("bias") if has_bias else None
    # A registered class promotes its input as `jnp.einsum` does.
    promote = promote_to_kernel
    if hasattr(module, "promote_dtype"):
        promote = functools.partial(module.promote_dtype, dtype=module.dtype)
    return ModuleCall(
        kernel,
        equation,
        x,
        bias=nn.meta.unbox(bias),
        promote=promote,
        precision=getattr(module, "precision", None),
    )


class QLoRADense(nn.Module):
    """`nn.Dense` whose kernel is packed and frozen, with a trainable adapter.

    It computes `x W + scaling * (x A) B + bias` (QLoRA, Dettmers et al. 2023, section
    3). `init` returns a `"params"` collection with the packed kernel and the bias, and
    a `"lora"` collection to train. Under `nn.scan`, name both in `variable_axes`.
    `wrap` is optional.

    Attributes:
        features: Number of outputs.
        config: How the kernel is packed and adapted. Settings by pattern are not
            allowed. Dropout is active in `apply` with a "dropout" rng or, as in Flax, a
            "params" rng.
        use_bias: Whether to add a bias.
        dtype: Dtype of the computation; by default inferred from input and parameters.
        param_dtype: Logical dtype of the kernel, and dtype of the bias.
        precision: As in `jax.lax.dot_general`.
        kernel_init: Initializer of the kernel, before it is packed.
        bias_init: Initializer of the bias.
        promote_dtype: As in `nn.Dense`.

    Example:
        >>> import jax, jax.numpy as jnp, qlora_jax as ql
        >>> layer, x = ql.linen.QLoRADense(8, ql.QLoRAConfig(rank=4)), jnp.ones((2, 64))
        >>> variables = layer.init(jax.random.key(0), x)
        >>> variables["params"]["kernel"].fmt, variables["lora"]["kernel"].rank
        ('nf4', 4)
        >>> layer.apply(variables, x).shape
        (2, 8)
    """

    features: int
    config: QLoRAConfig = QLoRAConfig()
    use_bias: bool = True
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    precision: PrecisionLike = None
    kernel_init: Initializer = nn.initializers.lecun_normal()
    bias_init: Initializer = nn.initializers.zeros_init()
    promote_dtype: Callable = promote_dtype

    def _init_kernel(self, key: jax.Array, shape: tuple[int, int]) -> Leaf:
        w = self.kernel_init(key, shape, self.param_dtype)
        return as_base_leaf(FloatKernel(w, Geometry()), self.config)

    def _init_lora(self, kernel: Leaf) -> Adapter:
        key = self.make_rng("params")
        return new_adapter(key, as_kernel(kernel), self.config, "kernel")

    @nn.compact
    def __call__(self, inputs: Float[Array, "..."]) -> Float[Array, "..."]:
        """Returns `[..., features]`, in `dtype` or the dtype that `nn.Dense` infers.

        Args:
            inputs: A floating-point array `[..., K]`.

        Raises:
            TypeError: If `config` is not a `QLoRAConfig`.
            ValueError: If `config` excludes the kernel, or has settings by pattern.
        """
        check_layer_config(self.config)
        shape = (jnp.shape(inputs)[-1], self.features)  # [K, N]
        kernel = self.param("kernel", self._init_kernel, shape)
        lora = self.variable("lora", "kernel", self._init_lora, kernel).value
        if self.use_bias:
            self.param("bias", self.bias_init, shape[1:], self.param_dtype)
        call = module_call(self, "kernel", DENSE, inputs)
        # `make_rng` uses the "params" rng if there is no "dropout" rng, as in Flax.
        has_key = self.has_rng("dropout") or self.has_rng("params")
        use_dropout = self.config.dropout > 0 and has_key and not self.is_initializing()
        key = self.make_rng("dropout") if use_dropout else None
        path = "/".join((*self.path, "kernel"))
        return adapted_call(call, kernel, lora, key, path=path)
