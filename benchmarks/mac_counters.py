"""Spectrim's count of multiply-accumulates against that of fvcore, operator by operator.

    pip install fvcore
    python benchmarks/mac_counters.py --json counts.json        # two minutes, one thread

The two work at different levels: fvcore on a trace of TorchScript, Spectrim on the operators that are run. By kind:

- convolutions, and products of matrices (linear layers, matmul, einsum), must be equal to the last digit,
  but that fvcore rounds an einsum to four digits;
- attention in one operator (scaled_dot_product_attention) has no formula in fvcore; it is given one here, which must
  agree as well: the scores and the sum of the values, T x S x (E + V) for each head;
- baddbmm has none either, and is given that of bmm;
- norms, pooling and interpolation count in fvcore, and nowhere in Spectrim: they multiply element by element.

So `ours = theirs - element-wise + attention`. The exit status is 1 where this does not hold.
"""

import argparse
import json
import logging
import math
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from architecture_catalogue import catalogue
from fvcore.nn import FlopCountAnalysis
from fvcore.nn.jit_handles import bmm_flop_jit, get_shape
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import get_model

import spectrim as st
from spectrim.core.execution import evaluating
from spectrim.core.nested import tensors
from spectrim.layers.operators import formulas

AT_224 = (
    *("alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "googlenet", "inception_v3", "mnasnet1_0"),
    *("mobilenet_v2", "mobilenet_v3_small", "regnet_y_400mf", "resnet18", "resnet50", "resnext50_32x4d"),
    *("shufflenet_v2_x1_0", "squeezenet1_0", "swin_t", "swin_v2_t", "vgg11", "vit_b_32", "wide_resnet50_2"),
)
SMALL = (
    *("hf/BertForSequenceClassification", "hf/DebertaV2ForMaskedLM", "hf/XLNetLMHeadModel", "hf/GPT2LMHeadModel"),
    *("hf/BloomForCausalLM", "hf/LlamaForCausalLM", "hf/T5ForConditionalGeneration", "hf/BartForConditionalGeneration"),
    *("hf/ViTForImageClassification", "hf/SegformerForSemanticSegmentation", "hf/Wav2Vec2ForCTC", "timm/cait"),
    *("timm/xcit", "timm/maxxvit", "timm/volo", "timm/mlp_mixer"),
)
KINDS: Mapping[str, str] = {
    "conv": "convolutions",
    **dict.fromkeys(("linear", "addmm", "matmul", "mm", "bmm", "baddbmm", "einsum"), "products"),
    "scaled_dot_product_attention": "attention",
}
"""By fvcore's names of operators; all others are element-wise."""

KINDS_COMPARED = ("convolutions", "products", "attention")


class Plain(nn.Module):
    """A network as a trace needs it: from positional tensors to a tuple of tensors."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """One call."""
        outputs = self.model(**dict(zip(self.names, inputs, strict=True))) if self.names else self.model(*inputs)
        return tuple(tensors(outputs))


def networks() -> Mapping[str, Callable[[], tuple[nn.Module, Any]]]:
    """By name, what gives the network and its inputs."""
    small = catalogue()

    def at_224(name: str) -> tuple[nn.Module, Tensor]:
        return get_model(name, weights=None).eval(), torch.randn(1, 3, 224, 224)

    def listed(name: str) -> tuple[nn.Module, Any]:
        return small[name].build().eval(), small[name].inputs(1)

    large = {f"torchvision/{name}": lambda name=name: at_224(name) for name in AT_224}
    return large | {name: lambda name=name: listed(name) for name in SMALL}


def theirs(model: nn.Module, inputs: Any) -> dict[str, int]:
    """By kind, as fvcore counts, and by how much it may be off where it rounds."""

    def attention(values: Sequence[Any], outputs: Sequence[Any]) -> int:
        query, key, value = (get_shape(tensor) for tensor in values[:3])
        return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])

    named = isinstance(inputs, Mapping)
    plain = Plain(model, tuple(inputs) if named else ())
    analysis = FlopCountAnalysis(plain, tuple(inputs.values()) if named else (inputs,))
    analysis.set_op_handle("aten::scaled_dot_product_attention", attention)
    analysis.set_op_handle("aten::baddbmm", lambda values, outputs: bmm_flop_jit(values[1:3], outputs))
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
    kinds = {"convolutions": 0, "products": 0, "attention": 0, "element-wise": 0}
    for operator, number in analysis.by_operator().items():
        kinds[KINDS.get(operator, "element-wise")] += int(number)
    return kinds | {"rounding": int(analysis.by_operator()["einsum"] * 1e-3)}


def ours(model: nn.Module, inputs: Any) -> dict[str, int]:
    """By kind, as Spectrim counts, and the total that it says."""
    counter = FlopCounterMode(display=False, custom_mapping=dict(formulas()))
    with counter:
        model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
    kinds = {"convolutions": 0, "products": 0, "attention": 0}
    for operator, flops in counter.get_flop_counts()["Global"].items():
        name = str(operator)
        kind = "convolutions" if "conv" in name else "attention" if "attention" in name else "products"
        kinds[kind] += flops // 2
    return kinds | {"total": st.measure(model, inputs, latency=False).macs}


def main() -> None:
    """All networks, one row each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", help="pattern of names")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    rows, table = [], Table("network", "Spectrim", "fvcore", "ratio", "its attention", "its element-wise", "by kind")
    for name, build in networks().items():
        if not fnmatch(name, options.only):
            continue
        torch.manual_seed(0)
        model, inputs = build()
        model.requires_grad_(False)  # torch's counter follows gradients
        with evaluating(model):  # without shortcuts of torch that are one operator
            own, other = ours(model, inputs), theirs(model, inputs)
        # fvcore as it is, without the formula that it was given here
        alone = other["convolutions"] + other["products"] + other["element-wise"]
        unequal = [kind for kind in KINDS_COMPARED if abs(own[kind] - other[kind]) > other["rounding"]]
        off = own["total"] - (alone + other["attention"] - other["element-wise"])
        unequal += ["total"] if abs(off) > other["rounding"] else []
        rows.append({"network": name, "ours": own, "fvcore": other, "ratio": own["total"] / alone, "unequal": unequal})
        figures = (f"{value:,}" for value in (other["attention"], other["element-wise"]))
        verdict = f"differ: {', '.join(unequal)}" if unequal else "equal"
        table.add_row(name, f"{own['total']:,}", f"{alone:,}", f"{own['total'] / alone:.4f}", *figures, verdict)
        print(f"{name}: {verdict}", own, other, flush=True) if unequal else None
    Console(width=150, highlight=False).print(table)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    sys.exit(any(row["unequal"] for row in rows))


if __name__ == "__main__":
    main()
