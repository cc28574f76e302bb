"""The names that rules, files and the command line share; nothing else is imported for them."""

from typing import Literal, get_args

Metric = Literal["plain", "activation", "loss"]
"""What an error is measured on: the weights alone (plain), the layer's outputs on calibration data (activation), or
those outputs weighted by their effect on the network's outputs (loss)."""

RuntimeName = Literal["torch", "channels_last", "compile", "onnxruntime", "openvino", "openvino-bf16", "torch-bf16"]
RUNTIMES: tuple[RuntimeName, ...] = get_args(RuntimeName)
"""Every runtime: torch eager; the same with images and weights in channels_last; torch.compile with frozen weights in
channels_last; ONNX Runtime with all its optimisations; OpenVINO in float32 and in bfloat16; torch eager in bfloat16."""

Scheme = Literal["int8-weights", "int8-dynamic", "int8-static", "bf16"]
SCHEMES: tuple[Scheme, ...] = get_args(Scheme)
"""int8-weights: stored as int8, computed in float32. int8-dynamic: linear layers computed in int8, with the range of
their inputs taken in every pass; all other weights stored as int8. int8-static: layers and what lies between computed
in int8, with ranges from calibration data. bf16: stored as bfloat16, computed in what the runtime has."""

LossName = Literal["cross_entropy", "mse", "bce", "kl"]
