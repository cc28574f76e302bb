"""Files that a command writes: all of them or none, and never over a file that Spectrim did not write."""

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from spectrim.core.errors import FileError
from spectrim.core.files import require_writable_folder

Ours = Callable[[Path], object]
"""Raises a FileError for a file that Spectrim did not write."""


@contextmanager
def outputs(folder: Path, files: Mapping[str, Ours]) -> Iterator[Path]:
    """A temporary folder, whose files are moved to `folder` when the block has ended well; otherwise nothing is left.

    Args:
        folder: Is made if it is not there.
        files: What will be written, each with a check whether a file of that name may be replaced.

    Raises:
        FileError: the folder cannot be written to, or holds a file of such a name that must not be replaced.
    """
    new = [one for one in (folder, *folder.parents) if not one.exists()]
    for name, ours in files.items():
        _require_ours(folder / name, ours)
    try:
        require_writable_folder(folder)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".spectrim-") as temporary:
            yield Path(temporary)
            _move(files, Path(temporary), folder)
    except BaseException:
        for one in new:
            with suppress(OSError):  # not made, or no longer empty
                one.rmdir()
        raise


def _move(names: Iterable[str], source: Path, target: Path) -> None:
    for name in names:
        try:
            (source / name).replace(target / name)
        except OSError as error:
            raise FileError(f"cannot write {target / name}: {error.strerror or error}; choose another --out") from error


def _require_ours(path: Path, ours: Ours) -> None:
    if not path.exists():
        return
    try:
        ours(path)
    except FileError as error:
        raise FileError(
            f"{path} is there already, and is not a file that this command wrote; it stays as it is: move it away, or "
            "choose another --out"
        ) from error
