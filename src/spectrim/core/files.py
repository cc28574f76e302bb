"""Files that are either whole or absent, and values read from them that are checked before use."""

import hashlib
import secrets
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError

from spectrim.core.arguments import checked
from spectrim.core.errors import ArgumentError, FileError

TEMPORARY = ".spectrim-"
"""How the names of folders begin that are only there while a command runs, or is stopped."""

_Value = TypeVar("_Value", bound=BaseModel)


class Frozen(BaseModel):
    """A value that is checked when it is made, cannot change afterwards, and goes to JSON and back.

    Raises:
        ArgumentError: a field is missing, unknown, or of another type or range than it has.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, serialize_by_alias=True)

    def __init__(self, /, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            fault = error.errors()[0]
            place = ".".join(map(str, fault["loc"]))
            raise ArgumentError(f"{type(self).__name__}({place}=..): {fault['msg']}") from error

    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]  # values inside others are not made by it


def write_atomically(path: Path, write: Callable[[Path], object]) -> Path:
    """Let `write` fill a temporary neighbour of `path`, then rename it to `path` in one step.

    An interrupted or failing write leaves the old file, or none. Missing parent folders are made.

    Raises:
        FileError: the folder or the file cannot be written.
    """
    path = Path(path)
    temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}.part"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode
        try:
            write(temporary)
            temporary.chmod(mode)  # some writers put a file of their own in its place, which no one else can read
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise FileError(f"cannot write {path}: {reason}; choose a folder you may write to, with space") from error
    return path


def write_text(path: Path, text: str) -> Path:
    """Write UTF-8 text to `path`, wholly or not at all."""
    return write_atomically(path, lambda part: part.write_text(text, encoding="utf-8"))


def read_text(path: Path) -> str:
    """Read UTF-8 text.

    Raises:
        FileError: the file is missing, unreadable or not text.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise FileError(f"{path} is not a text file (byte {error.start} is not UTF-8)") from error
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror or error}") from error


def gguf_file(folder: Path) -> Path | None:
    """The model of a folder that has one .gguf file, and no config.json."""
    files = [] if (folder / "config.json").exists() else sorted(folder.glob("*.gguf"))
    return files[0] if len(files) == 1 else None


def sha256_of(path: Path) -> str:
    """The checksum of a file, as hexadecimal digits.

    Raises:
        FileError: it cannot be read.
    """
    try:
        with path.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror or error}") from error


def parse(kind: type[_Value], text: str, *, origin: str) -> _Value:
    """Validate JSON `text` as a `kind`; `origin` names it in the message.

    Raises:
        FileError: the text is not JSON, or not a valid `kind`. At most three faults are listed.
    """
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, fault['loc'])) or 'file'}: {fault['msg']}" for fault in error.errors()]
        more = f" (and {len(faults) - 3} more)" if len(faults) > 3 else ""
        raise FileError(f"{origin} is not a valid {kind.__name__}: {'; '.join(faults[:3])}{more}") from error


class FrozenFile(Frozen):
    """A frozen value with a JSON file of its own, in which each level is indented by `indent` spaces."""

    indent: ClassVar[int] = 1

    @checked
    def save(self, path: str | Path) -> Path:
        """Write it as indented JSON, wholly or not at all. Raises `FileError` when that is not possible."""
        return write_text(Path(path), self.model_dump_json(indent=self.indent, exclude_none=True) + "\n")

    @classmethod
    @checked
    def load(cls, path: str | Path) -> Self:
        """Read one. Raises `FileError` when the file is missing, cut short, or not valid, as after a wrong edit."""
        return parse(cls, read_text(Path(path)), origin=str(path))


def require_writable_folder(path: Path) -> Path:
    """Make `path` a folder and prove that a file can be written in it, before hours of work rely on it.

    Raises:
        FileError: `path` is a file, or cannot be made or written to.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path):
            return path
    except OSError as error:
        raise FileError(f"cannot write to the folder {path}: {error.strerror or error}; choose another") from error
