"""What holds for a compressed network whatever the network does; see `random_networks`."""

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from random_networks import Network
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import spectrim as st
from spectrim.core.nested import tensors
from spectrim.core.plans import Rule

RULES: dict[str, Rule] = {
    "half the MACs": st.Budget(macs=0.5),
    "0.8 of the MACs": st.Budget(macs=0.8),
    "rank 3": st.Rank(3),
    "energy": st.Energy(0.9),
    "ratio": st.Ratio(0.3),
}


def outputs(model: nn.Module, x: Tensor) -> Any:
    """What a copy of the model gives for a copy of the inputs."""
    with torch.no_grad():
        return copy.deepcopy(model)(x.clone(memory_format=torch.preserve_format))


def structure(value: Any) -> Any:
    """What is in nested outputs besides numbers."""
    return pytree.tree_structure(value), [(tensor.dtype, tensor.shape) for tensor in tensors(value)]


def distance(first: Any, second: Any) -> float:
    """The largest difference, as a share of the largest number of each tensor."""
    shares = [0.0]
    for a, b in zip(tensors(first), tensors(second), strict=True):
        shares.append(float((a - b).abs().max()) / (float(a.abs().max()) + 1e-9))
    return max(shares)


def snapshot(model: nn.Module) -> list[Any]:
    """Everything of a model that a call may not change."""
    hooks = [
        (name, attribute, list(value))
        for name, module in model.named_modules()
        for attribute, value in vars(module).items()
        if attribute.endswith("_hooks")
    ]
    flags = [(name, module.training, type(module), id(module)) for name, module in model.named_modules()]
    values = [(name, value, value.clone()) for name, value in model.state_dict(keep_vars=True).items()]
    return [hooks, flags, values, [(name, value.requires_grad) for name, value, _ in values]]


def same(before: list[Any], after: list[Any]) -> bool:
    """Whether two snapshots agree, to the bit."""
    if before[:2] != after[:2] or before[3:] != after[3:] or len(before[2]) != len(after[2]):
        return False
    pairs = zip(before[2], after[2], strict=True)
    return all(a[0] == b[0] and a[1] is b[1] and torch.equal(a[2], b[2]) for a, b in pairs)


def simplest(network: Network, fails: Callable[[Network], bool]) -> Network:
    """The network with everything left out that the failure does not need."""
    return next((simplest(other, fails) for other in network.simpler() if fails(other)), network)


@dataclass
class Laws:
    """Checks one network under one rule, and collects what does not hold: the law's name, and what was seen.

    `compress` gives None where the library says why it cannot be done.
    """

    network: Network
    rule: Rule
    calibrated: bool

    def __post_init__(self) -> None:
        self.violations: dict[str, str] = {}
        self.model = self.network.build()
        self.x, self.example = self.network.inputs(48), self.network.inputs(2, seed=2)
        with torch.no_grad():
            self.model(self.example.clone())  # whoever writes to its own weights has done it
        self.dense = outputs(self.model, self.x)
        self.precision = 1e-6 if self.network.double else 2e-3

    def check(self) -> dict[str, str]:
        """All laws."""
        before = snapshot(self.model)
        result = self.compress(self.rule)
        self.at_full_rank()
        if result is not None:
            self.compressed(result)
            self.without_cache(result)
            self.inplace(result)
        self.require("the dense model is as it was", same(before, snapshot(self.model)), "it has changed")
        return self.violations

    def require(self, law: str, holds: bool, text: str) -> None:
        if not holds:
            self.violations.setdefault(law, text)

    def guarded(self, law: str, action: Callable[[], Any]) -> Any:
        """What an action gives; None if it raised, and any error but the library's own breaks the law."""
        try:
            return action()
        except st.errors.SpectrimError as error:
            if law != "no foreign exception":
                self.violations.setdefault(law, f"{type(error).__name__}: {error}")
        except Exception as error:
            self.violations.setdefault(law, f"{type(error).__name__}: {error}")
        return None

    def compress(self, rule: Rule, **options: Any) -> st.Compressed | None:
        model = options.pop("model", self.model)
        data = list(self.x.split(16)) if self.calibrated else None
        return self.guarded(
            "no foreign exception",
            lambda: st.compress(model, rule, example_inputs=self.example, data=data, **options),
        )

    def run(self, law: str, model: nn.Module) -> Any:
        return self.guarded(law, lambda: outputs(model, self.x))

    def at_full_rank(self) -> None:
        law = "at full rank it gives what the dense one gives"
        full = self.compress(st.Energy(1.0), allow_growth=True)
        result = None if full is None else self.run(law, full.model)
        if result is not None:
            self.near(law, self.dense, result, self.precision)

    def near(self, law: str, expected: Any, result: Any, tolerance: float) -> None:
        if structure(expected) != structure(result):
            self.require(law, False, "another structure")
        else:
            far = distance(expected, result)
            self.require(law, far <= tolerance, f"differs by {far:.2g}")

    def compressed(self, result: st.Compressed) -> None:
        """What holds for the outputs and costs of a compressed network, and of what is made of it."""
        law = "outputs are finite and of the same structure"
        compressed = self.run(law, result.model)
        if compressed is None:
            return
        self.require(law, structure(self.dense) == structure(compressed), "another structure")
        self.require(law, all(bool(y.isfinite().all()) for y in tensors(compressed)), "not finite")
        self.costs(result)
        self.saved(result.model, compressed)
        merged = self.guarded("merging keeps the outputs", lambda: st.merge(result.model))
        if merged is not None:
            self.near("merging keeps the outputs", compressed, self.run("merging runs", merged), self.precision)

    def costs(self, result: st.Compressed) -> None:
        plan, law = result.plan, "MACs as planned"
        dense = st.measure(self.model, self.example, latency=False).macs
        fewer = plan.dense_cost.macs - plan.kept_cost.macs
        if not {"Branches", "Iterated", "Masked"} & {step.block for step in self.network.steps}:  # MACs of the data
            macs = result.measurement.macs
            self.require(law, macs == dense - fewer, f"{macs} of {dense} MACs, and the plan says {dense - fewer}")
            if isinstance(plan.rule, st.Budget):
                self.require("MACs within the budget", macs <= plan.rule.share * dense, f"{macs / dense:.3f}")
        measured = st.measure(result.model, self.example, latency=False)
        self.require("measured again, the same", measured.macs == result.measurement.macs, f"{measured.macs}")

    def saved(self, model: nn.Module, compressed: Any) -> None:
        law = "loading gives what was saved"
        with tempfile.TemporaryDirectory() as folder:
            loaded = self.guarded(law, lambda: st.load(st.save(model, Path(folder)), self.network.build()))
        if loaded is not None:
            again = self.run(law, loaded)
            equal = again is not None and all(map(torch.equal, tensors(compressed), tensors(again)))
            self.require(law, equal, "other outputs")

    def without_cache(self, result: st.Compressed) -> None:
        """Only a budget with data uses the activation cache."""
        if not (self.calibrated and isinstance(self.rule, st.Budget)):
            return
        law = "the activation cache changes nothing"
        other = self.compress(self.rule, cache=0)
        self.require(law, other is not None, "only one of the two could be compressed")
        if other is not None:
            tolerance = 1e-5 if self.network.double else self.precision
            self.near(law, self.run(law, result.model), self.run(law, other.model), tolerance)

    def inplace(self, result: st.Compressed) -> None:
        law = "in place is the same"
        model = copy.deepcopy(self.model)
        other = self.compress(self.rule, model=model, inplace=True)
        self.require(law, other is not None and other.model is model, "not compressed, or another model returned")
        if other is not None:
            self.near(law, self.run(law, result.model), self.run(law, model), 1e-9 if self.network.double else 1e-4)

    def exported(self) -> None:
        """Where the dense network goes to ONNX and gives the same there, the compressed one does as well."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            try:
                st.export_onnx(self.model, path, self.example)
            except st.errors.SpectrimError:
                return
            result = self.compress(self.rule)
            if result is not None:
                law = "ONNX gives what torch gives"
                self.guarded(law, lambda: st.export_onnx(result.model, path, self.example))
