"""The configuration of a decoder: its sizes, constants and parts."""

import dataclasses
import math
import operator
from typing import Literal

# Limits far above any published model. Larger values are errors in a file, and would
# use up all memory.
MAX_LAYERS, _MAX_EXPERTS = 10_000, 4096


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary positions: a token's position determines how its heads are rotated.

    The values of a head form pairs. For a token at `position`, pair i is rotated by
    `position * theta ** (-2 * i / D) / divisors[i]` radians, where D is the number of
    values in pairs.

    Attributes:
        theta: Base of the frequencies.
        divisors: One divisor per frequency, to extend the context length; empty if
            all are 1.
        long_divisors: The divisors in sequences of more than `original_length` tokens
            (LongRoPE, arXiv:2402.13753); empty if they are the same.
        original_length: The context length before it was extended, in tokens.
        scale: Factor that multiplies the rotated queries and keys.
        dim: D in this formula; 0 for `DecoderConfig.rotary_dim`.
        num_pairs: Number of leading pairs that are rotated; 0 for all.
    """

    theta: float = 10_000.0
    divisors: tuple[float, ...] = ()
    long_divisors: tuple[float, ...] = ()
    original_length: int = 0
    scale: float = 1.0
    dim: int = 0
    num_pairs: int = 0


@dataclasses.dataclass(frozen=True)
class Heads:
    """Sizes of the heads of attention in one layer.

    Attributes:
        num_kv_heads: Number of key and value heads.
        head_dim: Size of one head.
        key_is_value: Whether the layer has no `v_proj`. The outputs of `k_proj` then
            serve as values too, without the norm and the rotation of the keys.
    """

    num_kv_heads: int
    head_dim: int
    key_is_value: bool = False

    def __post_init__(self):
        _check_sizes(self, self.num_kv_heads, self.head_dim)


@dataclasses.dataclass(frozen=True)
class DeltaRule:
    """Sizes of a gated delta rule, which mixes tokens through a state of fixed size.

    Each head has a state, a matrix that maps keys to values (arXiv:2412.06464).

    Attributes:
        num_key_heads: Number of heads of queries and keys; divides `num_value_heads`.
        num_value_heads: Number of heads of values.
        key_dim: Size of a query or key.
        value_dim: Size of a value.
        conv_width: Number of tokens that the convolution of queries, keys and values
            sees, including the token itself.
    """

    num_key_heads: int
    num_value_heads: int
    key_dim: int
    value_dim: int
    conv_width: int = 4

    def __post_init__(self):
        _check_sizes(self, *dataclasses.astuple(self))
        if self.num_value_heads % self.num_key_heads:
            raise ValueError(
                f"`num_key_heads` must divide `num_value_heads`. Got {self}."
            )

    @property
    def conv_channels(self) -> int:
        """The width of queries, keys and values together."""
        num_keys = self.num_key_heads * self.key_dim
        return 2 * num_keys + self.num_value_heads * self.value_dim


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """Settings that may differ between the layers of a decoder.

    Attributes:
        rope: The rotary positions, or None for a layer without them.
        window: The number of tokens that a query sees, including itself; None for all
            previous tokens.
        mlp_width: Width of the dense MLP that this layer has instead of the decoder's
            MLP or mixture of experts; None if it has the decoder's.
        delta_rule: The gated delta rule that replaces attention, or None. `rope` and
            `window` are unused in such a layer.
        heads: The sizes of the heads of this layer's attention; None if they are those
            of the decoder.
        kv_group: Name of a group of layers that share keys and values, or None.
        has_kv: Whether the layer computes its own keys and values. If not, it uses
            those of an earlier layer: the last one in its `kv_group` that computes
            them.
    """

    rope: Rope | None = Rope()
    window: int | None = None
    mlp_width: int | None = None
    delta_rule: DeltaRule | None = None
    heads: Heads | None = None
    kv_group: str | None = None
    has_kv: bool = True

    @property
    def has_attention(self) -> bool:
        """Whether the layer has attention, and not a state of fixed size."""
        return self.delta_rule is None

    @property
    def structure(self) -> "LayerKind":
        """The settings in which stacked layers agree.

        They determine the parameters and the program of a layer. The other settings
        can be inputs of the program.
        """
        return dataclasses.replace(self, rope=None, window=None)


@dataclasses.dataclass(frozen=True)
class Experts:
    """A mixture of experts, which replaces the MLP of a layer or is added to it.

    A router computes a logit for each token and expert. A token is processed by the
    experts with the largest logits. Their outputs are summed, with weights that are a
    softmax of the logits.

    Attributes:
        count: Number of experts.
        per_token: Number of experts that process a token.
        normalized: Whether the weights of a token's experts sum to 1.
        width: Width inside each expert; 0 for `intermediate_size` of the decoder.
        joined: How gate and up form one kernel: "alternating" for alternating columns,
            "halves" for the columns of gate followed by those of up. None if they are
            two kernels.
        beside_mlp: Whether a layer has experts and an MLP, whose outputs are added.
        router: Name of the router in the Hugging Face model, relative to the layer.
        kernel: Name of an expert's kernel, also relative to the layer. NAME stands for
            "gate_proj" and so on. A name that ends in {expert} means that one tensor
            contains the kernels of all experts.
        names: What NAME stands for: one name for each of `kernels`, in the same order.
            If empty, NAME stands for the names in `kernels`.
        shared_width: Width of an MLP whose output is added for every token, multiplied
            by the sigmoid of a gate, which is one number for each token; 0 for none.
        balance: Weight of the load-balancing loss in training.
    """

    count: int
    per_token: int
    normalized: bool = True
    width: int = 0
    joined: Literal["alternating", "halves"] | None = None
    beside_mlp: bool = False
    router: str = "mlp.gate"
    kernel: str = "mlp.experts.{expert}.NAME.weight"
    names: tuple[str, ...] = ()
    shared_width: int = 0
    # `==` ignores this option of training: decoders that differ only in it are equal.
    balance: float = dataclasses.field(default=0.0, compare=False)

    def __post_init__(self):
        sizes = self.count, self.per_token
        is_int = all(type(size) is int for size in sizes)
        if not is_int or not 0 < self.per_token <= self.count <= _MAX_EXPERTS:
            raise ValueError(
                f"`count` must be an integer up to {_MAX_EXPERTS}, and `per_token` an "
                f"integer from 1 to `count`. Got {sizes}."
            )
        for name in ("width", "shared_width"):
            if type(width := getattr(self, name)) is not int or width < 0:
                raise ValueError(
                    f"`{name}` must be a positive integer, or 0. Got {width!r}."
                )

    @property
    def kernels(self) -> tuple[str, ...]:
        """The names of an expert's kernels."""
        if self.joined is not None:
            return "gate_up_proj", "down_proj"
        return "gate_proj", "up_proj", "down_proj"


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes, constants and parts of a decoder.

    Attributes:
        vocab_size: Rows of the embedding.
        hidden_size: Width of the residual stream.
        intermediate_size: Width inside the MLP, or inside each expert.
        num_layers: Number of layers.
        num_heads: Number of query heads.
        num_kv_heads: Number of key and value heads; must divide `num_heads`.
        head_dim: Size of one head; 0 for `hidden_size // num_heads`.
        layers: The kind of each layer, or one kind for all.
        rotary_dim: Number of leading values of a head that are rotated; 0 for all.
        rms_norm_eps: Epsilon that norms add to the mean square.
        unit_offset_norms: Whether norms multiply by `1 + scale` instead of `scale`.
        pre_norms: Whether the inputs of attention and MLP are normalized.
        post_norms: Whether the outputs of attention and MLP are normalized.
        qk_norms: Whether the query and key of each head are normalized; "whole" to
            normalize all heads together.
        value_norms: Whether the value of each head is divided by its root mean square.
        activation: The activation of the gate: "silu", "gelu_pytorch_tanh", or
            "clamped_swiglu" (gpt-oss's function of gate and up).
        fused: Whether q, k and v share one kernel, `qkv_proj`, and gate and up share
            another, `gate_up_proj`.
        attention_gate: Whether `q_proj` also computes a gate. The result of attention
            is multiplied by the sigmoid of the gate, elementwise.
        qkv_bias: Whether q, k and v have a bias.
        o_bias: Whether the output projection has a bias.
        mlp_bias: Whether the projections of the MLP, and the router, have a bias.
        sinks: Whether each head has an attention sink: a trained score that takes part
            in the softmax but has no value.
        output_scalars: Whether each layer ends by multiplying the residual stream by a
            stored number, `layer_scalar`.
        per_layer_width: Size of the additional input vector that each layer has for
            each token (see `per_layer_input.py`); 0 for none.
        embedding_scale: Factor that multiplies the embedded tokens.
        attention_scale: Factor of the attention scores; 0 for `head_dim ** -0.5`.
        attention_soft_cap: The cap in `cap * tanh(scores / cap)`; None for no cap.
        logit_soft_cap: The cap of the logits, in the same formula; None for no cap.
        tie_embeddings: Whether the head is the transposed embedding.
        module: Path of the decoder's module in the Hugging Face model.
        experts: The mixture of experts that replaces MLPs, or None.

    Example:
        >>> config = DecoderConfig(64, 32, 48, 2, num_heads=4, num_kv_heads=2)
        >>> config.head_dim, len(config.layers)
        (8, 2)
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int = 0
    layers: tuple[LayerKind, ...] = (LayerKind(),)
    rotary_dim: int = 0
    rms_norm_eps: float = 1e-5
    unit_offset_norms: bool = False
    pre_norms: bool = True
    post_norms: bool = False
    qk_norms: bool | Literal["whole"] = False
    value_norms: bool = False
    activation: str = "silu"
    fused: bool = False
    attention_gate: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    sinks: bool = False
    output_scalars: bool = False
    per_layer_width: int = 0
    embedding_scale: float = 1.0
    attention_scale: float = 0.0
    attention_soft_cap: float | None = None
    logit_soft_cap: float | None = None
    tie_embeddings: bool = True
    module: str = "model"
    experts: Experts | None = None

    def __post_init__(self):
        names = ["vocab_size", "hidden_size", "intermediate_size"]
        names += ["num_layers", "num_heads", "num_kv_heads"]
        sizes = {name: getattr(self, name) for name in names}
        wrong = {name: x for name, x in sizes.items() if not _is_size(x)}
        if wrong:
            raise ValueError(
                f"{[*wrong]} must be positive integers, of type int. Got {wrong}."
            )
        # Resolve defaults once, so that configs that mean the same compare equal. Some
        # defaults depend on `head_dim`.
        head_dim = self.head_dim or self.hidden_size // self.num_heads
        resolved = {
            "head_dim": head_dim,
            "rotary_dim": self.rotary_dim or head_dim,
            "attention_scale": self.attention_scale or head_dim**-0.5,
        }
        if len(self.layers) == 1:
            resolved["layers"] = self.layers * self.num_layers
        for name, value in resolved.items():
            object.__setattr__(self, name, value)  # the dataclass is frozen
        self._check_layers()
        self._check_numbers()

    def _check_layers(self):
        if len(self.layers) != self.num_layers:
            raise ValueError(
                "`layers` must have one entry, or one for each layer. "
                f"Got {len(self.layers)} for {self.num_layers} layers."
            )
        for kind in filter(operator.attrgetter("has_attention"), self.layers):
            if kind.window is not None and kind.window < 1:
                raise ValueError(
                    f"`window` must be positive or None. Got {kind.window}."
                )
            heads, dim = self.heads_of(kind), self.dim_of(kind.rope)
            is_valid_dim = dim % 2 == 0 and 0 < dim <= heads.head_dim
            if self.num_heads % heads.num_kv_heads or not is_valid_dim:
                raise ValueError(
                    f"`num_kv_heads` must divide {self.num_heads}, and the number of "
                    "rotated values must be positive, even and at most `head_dim`. "
                    f"Got {heads} with {dim} rotated values."
                )

    def _check_numbers(self):
        names = ["rms_norm_eps", "embedding_scale", "attention_scale"]
        names += ["attention_soft_cap", "logit_soft_cap"]
        numbers = {name: getattr(self, name) for name in names}
        numbers = {name: x for name, x in numbers.items() if x is not None}
        for i, rope in enumerate(self.ropes):
            fields = ("theta", "divisors", "long_divisors", "scale") if rope else ()
            numbers |= {f"ropes[{i}].{name}": getattr(rope, name) for name in fields}
        wrong = {name: x for name, x in numbers.items() if not _is_positive(x)}
        if wrong:
            raise ValueError(f"{[*wrong]} must be positive and finite. Got {wrong}.")

    @property
    def ropes(self) -> tuple[Rope | None, ...]:
        """The distinct rotary positions of the layers, in order of first use."""
        with_attention = (kind for kind in self.layers if kind.has_attention)
        return tuple(dict.fromkeys(kind.rope for kind in with_attention))

    def heads_of(self, kind: LayerKind) -> Heads:
        """Returns the sizes of the heads of a layer's attention.

        Args:
            kind: The kind of the layer.
        """
        return kind.heads or Heads(self.num_kv_heads, self.head_dim)

    def dim_of(self, rope: Rope | None) -> int:
        """Returns the number of values of a head that form pairs.

        Args:
            rope: The rotary positions of the layer. If None, all angles are 0.
        """
        return self.rotary_dim if rope is None else rope.dim or self.rotary_dim

    @property
    def delta_rule(self) -> DeltaRule | None:
        """The gated delta rule of the first layer that has one, or None."""
        return next((x.delta_rule for x in self.layers if x.delta_rule), None)

    @property
    def has_states(self) -> bool:
        """Whether some layers have a state of fixed size instead of attention.

        A state depends on all tokens so far, and on their order.
        """
        return not all(kind.has_attention for kind in self.layers)


def _is_size(value: object) -> bool:
    return type(value) is int and value > 0


def _check_sizes(record: object, *sizes: object) -> None:
    if not all(map(_is_size, sizes)):
        name = type(record).__name__
        raise ValueError(f"sizes of `{name}` must be positive. Got {record}.")


def _is_positive(x: float | tuple[float, ...]) -> bool:
    values = x if isinstance(x, tuple) else (x,)
    return all(math.isfinite(value) and value > 0 for value in values)
