"""Clear errors where a kernel is used as if it were an array."""

from typing import TYPE_CHECKING, Any, NoReturn

# What users may ask of an array that a kernel lacks.
ARRAY_ATTRIBUTES = frozenset(
    "T mT at astype reshape transpose flatten ravel squeeze sum mean min max item "
    "tolist copy device devices sharding addressable_shards block_until_ready".split()
)


class NotAnArrayError(TypeError, AttributeError):
    """A kernel is used as an array. An AttributeError too, so that `hasattr` works."""


class NotAnArray:
    """Base of kernels: their use as arrays raises an error that says what to use."""

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        del args, kwargs
        raise NotAnArrayError(
            f"{type(self).__name__} is not an array: its weights are packed. Use "
            "ql.matmul(x, q) or ql.einsum to multiply by it, and ql.dequantize(q) for "
            "its float weights."
        )

    # NumPy and `jnp.asarray` convert by it. The operators of arrays leave it to
    # `__rmatmul__` and the like where `__array_ufunc__` is None.
    __array__ = _refuse
    __array_ufunc__ = None
    __matmul__ = __rmatmul__ = __mul__ = __rmul__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __truediv__ = __rtruediv__ = _refuse
    __neg__ = __getitem__ = __iter__ = __len__ = _refuse

    def __bool__(self) -> bool:
        """True: that `__len__` is refused must not make it an error."""
        return True

    if not TYPE_CHECKING:  # a type checker would take any attribute for one

        def __getattr__(self, name: str) -> Any:
            """Refuses the attributes of arrays; others are missing as usual."""
            if name in ARRAY_ATTRIBUTES:
                self._refuse()
            raise AttributeError(f"{type(self).__name__!r} has no attribute {name!r}.")
