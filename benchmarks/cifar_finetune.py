"""CIFAR-10 accuracy of ResNet-20 at 0.3 of its MACs after ten epochs of fine-tuning on the whole training set.

    python benchmarks/cifar_finetune.py --weights cifar_resnet20.safetensors --out tuned     # seed 0; an hour or so
    python benchmarks/cifar_finetune.py --weights cifar_resnet20.safetensors --out tuned --held-out --epochs 2 --lr 3e-3
    .. --device cuda --share 0.28 --epochs 30 --optimizer sgd --lr 0.05 --label-weight 0.5 --free-norms    # retrained

The dense network is the teacher, or another one with `--teacher resnet32 --teacher-weights cifar_resnet32.safetensors`.
Labels are used with `--label-weight` only; images are flipped and shifted. Start it again to resume it. With
`--held-out`, 5000 training images are left out, and accuracy is on those: to choose settings.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from cifar_zero_shot import Augmented, accuracy, calibration, compressed, network, padded
from rich.console import Console

import spectrim as st
from spectrim.data import load
from spectrim.models import cifar_inputs, resolve

HELD_OUT = 5000
BARS = {0.3: 90.0, 0.28: 91.3}
"""Test accuracy by the share of the MACs, after 10 and 30 epochs."""


def main() -> None:
    """Compress, fine-tune, and hold the accuracy against the bar."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=("resnet20", "resnet32"), default="resnet20")
    parser.add_argument("--share", type=float, default=0.3, help="MACs kept")
    parser.add_argument("--weights", type=Path, required=True, help="the published network as safetensors")
    parser.add_argument("--out", type=Path, required=True, help="folder for the networks and the unfinished run")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--optimizer", choices=("adamw", "sgd"), default="adamw")
    parser.add_argument("--weight-decay", type=float, default=0.0)
    parser.add_argument("--label-weight", type=float, default=0.0, help="share of the labels in the loss")
    parser.add_argument("--loss", choices=("mse",), help="of the outputs, in place of the divergence of classes")
    parser.add_argument("--precision", choices=("float32", "bf16"), default="float32", help="of the training")
    parser.add_argument("--temperature", type=float, default=4.0)
    parser.add_argument("--free-norms", action="store_true", help="BatchNorm statistics follow the batches")
    parser.add_argument(
        "--teacher",
        choices=("resnet20", "resnet32"),
        nargs="+",
        help="the dense network by default; of several the mean",
    )
    parser.add_argument("--teacher-weights", type=Path, nargs="+", help="a file for each teacher")
    parser.add_argument("--device", default="cpu", help="where it is trained, such as cuda")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--held-out", action="store_true", help="choose on held-out training images instead")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    console, dense = Console(), network(args)
    small = start(args, dense).to(args.device)
    train = load("cifar10", split="train")
    order = torch.randperm(len(train.images), generator=torch.Generator().manual_seed(args.seed))
    scored = (train.images[order[:HELD_OUT]], train.labels[order[:HELD_OUT]])
    if not args.held_out:
        test = load("cifar10", split="test")
        scored = (test.images, test.labels)
    images, labels = padded(cifar_inputs(train.images)).to(args.device), train.labels
    if args.held_out:
        images, labels = images[order[HELD_OUT:].to(images.device)], labels[order[HELD_OUT:]]
    bar = None if args.held_out or args.network != "resnet20" else BARS.get(args.share)
    before = accuracy(small, *scored)
    console.print(
        f"dense {accuracy(dense, *scored):.2f}, at {args.share:g} of the MACs {before:.2f}, {len(images)} images"
    )
    chosen = "-held-out" if args.held_out else ""
    norms = "-free" if args.free_norms else ""
    taught = f"{'+'.join(args.teacher or ['dense'])}-w{args.label_weight:g}-{args.loss or f't{args.temperature:g}'}"
    norms += "-bf16" if args.precision == "bf16" else ""
    setting = (
        f"{args.epochs}x{args.batch}-{args.optimizer}{args.lr:g}-decay{args.weight_decay:g}-{taught}{norms}{chosen}"
    )
    name = f"{args.network}-{args.share:g}-seed{args.seed}-{setting}"
    tuned = st.finetune(
        small,
        lambda epoch: Augmented(images, draw=1000 * args.seed + epoch, labels=labels, batch=args.batch),
        teacher=teacher(args, dense).to(args.device),
        epochs=args.epochs,
        lr=args.lr,
        optimizer=args.optimizer,
        weight_decay=args.weight_decay,
        label_weight=args.label_weight,
        temperature=args.temperature,
        loss=args.loss,
        precision=args.precision,
        frozen_norms=not args.free_norms,
        seed=args.seed,
        checkpoint=args.out / f"{name}.unfinished.safetensors",
        save_every=100,
        on_step=progress(console),
    )
    st.save(tuned.model, args.out / f"{name}.safetensors")
    after = accuracy(tuned.model, *scored)
    console.print(f"{setting}, seed {args.seed}: {after:.2f}" + (f" (bar {bar})" if bar else ""))
    sys.exit(1 if bar and after < bar else 0)


class Mean(torch.nn.ModuleList):
    """The mean of what several networks give."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (batch, classes)."""
        return torch.stack([network(x) for network in self]).mean(0)


def teacher(args: argparse.Namespace, dense: torch.nn.Module) -> torch.nn.Module:
    """The network whose outputs are learnt."""
    if args.teacher is None:
        return dense
    files = zip(args.teacher, args.teacher_weights, strict=True)
    return Mean(resolve(f"spectrim:{name}", weights=path) for name, path in files).eval()


def start(args: argparse.Namespace, dense: torch.nn.Module) -> torch.nn.Module:
    """The compressed network, made once."""
    path = args.out / f"{args.network}-{args.share:g}-seed{args.seed}.safetensors"
    if path.exists():
        return st.load(path, network(args))
    small = compressed(dense, calibration(args.seed), args.share).model
    st.save(small, path)
    return small


def progress(console: Console) -> Callable[[st.training.Step], None]:
    """A line every 50 steps."""
    begun = time.perf_counter()

    def report(step: st.training.Step) -> None:
        if step.step % 50 == 49:
            remaining = f", {step.seconds_left / 60:.0f} min left" if step.seconds_left else ""
            console.print(
                f"{time.perf_counter() - begun:6.0f} s  epoch {step.epoch + 1}, {step.step + 1}/{step.steps}: "
                f"loss {step.loss:.4f}{remaining}"
            )

    return report


if __name__ == "__main__":
    main()
