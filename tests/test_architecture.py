"""The directions of imports, the public names, and what a bare import costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import spectrim as st

ROOT = Path(st.__file__).parent

LEVELS = (
    ("errors",),
    ("files",),
    ("plan",),
    ("linalg", "layers"),
    ("forms",),
    ("execution", "processes"),
    ("surgery", "sequel", "prefix", "timing", "conversion"),
    ("calibrate", "padding", "runtimes"),
    ("measure", "probe"),
    ("factorize",),
    ("analyze",),
    ("allocate", "decisions", "latency"),
    ("budget",),
    ("ranks", "settle", "io", "reconstruct", "sensitivity"),
    ("compress", "export", "quantize", "training", "report"),
    ("data", "models"),
    ("recipes",),
    ("cli",),
    ("__main__",),
)
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
OPTIONAL = {"torchvision", "PIL", "onnx", "onnxruntime", "openvino", "torchao"}
PUBLIC = {
    *(
        "Accuracy",
        "Analysis",
        "Budget",
        "Calibration",
        "Changes",
        "Comparison",
        "Compressed",
        "Cost",
        "Curve",
        "Energy",
        "Epoch",
        "Exported",
        "Finetuned",
        "Grid",
        "History",
        "Interval",
    ),
    *(
        "LatencyNote",
        "LatencyTable",
        "LayerAnalysis",
        "LayerPlan",
        "LayerSpectrum",
        "LowRankConv1d",
        "LowRankConv2d",
        "LowRankConvTranspose2d",
        "LowRankLinear",
    ),
    *(
        "Measurement",
        "Plan",
        "Published",
        "PublishedPoint",
        "Quantized",
        "QuantizedRow",
        "QuantizedTable",
        "Rank",
        "Ratio",
        "Results",
        "Run",
        "SpatialConv2d",
        "Spectrum",
        "Tucker2Conv2d",
        "Variant",
        "accuracy",
    ),
    *(
        "analyze",
        "calibrate",
        "compare_quantized",
        "compress",
        "errors",
        "export_onnx",
        "export_openvino",
        "export_program",
        "finetune",
        "latency_table",
        "load",
        "measure",
        "merge",
        "onnx_accuracy",
        "pareto",
        "plan",
    ),
    *(
        "plot_accuracy",
        "plot_classes",
        "plot_curves",
        "plot_history",
        "plot_ranks",
        "plot_spectra",
        "probe",
        "quantize",
        "report",
        "runtime_gain",
        "save",
        "save_figure",
        "sensitivity",
        "table",
        "text",
        "training",
    ),
}
FILES = sorted(ROOT.rglob("*.py"))


def room_of(path: Path) -> str:
    first = path.relative_to(ROOT).parts[0]
    return first.removesuffix(".py")


def imports(tree: ast.AST) -> list[tuple[ast.stmt, str]]:
    found: list[tuple[ast.stmt, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found += [(node, f"{node.module}.{alias.name}") for alias in node.names]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_from_rooms_above_it(path: Path) -> None:
    room = room_of(path)
    if room == "__init__":
        return
    for _, name in imports(ast.parse(path.read_text(encoding="utf-8"))):
        parts = name.split(".")
        if parts[0] == "spectrim" and parts[1] != room:
            assert LEVEL[parts[1]] < LEVEL[room], f"{room} (level {LEVEL[room]}) imports {name}"


def test_every_room_has_its_level() -> None:
    assert {room_of(path) for path in FILES} - {"__init__"} == set(LEVEL)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_optional_dependencies_are_imported_late(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top = {id(node) for node in tree.body} | {
        id(inner) for node in tree.body if isinstance(node, ast.If) for inner in node.body
    }
    late = {name.split(".")[0] for node, name in imports(tree) if id(node) not in top}
    assert late <= OPTIONAL


def test_the_public_names() -> None:
    assert set(st.__all__) == PUBLIC
    assert all(getattr(st, name).__doc__ for name in st.__all__)


def test_a_bare_import_prints_nothing_and_leaves_torch_as_it_is() -> None:
    code = (
        "import torch; a = torch.get_rng_state(), torch.get_num_threads(), torch.is_grad_enabled(); import spectrim; "
        "b = torch.get_rng_state(), torch.get_num_threads(), torch.is_grad_enabled(); "
        "assert torch.equal(a[0], b[0]) and a[1:] == b[1:]; import sys; assert not {'torchvision', 'lightning', 'pytorch_lightning'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
