"""The notebooks in `examples/` run from top to bottom, and no call leaves an empty output in one."""

from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[1] / "examples" / "notebooks").glob("*.ipynb"))
NEEDS = {"2-your-own-network": "onnxruntime", "3-a-transformer": "transformers"}


def executed(book: nbformat.NotebookNode, folder: Path) -> list[nbformat.NotebookNode]:
    """The cells with code, after they have run in a kernel of their own."""
    NotebookClient(book, timeout=600, resources={"metadata": {"path": str(folder)}}).execute()
    return [cell for cell in book.cells if cell.cell_type == "code"]


def texts(cell: nbformat.NotebookNode) -> Iterator[str]:
    """What is read in each output of a cell, less what other libraries say on standard error; a figure has no text."""
    for output in cell.outputs:
        if output.output_type != "stream":
            figure = "figure" if "application/vnd.plotly.v1+json" in output.data else ""
            yield output.data.get("text/plain", figure)
        elif output.name == "stdout":
            yield output.text


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, tmp_path: Path) -> None:
    pytest.importorskip(NEEDS.get(path.stem, "torch"))
    book = nbformat.read(path, as_version=4)
    stored = [cell for cell in book.cells if cell.get("outputs") or cell.get("execution_count")]
    assert not stored, "clear all outputs before you save it"
    for cell in executed(book, tmp_path):
        assert all(text.strip() for text in texts(cell)), cell.source
        assert "begins" not in texts(cell), "the progress of a call has not ended"


def test_calls_leave_no_empty_outputs(tmp_path: Path) -> None:
    sources = [
        "import torch, spectrim as st\n"
        "torch.manual_seed(0)\n"
        "model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))\n"
        "x = torch.randn(16, 8); batches = [(x, torch.arange(16) % 4)]",
        "small = st.compress(model, st.Rank(3), example_inputs=x, data=[x])\n"
        "tuned = st.finetune(small.model, batches, epochs=1)\n"
        "before, after = st.measure(model, x, rounds=5), st.measure(small.model, x, rounds=5)\n"
        "results = st.Results.of_network('A study', dense=before, compressed=after)\n"
        "path, listing, text = st.report(results, 'report.html'), st.table(small.plan), st.text(small.plan)",
        "assert 'Rank 3' in text; print(small)",
        "small",
        "listing",
        "_ = st.finetune(small.model, batches, epochs=2, progress=True)",
    ]
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    imports, calls, prints, value, table, training = executed(book, tmp_path)
    assert imports.outputs == calls.outputs == []
    assert [(output.output_type, output.name) for output in prints.outputs] == [("stream", "stdout")]
    for cell in (value, table):
        (output,) = cell.outputs
        assert set(output.data) == {"text/html", "text/plain"}
        assert output.data["text/plain"].startswith("Rank 3, activation metric: 2 of 2 factored")
    (line,) = texts(training)
    assert line.startswith("done in ")
