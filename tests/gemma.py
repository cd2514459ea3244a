"""A tiny random DiffusionGemma in transformers, and the same on disk under the names and keys of published files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion, DiffusionGemmaTextConfig
from transformers import Gemma4VisionConfig as VisionConfig

from tests.checkpoints import Shape, write_tokenizer

VOCAB, CANVAS, WINDOW, STOP = 67, 8, 6, 2
ENCODER, DECODER = "model.encoder.language_model.", "model.decoder."
ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
}
TEXT: dict[str, Any] = {  # a text_config as published
    "attention_bias": False, "bos_token_id": 1, "eos_token_id": STOP, "pad_token_id": 0,
    "final_logit_softcapping": 30.0, "global_head_dim": 32, "head_dim": 16, "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 48, "intermediate_size": 40,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    "max_position_embeddings": 512, "model_type": "diffusion_gemma_text", "moe_intermediate_size": 24,
    "num_attention_heads": 4, "num_experts": 8, "num_global_key_value_heads": 1, "num_hidden_layers": 4,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_parameters": ROPE, "sliding_window": WINDOW,
    "tie_word_embeddings": True, "top_k_experts": 3, "use_bidirectional_attention": "vision", "vocab_size": VOCAB,
}  # fmt: skip


def published() -> dict[str, Any]:
    """config.json as google publishes it, without the vision tower's."""
    top = {"architectures": ["DiffusionGemmaForBlockDiffusion"], "model_type": "diffusion_gemma"}
    return {**top, "canvas_length": CANVAS, "eos_token_id": [STOP], "text_config": dict(TEXT)}


def model(seed: int = 0, sharpness: float = 1.0) -> DiffusionGemmaForBlockDiffusion:
    """Everything random, 1-D parameters and the layers' scalars too; `sharpness` scales the embedding, so the logits.

    Attention is soft and self-conditioning weak, so that forwards which feed on one another do not blow rounding up.
    """
    vision = VisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        head_dim=8, patch_size=2, position_embedding_size=16, pooling_kernel_size=1,
    )  # fmt: skip
    text = DiffusionGemmaTextConfig(**{key: value for key, value in TEXT.items() if key != "model_type"})
    ids = dict(zip(("image_token_id", "boi_token_id", "eoi_token_id"), range(VOCAB - 3, VOCAB), strict=True))
    config = DiffusionGemmaConfig(text_config=text, vision_config=vision, canvas_length=CANVAS, **ids)
    net = DiffusionGemmaForBlockDiffusion(config).eval().float()
    gen = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, x in net.named_parameters():
            drawn = torch.randn(x.shape, generator=gen)
            if x.ndim == 1:
                x.copy_((1 + 0.25 * drawn).clamp(0.3, 1.7) * (0.4 if "q_norm" in name else 1.0))
            else:
                gain = sharpness if "embed_tokens" in name else 0.1 if "conditioning.down" in name else 1.0
                x.copy_(drawn * gain / x.shape[-1] ** 0.5)
        for name, x in net.named_buffers():
            if name.endswith("layer_scalar"):
                x.copy_(0.6 + 0.8 * torch.rand(1, generator=gen))
    return net


def tensors(net: DiffusionGemmaForBlockDiffusion) -> dict[str, Tensor]:
    """As transformers writes them: shared ones once, under the decoder's names; the vision tower as well."""
    state = {name: x for name, x in net.state_dict().items() if name != "lm_head.weight"}
    spare = [n for n in state if n.startswith(ENCODER) and not n.endswith("layer_scalar")]
    return {name: x.clone().contiguous() for name, x in state.items() if name not in spare}


def apart(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The other layout: the encoder's names, experts one by one."""
    out: dict[str, Tensor] = {}
    for name, x in state.items():
        name = name if name.endswith("layer_scalar") else name.replace(DECODER, ENCODER)
        experts = re.fullmatch(r"(.*\.experts)\.(gate_up|down)_proj", name)
        for e, part in enumerate(x if experts else ()):
            names = ("gate", "up") if experts and experts[2] == "gate_up" else ("down",)
            for kind, matrix in zip(names, part.chunk(len(names)), strict=True):
                out[f"{experts[1]}.{e}.{kind}_proj.weight"] = matrix.contiguous()  # type: ignore[index]
        if not experts:
            out[name] = x
    return out


def write(folder: Path, state: dict[str, Tensor], config: dict[str, Any] | None = None) -> Path:
    """A checkpoint folder with a tokenizer of VOCAB words."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config or published()))
    words = Shape(CANVAS, 4, 2, 16, 4, 48, 40, vocab=VOCAB, words=VOCAB, stop_id=STOP)
    write_tokenizer(folder, words)
    return folder
