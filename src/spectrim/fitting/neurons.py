"""The neurons that stay in a narrowed MLP, fitted: Gauss-Newton steps on what the layer after them gives."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from spectrim.analysis.sampling import Samples
from spectrim.core.errors import DataError, ModelError
from spectrim.core.execution import device_of
from spectrim.fitting.regression import InputRows, RidgeFit
from spectrim.layers.elementwise import FunctionBetween
from spectrim.layers.factored import shallow_copy
from spectrim.layers.replacement import set_weight
from spectrim.layers.types import layer_type_of
from spectrim.linalg import to_float64
from spectrim.linalg.problem import Solver

_STEPS, _ROWS, _LENGTH_OF = 4, 2048, 4
_FLAT, _TOLERANCE, _CHECKED = 1e-3, 1e-2, 64

Part = tuple[int, slice]
"""A batch, and places in it."""


@dataclass(eq=False)
class Feeder:
    """A layer before the function: z = W (x - m, 1) of the rows x, whose mean is m.

    Attributes:
        name: The call site's.
        rows: What it receives, batch by batch, (1, n, in).
        fit: Of these rows; has their mean and their covariance with a ridge.
        solve: Multiplies by the inverse of that.
        biased: Whether the layer has a bias, the last column of W; else m is zero.
        start: W (neurons, in + 1) before the first step.
        weight: W as it is now.
    """

    name: str
    rows: Sequence[Tensor]
    fit: RidgeFit
    solve: Solver
    biased: bool
    start: Tensor
    weight: Tensor

    @classmethod
    def of(cls, name: str, layer: nn.Module, received: InputRows) -> "Feeder":
        """As the layer is."""
        bias = layer._parameters.get("bias")
        fit = RidgeFit.of(layer, {name: received}, biased=bias is not None)
        dense = to_float64(fit.dense[0])
        middle = (dense @ fit.means[name].mT).squeeze(1)
        if bias is not None:
            middle = middle + to_float64(bias).to(middle.device)
        W = torch.cat([dense, middle.unsqueeze(1)], dim=1)
        return cls(name, received.rows, fit, fit.solver(), bias is not None, W, W)

    def inputs(self, batch: int, places: slice) -> Tensor:
        """Rows (x - m, 1), (n, in + 1), float32 at least."""
        rows = _float32(self.rows[batch][0, places])
        return functional.pad(rows - self.fit.means[self.name].to(rows), (0, 1), value=1.0)

    @property
    def kernels(self) -> Tensor:
        """The layer's weight, (1, neurons, in)."""
        return self.weight[None, :, :-1]

    @property
    def bias(self) -> Tensor | None:
        """The layer's bias, (neurons,)."""
        return self.weight[:, -1] - (self.kernels[0] @ self.fit.means[self.name].mT).squeeze(1) if self.biased else None

    def times_ridge(self, change: Tensor) -> Tensor:
        """The ridge times a change of W; that of the bias is free."""
        own = change[None, :, :-1]
        ridge = own * self.fit.ridge.unsqueeze(-2)
        return functional.pad(ridge[0], (0, 1))

    def solved(self, gradient: Tensor) -> Tensor:
        """A gradient times the inverse of the second moment of (x - m, 1) with the ridge."""
        return torch.cat([self.solve(gradient[None, :, :-1])[0], gradient[:, -1:]], dim=1)


@dataclass(frozen=True, eq=False)
class Neurons:
    """What lies before a layer that is narrowed with those before it.

    Attributes:
        between: f, from their outputs to its inputs.
        received: By name of a layer before f, what it receives.
        held_out: Batches that are not fitted to.
    """

    between: FunctionBetween
    received: Mapping[str, InputRows]
    held_out: Collection[int]

    def to(self, device: torch.device) -> "Neurons":
        """On another device."""
        return replace(self, received={name: rows.to(device) for name, rows in self.received.items()})

    def agree(self, model: nn.Module, hidden: InputRows) -> bool:
        """Whether f, which was recorded on other data, gives what the layer after it has received in the model.

        And whether f has derivatives, also in the number type of the fit and of any number of rows.
        """
        batch = next((batch for batch, rows in enumerate(hidden.rows) if rows.shape[1]), 0)
        expected = hidden.rows[batch][0, :_CHECKED]
        try:
            with torch.enable_grad():
                layers = {name: model.get_submodule(name) for name in self.received}
                outputs = [_float32(z).requires_grad_() for z in self.outputs(layers, batch, slice(_CHECKED))]
                actual = self.between(outputs)
                torch.autograd.grad(actual.sum(), outputs)
                more = self.between([torch.cat([z, z[:1]]) for z in outputs])
        except (RuntimeError, TypeError, ValueError, IndexError):  # calls that do not fit other values
            return False
        if (actual.shape, more.shape[:-1]) != (expected.shape, (len(expected) + 1,)):
            return False
        away = (actual.detach().double() - expected.to(actual.device).double()).norm()
        return float(away) <= _TOLERANCE * float(expected.double().norm())

    def outputs(self, layers: Mapping[str, nn.Module], batch: int, places: slice = slice(None)) -> list[Tensor]:
        """What these layers, in the place of those before f, give, (n, neurons)."""
        rows = {name: own.rows[batch][0, places] for name, own in self.received.items()}
        return [layers[name](x.to(device_of(layers[name]))).detach().to(x.device) for name, x in rows.items()]

    def fitted(
        self,
        layers: Mapping[str, nn.Module],
        samples: Sequence[Samples],
        *,
        targets: Sequence[Tensor],
        G: Tensor | None,
    ) -> dict[str, nn.Module] | None:
        """Copies of narrowed layers, as `fit` leaves them; None where that fails."""
        copies = {name: shallow_copy(module) for name, module in layers.items()}
        try:
            self.fit(copies, samples, targets=targets, G=G)
        except (DataError, ModelError, torch.linalg.LinAlgError):  # type: ignore[attr-defined]  # a step too far
            return None
        return copies

    def fit(
        self,
        layers: Mapping[str, nn.Module],
        samples: Sequence[Samples],
        *,
        targets: Sequence[Tensor],
        G: Tensor | None,
    ) -> None:
        """Fit narrowed layers by name, the one after f last, which belong to no network yet, to targets (1, n, out)."""
        metric = None if G is None else G[0] + _FLAT * G[0].diagonal().mean() * torch.eye(G.shape[1]).to(G)
        fit = NeuronFit.of(layers, self, targets=targets, metric=metric)
        fit.run()
        for own in fit.feeders:
            layer = layers[own.name]
            set_weight(layer, own.kernels, own.bias, like=layer.get_parameter("weight"), name=own.name)
        name, layer = list(layers.items())[-1]
        rows = [self.between(self.outputs(layers, batch))[None] for batch in range(len(targets))]
        received = {name: InputRows(name, rows, list(samples))}
        again = RidgeFit.of(layer, received, biased=layer._parameters.get("bias") is not None)
        cross = again.cross({name: list(targets)})
        best = again.weight(cross)
        best = best if again.excess(best, again.dense, cross=cross, G=G) <= 0 else again.dense
        bias = again.bias(name, best, targets) if again.biased else None
        set_weight(layer, best, bias, like=layer.get_parameter("weight"), name=name)


@dataclass(frozen=True, eq=False)
class _Slopes:
    """Of some rows, as the weights are now, by feeder: its inputs, and the derivatives of f with respect to z."""

    inputs: Sequence[Tensor]
    derivatives: Sequence[Tensor]

    def image(self, change: Sequence[Tensor], weight: Tensor) -> Tensor:
        """What a change of the feeders changes of the outputs, (n, out), with f linear."""
        each = zip(self.inputs, self.derivatives, change, strict=True)
        hidden = [(x @ W.mT.to(x)) * slope for x, slope, W in each]
        return torch.stack(hidden).sum(dim=0) @ weight.mT.to(hidden[0])


@dataclass(eq=False)
class NeuronFit:
    """Fits the feeders of a narrowed layer so that what that gives is near to the targets, on rows.

    The squared error of V f(z1, z2) + c with z = W (x - m, 1), in a metric M of the outputs, is made smaller by
    Gauss-Newton steps in W. Of the second derivative the part of each neuron by itself, a number times the second
    moment of the inputs with the ridge, gives a direction; how far to go along this and the last one is found exactly,
    with f linear around where it is. The ridge draws towards the weights at the start.

    Attributes:
        feeders: The layers before f.
        between: f.
        weight: V, (out, neurons), which does not change here.
        offset: c, (out,).
        targets: (1, n, out), batch by batch.
        metric: M, (out, out); None for the identity.
        parts: Which rows to fit to.
    """

    feeders: Sequence[Feeder]
    between: FunctionBetween
    weight: Tensor
    offset: Tensor
    targets: Sequence[Tensor]
    metric: Tensor | None
    parts: Sequence[Part]

    @classmethod
    def of(
        cls, layers: Mapping[str, nn.Module], neurons: Neurons, *, targets: Sequence[Tensor], metric: Tensor | None
    ) -> "NeuronFit":
        """Of narrowed layers by name, the one after f last."""
        *names, last = layers
        layer, device = layers[last], targets[0].device
        weight = to_float64(layer_type_of(layer).kernels(layer)).flatten(2)[0].to(device)
        bias = layer._parameters.get("bias")
        offset = torch.zeros_like(weight[:, 0]) if bias is None else to_float64(bias).to(device)
        feeders = [Feeder.of(name, layers[name], neurons.received[name]) for name in names]
        lengths = ((batch, rows.shape[1]) for batch, rows in enumerate(targets) if batch not in neurons.held_out)
        parts = [(batch, slice(start, start + _ROWS)) for batch, n in lengths for start in range(0, n, _ROWS)]
        return cls(feeders, neurons.between, weight, offset, targets, metric, parts)

    def run(self) -> None:
        """Take the steps; fewer where f is flat everywhere, or something is not finite."""
        last = list[list[Tensor]]()
        for _ in range(_STEPS):
            moved = self._step(last)
            if not all(torch.isfinite(change).all() for change in moved):
                return
            for feeder, change in zip(self.feeders, moved, strict=True):
                feeder.weight = feeder.weight + change
            last = [moved]

    def _weighted(self, outputs: Tensor) -> Tensor:
        return outputs if self.metric is None else outputs @ self.metric.to(outputs)

    def _step(self, last: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """By feeder the change of its weight; not finite where there is none to be found."""
        gradient, curvatures, slopes = self._gradient()
        descent = [
            feeder.solved(W / curvature)
            for feeder, W, curvature in zip(self.feeders, gradient, curvatures, strict=True)
        ]
        directions = [descent, *last]
        number = sum(len(own.inputs[0]) for own in slopes)
        system = torch.zeros(len(directions), len(directions), dtype=torch.float64)
        for own in slopes:
            images = [own.image(change, self.weight) for change in directions]
            system += _products(images, [self._weighted(image) / number for image in images])
        for place, (feeder, curvature) in enumerate(zip(self.feeders, curvatures, strict=True)):
            changes = [change[place] for change in directions]
            system += _products(changes, [curvature * feeder.times_ridge(change) for change in changes])
        known = torch.zeros(len(directions), dtype=torch.float64)
        for W, own_changes in zip(gradient, zip(*directions, strict=True), strict=True):
            known += _products(own_changes, [W]).flatten()
        lengths = torch.linalg.pinv(system, hermitian=True) @ known if system.isfinite().all() else known * torch.nan
        return [
            torch.stack([change * length for change, length in zip(own, lengths.tolist(), strict=True)]).sum(dim=0)
            for own in zip(*directions, strict=True)
        ]

    def _gradient(self) -> tuple[list[Tensor], list[Tensor], list[_Slopes]]:
        """By feeder where the error falls and the curvature of each neuron, (neurons, 1); slopes of some parts."""
        sums = [torch.zeros_like(feeder.weight) for feeder in self.feeders]
        squares, slopes, number = [torch.zeros_like(own[:, :1]) for own in sums], list[_Slopes](), 0
        V, weighted = self.weight, self._weighted(self.weight.mT).mT
        every = _LENGTH_OF if len(self.parts) >= 2 * _LENGTH_OF else 1  # of the slopes, enough for two numbers
        for position, (batch, places) in enumerate(self.parts):
            inputs = [feeder.inputs(batch, places) for feeder in self.feeders]
            derivatives, hidden = self._derivatives(inputs)
            lacking = self.targets[batch][0, places].to(hidden) - self.offset.to(hidden) - hidden @ V.mT.to(hidden)
            back = lacking @ weighted.to(hidden)
            for place, (x, slope) in enumerate(zip(inputs, derivatives, strict=True)):
                sums[place] += (back * slope).mT @ x
                squares[place] += slope.square().sum(dim=0).unsqueeze(1)
            if position % every == 0:
                slopes.append(_Slopes(inputs, derivatives))
            number += len(hidden)
        gains = (V * weighted).sum(dim=0).unsqueeze(1)
        curvatures = [gains * own / number for own in squares]
        curvatures = [(own + _FLAT * own.mean()).clamp(min=torch.finfo(own.dtype).tiny) for own in curvatures]
        gradient = []
        for feeder, own, curvature in zip(self.feeders, sums, curvatures, strict=True):
            gradient.append(own / number - curvature * feeder.times_ridge(feeder.weight - feeder.start))
            gradient[-1][:, -1] *= feeder.biased
        return gradient, curvatures, slopes

    def _derivatives(self, inputs: Sequence[Tensor]) -> tuple[Sequence[Tensor], Tensor]:
        """The derivatives of f by feeder, (n, neurons), zero where there is none, and f."""
        outputs = [x @ own.weight.mT.to(x) for own, x in zip(self.feeders, inputs, strict=True)]
        with torch.enable_grad():
            outputs = [z.detach().requires_grad_() for z in outputs]
            hidden = self.between(outputs)
            slopes = torch.autograd.grad(hidden.sum(), outputs)
        return [slope.nan_to_num(0, 0, 0) for slope in slopes], hidden.detach()


def _float32(rows: Tensor) -> Tensor:
    """At least, and without a history."""
    return rows.detach().to(torch.promote_types(rows.dtype, torch.float32))


def _products(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    """The inner product of each of the first with each of the second, float64."""
    return torch.tensor([[float((a * b).sum()) for b in second] for a in first], dtype=torch.float64)
