"""What the documentation shows is true: every Python block runs, every command exists, every link leads somewhere."""

import importlib.util
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from typer.main import get_command

import spectrim as st
from spectrim.cli.app import app

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
BLOCK = re.compile(r"(?:<!-- needs (\w+) -->\n)?```python\n(.*?)```", re.DOTALL)


def script(page: Path) -> str:
    """The Python blocks of a page in their order; a block marked with a package that is not installed is left out."""
    blocks = BLOCK.findall(page.read_text(encoding="utf-8"))
    return "\n".join(block for needed, block in blocks if not needed or importlib.util.find_spec(needed))


def run(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.parametrize("page", [page for page in PAGES if script(page)], ids=lambda page: page.name)
def test_python_blocks_run(page: Path, tmp_path: Path) -> None:
    done = run(["-c", script(page)], tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("script", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name)
def test_examples_run(script: Path, tmp_path: Path) -> None:
    done = run([str(script), str(tmp_path)], tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "plan.json").exists()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist(page: Path) -> None:
    commands = set(re.findall(r"^\s*spectrim ([a-z-]+)(?: ([a-z][a-z0-9-]*))?", page.read_text(encoding="utf-8"), re.M))
    root = get_command(app)
    for first, second in commands:
        found = root.commands[first]  # type: ignore[attr-defined]
        assert not second or not hasattr(found, "commands") or second in found.commands


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_two_commands_stand_where_continuous_integration_reads_them() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "<!-- demo-command -->\n```sh\npip install . && spectrim demo\n```" in text
    assert '<!-- test-command -->\n```sh\npip install ".[all,test]" && pytest\n```' in text


def test_one_version_everywhere() -> None:
    assert version("spectrim") == st.__version__


def test_everything_a_table_promises_was_filled_in() -> None:
    assert not re.search(r"@@\w+@@", (ROOT / "README.md").read_text(encoding="utf-8"))
