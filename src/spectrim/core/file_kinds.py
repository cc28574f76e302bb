"""What a file of weights is, told by its name and its first bytes, and what to do with one that cannot be read."""

import json
import tomllib
import zipfile
from contextlib import suppress
from pathlib import Path

from spectrim.core.errors import did_you_mean

STATES = ("state_dict", "model_state_dict", "model", "module", "net", "network", "weights", "params")
"""Entries in which a checkpoint keeps a network's state beside other things, the most explicit name first."""

SAVE_STATE = "torch.save(model.state_dict(), 'weights.pt')"


def why_no_weights(path: str | Path) -> str | None:
    """What there is in the place of a file of weights, and what to do with it; None for a file that may hold some."""
    address, path = str(path), Path(path)
    if address.startswith(("https:/", "http:/", "file:/")):
        return f"an address; download it: torch.hub.download_url_to_file({address!r}, 'weights{path.suffix}')"
    if path.is_dir():
        return _in_folder(path)
    if not path.exists():
        if address.startswith("~/") and path.expanduser().exists():
            return f"missing; give os.path.expanduser({address!r})"
        near = did_you_mean(address, map(str, path.parent.glob("*")))
        return f"missing; {near}the current folder is {Path.cwd()}"
    start, members = b"", ""
    with suppress(OSError, zipfile.BadZipFile):
        with path.open("rb") as opened:
            start = opened.read(32)
        members = "\n".join(zipfile.ZipFile(path).namelist()) if start[:2] == b"PK" else ""
    for kind in tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))["kinds"]:
        begins, member = kind.get("begins", "\0" * 33).encode("latin-1"), kind.get("member", "\0")
        if address.lower().endswith(tuple(kind["suffixes"])) or start.startswith(begins) or member in members:
            return str(kind["text"].format(repr(address)))
    return None


def _in_folder(path: Path) -> str:
    with suppress(OSError, ValueError, LookupError, TypeError):
        kind = json.loads((path / "config.json").read_text(encoding="utf-8"))["architectures"][0]
        return f"a folder of Hugging Face; load the network from it: transformers.{kind}.from_pretrained({str(path)!r})"
    ends = (".index.json", ".safetensors", ".pt", ".pth", ".ckpt", ".bin")
    weights = [str(each) for end in ends for each in sorted(path.iterdir()) if each.name.endswith(end)]
    return "a folder" + (f"; name a file in it: {', '.join(map(repr, weights[:3]))}" if weights else " without weights")
