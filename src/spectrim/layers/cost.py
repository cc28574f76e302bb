"""What a model costs, counted: parameters, bytes of its file, multiply-accumulates."""

import json
import math
from typing import Any

import torch
from pydantic import Field
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop

from spectrim.core.execution import as_inputs, call, evaluating, unique_tensors
from spectrim.core.files import Frozen


class NetworkCost(Frozen):
    """What a whole model costs.

    Attributes:
        params: Stored numbers, shared ones once.
        bytes: Size of the model's safetensors file.
        macs: Multiply-accumulates of one forward pass of the example inputs (1 MAC = 2 FLOPs), in matrix products,
            convolutions and attention; element-wise operations, norms and look-ups are not counted.
    """

    params: int = Field(ge=0)
    bytes: int = Field(ge=0)
    macs: int = Field(ge=0)


def count(model: nn.Module, example_inputs: Any) -> NetworkCost:
    """Parameters, bytes and MACs: what can be known without timing or data."""
    params = sum(parameter.numel() for parameter in model.parameters())
    return NetworkCost(params=params, bytes=file_size(model), macs=count_macs(model, example_inputs))


def count_macs(model: nn.Module, example_inputs: Any) -> int:
    """Multiply-accumulates of one forward pass, as half of the FLOPs that torch counts; see `NetworkCost.macs`."""
    with evaluating(model), FlopCounterMode(display=False, custom_mapping=_formulas()) as counter:
        call(model, as_inputs(example_inputs))
    return int(counter.get_total_flops()) // 2


def _formulas() -> dict[Any, Any]:
    """For operators that torch does not count: attention on the CPU."""

    def attention(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
        return sdpa_flop(query, key, value)

    return {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention}


def file_size(model: nn.Module) -> int:
    """Bytes of the model as a plain safetensors file: header and every distinct tensor once."""
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in unique_tensors(model)[0].items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = len(json.dumps(header, separators=(",", ":")))
    return 8 + math.ceil(text / 8) * 8 + end
