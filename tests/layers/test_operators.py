"""Multiply-accumulates of single operators against products worked out by hand."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pack_padded_sequence

import spectrim as st
from spectrim.layers.cost import count

B, T, D, H = 2, 7, 16, 8
X, IMAGE = torch.randn(B, T, D), torch.randn(B, 4, 9, 10)
QUERY, KEY, WIDE = torch.randn(B, 4, T, H), torch.randn(B, 2, T, H), torch.randn(B, 4, T, D)


class Calls(nn.Module):
    """A function of its inputs as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Any) -> Any:
        return self.function(*inputs)


def recurrent(
    kind: type[nn.RNNBase], gates: int, *, layers: int = 1, both: bool = False
) -> tuple[nn.Module, Tensor, int]:
    model = kind(D, H, num_layers=layers, bidirectional=both, batch_first=True)
    ways = 2 if both else 1
    later = (layers - 1) * (ways * H + H)
    return model, X, B * T * ways * gates * H * (D + H + later)


def attention(query: Tensor, key: Tensor, **options: Any) -> Tensor:
    return functional.scaled_dot_product_attention(query, key, key, **options)


SCORES = B * 4 * T * T
LAYERS = {
    "linear": (nn.Linear(D, 5), X, B * T * D * 5),
    "linear without bias": (nn.Linear(D, 5, bias=False), X, B * T * D * 5),
    "bilinear": (nn.Bilinear(D, D, 3), (X, X), B * T * 3 * D * D),
    "conv1d": (nn.Conv1d(T, 6, 3), X, B * 14 * 6 * T * 3),
    "conv1d, dilated, strided": (nn.Conv1d(T, 6, 3, stride=2, dilation=2), X, B * 6 * 6 * T * 3),
    "conv2d": (nn.Conv2d(4, 6, 3), IMAGE, B * 7 * 8 * 6 * 4 * 9),
    "conv2d, padded": (nn.Conv2d(4, 6, 3, padding="same"), IMAGE, B * 9 * 10 * 6 * 4 * 9),
    "conv2d, reflected": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), IMAGE, B * 9 * 10 * 6 * 4 * 9),
    "conv2d, grouped": (nn.Conv2d(4, 6, 3, groups=2), IMAGE, B * 7 * 8 * 6 * 2 * 9),
    "conv2d, depthwise": (nn.Conv2d(4, 8, 3, groups=4), IMAGE, B * 7 * 8 * 8 * 9),
    "conv3d": (nn.Conv3d(2, 3, 2), torch.randn(1, 2, 4, 5, 6), 3 * 4 * 5 * 3 * 2 * 8),
    "transposed conv1d": (nn.ConvTranspose1d(T, 6, 3), X, B * D * 6 * T * 3),
    "transposed conv2d": (nn.ConvTranspose2d(4, 6, 2, stride=2), IMAGE, B * 9 * 10 * 6 * 4 * 4),
    "transposed conv3d": (nn.ConvTranspose3d(2, 3, 2), torch.randn(1, 2, 4, 5, 6), 4 * 5 * 6 * 3 * 2 * 8),
    "LSTM": recurrent(nn.LSTM, 4),
    "LSTM, two layers": recurrent(nn.LSTM, 4, layers=2),
    "LSTM, both ways": recurrent(nn.LSTM, 4, both=True),
    "LSTM, two layers, both ways": recurrent(nn.LSTM, 4, layers=2, both=True),
    "GRU": recurrent(nn.GRU, 3),
    "GRU, two layers, both ways": recurrent(nn.GRU, 3, layers=2, both=True),
    "RNN": recurrent(nn.RNN, 1),
    "RNN, two layers, both ways": recurrent(nn.RNN, 1, layers=2, both=True),
    "LSTM cell": (nn.LSTMCell(D, H), X[0], T * 4 * H * (D + H)),
    "GRU cell": (nn.GRUCell(D, H), X[0], T * 3 * H * (D + H)),
    "RNN cell": (nn.RNNCell(D, H), X[0], T * H * (D + H)),
    "multi-head attention": (nn.MultiheadAttention(D, 2, batch_first=True), (X, X, X), B * T * D * (4 * D + 2 * T)),
    "encoder layer": (
        nn.TransformerEncoderLayer(D, 2, 32, batch_first=True),
        X,
        B * T * D * (4 * D + 2 * T + 2 * 32),
    ),
    "embedding": (nn.Embedding(10, D), torch.zeros(B, T, dtype=torch.long), 0),
    "bag of embeddings": (nn.EmbeddingBag(10, D), torch.zeros(B, T, dtype=torch.long), 0),
    "attention": (Calls(lambda query: attention(query, query)), WIDE, 2 * SCORES * D),
    "causal attention": (Calls(lambda query: attention(query, query, is_causal=True)), WIDE, 2 * SCORES * D),
    "masked attention": (Calls(lambda q: attention(q, q, attn_mask=torch.zeros(T, T))), WIDE, 2 * SCORES * D),
    "attention in float64": (Calls(lambda query: attention(query, query)), WIDE.double(), 2 * SCORES * D),
    "grouped attention": (Calls(lambda q, k: attention(q, k, enable_gqa=True)), (QUERY, KEY), 2 * SCORES * H),
    "matmul": (Calls(lambda x: x @ x.mT), X, B * T * T * D),
    "matrix and vector": (Calls(lambda x: x[0] @ x[0, 0]), X, T * D),
    "vectors": (Calls(lambda x: x[0, 0] @ x[0, 0]), X, D),
    "einsum of two": (Calls(lambda x: torch.einsum("btd,bsd->bts", x, x)), X, B * T * T * D),
    "einsum over a batch": (Calls(lambda x: torch.einsum("btd,bsd->ts", x, x)), X, B * T * T * D),
    "bmm": (Calls(lambda x: torch.bmm(x, x.mT)), X, B * T * T * D),
    "baddbmm": (Calls(lambda x: torch.baddbmm(x.new_zeros(B, T, T), x, x.mT)), X, B * T * T * D),
    "addbmm": (Calls(lambda x: torch.addbmm(x.new_zeros(T, T), x, x.mT)), X, B * T * T * D),
    "addmm": (Calls(lambda x: torch.addmm(x.new_zeros(T, T), x[0], x[1].T)), X, T * T * D),
    "addmv": (Calls(lambda x: torch.addmv(x.new_zeros(T), x[0], x[0, 0])), X, T * D),
    "tensordot": (Calls(lambda x: torch.tensordot(x, x, dims=([2], [2]))), X, (B * T) ** 2 * D),
    "element by element": (Calls(lambda x: (x * x + x).softmax(-1).cumsum(1)), X, 0),
    "norm": (nn.LayerNorm(D), X, 0),
    "pooling": (nn.AvgPool2d(3), IMAGE, 0),
}


@pytest.mark.parametrize("name", LAYERS)
def test_products_are_those_worked_out_by_hand(name: str) -> None:
    model, inputs, macs = LAYERS[name]
    cost = count(model.eval(), inputs)
    assert (cost.macs, cost.uncounted) == (macs, None)


def test_packed_sequences_count_their_own_steps() -> None:
    packed = pack_padded_sequence(X, [T, 3], batch_first=True)
    assert count(nn.LSTM(D, H, batch_first=True), (packed,)).macs == (T + 3) * 4 * H * (D + H)


def test_a_deformable_convolution_counts_as_a_convolution() -> None:
    ops = pytest.importorskip("torchvision.ops")
    layer, offset = ops.DeformConv2d(4, 6, 3), torch.zeros(B, 18, 7, 8)
    assert count(layer, (IMAGE, offset)).macs == B * 7 * 8 * 6 * 4 * 9


def test_operators_of_unknown_cost_are_named() -> None:
    assert count(Calls(lambda x: torch.fft.rfft(x).abs() @ x.new_ones(9, 2)), X).uncounted == ("aten::_fft_r2c",)
    assert count(Calls(lambda x: torch.linalg.inv(x @ x.mT + torch.eye(T))), X).uncounted == ("aten::linalg_inv_ex",)
    ops = pytest.importorskip("torchvision.ops")
    boxes = torch.tensor([[0.0, 0.0, 4.0, 4.0]])
    assert count(Calls(lambda x: ops.roi_align(x, [boxes, boxes], 2)), IMAGE).uncounted == ("torchvision::roi_align",)


class Relative(nn.Module):
    """Gives a layer a part of a table of its own, as relative positions are."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(9, D))
        self.fc, self.key = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) @ self.key(self.table[:T]).mT


def test_a_layer_may_be_given_a_part_of_a_parameter() -> None:
    model = Relative().eval()
    assert count(model, X).macs == B * T * D * D + T * D * D + B * T * T * D
    assert st.compress(model, st.Rank(2), example_inputs=X).plan.factored


class Solves(nn.Module):
    """Multiplies a weight by an operator that is not counted."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.eye(D))
        self.fc = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x @ torch.linalg.inv(self.matrix))


def test_a_budget_of_macs_that_are_not_known_is_refused() -> None:
    model = Solves().eval()
    assert count(model, X).uncounted_weights == ("aten::linalg_inv_ex",)
    with pytest.raises(st.errors.RuleError, match=r"MACs.*not known, since aten::linalg_inv_ex.*limit params="):
        st.compress(model, st.Budget(macs=0.7), example_inputs=X)
    assert st.compress(model, st.Budget(params=0.7), example_inputs=X).plan.factored
    assert "aten::linalg_inv_ex" in st.text(st.measure(model, X, latency=False))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["LSTM", "LSTM, two layers, both ways", "GRU", "RNN", "attention", "bilinear"])
def test_products_are_the_same_on_a_gpu(name: str) -> None:
    model, inputs, macs = LAYERS[name]
    there = tuple(x.cuda() for x in inputs) if isinstance(inputs, tuple) else inputs.cuda()
    assert count(copy.deepcopy(model).cuda().eval(), there).macs == macs
