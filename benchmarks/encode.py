"""How much faster a compressed encoder is than its dense self, by runtime, length and batch size.

    python benchmarks/encode.py --dense MINILM --compressed SMALL --runtimes torch,onnxruntime,openvino

Both are folders of Hugging Face; `--device cuda --runtimes torch,torch-bf16` times them on a GPU. Speed-ups are medians
of paired rounds in one process, with their 95 % interval; one thread. Beside them what the multiplications alone
would give.
"""

import argparse
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import spectrim as st
from spectrim.models.folders import load_pretrained


def inputs(vocabulary: int, *, batch: int, length: int) -> dict[str, Any]:
    """Random tokens, none of them padding."""
    tokens = torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def main() -> None:
    """Print a line for every runtime, length and batch size, and then the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dense", required=True)
    parser.add_argument("--compressed", required=True)
    parser.add_argument("--runtimes", default=("torch", "onnxruntime", "openvino"), type=lambda text: text.split(","))
    parser.add_argument("--lengths", default=(32, 128, 512), type=lambda text: tuple(map(int, text.split(","))))
    parser.add_argument("--batches", default=(1, 8), type=lambda text: tuple(map(int, text.split(","))))
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--device", default="cpu", help="cuda for a GPU, in torch, torch-compile or torch-bf16")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dense, small = (
        load_pretrained(folder).eval().to(arguments.device) for folder in (arguments.dense, arguments.compressed)
    )
    table = Table("runtime", "length", "batch", "dense ms", "speed-up", "95 % interval", "of the MACs", "verdict")
    for runtime in arguments.runtimes:
        for length in arguments.lengths:
            for batch in arguments.batches:
                example = inputs(dense.config.vocab_size, batch=batch, length=length)
                measured = st.measure(small, example, reference=dense, runtime=runtime, rounds=arguments.rounds)
                ratio, of_macs = measured.speedup, 1 / (measured.macs_ratio or 1)
                assert ratio is not None
                assert measured.reference_ms is not None
                bounds = f"{ratio.low:.2f} to {ratio.high:.2f}"
                cells = (runtime, str(length), str(batch), f"{measured.reference_ms:.1f}", f"{ratio.value:.2f}", bounds)
                table.add_row(*cells, f"{of_macs:.2f}", measured.verdict)
                print(*cells, f"{of_macs:.2f}", measured.verdict, sep="  ", flush=True)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
