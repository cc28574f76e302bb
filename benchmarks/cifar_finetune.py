"""CIFAR-10 accuracy of ResNet-20 at 0.3 of its MACs after ten epochs of fine-tuning on the whole training set.

    python benchmarks/cifar_finetune.py --weights cifar_resnet20.safetensors --out tuned     # seed 0; an hour or so
    python benchmarks/cifar_finetune.py --weights cifar_resnet20.safetensors --out tuned --held-out --epochs 2 --lr 3e-3

The dense network is the teacher; labels are not used; images are flipped and shifted. Start it again to resume it.
With `--held-out`, 5000 training images are left out, and accuracy is on those: to choose learning rates.
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
from spectrim.models import cifar_inputs

BAR, HELD_OUT = 90.0, 5000


def main() -> None:
    """Compress, fine-tune, and hold the accuracy against the bar."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=("resnet20", "resnet32"), default="resnet20")
    parser.add_argument("--share", type=float, default=0.3, help="MACs kept")
    parser.add_argument("--weights", type=Path, required=True, help="the published network as safetensors")
    parser.add_argument("--out", type=Path, required=True, help="folder for the networks and the unfinished run")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--held-out", action="store_true", help="choose on held-out training images instead")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    console, dense = Console(), network(args)
    small = start(args, dense)
    train = load("cifar10", split="train")
    order = torch.randperm(len(train.images), generator=torch.Generator().manual_seed(args.seed))
    scored = (train.images[order[:HELD_OUT]], train.labels[order[:HELD_OUT]])
    if not args.held_out:
        test = load("cifar10", split="test")
        scored = (test.images, test.labels)
    images = padded(cifar_inputs(train.images[order[HELD_OUT:]] if args.held_out else train.images))
    barred = not args.held_out and (args.network, args.share) == ("resnet20", 0.3)
    before = accuracy(small, *scored)
    console.print(
        f"dense {accuracy(dense, *scored):.2f}, at {args.share:g} of the MACs {before:.2f}, {len(images)} images"
    )
    chosen = "-held-out" if args.held_out else ""
    name = f"{args.network}-{args.share:g}-seed{args.seed}-{args.epochs}x{args.lr:g}{chosen}"
    tuned = st.finetune(
        small,
        lambda epoch: Augmented(images, draw=1000 * args.seed + epoch),
        teacher=dense,
        epochs=args.epochs,
        lr=args.lr,
        seed=args.seed,
        checkpoint=args.out / f"{name}.unfinished.safetensors",
        save_every=100,
        on_step=progress(console),
    )
    st.save(tuned.model, args.out / f"{name}.safetensors")
    after = accuracy(tuned.model, *scored)
    console.print(f"{args.epochs} epochs at {args.lr:g}: {after:.2f}" + (f" (bar {BAR})" if barred else ""))
    sys.exit(1 if barred and after < BAR else 0)


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
