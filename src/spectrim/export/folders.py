"""A compressed model as a folder of Hugging Face, with all that lay beside the dense one."""

import shutil
from pathlib import Path
from typing import Any

from spectrim.core.files import gguf_file
from spectrim.data.samples import load_tokenizer
from spectrim.models.folders import other_files

_SINGLE_FILE = "100TB"


def save_folder(model: Any, folder: Path, *, source: Path) -> None:
    """Save a model of transformers that comes from the folder `source`, with its tokenizer and other files."""
    model.save_pretrained(folder, max_shard_size=_SINGLE_FILE)
    if gguf_file(source):
        load_tokenizer(source).save_pretrained(folder)
    copy_beside(source, folder)


def copy_beside(source: Path, folder: Path) -> None:
    """Copy what a folder has besides the model: tokenizer, settings of text generation, .."""
    for path in other_files(source):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / path, folder / path)
