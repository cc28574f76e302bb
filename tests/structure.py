"""The structure of the source in figures: rooms, imports, names, lengths.

    python tests/structure.py           # the table
    python tests/structure.py --list    # also every place that a figure counts

`test_structure.py` holds these figures to their bars.
"""

import argparse
import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "spectrim"
USERS = ("tests", "benchmarks", "examples")
MAY_NAME_FORMS = ("layers/forms/", "cli/", "recipes/")
LAYER_TYPES = {"Linear", "Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d"}

FORM_NAMES = {
    name
    for path in (SOURCE / "layers" / "forms").glob("*.py")
    for name in re.findall(r'^    name = "(\w+)"$', path.read_text(encoding="utf-8"), re.MULTILINE)
} - {"width"}  # which figures and small networks have as well

LOOSE = {"one", "found", "given", "made", "kept", "shown", "wanted"}
"""Names that say nothing of what they hold: of no variable, loop or argument."""

WORDS = {
    *("felt", "feel", "feeling", "told", "telling", "shown", "sequel", "sequels", "stream", "streams"),
    *("prefix", "passing", "room", "settle", "settled", "race", "judged", "noted", "offers", "offered", "choices"),
    *("menu", "menus", "picked", "refusal", "also", "sites", "fixed", "running", "noise", "answers", "patches"),
    *("in_turn", "summed", "several", "averaging", "algebra", "gathered", "leading", "cut", "cuts", "shrink"),
    *("movable", "job", "still", "outcome", "chance", "prepared", "lap", "laps", "apart", "making", "trial"),
    *("use", "shape_of", "way", "ours", "left", "mended", "stand_in"),
}
"""Home-made words for which the field has others, as whole names (any case, leading underscores aside)."""

PARTS = {
    *("felt", "feel", "feels", "feeling", "told", "telling", "sequel", "sequels", "settle", "settled", "judged"),
    *("noted", "offers", "refusal", "algebra", "chance", "lap", "laps", "movable", "menu", "menus", "mended"),
}
"""Those that may not even be a part of a name."""


@dataclass(frozen=True)
class Module:
    """One file of the source."""

    path: Path
    text: str = field(repr=False)

    @cached_property
    def tree(self) -> ast.Module:
        """Parsed."""
        return ast.parse(self.text)

    @cached_property
    def nodes(self) -> list[ast.AST]:
        """Every part of the tree."""
        return list(ast.walk(self.tree))

    @property
    def name(self) -> str:
        """Relative to the package; of a file outside it, to the repository."""
        return self.path.relative_to(SOURCE if self.path.is_relative_to(SOURCE) else ROOT).as_posix()

    @property
    def room(self) -> str:
        """The file or folder directly in the package."""
        return self.name.split("/", 1)[0].removesuffix(".py")

    @property
    def imports(self) -> set[str]:
        """The other rooms that this module imports, at the top or later."""
        modules: set[str] = set()
        for node in self.nodes:
            if isinstance(node, ast.Import):
                modules |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                modules |= {f"{node.module}.{alias.name}" for alias in node.names}
        rooms = {name.split(".")[1] for name in modules if name.startswith("spectrim.")}
        return {room for room in rooms if (SOURCE / room).exists() or (SOURCE / f"{room}.py").exists()} - {self.room}

    @property
    def functions(self) -> Iterator[ast.FunctionDef]:
        """Every function and method, nested ones too."""
        return (node for node in self.nodes if isinstance(node, ast.FunctionDef))

    @property
    def public(self) -> set[str]:
        """Names of its functions and methods that belong to its interface."""
        names = {node.name for node in self.tree.body if isinstance(node, ast.FunctionDef)}
        for owner in self.tree.body:
            if isinstance(owner, ast.ClassDef) and not owner.name.startswith("_"):
                names |= {node.name for node in owner.body if isinstance(node, ast.FunctionDef)}
        return {name for name in names if not name.startswith("_")}

    def at(self, node: ast.AST, text: str) -> str:
        """A place for a list."""
        return f"{self.name}:{getattr(node, 'lineno', 0)} {text}"


def modules(*folders: Path) -> list[Module]:
    """Every file in these folders."""
    paths = sorted(path for folder in folders for path in folder.rglob("*.py"))
    return [Module(path, path.read_text(encoding="utf-8")) for path in paths]


def entries() -> list[str]:
    """Files and folders directly in the package; the marker `py.typed` aside."""
    return sorted(path.name for path in SOURCE.iterdir() if path.name not in ("__pycache__", "py.typed"))


def longest_chain(source: list[Module]) -> list[str]:
    """The longest chain of imports between the entries, each of which imports the next; or a circle."""
    graph: dict[str, set[str]] = {}
    for module in source:
        if module.room != "__init__":
            graph.setdefault(module.room, set()).update(module.imports)

    circles: list[list[str]] = []

    def below(room: str, above: tuple[str, ...]) -> list[str]:
        if room in above or circles:
            circles.append([*above, room])
            return []
        chains = (below(other, (*above, room)) for other in sorted(graph.get(room, ())))
        return [room, *max(chains, key=len, default=[])]

    chains = [below(room, ()) for room in graph]
    return ["a circle:", *circles[0]] * 9 if circles else max(chains, key=len)


def form_strings(source: list[Module]) -> list[str]:
    """Names of forms as strings where no form has to be named."""
    return [
        module.at(node, repr(node.value))
        for module in source
        if not module.name.startswith(MAY_NAME_FORMS)
        for node in module.nodes
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in FORM_NAMES
    ]


def layer_checks(source: list[Module]) -> list[str]:
    """`isinstance` on a type of layer outside the files of the layer types."""
    return [
        module.at(node, ast.unparse(node))
        for module in source
        if not module.name.startswith("layers/types/")
        for node in module.nodes
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in ("isinstance", "issubclass")
        if any(getattr(part, "attr", getattr(part, "id", None)) in LAYER_TYPES for part in ast.walk(node))
    ]


def _targets(node: ast.AST) -> Iterator[ast.Name]:
    return (part for part in ast.walk(node) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store))


def bound_names(module: Module) -> Iterator[tuple[ast.AST, str]]:
    """Every name that the module gives to something: variables, arguments, functions, classes, attributes."""
    for node in module.nodes:
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node, node.id
        elif isinstance(node, ast.arg):
            yield node, node.arg
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node, node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node, node.attr
        elif isinstance(node, ast.ImportFrom | ast.Import):
            yield from ((node, alias.asname) for alias in node.names if alias.asname)


def _parts(name: str) -> set[str]:
    return {part.lower() for part in re.findall(r"[A-Z]?[a-z0-9]+|[A-Z]+(?![a-z])", name)}


def home_made_words(source: list[Module]) -> list[str]:
    """Names with a word for which the field has another; the names of the modules too."""
    places = [f"{module.name} (the module itself)" for module in source if module.path.stem in WORDS]
    for module in source:
        for node, name in bound_names(module):
            if name.strip("_").lower() in WORDS or _parts(name) & PARTS:
                places.append(module.at(node, name))
    return places


def loose_names(source: list[Module]) -> list[str]:
    """Variables and arguments whose name says nothing of what they hold; fields such as `cost.kept` are none."""
    places = []
    for module in source:
        fields = {
            id(target)
            for owner in module.nodes
            if isinstance(owner, ast.ClassDef)
            for statement in owner.body
            if isinstance(statement, ast.AnnAssign)
            for target in _targets(statement)
        }
        for node, name in bound_names(module):
            variable = isinstance(node, ast.Name | ast.arg) and id(node) not in fields
            if variable and name in LOOSE:
                places.append(module.at(node, name))
    return places


def many_parameters(source: list[Module]) -> list[str]:
    """Functions with more than 8 parameters, `self` aside; a private one is marked."""
    places = []
    for module in source:
        for node in module.functions:
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            number = sum(argument.arg not in ("self", "cls") for argument in arguments)
            if number > 8:
                mark = "" if node.name in module.public else " (private)"
                places.append(module.at(node, f"{node.name} has {number}{mark}"))
    return places


def body_lengths(source: list[Module]) -> list[tuple[int, str]]:
    """Lines of every function's body without its docstring, longest first."""
    lengths = []
    for module in source:
        for node in module.functions:
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            lines = (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0
            lengths.append((lines, module.at(node, node.name)))
    return sorted(lengths, reverse=True)


@dataclass(frozen=True)
class Figure:
    """One line of the table.

    Attributes:
        name: What is counted.
        value: How many there are.
        bar: The most that there may be.
        places: Where.
    """

    name: str
    value: int
    bar: int
    places: tuple[str, ...] = ()


def figures() -> tuple[Figure, ...]:
    """All of them."""
    source = modules(SOURCE)
    chain, lengths = longest_chain(source), body_lengths(source)
    files = sorted(((len(module.text.splitlines()), module.name) for module in source), reverse=True)
    counted = [
        ("form names as strings outside their files", form_strings(source), 4),
        ("isinstance on layer types outside their files", layer_checks(source), 0),
        ("home-made words in names", home_made_words(source), 0),
        ("names that say nothing", loose_names(source), 0),
        ("the same in tests, benchmarks and examples", loose_names(modules(*(ROOT / name for name in USERS))), 0),
        ("functions with more than 8 parameters", many_parameters(source), 12),
        ("private ones among them", [place for place in many_parameters(source) if "private" in place], 0),
        ("modules over 400 lines", [f"{name} {lines}" for lines, name in files if lines > 400], 0),
    ]
    return (
        Figure("files and folders in the package", len(entries()), 20, tuple(entries())),
        Figure("longest chain of imports between them", len(chain), 10, (" -> ".join(chain),)),
        *(Figure(name, len(places), bar, tuple(places)) for name, places, bar in counted),
        Figure("longest function body", lengths[0][0], 45, tuple(f"{lines} {at}" for lines, at in lengths[:12])),
        Figure("lines of Python", sum(lines for lines, _ in files), 36_736, tuple(f"{n} {at}" for n, at in files[:12])),
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="every place that is counted")
    parser.add_argument("--room", default="", help="only places in this room")
    options = parser.parse_args()
    table = figures()
    for figure in table:
        print(f"{figure.value:6}  (at most {figure.bar:5})  {figure.name}")
        if options.list or options.room:
            for place in figure.places:
                if any(word.startswith(options.room) for word in place.split()):
                    print(f"            {place}")
    sys.exit(any(figure.value > figure.bar for figure in table))


if __name__ == "__main__":
    main()
