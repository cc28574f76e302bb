"""Networks of timm, torchvision and transformers at small sizes, without their published weights.

Each is built by its own package, shallow and narrow where its options allow, and then awakened: untrained deep networks
die or explode, and have flat spectra. `awaken` gives the weights falling spectra, scales every layer to outputs of unit
variance on random inputs, and takes the statistics of batch norms from the same.
"""

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

Source = Literal["timm", "torchvision", "hf"]
WORDS, LENGTH = 200, 12
"""Size of the vocabulary and of a text."""

STILL = {"rpn_nms_thresh": 1.0, "rpn_pre_nms_top_n_test": 50, "rpn_post_nms_top_n_test": 20}
"""Options of detectors that propose boxes: as many in every network, so that the heads do the same work."""


@dataclass(frozen=True)
class Architecture:
    """A network and its inputs, `inputs(batch)`: a tensor, a tuple or a mapping, drawn from torch's random numbers."""

    source: Source
    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], Any]

    @property
    def id(self) -> str:
        """Such as `timm/beit`."""
        return f"{self.source}/{self.name}"

    def awake(self) -> nn.Module:
        """The network in evaluation mode, the same each time."""
        torch.manual_seed(0)
        model = self.build().eval()
        awaken(model, self.inputs(16))
        return model


# ---------------------------------------------------------------------------------------------------------- the weights


def awaken(model: nn.Module, inputs: Any) -> None:
    """Give untrained weights falling spectra, and the whole network activations that stay alive."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            _stir(name, parameter)
        matrices = [module for module in model.modules() if _is_matrix(module)]
        owners: dict[int, int] = {}
        for module in model.modules():
            for parameter in module.parameters(recurse=False):
                owners[id(parameter)] = owners.get(id(parameter), 0) + 1
        alone = {module for module in matrices if owners[id(module.weight)] == 1}
        for module in alone:
            _let_spectrum_fall(module.weight)
        norms = {norm: norm.momentum for norm in model.modules() if isinstance(norm, _BatchNorm)}
        handles = [module.register_forward_hook(_Scaling()) for module in alone]
        try:
            for norm in norms:
                norm.momentum = None
                norm.reset_running_stats()
                norm.train()
            run(model, inputs)
        finally:
            for norm, momentum in norms.items():
                norm.momentum = momentum
                norm.eval()
            for handle in handles:
                handle.remove()


def _stir(name: str, parameter: Tensor) -> None:
    """Scales and zero matrices that a recipe starts near 0, so that a branch begins as nothing, take part."""
    if not parameter.is_floating_point() or not parameter.numel():
        return
    largest = float(parameter.abs().max())
    if "bias" in name.rpartition(".")[2]:
        parameter.add_(torch.randn_like(parameter), alpha=0.05)
    elif largest < 1e-2 and parameter.numel() == max(parameter.shape, default=1):
        parameter.fill_(0.5)
    elif largest == 0:
        parameter.normal_(std=0.1)


def _is_matrix(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    lookup = isinstance(module, nn.Embedding | nn.EmbeddingBag)
    return isinstance(weight, Tensor) and weight.ndim >= 2 and weight.is_floating_point() and not lookup


def _let_spectrum_fall(weight: Tensor) -> None:
    """Scale what each input gives by falling factors in random order; half of them lie below a tenth."""
    into = weight.shape[1]
    falling = 0.01 ** (torch.arange(into) / max(1, into - 1))
    weight.mul_(falling[torch.randperm(into)].reshape(1, -1, *[1] * (weight.ndim - 2)))


class _Scaling:
    """At its first call, scales a layer so that its outputs have unit variance."""

    def __init__(self) -> None:
        self.was_run = False

    def __call__(self, module: nn.Module, _: Any, output: Any) -> Any:
        if self.was_run or not isinstance(output, Tensor):
            return None
        self.was_run = True
        deviation = float(output.std()) if output.numel() > 1 else 0.0
        if not 1e-12 < deviation < float("inf"):
            return None
        for parameter in module.parameters(recurse=False):
            parameter.div_(deviation)
        return output / deviation


def run(model: nn.Module, inputs: Any) -> Any:
    """One pass of a tensor, a tuple or a mapping."""
    with torch.no_grad():
        if isinstance(inputs, Mapping):
            return model(**inputs)
        return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def images(size: int, *, channels: int = 3) -> Callable[[int], Tensor]:
    """Inputs (batch, channels, size, size)."""
    return lambda batch: torch.randn(batch, channels, size, size)


# ------------------------------------------------------------------------------------------------------------- the list


def catalogue() -> Mapping[str, Architecture]:
    """All networks by id; packages are imported only to build one."""
    return {network.id: network for source in (_of_timm, _of_torchvision, _of_transformers) for network in source()}


def _of_timm() -> Iterator[Architecture]:
    """At least one of each of its families; options make it shallow and narrow."""

    def build(name: str, options: Mapping[str, Any]) -> nn.Module:
        return importlib.import_module("timm").create_model(name, pretrained=False, num_classes=10, **options)

    for family, (name, size, options) in TIMM.items():
        yield Architecture("timm", family, partial(build, name, options), images(size))


def _of_torchvision() -> Iterator[Architecture]:
    """By their factories in `torchvision.models`, or classes where a factory takes no sizes."""

    def build(name: str, options: Mapping[str, Any]) -> nn.Module:
        models = importlib.import_module("torchvision.models")
        return (
            getattr(models, name)(**options) if name[0].isupper() else models.get_model(name, weights=None, **options)
        )

    for name, (inputs, options) in TORCHVISION.items():
        yield Architecture("torchvision", name, partial(build, name, {"num_classes": 10} | options), inputs)


def _of_transformers() -> Iterator[Architecture]:
    """From their configurations."""

    def build(name: str, config: str, options: Mapping[str, Any]) -> nn.Module:
        package = importlib.import_module("transformers")
        return getattr(package, name)(getattr(package, config)(**options))

    for name, (config, inputs, options) in HF.items():
        yield Architecture("hf", name, partial(build, name, config, options), inputs)


# ---------------------------------------------------------------------------------------------------- inputs of several


def text(batch: int) -> dict[str, Tensor]:
    """Words."""
    return {"input_ids": words(batch)}


def pair(batch: int) -> dict[str, Tensor]:
    """A text and the beginning of another."""
    return {"input_ids": words(batch), "decoder_input_ids": words(batch)}


def words(batch: int) -> Tensor:
    """(batch, LENGTH), none of them special."""
    return torch.randint(5, WORDS, (batch, LENGTH))


def pixels(size: int, *frames: int) -> Callable[[int], dict[str, Tensor]]:
    """Images, or films."""
    return lambda batch: {"pixel_values": torch.randn(batch, *frames, 3, size, size)}


def sound(samples: int) -> Callable[[int], dict[str, Tensor]]:
    """A wave."""
    return lambda batch: {"input_values": torch.randn(batch, samples)}


def film(size: int, *, frames: int = 16) -> Callable[[int], Tensor]:
    """(batch, 3, frames, size, size)."""
    return lambda batch: torch.randn(batch, 3, frames, size, size)


def listed(size: int) -> Callable[[int], tuple[list[Tensor]]]:
    """As detectors take images: a list of (3, size, size) in [0, 1]."""
    return lambda batch: ([torch.rand(3, size, size) for _ in range(batch)],)


def captioned(size: int) -> Callable[[int], dict[str, Tensor]]:
    """Texts with images."""
    return lambda batch: text(batch) | pixels(size)(batch)


# -------------------------------------------------------------------------------------------------------- torchvision

_DETECTOR = {"num_classes": 5, "weights_backbone": None, "min_size": 96, "max_size": 96}
_BOXES = {"box_score_thresh": 0.0, "box_nms_thresh": 1.0, "box_detections_per_img": 10} | STILL
_ANCHORS = {"score_thresh": 0.0, "nms_thresh": 1.0, "detections_per_img": 10, "topk_candidates": 20}
_SEGMENTATION = {"weights_backbone": None}
_UNTRAINED = {"init_weights": True}

_AS_THEY_ARE = (
    *("convnext_tiny", "efficientnet_b0", "efficientnet_v2_s", "mnasnet0_5", "mnasnet1_0", "mobilenet_v3_large"),
    *("mobilenet_v3_small", "regnet_x_400mf", "regnet_y_400mf", "regnet_y_800mf", "resnet18", "resnet34"),
    *("resnext50_32x4d", "shufflenet_v2_x0_5", "shufflenet_v2_x1_0", "swin_t", "swin_v2_t", "vgg11", "vgg11_bn"),
    *("quantized_mobilenet_v2", "quantized_mobilenet_v3_large", "quantized_resnet18", "quantized_resnet50"),
    "quantized_shufflenet_v2_x0_5",
)
"""Networks that take small images with the sizes that they have."""

TORCHVISION: Mapping[str, tuple[Callable[[int], Any], Mapping[str, Any]]] = {
    "DenseNet": (images(32), {"block_config": (2, 2, 2, 2), "num_init_features": 32}),
    "MaxVit": (
        images(64),
        {
            "input_size": (64, 64),
            "stem_channels": 16,
            "partition_size": 2,
            "block_channels": [16, 32],
            "block_layers": [1, 1],
            "head_dim": 8,
            "stochastic_depth_prob": 0.0,
        },
    ),
    "VisionTransformer": (
        images(32),
        {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 4, "hidden_dim": 64, "mlp_dim": 128},
    ),
    "SwinTransformer": (
        images(32),
        {"patch_size": [2, 2], "embed_dim": 24, "depths": [1, 1, 1], "num_heads": [1, 2, 4], "window_size": [4, 4]},
    ),
    **dict.fromkeys(_AS_THEY_ARE, (images(32), {})),
    "alexnet": (images(64), {}),
    "googlenet": (images(64), _UNTRAINED | {"aux_logits": False}),
    "inception_v3": (images(80), _UNTRAINED),
    "mobilenet_v2": (images(32), {"width_mult": 0.35}),
    "resnet50": (images(32), {"width_per_group": 16}),
    "squeezenet1_0": (images(64), {}),
    "squeezenet1_1": (images(64), {}),
    "vit_b_16": (images(32), {"image_size": 32}),
    "deeplabv3_mobilenet_v3_large": (images(64), _SEGMENTATION),
    "deeplabv3_resnet50": (images(48), _SEGMENTATION),
    "fcn_resnet50": (images(48), _SEGMENTATION | {"aux_loss": True}),
    "lraspp_mobilenet_v3_large": (images(64), _SEGMENTATION),
    "fasterrcnn_mobilenet_v3_large_320_fpn": (listed(96), _DETECTOR | _BOXES),
    "fasterrcnn_mobilenet_v3_large_fpn": (listed(96), _DETECTOR | _BOXES),
    "fasterrcnn_resnet50_fpn": (listed(96), _DETECTOR | _BOXES),
    "fasterrcnn_resnet50_fpn_v2": (listed(96), _DETECTOR | _BOXES),
    "maskrcnn_resnet50_fpn": (listed(96), _DETECTOR | _BOXES),
    "keypointrcnn_resnet50_fpn": (listed(96), _DETECTOR | _BOXES | {"num_classes": 2, "box_detections_per_img": 2}),
    "retinanet_resnet50_fpn": (listed(96), _DETECTOR | _ANCHORS),
    "retinanet_resnet50_fpn_v2": (listed(96), _DETECTOR | _ANCHORS),
    "fcos_resnet50_fpn": (listed(96), _DETECTOR | _ANCHORS),
    "ssdlite320_mobilenet_v3_large": (listed(96), {"num_classes": 5, "weights_backbone": None} | _ANCHORS),
    "mc3_18": (film(32, frames=8), {}),
    "r3d_18": (film(32, frames=8), {}),
    "r2plus1d_18": (film(32, frames=8), {}),
    "swin3d_t": (film(32, frames=4), {}),
    "quantized_googlenet": (images(64), _UNTRAINED | {"aux_logits": False}),
    "quantized_inception_v3": (images(80), _UNTRAINED),
}

# ------------------------------------------------------------------------------------------------------- transformers

_WIDTHS = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
_TEXT = _WIDTHS | {"vocab_size": WORDS, "max_position_embeddings": 64, "pad_token_id": 0}
_CAUSAL = _TEXT | {"bos_token_id": 1, "eos_token_id": 2}
_GROUPED = _CAUSAL | {"num_key_value_heads": 2, "head_dim": 16}
_GPT = {
    "vocab_size": WORDS,
    "n_positions": 64,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LAYERS = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
_SIZES = {"vocab_size": WORDS, "d_model": 64, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128}
_PAIR = (
    _LAYERS
    | _SIZES
    | {"max_position_embeddings": 64, "pad_token_id": 0, "decoder_start_token_id": 1, "eos_token_id": 2}
)
_T5 = {
    "vocab_size": WORDS,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 128,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "num_local_experts": 4}
_IMAGE = _WIDTHS | {"image_size": 32, "patch_size": 8}
_FILM = _IMAGE | {"num_frames": 4}
_WINDOWS: dict[str, Any] = {"image_size": 32, "embed_dim": 24, "depths": [1, 1, 1], "num_heads": [1, 2, 4]}
_WINDOWS |= {"window_size": 4, "patch_size": 2}
_STAGES = {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1]}
_WAVE = (
    _WIDTHS
    | {"vocab_size": 32, "conv_dim": (32, 32, 32), "conv_stride": (5, 2, 2), "conv_kernel": (10, 3, 3)}
    | {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
)
_TOWERS = {
    "text_config": _CAUSAL | {"projection_dim": 32},
    "vision_config": _IMAGE | {"projection_dim": 32},
    "projection_dim": 32,
}

HF: Mapping[str, tuple[str, Callable[[int], Any], Mapping[str, Any]]] = {
    "BertForSequenceClassification": ("BertConfig", text, _TEXT),
    "RobertaForMaskedLM": ("RobertaConfig", text, _TEXT),
    "ElectraForPreTraining": ("ElectraConfig", text, _TEXT | {"embedding_size": 32}),
    "AlbertForMaskedLM": ("AlbertConfig", text, _TEXT | {"embedding_size": 32}),
    "MobileBertForMaskedLM": (
        "MobileBertConfig",
        text,
        _TEXT
        | {"embedding_size": 32, "intra_bottleneck_size": 32, "true_hidden_size": 32, "num_feedforward_networks": 2},
    ),
    "DistilBertForSequenceClassification": (
        "DistilBertConfig",
        text,
        {"vocab_size": WORDS, "max_position_embeddings": 64, "dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128},
    ),
    "DebertaForMaskedLM": ("DebertaConfig", text, _TEXT | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}),
    "DebertaV2ForMaskedLM": (
        "DebertaV2Config",
        text,
        _TEXT | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    ),
    "MPNetForMaskedLM": ("MPNetConfig", text, _TEXT),
    "ConvBertForMaskedLM": ("ConvBertConfig", text, _TEXT | {"embedding_size": 32}),
    "RoFormerForMaskedLM": ("RoFormerConfig", text, _TEXT | {"embedding_size": 32}),
    "SqueezeBertForMaskedLM": ("SqueezeBertConfig", text, _TEXT | {"embedding_size": 64}),
    "FNetForMaskedLM": ("FNetConfig", text, _TEXT),
    "NystromformerForMaskedLM": (
        "NystromformerConfig",
        text,
        _TEXT | {"segment_means_seq_len": 12, "num_landmarks": 4},
    ),
    "LongformerForMaskedLM": ("LongformerConfig", text, _TEXT | {"attention_window": 4}),
    "FunnelForMaskedLM": (
        "FunnelConfig",
        text,
        {
            "vocab_size": WORDS,
            "block_sizes": [1, 1],
            "num_decoder_layers": 1,
            "d_model": 64,
            "n_head": 4,
            "d_head": 16,
            "d_inner": 128,
        },
    ),
    "XLNetLMHeadModel": (
        "XLNetConfig",
        text,
        {"vocab_size": WORDS, "d_model": 64, "n_layer": 2, "n_head": 4, "d_inner": 128},
    ),
    "ModernBertForMaskedLM": ("ModernBertConfig", text, _CAUSAL | {"cls_token_id": 1, "sep_token_id": 2}),
    "LayoutLMForTokenClassification": ("LayoutLMConfig", text, _TEXT),
    "GPT2LMHeadModel": ("GPT2Config", text, _GPT),
    "GPTNeoForCausalLM": (
        "GPTNeoConfig",
        text,
        {
            "vocab_size": WORDS,
            "max_position_embeddings": 64,
            "hidden_size": 64,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "GPTJForCausalLM": ("GPTJConfig", text, _GPT | {"rotary_dim": 8}),
    "CodeGenForCausalLM": ("CodeGenConfig", text, _GPT | {"rotary_dim": 8, "n_ctx": 64}),
    "GPTNeoXForCausalLM": ("GPTNeoXConfig", text, _CAUSAL),
    "OPTForCausalLM": ("OPTConfig", text, _CAUSAL | {"ffn_dim": 128, "word_embed_proj_dim": 64}),
    "BloomForCausalLM": ("BloomConfig", text, {"vocab_size": WORDS, "hidden_size": 64, "n_layer": 2, "n_head": 4}),
    "LlamaForCausalLM": ("LlamaConfig", text, _GROUPED),
    "MistralForCausalLM": ("MistralConfig", text, _GROUPED),
    "MixtralForCausalLM": ("MixtralConfig", text, _GROUPED | _EXPERTS),
    "Qwen2ForCausalLM": ("Qwen2Config", text, _GROUPED),
    "Qwen3ForCausalLM": ("Qwen3Config", text, _GROUPED),
    "Qwen3MoeForCausalLM": ("Qwen3MoeConfig", text, _GROUPED | _EXPERTS),
    "GemmaForCausalLM": ("GemmaConfig", text, _GROUPED),
    "Gemma2ForCausalLM": ("Gemma2Config", text, _GROUPED),
    "Gemma3ForCausalLM": ("Gemma3TextConfig", text, _GROUPED),
    "PhiForCausalLM": ("PhiConfig", text, _CAUSAL),
    "Phi3ForCausalLM": ("Phi3Config", text, _CAUSAL),
    "FalconForCausalLM": ("FalconConfig", text, _CAUSAL),
    "StableLmForCausalLM": ("StableLmConfig", text, _CAUSAL | {"num_key_value_heads": 2}),
    "OlmoForCausalLM": ("OlmoConfig", text, _CAUSAL),
    "CohereForCausalLM": ("CohereConfig", text, _CAUSAL),
    "GraniteForCausalLM": ("GraniteConfig", text, _CAUSAL),
    "Starcoder2ForCausalLM": ("Starcoder2Config", text, _CAUSAL | {"num_key_value_heads": 2}),
    "DeepseekV3ForCausalLM": (
        "DeepseekV3Config",
        text,
        _CAUSAL
        | {
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "n_group": 1,
            "topk_group": 1,
            "q_lora_rank": 24,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 16,
            "first_k_dense_replace": 1,
        },
    ),
    "GptOssForCausalLM": ("GptOssConfig", text, _GROUPED | _EXPERTS),
    "MptForCausalLM": (
        "MptConfig",
        text,
        {"vocab_size": WORDS, "d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 64},
    ),
    "XGLMForCausalLM": (
        "XGLMConfig",
        text,
        {
            "vocab_size": WORDS,
            "max_position_embeddings": 64,
            "d_model": 64,
            "ffn_dim": 128,
            "num_layers": 2,
            "attention_heads": 4,
        },
    ),
    "BioGptForCausalLM": ("BioGptConfig", text, _CAUSAL),
    "MambaForCausalLM": (
        "MambaConfig",
        text,
        {"vocab_size": WORDS, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8},
    ),
    "Mamba2ForCausalLM": (
        "Mamba2Config",
        text,
        {
            "vocab_size": WORDS,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "state_size": 8,
            "num_heads": 8,
            "head_dim": 16,
            "n_groups": 1,
            "chunk_size": 8,
        },
    ),
    "RecurrentGemmaForCausalLM": (
        "RecurrentGemmaConfig",
        text,
        _CAUSAL | {"lru_width": 64, "attention_window_size": 16, "num_hidden_layers": 3},
    ),
    "RwkvForCausalLM": (
        "RwkvConfig",
        text,
        {
            "vocab_size": WORDS,
            "hidden_size": 64,
            "attention_hidden_size": 64,
            "num_hidden_layers": 2,
            "intermediate_size": 128,
        },
    ),
    "Lfm2ForCausalLM": (
        "Lfm2Config",
        text,
        _CAUSAL | {"num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]},
    ),
    "JambaForCausalLM": (
        "JambaConfig",
        text,
        _CAUSAL
        | {
            "num_key_value_heads": 2,
            "num_hidden_layers": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "num_experts": 4,
            "use_mamba_kernels": False,
            "mamba_d_state": 8,
        },
    ),
    "T5ForConditionalGeneration": ("T5Config", pair, _T5 | {"decoder_start_token_id": 0}),
    "UMT5ForConditionalGeneration": ("UMT5Config", pair, _T5 | {"decoder_start_token_id": 0}),
    "SwitchTransformersForConditionalGeneration": (
        "SwitchTransformersConfig",
        pair,
        _T5 | {"num_experts": 4, "decoder_start_token_id": 0},
    ),
    "BartForConditionalGeneration": ("BartConfig", pair, _PAIR | {"forced_eos_token_id": None, "bos_token_id": 1}),
    "PegasusForConditionalGeneration": ("PegasusConfig", pair, _PAIR),
    "MarianMTModel": ("MarianConfig", pair, _PAIR),
    "MBartForConditionalGeneration": ("MBartConfig", pair, _PAIR),
    "M2M100ForConditionalGeneration": ("M2M100Config", pair, _PAIR),
    "ProphetNetForConditionalGeneration": (
        "ProphetNetConfig",
        pair,
        {
            "vocab_size": WORDS,
            "hidden_size": 64,
            "encoder_ffn_dim": 128,
            "decoder_ffn_dim": 128,
            "num_encoder_layers": 2,
            "num_decoder_layers": 2,
            "num_encoder_attention_heads": 4,
            "num_decoder_attention_heads": 4,
            "max_position_embeddings": 64,
            "decoder_start_token_id": 1,
        },
    ),
    "WhisperForConditionalGeneration": (
        "WhisperConfig",
        lambda batch: {"input_features": torch.randn(batch, 80, 64), "decoder_input_ids": words(batch)},
        _PAIR | {"max_source_positions": 32, "max_target_positions": 32, "bos_token_id": 1},
    ),
    "ViTForImageClassification": ("ViTConfig", pixels(32), _IMAGE),
    "DeiTForImageClassification": ("DeiTConfig", pixels(32), _IMAGE),
    "BeitForImageClassification": ("BeitConfig", pixels(32), _IMAGE),
    "SwinForImageClassification": ("SwinConfig", pixels(32), _WINDOWS),
    "Swinv2ForImageClassification": ("Swinv2Config", pixels(32), _WINDOWS),
    "ConvNextForImageClassification": ("ConvNextConfig", pixels(32), _STAGES),
    "ConvNextV2ForImageClassification": ("ConvNextV2Config", pixels(32), _STAGES),
    "SegformerForSemanticSegmentation": (
        "SegformerConfig",
        pixels(64),
        _STAGES | {"num_attention_heads": [1, 2, 2, 4], "decoder_hidden_size": 32},
    ),
    "MobileViTForImageClassification": (
        "MobileViTConfig",
        pixels(64),
        {"image_size": 64, "hidden_sizes": [32, 48, 64], "neck_hidden_sizes": [8, 16, 16, 24, 32, 48, 64]},
    ),
    "ResNetForImageClassification": ("ResNetConfig", pixels(32), _STAGES | {"embedding_size": 16}),
    "RegNetForImageClassification": ("RegNetConfig", pixels(32), _STAGES | {"embedding_size": 16, "groups_width": 8}),
    "BitForImageClassification": ("BitConfig", pixels(32), _STAGES | {"embedding_size": 16, "num_groups": 4}),
    "Dinov2ForImageClassification": ("Dinov2Config", pixels(32), _IMAGE),
    "PoolFormerForImageClassification": ("PoolFormerConfig", pixels(32), _STAGES),
    "LevitForImageClassification": (
        "LevitConfig",
        pixels(64),
        {
            "image_size": 64,
            "hidden_sizes": [32, 48, 64],
            "num_attention_heads": [2, 3, 4],
            "depths": [1, 1, 1],
            "key_dim": [8, 8, 8],
        },
    ),
    "PvtForImageClassification": (
        "PvtConfig",
        pixels(32),
        _STAGES | {"image_size": 32, "num_attention_heads": [1, 2, 2, 4]},
    ),
    "FocalNetForImageClassification": (
        "FocalNetConfig",
        pixels(32),
        {"image_size": 32, "embed_dim": 24, "depths": [1, 1, 1, 1]},
    ),
    "SwiftFormerForImageClassification": (
        "SwiftFormerConfig",
        pixels(64),
        {"depths": [1, 1, 1, 1], "embed_dims": [16, 24, 32, 48]},
    ),
    "MobileNetV2ForImageClassification": ("MobileNetV2Config", pixels(64), {"depth_multiplier": 0.35}),
    "ViTMAEForPreTraining": (
        "ViTMAEConfig",
        pixels(32),
        _IMAGE
        | {
            "decoder_hidden_size": 32,
            "decoder_num_hidden_layers": 1,
            "decoder_num_attention_heads": 4,
            "decoder_intermediate_size": 64,
        },
    ),
    "YolosForObjectDetection": (
        "YolosConfig",
        pixels(32),
        _IMAGE | {"image_size": [32, 32], "num_detection_tokens": 8},
    ),
    "DPTForDepthEstimation": (
        "DPTConfig",
        pixels(32),
        _IMAGE
        | {
            "num_hidden_layers": 4,
            "backbone_out_indices": [0, 1, 2, 3],
            "neck_hidden_sizes": [16, 24, 32, 48],
            "fusion_hidden_size": 32,
        },
    ),
    "VideoMAEForVideoClassification": ("VideoMAEConfig", pixels(32, 4), _FILM),
    "TimesformerForVideoClassification": ("TimesformerConfig", pixels(32, 4), _FILM),
    "VivitForVideoClassification": (
        "VivitConfig",
        pixels(32, 4),
        _WIDTHS | {"image_size": 32, "num_frames": 4, "tubelet_size": [2, 8, 8]},
    ),
    "Wav2Vec2ForCTC": ("Wav2Vec2Config", sound(800), _WAVE),
    "HubertForCTC": ("HubertConfig", sound(800), _WAVE),
    "WavLMForCTC": ("WavLMConfig", sound(800), _WAVE),
    "SEWForCTC": ("SEWConfig", sound(800), _WAVE),
    "ASTForAudioClassification": (
        "ASTConfig",
        lambda batch: {"input_values": torch.randn(batch, 48, 32)},
        _WIDTHS | {"max_length": 48, "num_mel_bins": 32, "patch_size": 16},
    ),
    "CLIPModel": ("CLIPConfig", captioned(32), _TOWERS),
    "SiglipModel": ("SiglipConfig", captioned(32), _TOWERS),
    "BlipModel": ("BlipConfig", captioned(32), _TOWERS),
    "ViltModel": ("ViltConfig", captioned(32), _TEXT | {"image_size": 32, "patch_size": 8}),
    "PerceiverModel": (
        "PerceiverConfig",
        lambda batch: {"inputs": torch.randn(batch, LENGTH, 48)},
        {
            "num_latents": 8,
            "d_latents": 64,
            "d_model": 48,
            "num_self_attends_per_block": 2,
            "num_self_attention_heads": 4,
            "num_cross_attention_heads": 4,
        },
    ),
    "EncodecModel": (
        "EncodecConfig",
        lambda batch: {"input_values": torch.randn(batch, 1, 640)},
        {"num_filters": 8, "hidden_size": 32, "codebook_dim": 32, "codebook_size": 32},
    ),
}

TIMM: Mapping[str, tuple[str, int, Mapping[str, Any]]] = {
    "beit": ("beit_base_patch16_224", 32, {"depth": 2, "embed_dim": 96, "num_heads": 3, "img_size": 32}),
    "byoanet": ("botnet26t_256", 64, {"img_size": 64}),
    "byobnet": ("test_byobnet", 32, {}),
    "cait": ("cait_xxs24_224", 32, {"depth": 2, "embed_dim": 48, "num_heads": 2, "img_size": 32}),
    "coat": ("coat_tiny", 32, {"img_size": 32, "serial_depths": (1, 1, 1, 1), "parallel_depth": 1}),
    "convit": ("convit_tiny", 32, {"depth": 2, "num_heads": 2, "embed_dim": 48, "img_size": 32}),
    "convmixer": ("convmixer_768_32", 32, {"dim": 96, "depth": 4}),
    "convnext": ("test_convnext", 32, {}),
    "cpubone": ("cpubone_nano", 32, {}),
    "crossvit": ("crossvit_tiny_240", 240, {"depth": [[1, 1, 0], [1, 1, 0], [1, 1, 0]]}),
    "csatv2": ("csatv2", 64, {}),
    "cspnet": ("cs3darknet_focus_s", 32, {}),
    "cspnext": ("cspnext_tiny", 32, {"depths": [1, 1, 1, 1], "channels": [32, 64, 128, 256]}),
    "davit": ("davit_tiny", 32, {"depths": [1, 1, 1, 1], "embed_dims": [24, 48, 96, 192], "num_heads": [1, 1, 3, 6]}),
    "deit": ("deit_tiny_patch16_224", 32, {"depth": 2, "num_heads": 1, "embed_dim": 48, "img_size": 32}),
    "densenet": ("densenet121", 32, {}),
    "dla": ("dla46x_c", 32, {"channels": [8, 16, 32, 32, 64, 128]}),
    "dpn": ("dpn48b", 32, {}),
    "edgenext": ("edgenext_xx_small", 32, {"depths": [1, 1, 1, 1], "dims": [12, 24, 44, 84]}),
    "efficientformer": ("efficientformer_l1", 224, {"depths": [1, 1, 1, 1], "embed_dims": [12, 24, 56, 112]}),
    "efficientformer_v2": (
        "efficientformerv2_s0",
        32,
        {"depths": [1, 1, 1, 1], "embed_dims": [8, 12, 24, 44], "img_size": 32},
    ),
    "efficientnet": ("test_efficientnet", 32, {}),
    "efficientvim": ("efficientvim_m1", 32, {"depths": [1, 1, 1], "embed_dim": [32, 48, 80]}),
    "efficientvit_mit": ("efficientvit_b0", 32, {"depths": [1, 1, 1, 1, 1]}),
    "efficientvit_msra": (
        "efficientvit_m0",
        32,
        {"depth": [1, 1, 1], "num_heads": [1, 1, 1], "embed_dim": [16, 32, 48]},
    ),
    "eva": ("vit_tiny_patch16_dinov3_qkvb", 32, {"depth": 2, "num_heads": 1, "embed_dim": 48}),
    "fasternet": ("fasternet_t0", 32, {"depths": [1, 1, 1, 1], "embed_dim": 10}),
    "fastvit": ("fastvit_t8", 32, {"layers": [1, 1, 1, 1], "embed_dims": [12, 24, 48, 96]}),
    "focalnet": ("focalnet_tiny_srf", 32, {}),
    "gcvit": ("gcvit_xxtiny", 32, {"img_size": 32}),
    "gemma4_vit": ("gemma4_vit_167m", 64, {"depth": 2, "embed_dim": 64, "num_heads": 4, "img_size": 32}),
    "ghostnet": ("ghostnet_050", 32, {}),
    "hardcorenas": ("hardcorenas_b", 32, {}),
    "hgnet": ("hgnetv2_b0", 32, {}),
    "hiera": ("hiera_tiny_224", 32, {"num_heads": 1, "embed_dim": 24, "img_size": 32}),
    "hieradet_sam2": ("sam2_hiera_tiny", 32, {"num_heads": 1, "embed_dim": 24}),
    "hrnet": ("hrnet_w18_small", 32, {}),
    "iformer": ("iformer_t", 32, {}),
    "inception_next": ("inception_next_atto", 32, {"depths": [1, 1, 1, 1], "dims": [10, 20, 40, 80]}),
    "inception_resnet_v2": ("inception_resnet_v2", 128, {}),
    "inception_v3": ("inception_v3", 128, {}),
    "inception_v4": ("inception_v4", 128, {}),
    "lcnetv2": ("lcnetv2_small", 32, {"depths": [1, 1, 1, 1]}),
    "levit": (
        "levit_128s",
        32,
        {"depth": [1, 1, 1], "num_heads": [1, 1, 2], "embed_dim": [32, 64, 96], "img_size": 32},
    ),
    "lowformer": ("lowformer_b0", 32, {}),
    "mambaout": ("test_mambaout", 32, {}),
    "maxxvit": ("test_coatnet", 32, {"img_size": 32}),
    "metaformer": ("poolformerv2_s12", 32, {}),
    "mlp_mixer": ("gmlp_ti16_224", 32, {"img_size": 32}),
    "mobilenetv3": ("lcnet_035", 32, {}),
    "mobilevit": ("mobilevit_xxs", 32, {}),
    "mvitv2": ("mvitv2_tiny", 32, {}),
    "naflexvit": ("naflexvit_base_patch16_gap", 32, {"embed_dim": 64, "depth": 2, "num_heads": 4}),
    "nest": ("nest_tiny", 32, {"img_size": 32}),
    "nextvit": ("nextvit_small", 32, {}),
    "nfnet": ("test_nfnet", 32, {}),
    "pit": ("pit_ti_224", 32, {"depth": [1, 1, 1], "img_size": 32}),
    "pvt_v2": ("pvt_v2_b0", 32, {"depths": [1, 1, 1, 1], "embed_dims": [8, 16, 40, 64], "num_heads": [1, 1, 1, 2]}),
    "qwen3_vit": ("qwen3_vit_88m", 32, {"depth": 2, "num_heads": 3, "embed_dim": 192}),
    "rdnet": ("rdnet_tiny", 32, {}),
    "regnet": ("regnetx_002", 32, {}),
    "repghost": ("repghostnet_050", 32, {}),
    "repvit": ("repvit_m1", 32, {"depth": [1, 1, 1, 1], "embed_dim": [12, 24, 48, 96]}),
    "res2net": ("res2next50", 32, {"layers": [1, 1, 1, 1], "channels": [16, 32, 64, 128]}),
    "resnest": ("resnest14d", 32, {"channels": [16, 32, 64, 128]}),
    "resnet": ("test_resnet", 32, {"channels": [8, 12, 12, 24]}),
    "resnetv2": ("resnetv2_18", 32, {"layers": [1, 1, 1, 1], "channels": [16, 32, 64, 128]}),
    "rexnet": ("rexnet_100", 32, {}),
    "selecsls": ("selecsls42", 32, {}),
    "senet": ("legacy_seresnet18", 32, {"layers": [1, 1, 1, 1]}),
    "sequencer": ("sequencer2d_s", 32, {"layers": [1, 1, 1, 1], "embed_dims": [48, 96, 96, 96]}),
    "shvit": ("shvit_s1", 32, {"depth": [1, 1, 1], "embed_dim": [32, 56, 80]}),
    "sknet": ("skresnet18", 32, {"layers": [1, 1, 1, 1], "channels": [16, 32, 64, 128]}),
    "starnet": ("starnet_s050", 32, {"depths": [1, 1, 1, 1]}),
    "swiftformer": ("swiftformer_xs", 32, {"layers": [1, 1, 1, 1], "embed_dims": [12, 14, 28, 55]}),
    "swin_transformer": (
        "swin_tiny_patch4_window7_224",
        32,
        {"depths": [1, 1, 1, 1], "num_heads": [1, 1, 3, 6], "embed_dim": 24, "img_size": 32},
    ),
    "swin_transformer_v2": (
        "swinv2_tiny_window8_256",
        32,
        {"depths": [1, 1, 1, 1], "num_heads": [1, 1, 3, 6], "embed_dim": 24, "img_size": 32},
    ),
    "swin_transformer_v2_cr": (
        "swinv2_cr_tiny_224",
        32,
        {"depths": [1, 1, 1, 1], "num_heads": [1, 1, 3, 6], "embed_dim": 24, "img_size": 32},
    ),
    "tiny_vit": (
        "tiny_vit_5m_224",
        32,
        {"depths": [1, 1, 1, 1], "embed_dims": [16, 32, 40, 80], "num_heads": [1, 1, 1, 2]},
    ),
    "tnt": ("tnt_s_legacy_patch16_224", 32, {"depth": 2, "embed_dim": 96, "img_size": 32}),
    "tresnet": ("tresnet_m", 32, {"layers": [1, 1, 1, 1], "width_factor": 0.5}),
    "twins": (
        "twins_svt_small",
        32,
        {"depths": [1, 1, 1, 1], "embed_dims": [16, 32, 64, 128], "num_heads": [1, 1, 2, 4]},
    ),
    "visformer": ("visformer_tiny", 32, {"depth": [1, 1, 1], "num_heads": 1, "embed_dim": 48, "img_size": 32}),
    "vision_transformer": ("test_vit", 32, {"img_size": 32}),
    "vision_transformer_hybrid": ("vit_tiny_r_s16_p8_224", 32, {"img_size": 32, "depth": 2}),
    "vision_transformer_relpos": ("test_vit_relpos", 32, {"img_size": 32}),
    "vision_transformer_sam": (
        "samvit_base_patch16_224",
        64,
        {"img_size": 64, "embed_dim": 64, "depth": 2, "num_heads": 4, "global_attn_indexes": (1,)},
    ),
    "vitamin": ("vitamin_small_224", 32, {"depth": 2, "img_size": 32}),
    "volo": ("volo_d1_224", 32, {"img_size": 32}),
    "vovnet": ("ese_vovnet19b_slim_dw", 32, {}),
    "xception": ("legacy_xception", 32, {}),
    "xception_aligned": ("xception41", 32, {}),
    "xcit": ("xcit_nano_12_p16_224", 32, {"img_size": 32, "depth": 2}),
}
