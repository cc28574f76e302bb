"""From a trained network to a smaller one, step by step, on the embedded digits (about ten seconds).

    python examples/compress_your_network.py [FOLDER]

Put your own network and loaders in place of the first part; the rest stays as it is.
"""

import sys
from pathlib import Path

import torch
from torch.utils.data import DataLoader, TensorDataset

import spectrim as st
from spectrim import data, models


def loader(split: str) -> DataLoader:
    """Pairs of images and labels, as any DataLoader gives them."""
    digits = data.load("digits", split="test" if split == "test" else "train")
    images = digits.images.float() / 255
    return DataLoader(TensorDataset(images, digits.labels), batch_size=64, shuffle=split == "train")


def main(folder: Path) -> None:
    """Train, look, compress, tune, prove, save, load."""
    torch.manual_seed(0)
    train, test = loader("train"), loader("test")
    example = next(iter(test))[0][:1]

    # Your trained network. Here: a fresh one, trained with Spectrim's own loop, which also serves for fine-tuning.
    dense = st.finetune(models.mlp(inputs=64, width=256, hidden=3), train, epochs=8, lr=2e-3).model

    # Look at it first: which layers carry little in many dimensions?
    analysis = st.analyze(dense, example, calibration=st.calibrate(dense, train, labels=True), keep_last=True)
    print(st.text(analysis))

    # Decide. A plan is a value: print it, save it, edit the JSON, load it.
    plan = st.plan(analysis, st.Energy(0.9))
    print(st.text(plan))
    plan.save(folder / "plan.json")

    # Compress, and let the dense network teach the small one.
    small = st.compress(dense, plan, example_inputs=example, analysis=analysis).model
    tuned = st.finetune(small, train, teacher=dense, epochs=4).model

    # Prove it on your hardware.
    print(st.text(st.measure(dense, example, data=test)))
    print(st.text(st.measure(tuned, example, reference=dense, data=test)))

    # Keep it. Loading needs the network's own code and the file, nothing else.
    path = st.save(tuned, folder / "small.safetensors")
    again = st.load(path, models.mlp(inputs=64, width=256, hidden=3)).eval()
    with torch.no_grad():
        assert torch.equal(again(example), tuned.eval()(example))
    print(f"saved {path}")


if __name__ == "__main__":
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "spectrim-example")
    target.mkdir(parents=True, exist_ok=True)
    main(target)
