"""The structure's figures against their bars, the directions of imports, the public names, and what an import costs."""

import ast
import importlib.util
import pkgutil
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import structure
from structure import Figure, Module

import spectrim as st

ROOT = Path(__file__).resolve().parent.parent
OPTIONAL = {
    "IPython",
    "torchvision",
    "PIL",
    "tokenizers",
    "transformers",
    "huggingface_hub",
    "onnx",
    "onnxruntime",
    "openvino",
    "torchao",
}
PUBLIC = """
Accuracy Analysis Budget Calibration Changes Comparison Compressed CompressedCheckpoint Cost Curve Distillation Energy
Epoch Exported Fidelity Finetuned Grid History InterpolativeLayer Interval LatencyNote LatencyTable LayerAnalysis
LayerPlan LayerSpectrum LowRankConv1d LowRankConv2d LowRankConvTranspose2d LowRankEmbedding LowRankEmbeddingBag
LowRankLinear Measurement MemoryEstimate Plan Published PublishedPoint Quantized QuantizedRow QuantizedTable Rank
Ratio Results Run Score SpatialConv2d Spectrum Tucker2Conv2d Variant accuracy analyze calibrate compare_quantized
compress compress_checkpoint distill errors estimate_memory evaluate export_onnx export_openvino export_program
finetune latency_table load measure merge onnx_accuracy pareto plan plot_accuracy plot_classes plot_curves
plot_history plot_ranks plot_spectra probe quantize report runtime_gain save save_figure sensitivity table text
training write_model_card
"""
SOURCE = structure.modules(structure.SOURCE)


@pytest.mark.parametrize("figure", structure.figures(), ids=lambda figure: figure.name)
def test_a_figure_of_the_structure_keeps_its_bar(figure: Figure) -> None:
    assert figure.value <= figure.bar, "\n".join(figure.places)


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.stem)
def test_benchmarks_import_what_there_is(path: Path) -> None:
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    names = {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    names |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    beside = {file.stem for folder in ("benchmarks", "tests") for file in (ROOT / folder).glob("*.py")}
    tops = {name.split(".")[0] for name in names} - beside - {"playwright", "fvcore"}
    assert not [name for name in tops if importlib.util.find_spec(name) is None]


def test_the_figures_see_what_they_count() -> None:
    text = "def felt(one, given):\n    for made in one:\n        isinstance(made, nn.Linear)\n    return 'tucker2'\n"
    module = Module(structure.SOURCE / "planning" / "example.py", text)
    assert len(structure.home_made_words([module])) == 1
    assert len(structure.loose_names([module])) == 3
    assert len(structure.layer_checks([module])) == len(structure.form_strings([module])) == 1
    assert structure.body_lengths([module])[0][0] == 3


def layers_of_rooms() -> list[list[str]]:
    """The rooms as `pyproject.toml` tells import-linter, the highest level first."""
    (contract,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    return [[room.strip() for room in level.split("|")] for level in contract["layers"]]


def test_imports_go_down_only() -> None:
    levels = {room: level for level, rooms in enumerate(reversed(layers_of_rooms())) for room in rooms}
    assert set(levels) == {module.room for module in SOURCE} - {"__init__", "__main__"}
    for module in SOURCE:
        if module.room in levels:
            assert all(levels[room] < levels[module.room] for room in module.imports), module.name


def test_the_rooms_in_contributing_are_those_that_are_checked() -> None:
    rows = [line.split("|") for line in (ROOT / "CONTRIBUTING.md").read_text().splitlines() if line.startswith("| ")]
    table = [
        {name.strip().strip("`").rstrip("/").removesuffix(".py") for name in row[2].split(",")} for row in rows[1:]
    ]
    assert table == [set(rooms) for rooms in reversed(layers_of_rooms())]


def test_what_the_table_in_extending_names_exists() -> None:
    first, *_ = (ROOT / "docs/extending.md").read_text().split("\n\n| to add |")[1].split("\n\n")
    rows = [line.split("|")[2:-1] for line in first.splitlines() if line[:2] == "| "]
    seen = 0
    assert len(rows) > 6
    for row in rows:
        registries = re.findall(r"`(\w+)` in `(\S+)`", row[1])
        assert registries, row
        for name, file in registries:
            assert re.search(rf"^{name}\b", (structure.SOURCE / file).read_text(), re.MULTILINE), name
        for cell in row:
            for path in re.findall(r"`([\w/]+(?:/|\.py))`", cell):
                seen += 1
                assert (structure.SOURCE / path).exists() or (ROOT / path).exists(), path
    assert seen > 2 * len(rows)


@pytest.mark.parametrize("module", SOURCE, ids=lambda module: module.name)
def test_only_optional_dependencies_are_imported_late(module: Module) -> None:
    top = {id(node) for node in module.tree.body} | {
        id(inner) for node in module.tree.body if isinstance(node, ast.If) for inner in node.body
    }
    late = {
        (node.module if isinstance(node, ast.ImportFrom) else alias.name).split(".")[0]
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Import | ast.ImportFrom) and id(node) not in top
        for alias in node.names
    }
    # the shell has to answer before what a command does is imported
    assert late <= (OPTIONAL | {"spectrim"} if module.room == "cli" else OPTIONAL)


def test_no_module_is_hidden_by_a_function_of_its_name() -> None:
    hidden = []
    for info in pkgutil.walk_packages(st.__path__, "spectrim."):
        if info.name.startswith("spectrim.integrations.") or info.name == "spectrim.__main__":
            continue  # need extras, or run
        module = importlib.import_module(info.name)
        package, _, name = info.name.rpartition(".")
        if getattr(sys.modules[package], name) is not module:
            hidden.append(info.name)
    assert not hidden


def test_the_public_names() -> None:
    assert sorted(st.__all__) == sorted(PUBLIC.split())
    assert all(getattr(st, name).__doc__ for name in st.__all__)
    assert set(st.__all__) <= set(dir(st))
    names: dict[str, object] = {}
    exec("from spectrim import *", names)
    assert set(st.__all__) <= set(names)
    with pytest.raises(AttributeError, match="'spectrim' has no attribute 'compres'"):
        st.compres  # noqa: B018


def test_type_checkers_see_the_public_names_where_they_are_imported_from() -> None:
    (module,) = (module for module in SOURCE if module.name == "__init__.py")
    (block,) = (node for node in module.tree.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert seen == {**st._MODULES, "training": "spectrim"}


def test_errors_can_be_imported_by_their_public_path() -> None:
    from spectrim.errors import ModelError

    assert ModelError is st.errors.ModelError


def test_an_import_takes_nothing_heavy_until_a_name_is_asked_for() -> None:
    code = (
        "import sys, spectrim; from spectrim.errors import ModelError; "
        "assert not {'torch', 'numpy', 'pydantic', 'spectrim.layers'} & set(sys.modules); "
        "assert spectrim.layers is sys.modules['spectrim.layers']; from spectrim import Rank; print(Rank(2))"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "Rank(2)\n", "")


def test_a_bare_import_prints_nothing_and_leaves_torch_as_it_is() -> None:
    code = (
        "import torch; a = torch.get_rng_state(), torch.get_num_threads(), torch.is_grad_enabled(); import spectrim; "
        "b = torch.get_rng_state(), torch.get_num_threads(), torch.is_grad_enabled(); "
        "assert torch.equal(a[0], b[0]) and a[1:] == b[1:]; import sys; assert 'torchvision' not in sys.modules; "
        "assert not {'transformers', 'lightning'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
