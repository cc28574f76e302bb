"""What the documentation shows is true: every Python block runs, every command and its options exist, links lead on.

A block after `<!-- file NAME -->` is a file that the blocks of its page read; one after `<!-- needs PACKAGE -->` is
left out where that is not installed. Commands after `<!-- run -->` are run, once the page's Python blocks are through.
"""

import importlib.util
import re
import shlex
import shutil
from importlib.metadata import version
from pathlib import Path

import pytest
from preloaded import run
from typer.main import get_command

import spectrim as st
from spectrim.cli.app import app
from spectrim.recipes import KINDS, NAMES

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
BLOCK = re.compile(r"(?:<!-- (file|needs|run)(?: ([\w.]+))? -->\n)?```(\w+)?\n(.*?)```", re.DOTALL)
COMMAND = re.compile(r"^\s*(?:pip install \S+ && )?(spectrim (?:[^\n`#]*\\\n)*[^\n`#]*)", re.MULTILINE)


def blocks(page: Path) -> list[tuple[str, str, str, str]]:
    """Mark, what it says, language and text of every block."""
    return BLOCK.findall(page.read_text(encoding="utf-8"))


def there(package: str) -> bool:
    """Whether the package can be used here; kaleido draws with a browser."""
    browsers = ("chromium", "chromium-browser", "google-chrome", "chrome")
    return bool(importlib.util.find_spec(package)) and (package != "kaleido" or any(map(shutil.which, browsers)))


def script(page: Path) -> str:
    """The Python blocks of a page in their order; a block marked with a package that is not there is left out."""
    return "\n".join(
        text
        for mark, of, language, text in blocks(page)
        if language == "python" and mark != "file" and (mark != "needs" or there(of))
    )


def commands(text: str) -> list[list[str]]:
    """The words of every `spectrim` command in a text."""
    return [shlex.split(command.replace("\\\n", " "))[1:] for command in COMMAND.findall(text)]


def marked(page: Path) -> str:
    """A script that runs the commands that are to be run, in this very process."""
    to_run = [words for mark, _, _, text in blocks(page) if mark == "run" for words in commands(text)]
    if not to_run or not there("onnxruntime"):
        return ""
    lines = [f"app({words!r}, standalone_mode=False)" for words in to_run]
    return "\n".join(["\nfrom spectrim.cli.app import app", *lines])


@pytest.mark.parametrize("page", [page for page in PAGES if script(page)], ids=lambda page: page.name)
def test_python_blocks_run(page: Path, tmp_path: Path) -> None:
    for mark, name, _, text in blocks(page):
        if mark == "file":
            (tmp_path / name).write_text(text, encoding="utf-8")
    ended = run(script(page) + marked(page), tmp_path)
    assert ended.code == 0, ended.errors


def test_a_block_that_warns_fails(tmp_path: Path) -> None:
    ended = run("import warnings\nprint('before')\nwarnings.warn('deprecated', stacklevel=1)", tmp_path)
    assert ended.code == 1
    assert "UserWarning: deprecated" in ended.errors


@pytest.mark.parametrize("script", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name)
def test_examples_run(script: Path, tmp_path: Path) -> None:
    ended = run(script.read_text(encoding="utf-8"), tmp_path, arguments=(str(tmp_path),))
    assert ended.code == 0, ended.errors
    assert (tmp_path / "plan.json").exists()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_their_options_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    shown_commands = commands("\n".join(text for _, _, language, text in blocks(page) if language in ("sh", "")))
    # in running text, where no line begins with them
    shown_commands += [words.split()[1:] for words in re.findall(r"`(spectrim [a-z][^`]*)`", text)]
    for words in shown_commands:
        command = get_command(app)
        while words and hasattr(command, "commands"):
            first, *words = words
            assert first in command.commands or first in (".", "..") or first.isupper(), f"spectrim {first}"
            command = command.commands.get(first, command)
        known = {option for parameter in command.params for option in parameter.opts + parameter.secondary_opts}
        unknown = {word.partition("=")[0] for word in words if word.startswith("--")} - known - {"--help"}
        assert not unknown or hasattr(command, "commands"), (
            f"spectrim {command.name} has no {', '.join(sorted(unknown))}"
        )


def test_the_check_of_commands_sees_them() -> None:
    text = "spectrim recipe list  # all\n  spectrim plan .. \\\n    --out 'a b'\npip install . && spectrim demo\n"
    assert commands(text) == [["recipe", "list"], ["plan", "..", "--out", "a b"], ["demo"]]
    assert sum(len(commands(page.read_text(encoding="utf-8"))) for page in PAGES) > 40


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_recipes_that_are_named_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    families = "|".join(sorted({name.partition("-")[0] for name in NAMES if "-" in name}))
    named = set(re.findall(rf"`((?:{families})-[a-z0-9-]+)`", text))
    named |= {name for name in re.findall(r"spectrim recipe (?:(?:run|show) )?([a-z0-9-]+)", text) if "-" in name}
    assert named <= {*NAMES, *KINDS}


def test_every_recipe_is_named() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES if page.name != "CHANGELOG.md")
    assert [name for name in NAMES if f"spectrim recipe {name}" not in text and f"`{name}`" not in text] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_headings_meet_one(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            there = (page.parent / target if target else page).read_text(encoding="utf-8")
            headings = re.findall(r"^#+ (.+)$", there, re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}, anchor


def test_every_page_can_be_reached_from_the_readme() -> None:
    reached: set[Path] = set()
    ahead = {ROOT / "README.md"}
    while ahead:
        page = ahead.pop()
        reached.add(page)
        links = re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8"))
        ahead |= {there for link in links if (there := (page.parent / link).resolve()).suffix == ".md"} - reached
    assert set((ROOT / "docs").glob("*.md")) <= reached


def test_the_two_commands_stand_where_continuous_integration_reads_them() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "<!-- demo-command -->\n```sh\npip install . && spectrim demo\n```" in text
    assert '<!-- test-command -->\n```sh\npip install ".[all,test]" && pytest -n auto\n```' in text


def test_one_version_everywhere() -> None:
    assert version("spectrim") == st.__version__


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_everything_a_table_promises_was_filled_in(page: Path) -> None:
    assert re.findall(r"@@\w+@@", page.read_text(encoding="utf-8")) == []
