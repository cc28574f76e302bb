"""Masks: what is padded to a common length gives the statistics and the network of what is not."""

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spectrim as st
from spectrim.core.errors import DataError
from spectrim.core.execution import Inputs
from spectrim.layers.tokens import TokenMasks

LENGTHS = (3, 9, 5, 7, 2, 9, 4, 6, 8, 3, 5, 9)


class Encoder(nn.Module):
    """Two layers of attention over embedded tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.query, self.key, self.value = (nn.Linear(16, 16) for _ in range(3))
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, tokens: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embed(tokens)
        heads = [part(x).unsqueeze(1) for part in (self.query, self.key, self.value)]
        mask = attention_mask[:, None, None].bool()
        x = x + nn.functional.scaled_dot_product_attention(*heads, attn_mask=mask).squeeze(1)
        return x + self.down(torch.relu(self.up(x)))


def texts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, 50, (length,), generator=generator) for length in LENGTHS * 4]


def padded(*, left: bool = False, size: int = 12, padding: int = 0) -> Iterator[dict[str, Tensor]]:
    """Batches of texts of a common length, with their mask."""
    side = "left" if left else "right"
    for start in range(0, len(texts()), size):
        part = texts()[start : start + size]
        pad = nn.utils.rnn.pad_sequence
        yield {
            "tokens": pad(part, batch_first=True, padding_value=padding, padding_side=side),
            "attention_mask": pad([torch.ones_like(text) for text in part], batch_first=True, padding_side=side),
        }


def alone() -> list[dict[str, Tensor]]:
    return [{"tokens": text[None], "attention_mask": torch.ones_like(text)[None]} for text in texts()]


def close(first: Any, second: Any) -> bool:
    return bool(torch.allclose(first, second, rtol=1e-6, atol=1e-6 * float(second.abs().max())))


class TestStatistics:
    @pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
    @pytest.mark.parametrize("positions", [None, 3], ids=str)
    def test_padding_changes_nothing(self, left: bool, positions: int | None) -> None:
        model = Encoder().eval()
        expected = st.calibrate(model, alone(), positions=positions)
        seen = st.calibrate(model, padded(left=left), positions=positions)
        for name, moments in expected.moments.items():
            other = seen.moments[name]
            assert (other.count, other.samples) == (moments.count, moments.samples)
            assert close(other.mean, moments.mean)
            assert close(other.covariance, moments.covariance)

    @pytest.mark.parametrize(("shape", "looked_at"), [((2, 300, 8), 300), ((2, 600, 8), 512), ((2, 20, 30, 8), 64)])
    def test_tokens_are_looked_at_one_by_one_and_maps_by_some(self, shape: tuple[int, ...], looked_at: int) -> None:
        """Neighbours in a map tell nearly the same, and 64 tokens of a long text are too few for a wide layer."""
        moments = st.calibrate(nn.Sequential(nn.Linear(8, 8)), [torch.randn(shape)]).moments["0"]
        assert moments.count == 2 * looked_at

    def test_more_padding_changes_nothing(self) -> None:
        model = Encoder().eval()
        wide = [{name: nn.functional.pad(tensor, (0, 5)) for name, tensor in batch.items()} for batch in padded()]
        expected, seen = st.calibrate(model, padded(), gradients=True), st.calibrate(model, wide, gradients=True)
        for name, moments in expected.moments.items():
            assert close(seen.moments[name].covariance, moments.covariance)
            assert abs(seen.moments[name].shrinkage - moments.shrinkage) < 1e-6

    def test_what_lies_in_the_padding_is_not_seen(self) -> None:
        model = Encoder().eval()
        first, second = (st.calibrate(model, padded(padding=value)) for value in (0, 7))
        assert all(torch.equal(first.moments[n].covariance, second.moments[n].covariance) for n in first.moments)

    def test_gradients_are_those_of_tokens(self) -> None:
        model = Encoder().eval()
        first, second = (st.calibrate(model, padded(padding=value), gradients=True) for value in (0, 7))
        for name, moments in first.moments.items():
            assert close(second.moments[name].output_grad_covariance, moments.output_grad_covariance)

    def test_a_mask_of_ones_is_none(self) -> None:
        model = Encoder().eval()
        batches = [{"tokens": torch.randint(1, 50, (8, 6)), "attention_mask": torch.ones(8, 6)} for _ in range(2)]
        with_mask = st.calibrate(model, batches)
        without = st.calibrate(model, batches, mask="tokens")  # all of which are nonzero
        assert all(
            torch.equal(with_mask.moments[n].covariance, without.moments[n].covariance) for n in with_mask.moments
        )

    def test_flattened_tokens_are_found(self) -> None:
        class Flat(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = nn.Linear(4, 6)

            def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
                return self.inner(x.flatten(0, 1)).unflatten(0, x.shape[:2])

        x, mask = torch.randn(5, 7, 4), torch.rand(5, 7) > 0.4
        moments = st.calibrate(Flat(), [{"x": x, "attention_mask": mask}]).moments["inner"]
        assert moments.count == int(mask.sum())
        assert close(moments.mean[0], x[mask].double().mean(dim=0))


def test_both_orders_in_one_network() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.inside, self.lstm = nn.Linear(4, 6), nn.Linear(6, 6), nn.LSTM(6, 5)

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return self.lstm(self.inside(self.before(x).transpose(0, 1)))[0]

    x, mask = torch.randn(5, 7, 4), torch.arange(7) < torch.tensor([[2], [7], [3], [5], [1]])
    moments = st.calibrate(Mixed(), [{"x": x, "attention_mask": mask}]).moments
    assert moments["before"].count == moments["inside"].count == int(mask.sum())


@pytest.mark.parametrize("batch_first", [True, False])
def test_torch_says_where_padding_is(batch_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first, dropout=0.0)
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()
    x, padding = torch.randn(6, 7, 8), torch.arange(7) >= torch.tensor([[2], [6], [3], [5], [1], [4]])
    batch = {"src": x if batch_first else x.transpose(0, 1), "src_key_padding_mask": padding}
    moments = st.calibrate(model, [batch]).moments["layers.0.linear1"]
    first = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
    singles = [{"src": part[None, :size]} for part, size in zip(x, (2, 6, 3, 5, 1, 4), strict=True)]
    if not batch_first:
        singles = [{"src": single["src"].transpose(0, 1)} for single in singles]
    first.load_state_dict(model.state_dict())
    expected = st.calibrate(first, singles).moments["layers.0.linear1"]
    assert moments.count == expected.count == 21
    assert close(moments.covariance, expected.covariance)


@pytest.mark.parametrize("rule", [st.Rank(6), st.Budget(macs=0.6)], ids=["rank", "budget"])
def test_a_network_is_the_same_whatever_the_padding_holds(rule: Any) -> None:
    model, example = Encoder().eval(), next(padded())
    small = [
        st.compress(model, rule, example_inputs=example, data=list(padded(padding=value)), reconstruct=True)
        for value in (0, 7)
    ]
    states = [result.model.state_dict() for result in small]
    assert small[0].plan == small[1].plan
    assert all(close(states[0][name], states[1][name]) for name in states[0])
    assert small[0].fidelity is not None
    assert small[1].fidelity is not None
    assert abs(small[0].fidelity.relative_error - small[1].fidelity.relative_error) < 1e-5


def test_batches_of_several_lengths_are_compared() -> None:
    model, example = Encoder().eval(), next(padded())
    result = st.compress(model, st.Rank(12), example_inputs=example, data=alone())
    assert result.fidelity is not None


def test_a_mask_of_ones_own(recwarn: Any) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Encoder()

        def forward(self, tokens: Tensor, real: Tensor) -> Tensor:
            return self.inner(tokens, real)

    batches = [{"tokens": batch["tokens"], "real": batch["attention_mask"]} for batch in padded()]
    named, usual = Named().eval(), st.calibrate
    expected = usual(named.inner, padded())
    seen = usual(named, batches, mask="real")
    assert all(
        torch.equal(seen.moments[f"inner.{name}"].covariance, moments.covariance)
        for name, moments in expected.moments.items()
    )
    with pytest.raises(DataError, match="have no entry of this name"):
        st.compress(named, st.Rank(2), example_inputs=batches[0], data=batches, mask="reel")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert st.compress(named, st.Rank(8), example_inputs=batches[0], data=batches, mask="real").plan


def test_an_order_that_cannot_be_told_is_said() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0)
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()
    padding = torch.arange(6) >= torch.tensor([[2], [6], [3], [5], [1], [4]])
    with pytest.warns(UserWarning, match="which of two orders cannot be told"):
        st.calibrate(model, [{"src": torch.randn(6, 6, 8), "src_key_padding_mask": padding}])


def test_time_first_without_saying_so() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = nn.Linear(4, 4)

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return self.inside(x.transpose(0, 1))

    mask = torch.arange(7) < torch.tensor([[2], [7], [3]])
    assert st.calibrate(Turned(), [{"x": torch.randn(3, 7, 4), "attention_mask": mask}]).moments["inside"].count == 12


def test_masks_of_other_kinds_leave_nothing_out() -> None:
    model = nn.Identity()
    for mask in (torch.ones(5, 5).tril(), torch.zeros(5, 7), torch.ones(5, 7).bool()):
        places = TokenMasks.of(model, Inputs((), {"attention_mask": mask})).places((5, 7 if len(mask.T) == 7 else 5, 2))
        assert places is None or len(places.index) == mask.numel()


def test_encoder_and_decoder_have_masks_of_their_own() -> None:
    first, second = torch.arange(4) < torch.tensor([[2], [4]]), torch.arange(5) < torch.tensor([[5], [1]])
    inputs = Inputs((), {"attention_mask": first, "decoder_attention_mask": second.long()})
    masks = TokenMasks.of(nn.Identity(), inputs)
    assert masks.places((2, 4, 8)).sizes == [2, 4]  # type: ignore[union-attr]
    assert masks.places((2, 5, 8)).sizes == [5, 1]  # type: ignore[union-attr]
    assert masks.places((2, 6, 8)) is None
    additive = torch.where(first, 0.0, -torch.inf)
    assert TokenMasks.of(nn.Identity(), Inputs((), {"attention_mask": additive})).places((2, 4, 8)).sizes == [2, 4]  # type: ignore[union-attr]
