"""Plans and outputs of two networks at three budgets, with and without data, as `tests/files/figures` holds them.

    python tests/figures.py             # compares all of them; `test_figures.py` compares those that are quick
    python tests/figures.py --write     # writes the files anew: only where a change of the figures is meant

The files were written by commit 25f9191, before the library's structure was rebuilt, and anew when sensitivities began
to be measured in the metric of the budget, on other samples, and in parts of 32 samples, neurons to be fitted, and
random signs to differ between batches. Everything is in float64, so that machines differ only far behind the digits
that are compared.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

import spectrim as st
from spectrim.layers.forms import FORMS
from spectrim.models import mlp, resnet20

FOLDER = Path(__file__).parent / "files" / "figures"
WEIGHTS = Path(__file__).parent / "files" / "cifar_resnet20.safetensors"
BUDGETS = (0.3, 0.5, 0.7)


def cifar_resnet20() -> tuple[nn.Module, Tensor]:
    """The published ResNet-20, and smooth pictures of noise."""
    model = resnet20().eval()
    model.load_state_dict(load_file(WEIGHTS))
    draw = torch.Generator().manual_seed(0)
    coarse = torch.randn(24, 3, 8, 8, generator=draw, dtype=torch.float64)
    fine = torch.randn(24, 3, 32, 32, generator=draw, dtype=torch.float64)
    return model.double(), functional.interpolate(coarse, size=32, mode="bilinear") + 0.2 * fine


def mnist_mlp(width: int = 1024) -> tuple[nn.Module, Tensor]:
    """784-(5 x width)-10 with singular values that fall off, and sparse images."""
    model, draw = mlp(width=width).double().eval(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                out, into = layer.weight.shape
                values = 4 * 0.99 ** torch.arange(min(out, into), dtype=torch.float64) + 0.05
                left = torch.randn(out, len(values), generator=draw, dtype=torch.float64) / out**0.5
                right = torch.randn(len(values), into, generator=draw, dtype=torch.float64) / into**0.5
                layer.weight.copy_((left * values) @ right)
                layer.bias.copy_(0.1 * torch.randn(out, generator=draw, dtype=torch.float64))
    drawn = torch.rand(2, 192, 1, 28, 28, generator=draw, dtype=torch.float64)
    return model, drawn[0] * (drawn[1] < 0.2)


NETWORKS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "resnet20": cifar_resnet20,
    "mnist-mlp": mnist_mlp,
    "mnist-mlp-256": lambda: mnist_mlp(256),
}
CASES = [(network, calibrated) for network in NETWORKS for calibrated in (False, True)]
QUICK = [case for case in CASES if case != ("mnist-mlp", True)]


def compressed(network: str, *, calibrated: bool) -> Iterator[tuple[str, st.Compressed, Tensor]]:
    """At each budget: a name, what `st.compress` gives, and its outputs on the first images."""
    model, images = NETWORKS[network]()
    data = images.split(len(images) // 3) if calibrated else None
    analysis = None if calibrated else st.analyze(model, images[:1])
    alone = [form.name for form in FORMS if form.saves_time]  # there were no others then
    for share in BUDGETS:
        budget = st.Budget(macs=share)
        small = st.compress(model, budget, example_inputs=images[:1], data=data, analysis=analysis, forms=alone)
        with torch.no_grad():
            yield f"{network}-{share:g}-{'data' if calibrated else 'plain'}", small, small.model(images[:8])


def decisions(plan: dict[str, Any]) -> str:
    """The checksum of a plan's JSON without its predicted errors, whose last digits differ between machines."""
    layers = [{name: value for name, value in layer.items() if name != "predicted_error"} for layer in plan["layers"]]
    return hashlib.sha256(json.dumps({**plan, "layers": layers}, sort_keys=True).encode()).hexdigest()


def predicted_errors(plan: dict[str, Any]) -> list[float]:
    """Of every layer, 0 for a dense one."""
    return [layer.get("predicted_error", 0.0) for layer in plan["layers"]]


def require_unchanged(network: str, *, calibrated: bool) -> None:
    """Compare one network with the files: the plan's JSON, and its outputs to 1e-6 of the largest."""
    outputs = load_file(FOLDER / "outputs.safetensors")
    hashes = json.loads((FOLDER / "sha256.json").read_text(encoding="utf-8"))
    for case, small, output in compressed(network, calibrated=calibrated):
        plan = json.loads(small.plan.model_dump_json(exclude_none=True))
        before = json.loads((FOLDER / f"{case}.json").read_text(encoding="utf-8"))
        assert decisions(plan) == hashes[case] == decisions(before), f"another plan for {case}"
        assert predicted_errors(plan) == pytest.approx(predicted_errors(before), rel=1e-6, abs=1e-9)
        difference = float((output - outputs[case]).abs().max() / outputs[case].abs().max())
        assert difference < 1e-6, f"outputs of {case} differ by {difference:.2g} of the largest"


def write() -> None:
    """Write the files."""
    outputs: dict[str, Tensor] = {}
    hashes: dict[str, str] = {}
    for network, calibrated in CASES:
        for case, small, output in compressed(network, calibrated=calibrated):
            path = small.plan.save(FOLDER / f"{case}.json")
            hashes[case] = decisions(json.loads(path.read_text(encoding="utf-8")))
            outputs[case] = output.contiguous()
    save_file(outputs, FOLDER / "outputs.safetensors")
    (FOLDER / "sha256.json").write_text(json.dumps(hashes, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Compare, or write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the files anew")
    torch.set_num_threads(1)
    if parser.parse_args().write:
        return write()
    for network, calibrated in CASES:
        require_unchanged(network, calibrated=calibrated)
        print(f"{network}, {'with' if calibrated else 'without'} data: plans and outputs are those of the files")
    return None


if __name__ == "__main__":
    sys.exit(main())
