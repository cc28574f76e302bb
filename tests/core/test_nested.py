"""Nested tensors, in a network's forward pass and as its inputs."""

import pytest
import torch
from torch import Tensor, nn

import spectrim as st

pytestmark = pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype stage")
LAYOUTS = [torch.jagged, torch.strided]


class Ragged(nn.Module):
    """Runs two layers on texts of different lengths at once."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return torch.nested.to_padded_tensor(self.down(torch.relu(self.up(x))), 0.0)


class MakesRagged(Ragged):
    def __init__(self, layout: torch.layout) -> None:
        super().__init__()
        self.layout = layout

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(ragged(x, layout=self.layout))


def ragged(x: Tensor, *, layout: torch.layout) -> Tensor:
    return torch.nested.nested_tensor([x[0], *(text[:3] for text in x[1:])], layout=layout)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("as_input", [False, True])
def test_a_network_of_nested_tensors_is_compressed(layout: torch.layout, as_input: bool) -> None:
    torch.manual_seed(0)
    network = (Ragged() if as_input else MakesRagged(layout)).eval()
    data = [torch.randn(8, 5, 16) for _ in range(16)]
    data = [ragged(x, layout=layout) for x in data] if as_input else data
    compressed = st.compress(network, st.Budget(params=0.6), example_inputs=data[0], data=data)
    assert {layer.metric for layer in compressed.plan.factored} == {"loss"}
    assert compressed.fidelity
    assert compressed.fidelity.relative_error < 0.7


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_macs_of_nested_tensors_are_counted_or_named_as_not_counted(layout: torch.layout) -> None:
    measured = st.measure(MakesRagged(layout).eval(), torch.randn(8, 5, 16), latency=False)
    assert measured.macs == (2 * 16 * 32 * (5 + 7 * 3) if layout == torch.jagged else 0)
    assert measured.uncounted_weights == (None if layout == torch.jagged else ("aten::linear",))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_message_names_the_parts(layout: torch.layout) -> None:
    with pytest.raises(st.errors.ModelError, match=r"nested list\(float32 \[5, 9\], float32 \[3, 9\]\)"):
        st.analyze(Ragged(), ragged(torch.randn(2, 5, 9), layout=layout))
