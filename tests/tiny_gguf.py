"""A tiny model of random weights as a GGUF file, with its tokenizer."""

from pathlib import Path

import numpy as np

WORDS = [*map(str, range(10)), "12", "34", "Ġ", *map(chr, range(97, 108))]


def write_gguf(path: Path, *, width: int = 32, inner: int = 64) -> None:
    """A Llama of one layer, its weights in blocks of 8 bits; 24 words."""
    import gguf

    packed = gguf.GGMLQuantizationType.Q8_0
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_block_count(1)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(width // 4)
    writer.add_vocab_size(len(WORDS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(WORDS)
    writer.add_token_types([1] * len(WORDS))
    writer.add_token_merges(["1 2", "3 4"])
    for add_token_id in (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_unk_token_id):
        add_token_id(0)
    block = {f"attn_{name}": (width, width) for name in ("q", "k", "v", "output")}
    block |= {"ffn_gate": (inner, width), "ffn_up": (inner, width), "ffn_down": (width, inner)}
    generator = np.random.default_rng(0)
    shapes = {"token_embd": (len(WORDS), width)} | {f"blk.0.{name}": shape for name, shape in block.items()}
    for name, shape in shapes.items():
        weight = generator.standard_normal(shape).astype(np.float32) / shape[1] ** 0.5
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(weight, packed), raw_dtype=packed)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(width, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
