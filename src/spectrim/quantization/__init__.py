"""Quantisation on top of low rank: int8 and bfloat16 weights, int8 computation, and what each is good for."""

from spectrim.quantization.comparison import QuantizedRow, QuantizedTable, compare_quantized
from spectrim.quantization.evaluation import onnx_accuracy
from spectrim.quantization.schemes import SCHEMES, Quantized, Scheme, before, quantize

__all__ = [
    "SCHEMES",
    "Quantized",
    "QuantizedRow",
    "QuantizedTable",
    "Scheme",
    "before",
    "compare_quantized",
    "onnx_accuracy",
    "quantize",
]
