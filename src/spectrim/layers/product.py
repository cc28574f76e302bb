"""The weight of a factored layer: a tensor that is multiplied out only where its values are asked for."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from spectrim.core.dispatch import OperatorMode
from spectrim.core.errors import ModelError
from spectrim.core.nested import map_tensors, storage_of, tensors

_SIZES = frozenset(
    {getattr(Tensor, name).__get__ for name in ("dtype", "shape", "device", "layout", "ndim", "requires_grad")}
    | {getattr(Tensor, name).__get__ for name in ("is_cuda", "is_meta", "is_sparse", "is_quantized", "itemsize")}
    | {getattr(Tensor, name) for name in ("size", "dim", "numel", "nelement", "element_size", "get_device", "__len__")}
    | {Tensor.is_floating_point, Tensor.is_complex, torch.is_floating_point, torch.is_complex, torch.numel}
)
_WRITES = re.compile(r"__i(?!n)\w+__|__set(item)?__|\w*[a-z0-9]_")
_ASKS_FOR_SIZES = re.compile(r"new_\w+|\w+_like|type_as")
_SHARES_VALUES = frozenset({Tensor.detach, torch.detach, Tensor.data.__get__})  # type: ignore[attr-defined]
_TRAINS = frozenset(
    {Tensor.retains_grad.__get__, Tensor.retain_grad, Tensor.register_hook}  # type: ignore[attr-defined]
)
"""What an optimizer asks of a tensor that is no leaf, and what is lost with a passing value."""


class ProductTensor(Tensor):
    """A product that answers its type, shape and device without being computed, and cannot be written to.

    Models read such things of a weight outside of its layer (`self.wo.weight.dtype`), which must not cost a product.
    Any other function is given the product itself, so that gradients reach the factors. What shares the product's
    memory, such as a slice, is of this class as well; an array is read-only.

    Raises:
        ModelError: it is written to or trained, which would change a passing value and no layer.
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
        if func in _TRAINS or any(isinstance(value, cls) for value in _written(func, args, kwargs)):
            raise _read_only_error()
        if func in _SHARES_VALUES:
            return args[0]._detached()
        if func is Tensor.__deepcopy__:
            return args[0]._multiply().detach().clone().requires_grad_(args[0].requires_grad)
        is_other = func is Tensor.to and not isinstance(args[0], cls)
        if is_other or _ASKS_FOR_SIZES.fullmatch(str(getattr(func, "__name__", ""))):
            return func(*map_tensors(args, _without_values), **map_tensors(kwargs, _without_values))
        result, products = _run(func, args, kwargs)
        if isinstance(result, np.ndarray):
            result.flags.writeable = False
        return map_tensors(result, lambda value: cls._of_view(value) if _shares(value, products) else value)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """As `__torch_function__`, for calls that come from C++."""
        return _run(func, args, dict(kwargs or {}))[0]

    def _detached(self) -> Self:
        multiply, shape = self._multiply, self.shape
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        return type(self)(lambda: multiply().detach(), like=like, shape=shape)

    @classmethod
    def _of_view(cls, view: Tensor) -> "ProductTensor":
        return cls(lambda: view, like=view, shape=view.shape)


class _WriteGuard(OperatorMode):
    """Refuses operators that write to a product, which their names need not say."""

    def __init__(self, products: Sequence[Tensor]) -> None:
        super().__init__()
        self._products = products

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the operator, unless its schema says that it writes to a product."""
        own = kwargs or {}
        for place, argument in enumerate(operator._schema.arguments if operator._schema.is_mutable else ()):
            value = args[place] if place < len(args) else own.get(argument.name)
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written and any(_shares(tensor, self._products) for tensor in tensors(value)):
                raise _read_only_error()
        return operator(*args, **own)


def _read_only_error() -> ModelError:
    return ModelError(
        "the weight of a factored layer is the product of its factors, made anew at each use: it cannot be written to, "
        "trained, or be a parameter; change the weights of layer.chain, make the layer dense again with "
        "st.merge(model), or take a copy, layer.weight.detach().clone()"
    )


def _shares(value: Tensor, products: Sequence[Tensor]) -> bool:
    """Whether a tensor lies in the memory of a product."""
    storage = storage_of(value)
    return storage is not None and any(storage._cdata == product.untyped_storage()._cdata for product in products)


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, list[Tensor]]:
    """What a function gives of the products themselves, and these."""
    products: list[Tensor] = []

    def computed(value: Tensor) -> Tensor:
        if not isinstance(value, ProductTensor):
            return value
        products.append(value._multiply())
        return products[-1]

    args, kwargs = map_tensors((args, kwargs), computed)
    with _WriteGuard(products):
        return func(*args, **kwargs), products


def _without_values(value: Tensor) -> Tensor:
    """Any tensor of the same type, shape and device."""
    if not isinstance(value, ProductTensor):
        return value
    return torch.empty((), dtype=value.dtype, device=value.device).expand(value.shape)


def _written(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    """What a function writes to: its first argument, if its name says so, and `out`."""
    first = (*args, *kwargs.values())[:1] if _WRITES.fullmatch(str(getattr(func, "__name__", ""))) else ()
    return [*first, kwargs.get("out")]
