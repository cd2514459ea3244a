"""Facts of the families that a published config.json leaves out, and how their configs name what is in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

Allowed = tuple[tuple[object, ...], str]  # the values that ask for nothing, and those in words

OFF: Allowed = ((None, False), "false")
NONE: Allowed = ((None,), "null")

OWN_FP8 = {"quant_method": "dlx_fp8"}  # matmul weights e4m3, each row with an fp32 scale beside it

# what the shared decoder does not compute, by key; a family may have more
PLAIN: dict[str, Allowed] = {
    "hidden_act": (("silu",), '"silu"'),
    "rope_scaling": NONE,
    "use_sliding_window": OFF,
    "quantization_config": ((None, OWN_FP8), "null, or what `dlx convert --fp8` writes"),
    "mlp_bias": OFF,
}

OLMO = {  # LLaDA's names of what the others call otherwise
    "hidden_act": "activation_type",
    "hidden_size": "d_model",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "num_hidden_layers": "n_layers",
    "intermediate_size": "mlp_hidden_size",
    "vocab_size": "embedding_size",
    "tie_word_embeddings": "weight_tying",
    "max_position_embeddings": "max_sequence_length",
    "attention_bias": "include_qkv_bias",
}


class Facts(NamedTuple):
    """What is true of every checkpoint of a family.

    block    trained block length; of a family trained all-to-all, that of its D2F adapters
    others   block lengths of further published checkpoints, where config.json does not tell one from the other
    full     trained all-to-all, so a prompt sees all of itself; else block-causal
    shift    the token at a position is read off the position before it
    policy   the strategy that decodes it best without further knobs
    head_dim whether config.json must give it; else it is hidden_size ÷ num_attention_heads
    partial  whether only some channels of a head turn
    mixture  how experts are chosen: softmax, raw (softmax, not renormalised), or groups; None is a dense network
    keys     what its config.json calls a key, where that is another name
    plain    further keys that must ask for nothing
    repos    published checkpoints, `{a,b}` standing for several
    checked  weights with which it was held against transformers
    """

    name: str
    mask_id: int
    block: int
    stop_ids: tuple[int, ...]
    repos: str
    qkv_bias: bool = False
    qk_norm: bool = False
    full: bool = False
    shift: bool = False
    policy: str = "single_bd"
    head_dim: bool = False
    partial: bool = False
    mixture: str | None = None
    keys: Mapping[str, str] = {}
    plain: Mapping[str, Allowed] = {}
    others: tuple[int, ...] = ()
    checked: str = "random weights"


QWEN: dict[str, Any] = {"stop_ids": (151645, 151643)}
QWEN3: dict[str, Any] = QWEN | {"mask_id": 151669, "qk_norm": True, "head_dim": True}
SDAR: dict[str, Any] = QWEN3 | {"block": 4, "others": (8, 16, 32, 64)}  # …-Chat is 4, …-Chat-bN is N
EVERY: dict[str, Allowed] = {"decoder_sparse_step": ((None, 1), "1"), "mlp_only_layers": ((None, []), "[]")}

FAMILIES: dict[str, Facts] = {
    "SDARForCausalLM": Facts(
        "sdar", repos="JetLM/SDAR-{1.7B,4B,8B}-Chat[-bN]", checked="trained (bundled) and random weights", **SDAR
    ),
    "SDARMoeForCausalLM": Facts(
        "sdar_moe", repos="JetLM/SDAR-30B-A3B-{Chat[-bN],Sci}", mixture="softmax", plain=EVERY, **SDAR,
        keys={"num_experts": "num_local_experts"},
    ),
    "DreamModel": Facts(
        "dream", 151666, 32, repos="Dream-org/Dream-v0-{Base,Instruct}-7B, apple/DiffuCoder-7B-{Base,Instruct,cpGRPO}",
        qkv_bias=True, full=True, shift=True, policy="fast_dllm_v1", **QWEN,
    ),
    "DreamForCausalLM": Facts("dream_reasoner", block=32, repos="Dream-org/DreamReasoner-8B[-Base]", **QWEN3),
    "StableDiffcoderForCausalLM": Facts(
        "stable_diffcoder", 5, 4, (2,), "ByteDance-Seed/Stable-DiffCoder-8B-{Base,Instruct}"
    ),
    "Fast_dLLM_QwenForCausalLM": Facts(
        "fast_dllm_v2", 151665, 32, repos="Efficient-Large-Model/Fast_dLLM_v2_{7B,1.5B}", qkv_bias=True, shift=True,
        keys={"block_size": "bd_size"}, **QWEN,
    ),
    "LLaDAModelLM": Facts(
        "llada", 126336, 32, (126081, 126348), "GSAI-ML/LLaDA-8B-{Base,Instruct}, GSAI-ML/LLaDA-1.5",
        full=True, policy="fast_dllm_v1", keys=OLMO,
        plain=dict.fromkeys(("alibi", "attention_layer_norm", "input_emb_norm", "scale_logits", "include_bias"), OFF)
        | {"layer_norm_type": ((None, "rms"), '"rms"'), "multi_query_attention": OFF}
        | {"block_type": ((None, "llama"), '"llama"')},
    ),
    "LLaDAMoEModelLM": Facts(
        "llada_moe", 156895, 32, (156892,), "inclusionAI/LLaDA-MoE-7B-A1B-{Base,Instruct}",
        qk_norm=True, full=True, policy="fast_dllm_v1", mixture="raw",
        keys={"intermediate_size": "dense_intermediate_size", "moe_intermediate_size": "expert_intermediate_size"},
        plain={
            "clip_qkv": NONE, "moe_router_enable_expert_bias": OFF, "shared_expert_intermediate_size": NONE,
            "qk_layernorm": ((None, True), "true"), "moe_router_score_function": ((None, "softmax"), '"softmax"'),
        },
    ),
    "LLaDA2MoeModelLM": Facts(
        "llada2", 156895, 32, (156892,), "inclusionAI/LLaDA2.{0,1}-{mini,flash}, Zigeng/DMax-Math-16B",
        qk_norm=True, partial=True, mixture="groups",
        plain={
            "use_bias": OFF, "use_qkv_bias": OFF, "use_qk_norm": ((None, True), "true"),
            "score_function": ((None, "sigmoid"), '"sigmoid"'), "norm_topk_prob": ((None, True), "true"),
            "moe_router_enable_expert_bias": ((None, True), "true"),
        },
    ),
    "DiffusionGemmaForBlockDiffusion": Facts(
        "diffusion_gemma", -1, 256, (1, 106), "google/diffusiongemma-26B-A4B-it",
        qk_norm=True, head_dim=True, policy="diffusion_gemma", mixture="softmax",
        keys={
            "hidden_act": "hidden_activation", "block_size": "canvas_length", "num_experts_per_tok": "top_k_experts",
        },
        plain={
            "hidden_act": (("gelu_pytorch_tanh",), '"gelu_pytorch_tanh"'), "tie_word_embeddings": ((True,), "true"),
            "use_bidirectional_attention": ((None, "vision"), '"vision": text is read causally'),
        },
    ),
}  # fmt: skip

ALIASES = {  # older names, and those that dInfer's converter writes
    "SeedDiffcoderForCausalLM": "StableDiffcoderForCausalLM",
    "FusedLLaDAMoEModelLM": "LLaDAMoEModelLM",
    "FusedOlmoeForCausalLM": "LLaDAMoEModelLM",
}


def known(architecture: str, auto_map: object) -> str | None:
    """The key of FAMILIES for `architectures[0]`; None if there is none. `model_type` never decides.

    Early Stable-DiffCoder files say LlamaForCausalLM; only their auto_map tells them from a causal Llama.
    """
    mapped = auto_map.values() if isinstance(auto_map, Mapping) else ()
    if architecture == "LlamaForCausalLM" and any("diffcoder" in str(value).lower() for value in mapped):
        architecture = "StableDiffcoderForCausalLM"
    name = ALIASES.get(architecture, architecture)
    return name if name in FAMILIES else None
