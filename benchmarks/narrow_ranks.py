"""What rank 20 can give in ONNX Runtime at batch 64, and what bounds it.

    python benchmarks/narrow_ranks.py        # three minutes, nothing else running

The 784-1024x5-10 network with every layer but the last at ranks 16 to 64 is timed against its dense self in interleaved
pairs and one thread, laid out in two ways:

- as exported: a factor to r features computes whole vectors, with AVX-512 32 columns for rank 20;
- batch last: activations (features, batch), so that the batch fills the vectors and r counts in rows.

Efficiency is the measured speed-up over that of the MACs. The last line holds the speed-up that an efficiency of 0.95
asks of rank 20 against that of rank 16, which has a fifth fewer MACs and full vectors.
"""

import sys

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import spectrim as st
from spectrim.layers.factored import low_rank_layers
from spectrim.models import mlp

BATCH, BAR, ROUNDS = 64, 0.95, 101
RANKS, NARROW, FULL = (16, 20, 32, 48, 64), 20, 16


class BatchLast(nn.Module):
    """The same network on activations (features, batch): every layer and factor multiplies from the left."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        factored = low_rank_layers(model)
        named = [(name, layer) for name, layer in model.named_children() if name in factored or hasattr(layer, "bias")]
        self.layers = nn.ModuleList(
            nn.ModuleList(factored[name].chain if name in factored else [layer]) for name, layer in named
        )

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 784) -> (batch, 10)."""
        x = x.T
        for at, chain in enumerate(self.layers):
            x = x.relu() if at else x
            for part in chain:
                x = part.weight @ x if part.bias is None else torch.addmm(part.bias[:, None], part.weight, x)
        return x.T


def main() -> None:
    """Every rank in both layouts."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    dense, x = mlp().eval(), torch.randn(BATCH, 784)
    table = Table("rank", "layout", "ms", "speed-up", "MACs", "efficiency", "")
    speedups: dict[int, float] = {}
    asked = 0.0
    for rank in RANKS:
        small = st.compress(dense, st.Rank(rank), example_inputs=x, exclude=("head",)).model.eval()
        other = BatchLast(small).eval()
        torch.testing.assert_close(other(x), small(x), rtol=1e-4, atol=1e-4)
        promised = st.measure(small, x, reference=dense, latency=False).macs_speedup or 1.0
        asked = BAR * promised if rank == NARROW else asked
        for layout, model in (("as exported", small), ("batch last", other)):
            measured = st.measure(model, x, reference=dense, runtime="onnxruntime", rounds=ROUNDS)
            if measured.speedup is None or measured.latency_ms is None:
                raise SystemExit("not timed")
            speedups[rank] = max(speedups.get(rank, 0.0), measured.speedup.value)
            speedup = measured.speedup
            low, value, high = (figure / promised for figure in (speedup.low, speedup.value, speedup.high))
            noisy = measured.verdict if measured.verdict == "too noisy to tell" else "PASS" if value >= BAR else "MISS"
            figures = (f"{measured.latency_ms:.3f}", f"{measured.speedup.value:.2f}", f"{promised:.2f}")
            table.add_row(str(rank), layout, *figures, f"{value:.3f} [{low:.3f}, {high:.3f}]", noisy)
    console = Console(width=120, highlight=False)
    console.print(table)
    console.print(
        f"An efficiency of {BAR} at rank {NARROW} is a speed-up of {asked:.2f}; rank {FULL} reaches "
        f"{speedups[FULL]:.2f} in the faster layout."
    )
    sys.exit(0 if speedups[NARROW] >= asked else 1)


if __name__ == "__main__":
    main()
