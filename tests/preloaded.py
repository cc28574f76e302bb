"""Python code in a process of its own, in which the library is imported already: that takes most of a short run."""

import multiprocessing
import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch


@dataclass(frozen=True)
class Ended:
    """A process that has ended.

    Attributes:
        code: Its exit code.
        errors: What it wrote to standard error.
    """

    code: int | None
    errors: str


def run(code: str, folder: Path, *, arguments: tuple[str, ...] = ()) -> Ended:
    """Run the code as a script in the folder, with every warning an error."""
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    multiprocessing.set_forkserver_preload(["spectrim.cli.networks", "spectrim.cli.studies"])
    process = multiprocessing.get_context(method).Process(target=_execute, args=(code, folder, arguments))
    process.start()
    process.join()
    return Ended(process.exitcode, (folder / "stderr.txt").read_text(encoding="utf-8"))


def _execute(code: str, folder: Path, arguments: tuple[str, ...]) -> None:
    for stream, name in ((sys.stdout, "stdout.txt"), (sys.stderr, "stderr.txt")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), stream.fileno())
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    sys.argv = ["script.py", *arguments]
    sys.modules["__main__"] = ModuleType("__main__")
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    exec(compile(code, "script.py", "exec"), vars(sys.modules["__main__"]))
