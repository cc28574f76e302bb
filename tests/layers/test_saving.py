"""Saving and loading: nothing lost, nothing trusted, nothing half-written."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Double, SharedModule, Tied, WordModel, inputs, same_state, small_mlp, state
from safetensors.torch import save_file, save_model
from torch import nn

import spectrim as st
from spectrim import errors
from spectrim.models.weights import fill_, read_state

X = inputs(7, 12)


def compressed() -> nn.Module:
    return st.compress(small_mlp(), st.Rank(3), example_inputs=X, data=[X], keep_last=True).model


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_types_survive_and_outputs_are_bit_equal(tmp_path: Path, dtype: torch.dtype) -> None:
    x = X.to(dtype)
    model = st.compress(small_mlp(dtype=dtype), st.Rank(3), example_inputs=x, data=[x], keep_last=True).model
    loaded = st.load(st.save(model, tmp_path / "m.safetensors"), small_mlp(dtype=torch.float32))
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))
    assert same_state(loaded, state(model))


@pytest.mark.parametrize("build", [Double, Tied, SharedModule], ids=lambda build: build.__name__)
def test_ties_survive(tmp_path: Path, build: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = build()
    x = inputs(4, next(model.parameters()).shape[1], dtype=torch.float32)
    small = st.compress(model, st.Rank(2), example_inputs=x).model
    loaded = st.load(st.save(small, tmp_path), build())
    assert len(list(loaded.parameters())) == len(list(small.parameters()))
    assert {id(p) for p in loaded.parameters()}.isdisjoint({id(p) for p in small.parameters()})
    with torch.no_grad():
        assert torch.equal(loaded(x), model.eval() and small(x))


def test_a_tied_embedding_survives(tmp_path: Path) -> None:
    tokens = torch.arange(5)
    small = st.compress(WordModel(), st.Rank(2), example_inputs=tokens).model
    loaded = st.load(st.save(small, tmp_path), WordModel())
    assert loaded.out.weight is loaded.embed.weight


def test_buffers_and_dense_models_are_saved_too(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).double()
    model(inputs(9, 4))
    loaded = st.load(st.save(model, tmp_path), nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    assert same_state(loaded, state(model))


def test_loading_leaves_the_given_model_alone_and_keeps_its_modes(tmp_path: Path) -> None:
    path = st.save(compressed(), tmp_path)
    dense = small_mlp().eval()
    dense[0].weight.requires_grad_(False)
    before = state(dense)
    loaded = st.load(path, dense)
    assert same_state(dense, before)
    assert not loaded.training
    assert not loaded[0].training
    assert not loaded[0].down.weight.requires_grad
    assert loaded[2].down.weight.requires_grad


def test_equal_models_give_equal_files(tmp_path: Path) -> None:
    files = {st.save(compressed(), tmp_path / f"{number}.safetensors").read_bytes() for number in range(8)}
    assert len(files) == 1


def test_a_folder_stands_for_the_file_in_it(tmp_path: Path) -> None:
    assert st.save(compressed(), tmp_path) == tmp_path / "model.safetensors"
    st.load(tmp_path, small_mlp())


def test_saving_again_needs_no_memory_of_the_old_file(tmp_path: Path) -> None:
    path = st.save(compressed(), tmp_path)
    loaded = st.load(path, small_mlp())
    with torch.no_grad():
        before = loaded(X)
        st.save(small_mlp(), path)
        assert torch.equal(loaded(X), before)


def test_a_factor_that_is_no_ordinary_layer(tmp_path: Path) -> None:
    model = compressed()
    model[0].up = nn.Sequential(model[0].up)  # as adapters wrap it
    with pytest.raises(errors.ModelError, match="merge adapters first"):
        st.save(model, tmp_path)
    model = compressed()
    model[0].up.weight = nn.Parameter(torch.empty(0))  # as DeepSpeed leaves it
    with pytest.raises(errors.ModelError, match="whole weights"):
        st.save(model, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_plain_state_goes_into_a_copy(tmp_path: Path, suffix: str) -> None:
    model, trained = nn.Linear(12, 3), nn.Linear(12, 3)
    before = state(model)
    write = save_file if suffix == ".safetensors" else torch.save
    write(trained.state_dict(), tmp_path / f"w{suffix}")
    assert same_state(st.load(tmp_path / f"w{suffix}", model), state(trained))
    assert same_state(model, before)


def test_a_name_without_a_suffix_is_a_folder(tmp_path: Path) -> None:
    assert st.save(small_mlp(), tmp_path / "small") == tmp_path / "small" / "model.safetensors"
    assert same_state(st.load(tmp_path / "small", small_mlp()), state(small_mlp()))


class TestDamage:
    def test_a_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(errors.FileError, match="missing"):
            st.load(tmp_path / "none.safetensors", small_mlp())

    @pytest.mark.parametrize("keep", [0, 4, 100, -1], ids=str)
    def test_a_truncated_file(self, tmp_path: Path, keep: int) -> None:
        path = st.save(compressed(), tmp_path)
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(errors.FileError, match="cut short"):
            st.load(path, small_mlp())

    def test_a_changed_weight(self, tmp_path: Path) -> None:
        path = st.save(compressed(), tmp_path)
        content = bytearray(path.read_bytes())
        content[-3] ^= 1
        path.write_bytes(content)
        with pytest.raises(errors.FileError, match="checksum"):
            st.load(path, small_mlp())

    def test_an_edited_header(self, tmp_path: Path) -> None:
        path = st.save(compressed(), tmp_path)
        content = path.read_bytes()
        size = struct.unpack("<Q", content[:8])[0]
        header = json.loads(content[8 : 8 + size])
        structure = json.loads(header["__metadata__"]["spectrim"])
        structure["low_rank"]["0"]["rank"] = "many"
        header["__metadata__"]["spectrim"] = json.dumps(structure)
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])
        with pytest.raises(errors.FileError, match=r"low_rank\.0\.rank"):
            st.load(path, small_mlp())

    def test_a_file_of_somebody_else(self, tmp_path: Path) -> None:
        save_file({"a": torch.zeros(2)}, tmp_path / "a.safetensors")
        with pytest.raises(errors.FileError, match="for another network: 6 missing"):
            st.load(tmp_path / "a.safetensors", small_mlp())

    @pytest.mark.parametrize(
        "other",
        [
            nn.Sequential(nn.Linear(12, 9)),
            nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 5)),
            nn.Sequential(
                nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4), nn.Linear(4, 4)
            ),
        ],
        ids=["other shape", "other head", "more layers"],
    )
    def test_another_network(self, tmp_path: Path, other: nn.Module) -> None:
        before = state(other)
        with pytest.raises(errors.FileError, match="for another network"):
            st.load(st.save(compressed(), tmp_path), other)
        assert same_state(other, before)

    def test_a_folder_that_is_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("x")
        with pytest.raises(errors.FileError, match="cannot write"):
            st.save(compressed(), tmp_path / "file" / "m.safetensors")
        assert (tmp_path / "file").read_text() == "x"

    def test_a_failed_write_leaves_the_old_file_and_no_part(self, tmp_path: Path) -> None:
        path = st.save(compressed(), tmp_path)
        old = path.read_bytes()
        model = compressed()
        model.register_buffer("strange", torch.zeros(2, device="meta"))
        with pytest.raises(errors.ModelError, match="strange"):
            st.save(model, path)
        assert path.read_bytes() == old
        assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_the_reported_size_is_that_of_the_file(tmp_path: Path) -> None:
    model = compressed()
    save_model(model, str(tmp_path / "plain.safetensors"))
    plain = (tmp_path / "plain.safetensors").stat().st_size
    assert abs(st.measure(model, X, latency=False).bytes - plain) <= 64


def test_a_layer_that_is_used_in_another_way_is_another_network(tmp_path: Path) -> None:
    def cnn(stride: int) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(8, 16, 3, stride=stride), nn.ReLU(), nn.Conv2d(16, 16, 3)).eval()

    x = inputs(2, 8, 12, 12, dtype=torch.float32)
    path = st.save(st.compress(cnn(1), st.Rank(4), example_inputs=x).model, tmp_path)
    st.load(path, cnn(1))
    with pytest.raises(errors.FileError, match=r"'0' was saved with stride=\(1, 1\), .* has stride=\(2, 2\)"):
        st.load(path, cnn(2))


def test_values_that_were_saved_broken_are_said(tmp_path: Path) -> None:
    model = compressed()
    with torch.no_grad():
        model[0].down.weight[0, 0] = torch.nan
    with pytest.warns(UserWarning, match=r"NaN or infinite values in 0\.down\.weight"):
        st.load(st.save(model, tmp_path), small_mlp())


class Versioned(nn.Sequential):
    """Converts states of its first version, and wants to know which one it is given."""

    _version = 2

    def _load_from_state_dict(self, state: Any, prefix: str, metadata: Any, *rest: Any) -> None:
        if metadata.get("version") not in (1, 2):
            raise ValueError("version should be set to 1 or 2")
        super()._load_from_state_dict(state, prefix, metadata, *rest)


def test_a_network_that_wants_the_version_of_a_state_is_loaded(tmp_path: Path) -> None:
    model = Versioned(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 4)).double().eval()
    small = st.compress(model, st.Rank(3), example_inputs=X).model
    loaded = st.load(st.save(small, tmp_path), Versioned(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 4)))
    with torch.no_grad():
        assert torch.equal(loaded(X), small(X))
    save_file(model.state_dict(), tmp_path / "plain.safetensors")
    plain = Versioned(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 4))
    fill_(plain, read_state(tmp_path / "plain.safetensors"), origin=tmp_path)
    assert torch.equal(plain[0].weight, model[0].weight.float())


def test_others_can_read_a_file_as_they_can_any_other(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.touch()
    st.save(nn.Linear(4, 4), tmp_path / "model.safetensors")
    assert (tmp_path / "model.safetensors").stat().st_mode == plain.stat().st_mode
