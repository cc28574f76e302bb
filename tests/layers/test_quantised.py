"""Networks with quantised weights, before and after they are factored: counted, or refused by name."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spectrim as st
from spectrim import errors

X = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))


class Int8(Tensor):
    """A float32 tensor to those who ask, int8 values and a scale inside, as packages for quantisation make them."""

    values: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, values: Tensor, scale: Tensor) -> "Int8":
        return Tensor._make_wrapper_subclass(cls, values.shape, dtype=torch.float32)  # type: ignore[attr-defined,no-any-return]

    def __init__(self, values: Tensor, scale: Tensor) -> None:
        self.values, self.scale = values, scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["values", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *_: Any) -> "Int8":
        return Int8(inner["values"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operator in (torch.ops.aten.detach.default, torch.ops.aten.alias.default, torch.ops.aten.clone.default):
            return Int8(args[0].values, args[0].scale)
        if operator in (torch.ops.aten.t.default, torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            plain = [arg.values.float() * arg.scale if isinstance(arg, Int8) else arg for arg in args]
            return operator(*plain)
        raise NotImplementedError(f"Int8 does not know {operator}")


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)).eval()


def quantised(model: nn.Module, *, but: str = "") -> nn.Module:
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and name != but:
            scale = layer.weight.detach().abs().max() / 127
            values = (layer.weight.detach() / scale).round().to(torch.int8)
            layer.weight = nn.Parameter(Int8(values, scale), requires_grad=False)
    return model


def dynamic(model: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)  # type: ignore[no-any-return]


def test_layers_with_quantised_tensors_stay_as_they_are_and_the_others_are_factored() -> None:
    model = quantised(mlp(), but="2")
    small = st.compress(model, st.Rank(8), example_inputs=X, data=[X])
    assert [layer.is_factored for layer in small.plan] == [False, True, False]
    assert "its weight is not an ordinary floating-point parameter (Int8 float32 on cpu)" in small.plan["0"].reason
    with pytest.warns(UserWarning, match="no layer of this network can be factored"):
        st.compress(quantised(mlp()), st.Rank(8), example_inputs=X)


def test_quantised_factors_are_counted_in_what_they_are_stored_in() -> None:
    small = st.compress(mlp(), st.Rank(8), example_inputs=X).model
    before = st.measure(small, X, latency=False)
    after = st.measure(quantised(small), X, latency=False)
    assert after.params == before.params
    assert after.macs == before.macs
    weights = sum(layer.weight.numel() for layer in small.modules() if isinstance(layer, nn.Linear))
    assert before.bytes - after.bytes == pytest.approx(3 * weights, abs=2000)


def test_layers_of_torch_with_packed_weights_are_measured_and_not_compressed() -> None:
    small = dynamic(st.compress(mlp(), st.Rank(8), example_inputs=X).model)
    dense = st.measure(mlp(), X, latency=False)
    measured = st.measure(small, X, latency=False)
    assert 0 < measured.params < dense.params
    assert measured.bytes < dense.bytes / 4
    assert measured.uncounted is not None
    assert any("quantized" in name for name in measured.uncounted)
    with pytest.raises(errors.ModelError, match="compress the model first and quantise it afterwards"):
        st.compress(dynamic(mlp()), st.Rank(8), example_inputs=X)


def test_files_and_merging_refuse_quantised_tensors_by_name(tmp_path: Path) -> None:
    small = st.compress(mlp(), st.Rank(8), example_inputs=X).model
    with pytest.raises(errors.ModelError, match=r"0\.down\.weight is a Int8, which a safetensors file cannot hold"):
        st.save(quantised(small), tmp_path / "q.safetensors")
    with pytest.raises(errors.ModelError, match=r"the factors of 0 are quantised or distributed \(Int8\)"):
        st.merge(small)
    packed = dynamic(st.compress(mlp(), st.Rank(8), example_inputs=X).model)
    with pytest.raises(errors.ModelError, match="the factors of 0 are quantised"):
        st.merge(packed)
    with pytest.raises(errors.ModelError, match="cannot be saved"):
        st.save(packed, tmp_path / "q.safetensors")
    assert not list(tmp_path.iterdir())
