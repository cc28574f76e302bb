"""What a model costs, counted: parameters, bytes of its file, multiply-accumulates."""

import inspect
import json
import math
from typing import Any, Self

from pydantic import Field
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, _FlopCounterMode
from torch.utils.module_tracker import ModuleTracker

from spectrim.core.dispatch import OperatorMode
from spectrim.core.execution import as_inputs, call, evaluating, require_shapes
from spectrim.core.files import Frozen
from spectrim.core.nested import stored_tensors, tensors
from spectrim.core.state import distinct_state
from spectrim.layers.caches import bytes_per_token
from spectrim.layers.experts import evenly, rerouted
from spectrim.layers.operators import UncountedOperators, formulas


class NetworkCost(Frozen):
    """What a whole model costs.

    Attributes:
        params: Stored numbers, shared ones once.
        bytes: Size of the model's safetensors file.
        macs: Multiply-accumulates of one forward pass of the example inputs (1 MAC = 2 FLOPs), in matrix products,
            convolutions, attention, bilinear and recurrent layers; element-wise operations, norms and look-ups are not
            counted. Experts are counted as if each were given as many tokens as any other.
        uncounted: Names of operators that were run and may multiply more than element by element, but whose
            multiplications are not known: Fourier transforms, solvers, operators of other packages. None without any.
        uncounted_weights: Those of them that were given a weight of the model.
        cache_bytes: Of keys and values that a decoder of transformers keeps for each token; None for other models.
    """

    params: int = Field(ge=0)
    bytes: int = Field(ge=0)
    macs: int = Field(ge=0)
    uncounted: tuple[str, ...] | None = None
    uncounted_weights: tuple[str, ...] | None = None
    cache_bytes: int | None = None


def count(model: nn.Module, example_inputs: Any) -> NetworkCost:
    """Parameters, bytes and MACs: what can be known without timing or data."""
    require_shapes(model)
    uncounted = UncountedOperators(model.parameters())
    counter = FlopCounterMode(display=False, custom_mapping=dict(formulas()))
    counter.mod_tracker = _WholeNetwork()
    with evaluating(model), rerouted(model, evenly), _Multiplications(counter), uncounted:
        outputs = call(model, as_inputs(example_inputs))
    # torch's quantised layers pack their weights into their state
    packed = [value for value in distinct_state(model)[0].values() if not isinstance(value, Tensor)]
    return NetworkCost(
        params=sum(tensor.numel() for tensor in (*model.parameters(), *tensors(packed))),
        bytes=file_size(model),
        macs=int(counter.get_total_flops()) // 2,
        uncounted=tuple(uncounted.names) or None,
        uncounted_weights=tuple(uncounted.weighted) or None,
        cache_bytes=bytes_per_token(outputs),
    )


class _Multiplications(_FlopCounterMode):
    """What torch's counter enters, see `OperatorMode`."""

    __torch_dispatch__ = inspect.unwrap(_FlopCounterMode.__torch_dispatch__)
    _should_skip_dynamo = OperatorMode._should_skip_dynamo


class _WholeNetwork(ModuleTracker):
    """Torch's tracker without its hooks: without gradients they fail where a layer is given a view of a parameter."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def count_macs(model: nn.Module, example_inputs: Any) -> int:
    """Multiply-accumulates of one forward pass; see `NetworkCost.macs`."""
    return count(model, example_inputs).macs


def file_size(model: nn.Module) -> int:
    """Bytes of the model as a plain safetensors file: header and every distinct tensor once.

    Of quantised layers and tensors, what their values are stored in.
    """
    header: dict[str, Any] = {}
    end = 0
    for name, value in distinct_state(model)[0].items():
        for tensor in stored_tensors(value):
            start, end = end, end + tensor.numel() * tensor.element_size()
            entry = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, end]}
            header[f"{name}.{len(header)}" if name in header else name] = entry
    text = len(json.dumps(header, separators=(",", ":")))
    return 8 + math.ceil(text / 8) * 8 + end
