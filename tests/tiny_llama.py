"""A Llama with a vocabulary of 24 and random weights, for tests; skips them where transformers is not installed."""

from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="the extra 'hf' is not installed")

IDS = {"input_ids": torch.arange(24).reshape(2, 12) % 19}


def llama(*, layers: int = 1) -> Any:
    """Always the same one."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": layers, "num_attention_heads": 4}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=24, **sizes)).eval()
