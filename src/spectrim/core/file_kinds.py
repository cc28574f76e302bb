"""What a file of weights is, told by its name and its first bytes, and what to do with one that cannot be read."""

import json
import pickletools
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


def conversion_of(path: Path) -> str:
    """The line that saves the state alone of a pickle, told by the strings in it: it is not run."""
    steps: list[tuple[str, object]] = []
    name, archive, pickles = repr(str(path)), None, 0
    with suppress(ValueError, OSError, KeyError, zipfile.BadZipFile), path.open("rb") as opened:
        archive = zipfile.ZipFile(opened) if zipfile.is_zipfile(opened) else None
        opened.seek(0)
        content = archive.open(f"{archive.namelist()[0].partition('/')[0]}/data.pkl") if archive else opened
        while pickles < 4:  # in torch's older format it is the fourth
            steps = [(code.name, value) for code, value, _ in pickletools.genops(content)]
            pickles += 1
    whole = (
        f"torch.load({name}, 'cpu', weights_only=False)"
        if archive or pickles > 1
        else f"pickle.load(open({name}, 'rb'))"
    )
    first = next((code for code, _ in steps if code not in ("PROTO", "FRAME", "MARK")), "")
    words = [value for _, value in steps if isinstance(value, str)]
    entry = next((entry for entry in STATES if entry in words and "DICT" in first), None)
    whole += f"[{entry!r}]" if entry else ""
    if entry not in STATES[:2] and any(word.startswith("torch.nn.modules") for word in words):
        whole += ".state_dict()"
    elif any(word.startswith("numpy") for word in words) and not entry:
        whole = f"{{name: torch.as_tensor(value) for name, value in {whole}.items()}}"
    return f"torch.save({whole}, 'weights.pt')"
