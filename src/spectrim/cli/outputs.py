"""Files that a command writes: all of them or none, and never over a file that Spectrim did not write."""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from spectrim.core.errors import FileError
from spectrim.core.files import TEMPORARY, FrozenFile, read_text, require_writable_folder, sha256_of

OverwriteCheck = Callable[[Path], object]
"""Raises a FileError or returns False for a file that must not be replaced, since Spectrim did not write it."""

OutputFiles = Mapping[str, tuple[OverwriteCheck, str]]
"""What a command writes: by name, whether a file that is there may be replaced, and what is in it."""


class Record(FrozenFile):
    """What a command writes of what it did: every number, and the command that does it again."""

    version: Literal[1] = 1
    command: str


def has_checksum(checksum: Callable[[], str]) -> OverwriteCheck:
    """Whether a file is as it was written; its checksum is in a record beside it."""
    return lambda path: checksum() == sha256_of(path)


def is_page(path: Path) -> bool:
    """Whether Spectrim wrote a page."""
    return "Made by Spectrim." in read_text(path)


@contextmanager
def outputs(folder: Path, files: OutputFiles) -> Iterator[Path]:
    """A temporary folder, whose files are moved to `folder` when the block has ended well; otherwise nothing is left.

    Raises `FileError` for a folder that cannot be written to, or that holds one of the `files` which must not be
    replaced.
    """
    new = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    for name, (check, _) in files.items():
        with suppress(FileError):
            if not (folder / name).exists() or check(folder / name) is not False:
                continue
        raise FileError(
            f"{folder / name} is there already, and is not a file that this command wrote; it stays as it is: move it "
            "away, or choose another --out"
        )
    try:
        require_writable_folder(folder)
        with tempfile.TemporaryDirectory(dir=folder, prefix=TEMPORARY) as temporary:
            yield Path(temporary)
            for path in sorted(path for path in Path(temporary).rglob("*") if path.is_file()):
                target = folder / path.relative_to(temporary)
                try:
                    target.parent.mkdir(parents=True, exist_ok=True)
                    path.replace(target)
                except OSError as error:
                    reason = error.strerror or error
                    raise FileError(f"cannot write {target}: {reason}; choose another --out") from error
    except BaseException:
        for parent in new:
            with suppress(OSError):  # not made, or no longer empty
                parent.rmdir()
        raise
