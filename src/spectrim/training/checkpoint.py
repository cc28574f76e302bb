"""The state of a training run between two epochs, as one safetensors file: weights, optimiser, history."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from spectrim.files import Frozen, write_atomically
from spectrim.measure import Epoch
from spectrim.surgery import unique_tensors

_KEY = "spectrim-training"


class _Header(Frozen):
    run: str
    curve: tuple[Epoch, ...]


@dataclass(frozen=True)
class Checkpoint:
    """Where a run keeps its state.

    Attributes:
        path: The file.
        run: What identifies the run; a file of another run is not taken up.
    """

    path: Path
    run: str

    def save(self, model: nn.Module, optimiser: Optimizer, *, curve: Sequence[Epoch]) -> None:
        """Write the state after the last epoch of `curve`, wholly or not at all."""
        tensors = {f"model.{name}": tensor.cpu().contiguous() for name, tensor in unique_tensors(model)[0].items()}
        for index, state in optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{index}.{name}": value.cpu().contiguous() for name, value in state.items()}
        header = {_KEY: _Header(run=self.run, curve=tuple(curve)).model_dump_json()}
        write_atomically(self.path, lambda part: save_file(tensors, part, metadata=header))

    def restore(self, model: nn.Module, optimiser: Optimizer) -> tuple[Epoch, ...]:
        """Put the saved state into `model` and `optimiser`; the curve so far, empty when there is nothing to take up.

        A damaged file, or one of another run, is passed over: the work is done again.
        """
        try:
            with safe_open(self.path, framework="pt") as opened:
                header = _Header.model_validate_json((opened.metadata() or {}).get(_KEY, ""))
                # copies, since what safetensors gives may look into the file that the next save replaces
                tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, ValidationError):
            return ()
        if header.run != self.run or not self._fits(model, tensors):
            return ()
        for name, tensor in unique_tensors(model)[0].items():
            tensor.copy_(tensors[f"model.{name}"])
        groups = optimiser.state_dict()["param_groups"]
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimiser."):
                _, index, field = name.split(".", 2)
                state.setdefault(int(index), {})[field] = tensor
        optimiser.load_state_dict({"state": state, "param_groups": groups})
        return header.curve

    def _fits(self, model: nn.Module, tensors: dict[str, Tensor]) -> bool:
        wanted = {f"model.{name}": tensor.shape for name, tensor in unique_tensors(model)[0].items()}
        return wanted == {name: tensor.shape for name, tensor in tensors.items() if name.startswith("model.")}
