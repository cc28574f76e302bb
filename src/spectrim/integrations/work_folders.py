"""The folder in which a long compression keeps what is done, so that it goes on where it was stopped."""

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from safetensors.torch import save_file
from torch import Tensor

from spectrim.core.errors import FileError, ResourceError
from spectrim.core.files import TEMPORARY, read_text, require_writable_folder, write_atomically, write_text
from spectrim.integrations.shards import open_shard
from spectrim.models.folders import CONFIG

WORK = f"{TEMPORARY}checkpoint"
BEGIN_ANEW = "delete the folder that was begun, to begin anew"
Stage = Literal["spectra", "dense", "compressed"]
"""Hidden states of the first pass, and of both networks in the second one; at the first block they are the same."""


@dataclass(frozen=True)
class WorkFolder:
    """Files of a compression that is under way, in a hidden folder of its output; each is whole or absent."""

    out: Path

    @classmethod
    def begin(cls, out: Path, request: str, *, needed: int) -> "WorkFolder":
        """Make it, or go on with what is there.

        Args:
            out: The folder of the output.
            request: All that the result depends on.
            needed: Bytes that will be written.

        Raises:
            FileError: the folder was begun with another request.
            ResourceError: the disk has less space than is needed.
        """
        work = cls(out)
        if work.is_begun:
            if read_text(work._request) != request:
                raise FileError(
                    f"{out} was begun with another rule, other data, options or weights; give those again to go on, "
                    f"or delete {out} to begin anew"
                )
            for part in out.glob(".*.part"):  # what was being written when it was stopped
                part.unlink()
            return work
        free = shutil.disk_usage(next(parent for parent in (out, *out.absolute().parents) if parent.exists())).free
        if needed > free:
            raise ResourceError(
                f"{needed / 1e9:.1f} GB will be written to {out}, and {free / 1e9:.1f} GB are free; choose a folder on "
                "another disk, or give fewer samples"
            )
        require_writable_folder(work.path)
        write_text(work._request, request)
        return work

    @property
    def path(self) -> Path:
        """The folder."""
        return self.out / WORK

    def require_usable(self) -> None:
        """Raise `FileError` for a folder that holds more than what commands have left there that were killed."""
        out = self.out
        if self.is_begun or not out.exists():
            return
        if not out.is_dir() or any(not path.name.startswith(TEMPORARY) for path in out.iterdir()):
            raise FileError(f"{out} is there already, and stays as it is; choose another folder")

    @property
    def _request(self) -> Path:
        return self.path / "request.json"

    @property
    def is_begun(self) -> bool:
        """Whether there is something to go on with."""
        return self._request.is_file()

    @property
    def is_complete(self) -> bool:
        """Whether the output is whole."""
        return (self.out / CONFIG).is_file()

    def spectra(self, block: int) -> Path:
        """What is known of a block after the first pass."""
        return self.path / f"spectra-{block:05d}.safetensors"

    def weights(self, block: int) -> Path:
        """A block's weights after the second pass."""
        return self.path / f"weights-{block:05d}.safetensors"

    def record(self, block: int) -> Path:
        """What is known of a block after the second pass, written last."""
        return self.path / f"block-{block:05d}.json"

    def write_hidden(self, stage: Stage, block: int, batch: int, hidden: Tensor) -> None:
        """Keep what reaches a block in a batch."""
        path = self._hidden(stage, block) / f"{batch:06d}.safetensors"
        write_atomically(path, lambda part: save_file({"hidden": hidden.detach().contiguous()}, part))

    def read_hidden(self, stage: Stage, block: int, batch: int) -> Tensor:
        """What reaches a block in a batch, as it lies in the file."""
        with open_shard(self._hidden(stage, block) / f"{batch:06d}.safetensors", hint=BEGIN_ANEW) as opened:
            return cast(Tensor, opened.get_tensor("hidden"))

    def forget_hidden(self, stages: Iterable[Stage], block: int) -> None:
        """Delete what reached this block and those before it."""
        for stage in stages:
            for path in self.path.glob(f"{stage}-*"):
                if path.is_dir() and int(path.name.rpartition("-")[2]) <= block:
                    shutil.rmtree(path)

    def _hidden(self, stage: Stage, block: int) -> Path:
        return self.path / (f"{stage}-{block:05d}" if block else "first")
