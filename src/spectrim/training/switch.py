"""When a network that trains in full rank is ready to go on in low rank, and at which ranks."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from pydantic import Field
from torch import nn

from spectrim.core.errors import TrainingError
from spectrim.core.files import Frozen
from spectrim.core.plans import Ratio
from spectrim.training.choice import LayerFilter, shrinks, weight_of, weight_spectrum


class StableRanks(Frozen):
    """The stable ranks by layer name after an `epoch`, 0 for the initial weights.

    `stable` is |W|_F^2 / |W|_2^2 (Rudelson & Vershynin 2007); `scaled` is that times full rank over initial stable
    rank, so that it starts from the full rank.
    """

    epoch: int = Field(ge=0)
    stable: Mapping[str, float]
    scaled: Mapping[str, float]


class _State(Frozen):
    full: dict[str, int]
    history: tuple[StableRanks, ...]


@dataclass(eq=False, kw_only=True)
class Switch(LayerFilter):
    """Watch a network train in full rank, and say when to go on in low rank, at which ranks (Cuttlefish, Wang 2023).

        switch = st.training.Switch(keep_last=True)
        switch.step(model)
        for epoch in range(epochs):
            train(model)
            if (ranks := switch.step(model)) is not None:
                break
        truncation = st.training.truncated_(model, ranks)       # or ProjectEachEpoch(ranks).finish(model) for factors

    The stable ranks of the weights change early in training and then become stable. Once those of all layers are, the
    rank of each layer is its stable rank, scaled so that that of the random initial weight stands for the full rank.
    Unlike in the paper, changes are relative to the stable rank, so that they mean the same for layers of every size.

    Attributes:
        epsilon: Largest relative change of a stable rank from one epoch to the next that counts as stable, above 0.
        patience: For how many epochs in a row no layer may change by more.
        include, exclude, keep_last: As in `LayerFilter`.

    Raises:
        TrainingError: an epsilon or a patience that is not allowed.
    """

    epsilon: float = 0.02
    patience: int = 2

    def __post_init__(self) -> None:
        epsilon, patience = self.epsilon, self.patience
        if isinstance(epsilon, bool) or not isinstance(epsilon, int | float) or not 0 < epsilon < math.inf:
            raise TrainingError(f"epsilon={epsilon!r}: give a relative change above 0, such as 0.02")
        if isinstance(patience, bool) or not isinstance(patience, int) or patience < 1:
            raise TrainingError(f"patience={patience!r}: give a whole number of epochs, at least 1")
        self._state = _State(full={}, history=())

    @property
    def history(self) -> tuple[StableRanks, ...]:
        """The stable ranks at every call of `step`, oldest first."""
        return self._state.history

    def step(self, model: nn.Module) -> Mapping[str, int] | None:
        """Measure the weights: once before training, which sets the scale, and once after every epoch.

        Takes a decomposition of every weight, about 0.2 s for 1024 x 1024. The model is left as it is.

        Returns:
            None until all layers are stable. Then the ranks by layer name, for `truncated_`, `ProjectEachEpoch` or
            `spectral`; layers that would not get smaller are left out, so that it may be empty.

        Raises:
            PatternError: a pattern matches no layer.
            TrainingError: a weight became NaN, or the layers are not those of the first call.
        """
        layers, _ = self.choose(model, Ratio(1.0), trainable_rank=True)
        full = {unit.name: rank for unit, rank in layers.items()}
        if self.history and full != self._state.full:
            raise TrainingError(
                f"the layers are {', '.join(full)}, and were {', '.join(self._state.full)} at the first look; "
                "make a new Switch for another model"
            )
        stable = {unit.name: weight_spectrum(unit, weight_of(unit, model)).stable_rank for unit in layers}
        first = self.history[0].stable if self.history else stable
        # a weight that starts from zero gives no scale
        scaled = {name: rank * (full[name] / first[name] if first[name] > 0 else 1.0) for name, rank in stable.items()}
        look = StableRanks(epoch=len(self.history), stable=stable, scaled=scaled)
        self._state = _State(full=full, history=(*self.history, look))
        recent = [look.stable for look in self.history[-self.patience - 1 :]]
        changes = [(before[name], now[name]) for before, now in pairwise(recent) for name in now]
        if len(recent) <= self.patience or any(abs(now - before) > self.epsilon * before for before, now in changes):
            return None
        ranks = {unit: min(full[unit.name], max(1, math.ceil(scaled[unit.name] - 1e-9))) for unit in layers}
        return {unit.name: rank for unit, rank in ranks.items() if shrinks(unit, rank)}

    def state_dict(self) -> dict[str, Any]:
        """What is needed to resume, in types that JSON has."""
        return self._state.model_dump(mode="json")

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Resume from the result of `state_dict`. Raises `TrainingError` for a damaged one; then nothing is changed."""
        try:
            self._state = _State.model_validate(dict(state_dict))
        except (TypeError, ValueError) as error:
            raise TrainingError(f"this is not the state of a Switch: {error}") from error
