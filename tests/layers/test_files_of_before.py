"""Files that commit 25f9191 wrote, before the library's structure was rebuilt, still load and mean the same."""

import json

import pytest
import torch
from safetensors.torch import load_file
from saved_network import FOLDER, saved_inputs, saved_network

import spectrim as st


def test_a_saved_network_of_every_form_gives_its_outputs() -> None:
    model = st.load(FOLDER / "model.safetensors", saved_network())
    with torch.no_grad():
        outputs = model(saved_inputs())
    torch.testing.assert_close(outputs, load_file(FOLDER / "outputs.safetensors")["outputs"], rtol=1e-5, atol=1e-6)
    forms = {name: layer.form for name, layer in model.named_modules() if hasattr(layer, "form")}
    assert forms == {
        "stem": "spatial",
        "wide": "tucker2",
        "grouped": "tucker2",
        "point": "linear",
        "back": "channel",
        "steps": "channel",
        "first": "linear",
        "tied": "linear",
        "head": "linear",
    }
    assert model.again is model.first
    assert model.tied.down.weight is model.first.down.weight


@pytest.mark.parametrize("name", ["plan.json", "plan-latency.json"])
def test_a_plan_is_read_and_written_as_it_was(name: str) -> None:
    plan = st.Plan.load(FOLDER / name)
    before = json.loads((FOLDER / name).read_text(encoding="utf-8"))
    assert json.loads(plan.model_dump_json(exclude_none=True)) == before
    assert [layer.tied_names for layer in plan] == [tuple(layer["also"]) for layer in before["layers"]]


def test_a_plan_is_carried_out_as_it_was() -> None:
    before = st.Plan.load(FOLDER / "plan.json")
    model = saved_network()
    data = torch.rand(64, 3, 12, 12, generator=torch.Generator().manual_seed(2)).split(16)
    small = st.compress(model, before, example_inputs=saved_inputs()[:1], data=data)
    for layer, planned in zip(small.plan, before, strict=True):
        # of the weight of two layers, one of them without a bias, two biases were counted
        counted_twice = 20 if layer.name == "first" else 0
        assert layer.dense.params == planned.dense.params - counted_twice
        changed = {"predicted_error": None, "dense": layer.dense}
        assert layer.model_copy(update=changed) == planned.model_copy(update=changed)
        if planned.predicted_error is None:
            assert layer.predicted_error is None
        else:  # more than then, since it says now what 64 samples cannot tell
            assert 0.99 * planned.predicted_error <= layer.predicted_error <= planned.predicted_error + 0.15
    with torch.no_grad():
        outputs = small.model(saved_inputs())
    torch.testing.assert_close(outputs, load_file(FOLDER / "outputs.safetensors")["outputs"], rtol=1e-4, atol=1e-5)


def test_a_latency_table_is_read() -> None:
    table = st.LatencyTable.model_validate_json((FOLDER / "latency-table.json").read_text(encoding="utf-8"))
    assert table.of("stem") is not None
