"""A drop-in Dense layer with a packed, frozen kernel and an adapter."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype

from ..adapters.base import Adapter
from ..adapters.call import ModuleCall, adapted_call, promote_to_kernel
from ..adapters.config import QLoRAConfig
from ..adapters.initializers import AdapterSettings, kaiming_uniform
from ..quant.geometry import Geometry
from ..quant.kernel import as_kernel
from ..quant.pack import quantize_kernel
from ..quant.qtensor import QTensor
from ..quant.settings import Packing
from ..quant.straight_through import StraightThrough


def promotion_of(module: nn.Module) -> Callable[[Any, Any, Any], tuple[Any, Any]]:
    """Returns how a module promotes its input and its bias; see `ModuleCall`."""
    promote_dtype = getattr(module, "promote_dtype", None)
    if promote_dtype is None:  # a registered class: `jnp.einsum` promotes
        return promote_to_kernel

    def promote(x: Any, bias: Any, dtype: Any) -> tuple[Any, Any]:
        kernel = jnp.zeros((), dtype)
        own = getattr(module, "dtype", None)
        x, _, bias = promote_dtype(x, kernel, bias, dtype=own)
        return x, bias

    return promote


class QLoRADense(nn.Module):
    """`nn.Dense` whose kernel is packed and frozen, with a trainable adapter.

    It computes `x W + scaling * (x A) B + bias` (QLoRA, Dettmers et al. 2023, section
    3). `init` returns a `"params"` collection with the packed kernel and the bias, and
    a `"lora"` collection with the adapter: train the latter. Under `nn.scan`, name both
    in `variable_axes`. A model with such layers works with and without `wrap`.

    Attributes:
        features: Number of outputs.
        rank: Rank of the adapter.
        alpha: LoRA's alpha; by default the rank.
        fmt: Number format of the kernel: "nf4", "fp4", "int4" or "int8".
        block_size: Weights along the inputs that share a scale.
        double_quant: Whether the scales are quantized too.
        freeze_base: False keeps a float kernel, trained through the quantizer.
        dropout: Rate of dropout on the adapter's input. Active in `apply` with a
            "dropout" rng or, as in Flax, a "params" rng.
        rank_stabilized: Scale by alpha / sqrt(rank).
        lora_dtype: Dtype of A and B.
        use_bias: Whether there is a bias.
        dtype: Dtype of the computation; by default inferred from input and parameters.
        param_dtype: Logical dtype of the kernel, and dtype of the bias.
        precision: As in `jax.lax.dot_general`.
        kernel_init: Initializer of the kernel, before it is packed.
        bias_init: Initializer of the bias.
        promote_dtype: As in `nn.Dense`.

    Example:
        >>> import jax, jax.numpy as jnp, qlora_jax as ql
        >>> layer = ql.linen.QLoRADense(8, rank=4)
        >>> variables = layer.init(jax.random.key(0), jnp.ones((2, 64)))
        >>> variables["params"]["kernel"].fmt, variables["lora"]["kernel"].rank
        ('nf4', 4)
    """

    features: int
    rank: int = 16
    alpha: float | None = None
    fmt: str = "nf4"
    block_size: int = 64
    double_quant: bool = True
    freeze_base: bool = True
    dropout: float = 0.0
    rank_stabilized: bool = False
    lora_dtype: Any = "float32"
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: Any = None
    kernel_init: Any = nn.initializers.lecun_normal()
    bias_init: Any = nn.initializers.zeros_init()
    promote_dtype: Any = promote_dtype

    def _config(self) -> QLoRAConfig:
        return QLoRAConfig(
            rank=self.rank,
            alpha=self.alpha,
            fmt=self.fmt,
            block_size=self.block_size,
            double_quant=self.double_quant,
            freeze_base=self.freeze_base,
            dropout=self.dropout,
            rank_stabilized=self.rank_stabilized,
            lora_dtype=self.lora_dtype,
        )

    def _make_kernel(
        self, key: Any, shape: tuple[int, int]
    ) -> QTensor | StraightThrough:
        w = self.kernel_init(key, shape, self.param_dtype)
        packing = Packing(self.fmt, self.block_size, self.double_quant)
        if not self.freeze_base:
            return StraightThrough(w, packing, Geometry())
        return quantize_kernel(w, packing)

    def _make_lora(self, kernel: Any) -> Adapter:
        settings = AdapterSettings.of(self._config(), "kernel")
        key = self.make_rng("params")
        return kaiming_uniform(key, as_kernel(kernel), settings)[0]

    @nn.compact
    def __call__(self, inputs: Any) -> Any:
        """Applies the layer.

        Args:
            inputs: A floating-point array `[..., K]`.

        Returns:
            `[..., features]`, in `dtype` or the dtype that `nn.Dense` infers.

        Raises:
            TypeError: As `QLoRAConfig`, of which these settings are a part.
            ValueError: As `QLoRAConfig`.

        Example:
            >>> import jax, jax.numpy as jnp, qlora_jax as ql
            >>> layer, x = ql.linen.QLoRADense(8, rank=4), jnp.ones((2, 64))
            >>> variables = layer.init(jax.random.key(0), x)
            >>> layer.apply(variables, x).shape
            (2, 8)
        """
        self._config()  # refuses bad settings
        shape = (jnp.shape(inputs)[-1], self.features)
        kernel = self.param("kernel", self._make_kernel, shape)
        lora = self.variable("lora", "kernel", self._make_lora, kernel).value
        bias = None
        if self.use_bias:
            shape = (self.features,)
            bias = self.param("bias", self.bias_init, shape, self.param_dtype)
        call = ModuleCall(
            "kernel",
            "...k,kn->...n",
            inputs,
            bias=bias,
            promote=promotion_of(self),
            precision=self.precision,
        )
        has_key = self.has_rng("dropout") or self.has_rng("params")
        use_dropout = self.dropout > 0 and has_key and not self.is_initializing()
        key = self.make_rng("dropout") if use_dropout else None
        path = "/".join((*self.path, "kernel"))
        return adapted_call(call, kernel, lora, path=path, dropout_key=key)
