"""Plans as files: read, edited, damaged."""

import json
from pathlib import Path

import pytest
from cases import inputs, small_mlp

import spectrim as st
from spectrim import errors
from spectrim.core.plans import LatencyNote

X = inputs(5, 12)


def plan() -> st.Plan:
    return st.plan(st.analyze(small_mlp(), X, keep_last=True), st.Ratio(0.2))


@pytest.mark.parametrize("rule", [st.Rank(2), st.Ratio(0.5), st.Energy(0.75)], ids=str)
def test_a_plan_survives_its_file(tmp_path: Path, rule: st.Rank | st.Ratio | st.Energy) -> None:
    saved = st.plan(st.analyze(small_mlp(), X, exclude="4"), rule)
    assert st.Plan.load(saved.save(tmp_path / "folders" / "plan.json")) == saved


NOTE = LatencyNote(
    runtime="onnxruntime",
    threads=1,
    fingerprint="this one",
    dense_ms=2.0,
    predicted=0.61,
    measured=0.6,
    low=0.58,
    high=0.63,
)


def test_a_plan_of_latency_survives_its_file(tmp_path: Path) -> None:
    rule = st.Budget(latency=0.6, runtime="onnxruntime")
    saved = plan().model_copy(update={"rule": rule, "latency": NOTE, "rank_multiple": 16})
    again = st.Plan.load(saved.save(tmp_path / "plan.json"))
    assert again == saved
    assert again.latency is not None
    assert again.latency.verified
    assert not NOTE.model_copy(update={"measured": None}).verified


def test_plans_of_earlier_versions_are_read(tmp_path: Path) -> None:
    saved = st.plan(st.analyze(small_mlp(), X), st.Budget(params=0.7))
    path = saved.save(tmp_path / "plan.json")
    written = json.loads(path.read_text())
    assert written["rule"] == {"params": 0.7, "rule": "budget"}
    assert set(written) == {"version", "rule", "metric", "layers"}
    assert st.Plan.load(path) == saved


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"macs": 0.5, "threads": 1}, "belongs to a latency"),
        ({"latency": 0.5, "threads": 0}, "whole number of at least 1"),
        ({"latency": 0.5, "cores": 2}, "cores"),
    ],
    ids=str,
)
def test_a_budget_edited_into_nonsense_is_one_clear_error(
    tmp_path: Path, wrong: dict[str, object], message: str
) -> None:
    path = plan().save(tmp_path / "plan.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rule": {"rule": "budget", **wrong}}))
    with pytest.raises(errors.FileError, match=message):
        st.Plan.load(path)


def test_a_plan_reads_like_a_list_of_layers() -> None:
    saved = plan()
    assert [layer.name for layer in saved] == ["0", "2", "4"]
    assert len(saved) == 3
    assert saved["2"].rank == 3
    assert saved.kept_cost.params < saved.dense_cost.params
    with pytest.raises(KeyError, match="it has 0, 2, 4"):
        saved["5"]


EDITS = {
    "cut short": (lambda text: text[: len(text) // 2], "Invalid JSON"),
    "empty": (lambda text: "", "Invalid JSON"),
    "rank 0": (lambda text: text.replace('"rank": 3', '"rank": 0'), "greater than or equal to 1"),
    "rank above full": (lambda text: text.replace('"rank": 3', '"rank": 99'), "above its full rank"),
    "misspelt field": (lambda text: text.replace('"reason"', '"raeson"'), "raeson"),
    "dense with a rank": (lambda text: text.replace('"form": "linear"', '"form": "dense"'), "neither rank nor metric"),
    "a rank without a metric": (lambda text: text.replace('      "metric": "plain",\n', ""), "needs a rank"),
    "a layer twice": (lambda text: text.replace('"name": "2"', '"name": "0"'), "stands twice"),
    "a ratio above 1": (lambda text: text.replace('"ratio": 0.2', '"ratio": 2'), r"Ratio\(2"),
    "another version": (lambda text: text.replace('"version": 1', '"version": 2'), "version"),
    "NaN": (lambda text: text.replace('"predicted_error": 0', '"predicted_error": NaN, "x": 0'), "plan.json"),
}


@pytest.mark.parametrize(("edit", "message"), EDITS.values(), ids=EDITS.keys())
def test_a_damaged_plan_is_one_clear_error(tmp_path: Path, edit: object, message: str) -> None:
    path = plan().save(tmp_path / "plan.json")
    text = path.read_text()
    changed = edit(text)  # type: ignore[operator]
    assert changed != text
    path.write_text(changed)
    with pytest.raises(errors.FileError, match=message) as caught:
        st.Plan.load(path)
    assert "plan.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_form_that_does_not_exist_is_an_error_once_the_plan_is_applied(tmp_path: Path) -> None:
    path = plan().save(tmp_path / "plan.json")
    path.write_text(path.read_text().replace('"form": "linear"', '"form": "conical"', 1))
    with pytest.raises(errors.PlanError, match=r"no form 'conical'; there are linear"):
        st.compress(small_mlp(), st.Plan.load(path), example_inputs=X)


def test_missing_binary_and_unwritable(tmp_path: Path) -> None:
    with pytest.raises(errors.FileError, match="cannot read"):
        st.Plan.load(tmp_path / "none.json")
    (tmp_path / "b.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(errors.FileError, match="not a text file"):
        st.Plan.load(tmp_path / "b.json")
    with pytest.raises(errors.FileError, match="cannot write"):
        plan().save(tmp_path / "b.json" / "plan.json")


def test_values_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        plan().layers[0].rank = 2  # type: ignore[misc]
    with pytest.raises(AttributeError):
        st.Rank(2).rank = 3  # type: ignore[misc]
