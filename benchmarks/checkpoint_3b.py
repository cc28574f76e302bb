"""A synthetic Llama of 3 billion parameters in bfloat16, compressed block by block: memory, time, resuming.

    python benchmarks/checkpoint_3b.py --folder llama3b --layers 2

Makes the folder once (random weights; 6 GB with all 28 layers), compresses it to `--params` of its body in a process of
its own, and again in one that is killed twice and started anew; the files of both must be the same, byte by byte.
"""

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

import spectrim as st
from spectrim.core.memory import peak_gb

SAMPLES, LENGTH, BATCH = 8, 256, 2
HIDDEN, INNER, HEADS, KV_HEADS, WORDS = 3072, 8192, 24, 8, 128256


def make(folder: Path, *, layers: int) -> None:
    """Write the folder, a block at a time."""
    if (folder / "config.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)

    def weight(rows: int, columns: int) -> torch.Tensor:
        # singular values that fall, as those of trained weights do
        scale = torch.linspace(0, 4, columns).neg().exp()
        noise = torch.randn(rows, columns, generator=generator).mul_(scale)
        mixed = noise[:, torch.randperm(columns, generator=generator)]
        return mixed.mul_(2 / columns**0.5).to(torch.bfloat16)

    kv = HIDDEN // HEADS * KV_HEADS
    shapes = {"self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (kv, HIDDEN), "self_attn.v_proj": (kv, HIDDEN)}
    shapes |= {"self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN)}
    shapes |= {"mlp.down_proj": (HIDDEN, INNER)}
    ones, weight_map = torch.ones(HIDDEN, dtype=torch.bfloat16), {}
    embedding = torch.randn(WORDS, HIDDEN, generator=generator).to(torch.bfloat16)
    parts = [{"model.embed_tokens.weight": embedding, "model.norm.weight": ones}]
    for number in range(layers + 1):
        file = f"model-{number + 1:05d}-of-{layers + 1:05d}.safetensors"
        if number:
            block = f"model.layers.{number - 1}"
            part = {f"{block}.{name}.weight": weight(*shape) for name, shape in shapes.items()}
            norms = ("input_layernorm", "post_attention_layernorm")
            parts = [part | {f"{block}.{name}.weight": ones.clone() for name in norms}]
        save_file(parts[0], folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(parts[0], file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    sizes = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": layers, "vocab_size": WORDS}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "tie_word_embeddings": True}
    config = LlamaConfig(**sizes, **heads, architectures=["LlamaForCausalLM"], dtype="bfloat16")
    config.save_pretrained(folder)


def compress(folder: Path, out: Path, *, share: float) -> None:
    """One run; prints how long each step took, and one line of JSON."""
    tokens = torch.randint(0, WORDS, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(1))
    begin = time.perf_counter()

    def report(what: str, done: int, total: int) -> None:
        wall, cpu = time.perf_counter() - begin, time.process_time()
        print(f"{wall:8.1f} s  {cpu:8.1f} s of CPU  {peak_gb():5.2f} GB  {what}  {done}/{total}", flush=True)

    data = [{"input_ids": part} for part in tokens.split(BATCH)]
    result = st.compress_checkpoint(folder, st.Budget(params=share, of="body"), data=data, out=out, on_progress=report)
    figures = {"wall": time.perf_counter() - begin, "cpu": time.process_time(), "peak_gb": peak_gb()}
    print(json.dumps({**figures, "params": result.measurement.params_ratio, "error": result.hidden_error}), flush=True)


def hashes(out: Path) -> dict[str, str]:
    """Of every file."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.iterdir())}


def child(options: argparse.Namespace, out: Path, *, kill_at: str | None = None) -> None:
    """A run in a process of its own, which is killed some time after a step begins."""
    own = [sys.executable, __file__, "--folder", str(options.folder), "--params", str(options.params)]
    with subprocess.Popen([*own, "--out", str(out)], stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            if kill_at is not None and kill_at in line:
                time.sleep(3)
                os.kill(process.pid, signal.SIGKILL)
                print(f"killed in: {kill_at}", flush=True)
                return
    if process.returncode:
        sys.exit(process.returncode)


def main() -> None:
    """Both runs, and whether their files are the same."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--params", type=float, default=0.8)
    parser.add_argument("--out", type=Path, help="of a single run")
    parser.add_argument("--no-kills", action="store_true")
    options = parser.parse_args()
    if options.out:
        compress(options.folder, options.out, share=options.params)
        return
    make(options.folder, layers=options.layers)
    whole, resumed = (options.folder.with_name(f"{options.folder.name}-{name}") for name in ("whole", "resumed"))
    for out in (whole, resumed):
        shutil.rmtree(out, ignore_errors=True)
    child(options, whole)
    if options.no_kills:
        return
    last = options.layers - 1
    child(options, resumed, kill_at=f"calibrate model.layers.{last} ")
    child(options, resumed, kill_at=f"fit model.layers.{last} ")
    child(options, resumed)
    print("identical" if hashes(whole) == hashes(resumed) else "DIFFERENT")


if __name__ == "__main__":
    main()
