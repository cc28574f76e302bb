"""Nested and sparse tensors, in a network's forward pass, as its inputs and outputs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import spectrim as st
from spectrim.core.nested import extent, size_of

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


class Reader(nn.Module):
    """Classes from the last state of each text."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.hidden, self.last = nn.LSTM(8, 32), nn.Linear(32, 32), nn.Linear(32, 4)

    def forward(self, texts: PackedSequence) -> Tensor:
        return self.last(torch.relu(self.hidden(self.read(texts)[1][0][-1])))


def packed(seed: int) -> PackedSequence:
    generator = torch.Generator().manual_seed(seed)
    return pack_sequence([torch.randn(size, 8, generator=generator) for size in (5, 3, 4) * 5], enforce_sorted=False)


@pytest.mark.parametrize("labels", [False, True])
def test_packed_sequences_are_inputs_and_batches(labels: bool) -> None:
    torch.manual_seed(0)
    network = Reader()
    data = [(packed(seed), torch.arange(15) % 4) if labels else packed(seed) for seed in range(9)]
    compressed = st.compress(network, st.Budget(params=0.9), example_inputs=packed(0), data=data)
    assert compressed.plan.factored
    assert compressed.fidelity
    assert compressed.fidelity.samples == 9 * 15
    if labels:
        assert st.accuracy(compressed.model, data).total == 9 * 15
        assert len(st.finetune(compressed.model, data, epochs=1).history) == 1


def test_copies_of_packed_sequences_do_not_differ() -> None:
    alike = pack_sequence([torch.arange(24.0).reshape(3, 8)] * 4)
    with pytest.warns(UserWarning, match="8 times the same sample"):
        st.compress(Reader(), st.Rank(2), example_inputs=alike, data=[alike] * 2)


def test_ragged_samples_are_not_captured_and_not_repeated(tmp_path: Path) -> None:
    for export in (st.export_onnx, st.export_program):
        with pytest.raises(st.errors.ModelError, match="give a network that takes padded tensors"):
            export(Reader(), tmp_path / "written.onnx", packed(0))
    with pytest.raises(st.errors.DataError, match="have samples of one size to repeat"):
        st.measure(Reader(), packed(0), batch=4)


class MakesSparse(nn.Sequential):
    """Has sparse activations, and gives its input back as a sparse tensor."""

    def forward(self, x: Tensor) -> Any:
        hidden = torch.relu(self[0](x))
        mixed = torch.sparse.mm(hidden.to_sparse(), torch.eye(hidden.shape[1]))
        return self[2](torch.relu(self[1](mixed))), x.to_sparse()


@pytest.mark.parametrize("rule", [st.Rank(4), st.Budget(params=0.6)], ids=str)
def test_a_network_with_sparse_activations_and_outputs_is_compressed(rule: st.Rank | st.Budget) -> None:
    torch.manual_seed(0)
    network = MakesSparse(nn.Linear(32, 64), nn.Linear(64, 64), nn.Linear(64, 8)).eval()
    x = torch.randn(64, 32)
    for data in (None, x.split(16)):
        result = st.compress(network, rule, example_inputs=x[:4], data=data)
        assert result.plan.factored
        assert (result.fidelity is None) == (data is None)


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_bytes_are_those_that_tensors_are_stored_in() -> None:
    dense = torch.zeros(100, 100)
    dense[3, 4] = 1
    assert size_of([dense, (dense.to_sparse(), {"a": dense.to_sparse_csr()})]) == 40_000 + (16 + 4) + (808 + 8 + 4)
    assert extent(dense.to_sparse()) == extent(dense[0]) == range(0)
    assert len(extent(dense[2:4, :3])) == 4 * 103
