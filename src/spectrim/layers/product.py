"""The weight of a factored layer: a tensor that is multiplied out only where its values are asked for."""

import re
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor

from spectrim.core.errors import ModelError
from spectrim.core.nested import map_tensors

_SIZES = frozenset(
    {getattr(Tensor, name).__get__ for name in ("dtype", "shape", "device", "layout", "ndim", "requires_grad")}
    | {getattr(Tensor, name).__get__ for name in ("is_cuda", "is_meta", "is_sparse", "is_quantized", "itemsize")}
    | {getattr(Tensor, name) for name in ("size", "dim", "numel", "nelement", "element_size", "get_device", "__len__")}
    | {Tensor.is_floating_point, Tensor.is_complex, torch.is_floating_point, torch.is_complex, torch.numel}
)
_WRITES = re.compile(r"__i(?!n)\w+__|__set(item)?__|\w*[a-z0-9]_")
_ASKS_FOR_SIZES = re.compile(r"new_\w+|\w+_like|type_as")
_SHARES_VALUES = frozenset({Tensor.detach, torch.detach, Tensor.data.__get__})  # type: ignore[attr-defined]


class ProductTensor(Tensor):
    """A product that answers its type, shape and device without being computed, and cannot be written to.

    Models read such things of a weight outside of its layer (`self.wo.weight.dtype`), which must not cost a product.
    Any other function is given the product itself, so that gradients reach the factors.

    Raises:
        ModelError: it is written to, which would change a passing value and no layer.
    """

    _multiply: Callable[[], Tensor]
    _is_hf_initialized = True  # transformers writes random numbers into weights that do not say so

    @staticmethod
    def __new__(cls, multiply: Callable[[], Tensor], *, like: Tensor, shape: torch.Size) -> "ProductTensor":
        """The value of `multiply()`, which has the type and device of `like` and this shape."""
        product: ProductTensor = Tensor._make_wrapper_subclass(
            cls, shape, dtype=like.dtype, device=like.device, requires_grad=like.requires_grad
        )
        product._multiply = multiply
        return product

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Answer sizes at once; compute the product for anything else."""
        kwargs = dict(kwargs or {})
        if func in _SIZES:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if any(isinstance(value, cls) for value in _written(func, args, kwargs)):
            raise ModelError(
                "the weight of a factored layer is the product of its factors and cannot be written to; change the "
                "weights of layer.chain, or make the layer dense again with st.merge(model)"
            )
        if func in _SHARES_VALUES:
            return args[0]._detached()
        is_other = func is Tensor.to and not isinstance(args[0], cls)
        if is_other or _ASKS_FOR_SIZES.fullmatch(str(getattr(func, "__name__", ""))):
            return func(*map_tensors(args, _without_values), **map_tensors(kwargs, _without_values))
        return func(*map_tensors(args, _computed), **map_tensors(kwargs, _computed))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """As `__torch_function__`, for calls that come from C++."""
        return func(*map_tensors(args, _computed), **map_tensors(dict(kwargs or {}), _computed))

    def _detached(self) -> Self:
        multiply, shape = self._multiply, self.shape
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        return type(self)(lambda: multiply().detach(), like=like, shape=shape)


def _computed(value: Tensor) -> Tensor:
    return value._multiply() if isinstance(value, ProductTensor) else value


def _without_values(value: Tensor) -> Tensor:
    """Any tensor of the same type, shape and device."""
    if not isinstance(value, ProductTensor):
        return value
    return torch.empty((), dtype=value.dtype, device=value.device).expand(value.shape)


def _written(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    """What a function writes to: its first argument, if its name says so, and `out`."""
    first = (*args, *kwargs.values())[:1] if _WRITES.fullmatch(str(getattr(func, "__name__", ""))) else ()
    return [*first, kwargs.get("out")]
