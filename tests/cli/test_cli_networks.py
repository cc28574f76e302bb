"""`spectrim analyze`, `spectrim plan` and `spectrim compress` on real networks and the embedded digits."""

import csv
import json
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import files
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

import spectrim as st
from spectrim import data, models
from spectrim.cli import networks
from spectrim.cli.app import app
from spectrim.cli.loading import Preparation
from spectrim.cli.networks import Measured
from spectrim.planning import memory

MLP = ("--model", "spectrim:mlp", "--option", "inputs=64", "--option", "width=48", "--option", "hidden=2")
TRAINED = (*MLP, "--weights", "mlp.safetensors", "--data", "digits")
RESNET = ("--model", "spectrim:mini_resnet", "--option", "width=8", "--option", "hidden=64")
FACTORY = """
from torch import nn
def vectors():
    return nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))
def pair():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)
        def forward(self, x):
            return self.layer(x), x
    return Pair()
"""


Run = Callable[..., Any]


def digits(split: data.access.Split) -> tuple[torch.Tensor, torch.Tensor]:
    dataset = data.load("digits", split=split)
    return dataset.images / 255, dataset.labels


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    """A small network that has learnt the digits."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = models.mlp(64, width=48, hidden=2)
        optimiser = torch.optim.Adam(network.parameters(), lr=5e-3)
        images, labels = digits("train")
        for _ in range(12):
            for index in torch.randperm(len(images)).split(64):
                optimiser.zero_grad()
                nn.functional.cross_entropy(network(images[index]), labels[index]).backward()
                optimiser.step()
    return {name: tensor.detach() for name, tensor in network.state_dict().items()}


@pytest.fixture
def run(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: dict[str, torch.Tensor]) -> Run:
    """The whole command line, in a folder with a trained network and a module."""
    monkeypatch.delitem(sys.modules, "networks_of_mine", raising=False)
    save_file(weights, tmp_path / "mlp.safetensors")
    (tmp_path / "networks_of_mine.py").write_text(FACTORY)
    return run


def in_python(result: str) -> nn.Module:
    """What the lines printed for Python make."""
    lines = result.partition("In Python:\n")[2]
    scope: dict[str, nn.Module] = {}
    exec("\n".join(line.removeprefix("  ") for line in lines.splitlines()), scope)
    return scope["network"]


def test_analyze_shows_every_layer_and_writes_a_page(run: Run, tmp_path: Path) -> None:
    result = run("analyze", *TRAINED, "--out", "look")
    assert result.code == 0, result.err
    assert all(name in result.out for name in ("fc1", "fc2", "head", "activation", "3 of them can be factored"))
    page = (tmp_path / "look" / "spectra.html").read_text(encoding="utf-8")
    assert "Singular values of spectrim:mlp" in page
    assert "In the activation metric" in page
    assert run("analyze", *TRAINED, "--out", "look").code == 0
    assert [path.name for path in (tmp_path / "look").iterdir()] == ["spectra.html"]


def test_analyze_needs_no_data_and_writes_nothing_unasked(run: Run, tmp_path: Path) -> None:
    before = files(tmp_path)
    result = run("analyze", *RESNET, "--input", "1,28,28", "--include", "layer*", "--exclude", "*.shortcut.*")
    assert result.code == 0, result.err
    assert "this network is untrained" in result.err
    assert "plain" in result.out
    assert "12 of them can be factored" in result.out
    assert files(tmp_path) == before


def test_a_plan_is_made_edited_applied_and_loaded(run: Run, tmp_path: Path) -> None:
    result = run("plan", *TRAINED, "--images", 300, "--rank", 12, "--exclude", "head", "--out", "mine/plan.json")
    assert result.code == 0, result.err
    assert "Rank 12, activation metric: 2 of 3 factored" in result.out
    path = tmp_path / "mine" / "plan.json"
    written = json.loads(path.read_text())
    written["layers"][1]["rank"] = 9
    path.write_text(json.dumps(written))
    command = shlex.split(result.out.partition("Apply it:\n")[2])
    assert command[:2] == ["spectrim", "compress"]
    assert "--exclude" not in command
    done = run(*command[1:-1], "small")
    assert done.code == 0, done.err
    applied = st.Plan.load(tmp_path / "small" / "plan.json")
    assert [layer.rank for layer in applied] == [12, 9, None]
    assert "rank 9 set by hand in the plan" in done.out
    network = st.load(tmp_path / "small", models.mlp(64, width=48, hidden=2))
    assert network.fc2.rank == 9
    again = run("compress", *MLP, "--weights", "small", "--input", 64, "--rank", 1, "--out", "smaller")
    assert "small was compressed already: 2 of its layers are factored or narrowed; these stay, and" in again.said
    assert network(digits("test")[0]).shape == (360, 10)


@pytest.mark.parametrize("rule", [("--macs", 0.6), ("--ratio", 0.3, "--metric", "loss")], ids=str)
def test_a_plan_applied_as_it_is_does_what_its_rule_does(run: Run, tmp_path: Path, rule: tuple[object, ...]) -> None:
    results = [
        run("plan", *TRAINED, *rule, "--out", "plan.json"),
        run("compress", *TRAINED, "--plan", "plan.json", "--out", "planned"),
        run("compress", *TRAINED, *rule, "--out", "ruled"),
    ]
    assert [result.code for result in results] == [0, 0, 0], results
    planned, ruled = (tmp_path / name / "model.safetensors" for name in ("planned", "ruled"))
    assert planned.read_bytes() == ruled.read_bytes()


def test_compress_writes_the_network_that_it_measured(run: Run, tmp_path: Path) -> None:
    result = run("compress", *TRAINED, "--params", 0.6, "--out", "deep/small")
    assert result.code == 0, result.err
    small = tmp_path / "deep" / "small"
    assert {path.name for path in small.iterdir()} == {
        "model.safetensors",
        "plan.json",
        "measurement.json",
        "report.html",
    }
    record = Measured.load(small / "measurement.json")
    network = in_python(result.out)
    assert not network.training
    images, labels = digits("test")
    assert record.compressed.accuracy == st.accuracy(network, [(images, labels)])
    assert record.dense.accuracy.value > 0.9
    assert record.compressed.accuracy.value > 0.85
    assert record.compressed.params <= 0.6 * record.dense.params
    assert record.compressed.params == sum(parameter.numel() for parameter in network.parameters())
    assert f"dense {record.dense.accuracy.value:.2%}".replace("%", " %") in result.out
    assert "only guesses" not in result.out
    assert "takes float32 (batch, 1, 8, 8), pixel / 255" in result.out
    again = run(*shlex.split(record.command)[1:])
    assert again.code == 0, again.err
    assert Measured.load(small / "measurement.json") == record


@pytest.mark.parametrize(("batch", "aside"), [(64, "kept aside"), (256, "that the network was fitted to")])
def test_the_distance_to_the_dense_network_is_said(run: Run, tmp_path: Path, batch: int, aside: str) -> None:
    result = run("compress", *TRAINED, "--macs", 0.6, "--images", 1024, "--batch", batch, "--no-test", "--out", "small")
    assert result.code == 0, result.err
    fidelity = Measured.load(tmp_path / "small" / "measurement.json").fidelity
    assert fidelity is not None
    assert fidelity.plain is not None
    assert fidelity.held_out == (aside == "kept aside")
    assert f"Outputs on {min(batch, 256)} calibration samples {aside}" in result.out
    assert f": {fidelity.relative_error:.1%} off the dense ones, {fidelity.predicted:.1%} predicted" in result.out
    assert f"Without data: {fidelity.plain.relative_error:.1%} off." in result.out


def test_the_result_learns_from_the_dense_network(run: Run, tmp_path: Path) -> None:
    errors = []
    for name, options in (("small", ()), ("taught", ("--distill", 3))):
        result = run("compress", *TRAINED, "--macs", 0.4, "--batch", 64, "--no-test", *options, "--out", name)
        assert result.code == 0, result.err
        fidelity = Measured.load(tmp_path / name / "measurement.json").fidelity
        assert fidelity is not None
        errors.append(fidelity.relative_error)
        assert ("distil in 168 steps" in result.err) == (name == "taught")
    assert errors[1] < errors[0]


def test_each_stage_is_a_line_where_there_is_no_terminal(run: Run) -> None:
    torch.manual_seed(0)  # of untrained networks, some are lucky
    result = run("compress", *RESNET, "--data", "digits", "--images", 64, "--macs", 0.6, "--out", "small")
    assert result.code == 0, result.err
    stages = [
        line
        for line in result.err.splitlines()
        if re.match(r"(load|calib|analyse|weigh|plan|compress|reconstruct|test|write)", line)
    ]
    assert stages == [
        "load spectrim:mini_resnet",
        "load digits",
        "analyse",
        "calibrate",
        "analyse",
        "weigh 18 layers",
        "plan",
        "compress",
        "reconstruct 18 layers",
        "test the dense network",
        "test the compressed network",
        "write",
    ]
    assert "The dense network only guesses" in result.out
    # its convolutions have no bias, those of the compressed one do
    assert in_python(result.out)(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


def test_long_stages_say_how_far_they_are_where_there_is_no_terminal(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spectrim.cli.stages._SECONDS", 0.0)
    result = run("compress", *RESNET, "--data", "digits", "--images", 64, "--macs", 0.6, "--no-test", "--out", "small")
    assert result.code == 0, result.err
    lines = result.err.splitlines()
    weighed = lines[lines.index("weigh 18 layers") + 1 : lines.index("plan")]
    assert [line.partition(",")[0] for line in weighed] == [f"  {done} of 18" for done in range(1, 18)]
    assert weighed[0].startswith("  1 of 18, weigh ")


def test_options_reach_the_library(run: Run, tmp_path: Path) -> None:
    more = (
        "--form",
        "spatial",
        "--rank-multiple",
        4,
        "--metric",
        "plain",
        "--keep-last",
        "--no-reconstruct",
        "--no-test",
    )
    result = run("compress", *RESNET, "--data", "digits", "--images", 32, "--macs", 0.6, *more, "--out", "small")
    assert result.code == 0, result.err
    assert "reconstruct" not in result.out
    assert "Accuracy not measured: --no-test." in result.out
    plan = st.Plan.load(tmp_path / "small" / "plan.json")
    assert plan.metric == "plain"
    assert plan["head"].form == "dense"
    assert {layer.form for layer in plan} <= {"dense", "spatial", "linear"}
    assert any(layer.form == "spatial" and layer.rank % 4 == 0 for layer in plan)


WIDE = ("--model", "spectrim:mlp", "--option", "inputs=64", "--option", "width=512", "--option", "hidden=2")


def test_a_plan_of_latency_is_timed_shown_and_applied(run: Run, tmp_path: Path) -> None:
    timed = ("--latency", 0.7, "--runtime", "torch", "--latency-batch", 64, "--rank-multiple", 16)
    result = run("plan", *WIDE, "--input", "64", *timed, "--out", "plan.json")
    assert result.code == 0, result.err
    stages = [line for line in result.err.splitlines() if re.match(r"(load|analyse|plan|time|verify)", line)]
    assert stages[:5] == ["load spectrim:mlp", "analyse", "plan", "time 3 shapes of layers", "verify in torch"]
    assert "Latency in torch, 1 thread, batch 64" in result.out
    assert all(re.search(rf"{what} +[0-9.]+ ms", result.out) for what in ("Dense", "Target", "Predicted", "Measured"))
    plan = st.Plan.load(tmp_path / "plan.json")
    assert plan.latency is not None
    assert plan.latency.verified
    assert ("The network is as it was" in result.out) == (plan.latency.refused is not None)
    done = run("compress", *WIDE, "--input", "64", "--plan", "plan.json", "--out", "small")
    assert done.code == 0, done.err
    applied = st.Plan.load(tmp_path / "small" / "plan.json")
    assert (applied.latency, applied.rank_multiple) == (plan.latency, 16)
    assert [(layer.form, layer.ranks) for layer in applied] == [(layer.form, layer.ranks) for layer in plan]
    assert "Measured" in done.out


def test_the_step_of_the_hardware_is_probed(run: Run, tmp_path: Path) -> None:
    probed = ("--ratio", 0.3, "--rank-multiple", "auto", "--runtime", "torch", "--latency-threads", 1)
    result = run("plan", *WIDE, "--input", "64", *probed, "--out", "plan.json")
    assert result.code == 0, result.err
    assert "probe" in result.err.splitlines()
    step = st.Plan.load(tmp_path / "plan.json").rank_multiple or 1
    assert all(layer.rank in (layer.full_rank, *range(step, 512, step)) for layer in st.Plan.load("plan.json").factored)


def test_the_cache_changes_nothing_but_the_time(run: Run, tmp_path: Path) -> None:
    command = ("compress", *TRAINED, "--macs", 0.5, "--images", 128, "--batch", 32, "--no-test")
    for cache in (0, 100):
        assert run(*command, "--cache", cache, "--out", tmp_path / str(cache)).code == 0
    first, second = (load_file(tmp_path / str(cache) / "model.safetensors") for cache in (0, 100))
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_the_seed_decides_which_images_are_drawn(run: Run, tmp_path: Path) -> None:
    files_written = []
    for seed in (0, 0, 1):
        assert run("compress", *TRAINED, "--images", 48, "--seed", seed, "--rank", 8, "--out", "small").code == 0
        files_written.append((tmp_path / "small" / "model.safetensors").read_bytes())
    assert files_written[0] == files_written[1] != files_written[2]


def test_a_network_of_vectors_wants_flatten(run: Run, tmp_path: Path) -> None:
    vectors = ("--model", "networks_of_mine:vectors", "--data", "digits", "--ratio", "0.3")
    wrong = run("compress", *vectors, "--out", "small")
    assert wrong.code == 1
    assert "shapes cannot be multiplied" in wrong.err
    assert "--flatten" in wrong.err
    result = run("compress", *vectors, "--flatten", "--out", "small")
    assert result.code == 0, result.err
    assert "--model networks_of_mine:vectors runs the code of that module" in result.err
    assert "takes float32 (batch, 64)" in result.out
    assert in_python(result.out)(torch.zeros(2, 64)).shape == (2, 10)


def test_there_is_an_accuracy_only_for_outputs_that_fit_the_classes(run: Run) -> None:
    seven = (*MLP, "--option", "outputs=7", "--data", "digits", "--rank", 4)
    result = run("compress", *seven, "--out", "small")
    assert result.code == 0, result.err
    assert (
        "not measured: digits has 10 classes (labels 0 to 9), and for one image the network gives outputs [1, 7]"
        in result.out
    )
    assert run("compress", *seven, "--test", "--out", "small").code == 2
    pair = run("compress", "--model", "networks_of_mine:pair", "--data", "digits", "--rank", 2, "--out", "pair")
    assert pair.code == 0, pair.err
    assert "the network gives a tuple" in pair.out


def test_images_are_prepared_as_the_networks_want_them(run: Run) -> None:
    pixels = torch.randint(0, 256, (4, 3, 5, 5), dtype=torch.uint8)
    own = Preparation(models.CIFAR_MEAN, models.CIFAR_STD, flatten=False)
    assert torch.equal(own(pixels), models.cifar_inputs(pixels))
    assert torch.equal(Preparation((0.0,), (1.0,), flatten=True)(pixels), (pixels / 255).flatten(1))
    result = run("compress", *TRAINED, "--mean", "0.3", "--std", "0.4", "--rank", 8, "--out", "small")
    assert "takes float32 (batch, 1, 8, 8), (pixel / 255 - 0.3) / 0.4" in result.out


def test_every_column_is_printed_where_there_is_no_terminal(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    result = run("plan", *TRAINED, "--rank", 4, "--out", "plan.json")
    assert "Not shown" not in result.out
    for layer in st.Plan.load("plan.json"):
        assert re.search(rf"^{layer.name} .* {layer.form} .*{re.escape(layer.reason)}", result.out, re.MULTILINE)


def test_tables_for_programs_hold_plain_numbers(run: Run, tmp_path: Path) -> None:
    command = ("compress", *TRAINED, "--rank", 4, "--exclude", "head", "--out", "small")
    result = run(*command, "--json")
    assert result.code == 0, result.err
    assert "In Python:" in result.err
    plan, measurement = json.loads(result.out)
    record = Measured.load(tmp_path / "small" / "measurement.json")
    assert "--json" not in record.command
    for row, layer in zip(plan["rows"], st.Plan.load(tmp_path / "small" / "plan.json"), strict=True):
        assert (row["Layer"], row["Form"], row["Rank"]) == (layer.name, layer.form, layer.rank)
        assert (row["Params before"], row["Params after"]) == (layer.dense.params, layer.kept.params)
        assert row["Predicted error"] == layer.predicted_error
    values = {row["Name"]: row["Value"] for row in measurement["rows"]}
    assert values["MACs"] == record.compressed.macs
    assert values["Accuracy"] == record.compressed.accuracy.value
    tables = run("analyze", *TRAINED, "--csv").out.split("\n\n")
    rows = list(csv.DictReader(tables[0].splitlines()))
    assert [row["Layer"] for row in rows] == ["fc1", "fc2", "head"]
    assert all(float(row["Effective rank"]) > 1 for row in rows)


@pytest.mark.parametrize("name", ["mlp.onnx", "empty"])
def test_weights_of_another_kind_are_refused_before_any_data(name: str, run: Run, tmp_path: Path) -> None:
    (tmp_path / "mlp.onnx").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    for command in ("analyze", "compress", "finetune", "quantize"):
        more = {"analyze": (), "compress": ("--rank", 4), "finetune": (), "quantize": ()}[command]
        out = "new.onnx" if command == "quantize" else "new"
        result = run(command, *MLP, "--data", "digits", "--weights", name, *more, "--out", out)
        assert result.code == 1
        assert name in result.err.splitlines()[-1]
        assert "load digits" not in result.err


@pytest.mark.parametrize("rule", [("--macs", 0.0001), ("--rank", 60)], ids=lambda rule: rule[0])
def test_a_rule_out_of_reach_is_reported_before_the_images_are_run(rule: tuple[str, float], run: Run) -> None:
    result = run("compress", *RESNET, "--data", "digits", *rule, "--out", "small")
    assert result.code == 1
    assert "cannot be reached" in result.err or "above what some layers can have" in result.err
    assert "calibrate" not in result.err


COMPRESS = ("compress", *TRAINED, "--out", "new/small")
INPUT = ("compress", *MLP, "--rank", "4", "--out", "new/small", "--input", "64")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (COMPRESS, 2, "exactly one of --macs, --params, --bytes, --latency, --rank, --ratio, --energy (or a --plan)"),
        ((*COMPRESS, "--macs", "0.5", "--rank", "4"), 2, "--macs and --rank are 2"),
        (("plan", *TRAINED, "--out", "new/plan.json"), 2, "none was given"),
        ((*COMPRESS, "--plan", "nowhere.json", "--rank", "4"), 2, "own rule and layers; leave out --rank 4"),
        ((*COMPRESS, "--plan", "nowhere.json", "--exclude", "head"), 2, "leave out --exclude head"),
        ((*COMPRESS, "--plan", "nowhere.json"), 1, "cannot read nowhere.json"),
        ((*COMPRESS, "--plan", "networks_of_mine.py"), 1, "is not a valid Plan"),
        ((*COMPRESS, "--macs", "1.5"), 1, "a budget is a share of the dense network, between 0 and 1"),
        ((*COMPRESS, "--macs", "0.0001"), 1, "cannot be reached: the smallest this model can be"),
        ((*COMPRESS, "--rank", "0"), 1, "a whole number of at least 1"),
        ((*COMPRESS, "--rank", "60"), 1, "above what some layers can have"),
        ((*COMPRESS, "--rank", "4", "--include", "layer*"), 1, "'layer*'"),
        (("plan", *TRAINED, "--rank", "4", "--include", "layer*", "--out", "new/plan.json"), 1, "'layer*'"),
        ((*COMPRESS, "--rank", "4", "--form", "cubic"), 2, "'cubic': there are linear, channel, spatial, tucker2"),
        ((*COMPRESS, "--rank", "4", "--metric", "flat"), 2, "'flat' is not one of 'plain', 'activation', 'loss'"),
        ((*COMPRESS, "--latency", "0.5", "--macs", "0.5"), 2, "--macs and --latency are 2"),
        ((*COMPRESS, "--latency", "1.5"), 1, "a budget is a share of the dense network, between 0 and 1"),
        ((*COMPRESS, "--latency", "0.5", "--runtime", "onyx"), 2, "'onyx': there are torch, channels_last"),
        ((*COMPRESS, "--latency", "0.5", "--latency-threads", "9999"), 1, "threads=9999"),
        ((*COMPRESS, "--latency", "0.5", "--latency-batch", "0"), 2, "--latency-batch"),
        ((*COMPRESS, "--macs", "0.5", "--runtime", "torch"), 2, "--runtime say how --latency or --rank-multiple auto"),
        ((*COMPRESS, "--rank", "4", "--latency-threads", "1"), 2, "--latency-threads say"),
        ((*COMPRESS, "--rank", "4", "--rank-multiple", "0"), 2, "--rank-multiple 0: give a whole number of at least 1"),
        ((*COMPRESS, "--rank", "4", "--rank-multiple", "some"), 2, "--rank-multiple some: give a whole number"),
        ((*COMPRESS, "--plan", "nowhere.json", "--latency", "0.5"), 2, "leave out --latency 0.5"),
        ((*COMPRESS, "--rank", "4", "--mean", "0.3"), 2, "both --mean and --std"),
        ((*COMPRESS, "--rank", "4", "--mean", "0.3,0.2", "--std", "1"), 2, "--mean and --std take one value"),
        ((*COMPRESS, "--rank", "4", "--mean", "0.3", "--std", "0"), 2, "no deviation is 0"),
        ((*COMPRESS, "--rank", "4", "--mean", "dark", "--std", "1"), 2, "--mean 'dark'"),
        ((*COMPRESS, "--rank", "4", "--input", "1,8,8"), 2, "--input does not go with --data digits"),
        ((*COMPRESS, "--rank", "4", "--option", "width"), 2, "--option width: write each name once"),
        ((*COMPRESS, "--rank", "4", "--option", "depth=3"), 1, "cannot be called with"),
        ((*COMPRESS, "--rank", "4", "--images", "0"), 2, "--images"),
        (INPUT[:-2], 2, "an input: --input 3,32,32, or --tokens 128 of a text"),
        ((*INPUT[:-1], "6x4"), 2, "--input '6x4'"),
        ((*INPUT[:-1], "0,64"), 2, "--input '0,64'"),
        ((*INPUT[:-1], "63"), 1, "shapes cannot be multiplied"),
        ((*INPUT, "--reconstruct"), 2, "--reconstruct needs data"),
        ((*INPUT, "--distill", "2"), 2, "--distill needs data"),
        ((*INPUT, "--metric", "activation"), 2, "--metric activation needs data"),
        ((*INPUT, "--test"), 2, "there is no --data"),
        ((*INPUT, "--mean", "0.5", "--std", "0.5"), 2, "--mean goes with --data"),
        ((*INPUT, "--weights", "nowhere.safetensors"), 1, "cannot read nowhere.safetensors"),
        (("compress", *RESNET, *TRAINED[-4:], "--rank", "4", "--out", "new"), 1, "is for another network"),
        (("compress", *MLP, "--data", "digit", "--rank", "4", "--out", "new"), 1, "did you mean 'digits'"),
        (("compress", *MLP, "--data", "here", "--rank", "4", "--out", "new"), 1, "write --data folder:here"),
        (("analyze", "--model", "spectrim:resnet21", "--input", "3,32,32", "--out", "new"), 1, "did you mean 'resnet"),
        (("analyze", "--model", "resnet20", "--input", "3,32,32", "--out", "new"), 1, "write spectrim:resnet20"),
        (("analyze", "--model", "spectrim:resnet20", "--data", "digits", "--out", "new"), 1, "--flatten"),
        (("compress", *TRAINED, "--rank", "4", "--out", "mlp.safetensors"), 1, "cannot write to the folder"),
        (("plan", *TRAINED, "--rank", "4", "--out", "mlp.safetensors/plan.json"), 1, "cannot write to the folder"),
        (("plan", *TRAINED, "--rank", "4", "--out", "networks_of_mine.py"), 1, "not a file that this command wrote"),
        (("plan", *TRAINED, "--rank", "4"), 2, "--out"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_mistake_is_one_message(refused: Run, arguments: tuple[str, ...], code: int, message: str) -> None:
    Path("here").mkdir()
    refused(*arguments, code=code, message=message)


def test_a_plan_for_another_network_is_refused(run: Run, refused: Run) -> None:
    assert run("plan", *RESNET, "--input", "1,8,8", "--rank", 4, "--out", "plan.json").code == 0
    refused("compress", *TRAINED, "--plan", "plan.json", "--out", "small", message="the plan is for another model")


@pytest.mark.parametrize("name", ["model.safetensors", "plan.json", "measurement.json", "report.html"])
def test_a_file_that_is_not_of_an_earlier_run_is_never_replaced(refused: Run, tmp_path: Path, name: str) -> None:
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / name).write_text("mine")
    refused("compress", *TRAINED, "--rank", 4, "--out", "small", message=f"{name} is there already")


def test_a_network_trained_on_since_is_never_replaced(run: Run, tmp_path: Path) -> None:
    command = ("compress", *MLP, "--input", "64", "--rank", 4, "--out", "small")
    assert run(*command).code == run(*command).code == 0
    st.save(st.load("small", models.mlp(64, width=48, hidden=2)).double(), "small")
    before = files(tmp_path)
    assert "is there already" in run(*command).err
    assert files(tmp_path) == before


def test_an_interrupt_is_one_line_and_leaves_nothing(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(networks.Measured, "save", stop)  # the last file, when the others are made
    before = files(tmp_path)
    result = run("compress", *TRAINED, "--rank", 4, "--out", "deep/small")
    assert (result.code, result.err.splitlines()[-1]) == (130, "interrupted; nothing was written")
    assert files(tmp_path) == before


def test_help_says_that_a_factory_runs_code() -> None:
    for command in ("analyze", "plan", "compress"):
        result = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"})
        assert result.exit_code == 0
        assert "RUNS THE CODE" in result.output
        assert "cifar_inputs" in result.output


def test_the_memory_is_shown_without_work(run: Run, tmp_path: Path) -> None:
    before = files(tmp_path)
    ended = run("compress", *TRAINED, "--macs", 0.5, "--out", "small", "--estimate")
    assert ended.code == 0, ended.err
    assert re.search(r"At the highest +[\d.]+ [kM]B", ended.out)
    assert {name: content for name, content in files(tmp_path).items() if "cache" not in name} == before


def test_what_does_not_fit_is_one_message(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda _: 1000)
    ended = run("compress", *TRAINED, "--macs", 0.5, "--out", "small")
    assert ended.code == 1
    assert "of memory, and 0 MB are free" in ended.err
    assert "Traceback" not in ended.err
    assert not (tmp_path / "small").exists()
