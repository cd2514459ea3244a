"""Tiny random checkpoints of every family: the published config.json with smaller numbers, and transformers' network.

The oracle is the class of transformers that computes the same; its tensors are written under the family's own names.
Every vector, bias and router is drawn, so that one that is left out or swapped shows.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import (
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from tests.checkpoints import Shape, save, write_tokenizer

CONFIGS = Path(__file__).parent / "data" / "configs"
VOCAB, STOP, MASK = 97, 2, 3
E, F, LAYERS, HEADS, MAX_LEN = 64, 96, 3, 4, 256
HF = {
    "hidden_size": E, "intermediate_size": F, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "num_key_value_heads": 2, "vocab_size": VOCAB, "max_position_embeddings": MAX_LEN,
}  # fmt: skip
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24}
OLMO = {
    "d_model": E, "mlp_hidden_size": F, "n_layers": LAYERS, "n_heads": HEADS, "n_kv_heads": HEADS,
    "embedding_size": VOCAB, "vocab_size": VOCAB, "max_sequence_length": MAX_LEN,
}  # fmt: skip


class Tiny(NamedTuple):
    """One family: the published config it starts from, what is smaller, its oracle, and how its decoder looks."""

    published: str
    smaller: dict[str, Any]
    oracle: type[Any]
    config: type[Any]
    extra: dict[str, Any]  # for the oracle's config
    L: int  # block length
    full: bool = False
    shift: bool = False


def _llada_moe() -> dict[str, Any]:
    sizes = {k: v for k, v in HF.items() if k != "intermediate_size"} | {"num_key_value_heads": HEADS}
    experts = {"num_experts": 8, "num_experts_per_tok": 3, "expert_intermediate_size": 24}
    return sizes | experts | {"dense_intermediate_size": F, "moe_layer_freq": [1] * LAYERS}


HEAD = {"head_dim": 32}
LLADA2 = HF | HEAD | EXPERTS | {"num_experts": 16, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2}
FAMILIES: dict[str, Tiny] = {
    "dream": Tiny("dream_7b", HF, Qwen2ForCausalLM, Qwen2Config, {}, 8, full=True, shift=True),
    "diffucoder": Tiny("diffucoder_7b", HF, Qwen2ForCausalLM, Qwen2Config, {}, 4, full=True, shift=True),
    "dream_reasoner": Tiny("dream_reasoner_8b", HF | HEAD | {"block_size": 8}, Qwen3ForCausalLM, Qwen3Config, HEAD, 8),
    "stable_diffcoder": Tiny("stable_diffcoder_8b", HF | {"head_dim": 16}, LlamaForCausalLM, LlamaConfig, {}, 4),
    "llada": Tiny("llada_8b", OLMO, LlamaForCausalLM, LlamaConfig, {"num_key_value_heads": HEADS}, 8, full=True),
    "fast_dllm_v2": Tiny("fast_dllm_v2_7b", HF | {"bd_size": 8}, Qwen2ForCausalLM, Qwen2Config, {}, 8, shift=True),
    "fast_dllm_v2_tied": Tiny(
        "fast_dllm_v2_1_5b", HF | {"bd_size": 4}, Qwen2ForCausalLM, Qwen2Config, {}, 4, shift=True
    ),
    "sdar": Tiny("sdar_4b", HF | HEAD, Qwen3ForCausalLM, Qwen3Config, HEAD, 4),
    "sdar_moe": Tiny(
        "sdar_30b_a3b", HF | HEAD | EXPERTS, Qwen3MoeForCausalLM, Qwen3MoeConfig,
        HEAD | EXPERTS | {"norm_topk_prob": True}, 4,
    ),
    "llada_moe": Tiny(
        "llada_moe_7b_a1b", _llada_moe(), Qwen3MoeForCausalLM, Qwen3MoeConfig,
        EXPERTS | {"norm_topk_prob": False, "head_dim": E // HEADS, "num_key_value_heads": HEADS}, 8, full=True,
    ),
    "llada2": Tiny(
        "llada2_mini", LLADA2 | {"rotary_dim": 16, "block_size": 8}, Glm4MoeForCausalLM, Glm4MoeConfig,
        HEAD | {"moe_intermediate_size": 24, "n_routed_experts": 16, "n_shared_experts": 1, "num_experts_per_tok": 4,
                "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "norm_topk_prob": True,
                "first_k_dense_replace": 1, "use_qk_norm": True, "attention_bias": False}, 8,
    ),
}  # fmt: skip


def config(name: str) -> dict[str, Any]:
    """config.json of a tiny checkpoint: the published one, with smaller numbers."""
    tiny = FAMILIES[name]
    published: dict[str, Any] = json.loads((CONFIGS / f"{tiny.published}.json").read_text())
    return published | tiny.smaller | {"eos_token_id": STOP, "pad_token_id": 0, "mask_token_id": MASK}


def network(name: str, seed: int = 0, spread: float = 1.0) -> Any:
    """The oracle with random weights; `spread` is about the standard deviation of its logits."""
    tiny, facts = FAMILIES[name], config(name)
    rope = {"rope_type": "default", "rope_theta": float(facts["rope_theta"])}
    if "rotary_dim" in facts:
        rope["partial_rotary_factor"] = facts["partial_rotary_factor"]
    tied = facts.get("tie_word_embeddings", facts.get("weight_tying"))
    made = tiny.config(**{**HF, "tie_word_embeddings": tied, "rms_norm_eps": facts["rms_norm_eps"],
                          "rope_parameters": rope, "use_cache": False, **tiny.extra})  # fmt: skip
    net = tiny.oracle(made).eval().float()
    gen = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, x in (*net.named_parameters(), *net.named_buffers()):
            if "inv_freq" in key:
                continue
            drawn = torch.randn(x.shape, generator=gen)
            if x.ndim == 1:
                x.copy_(drawn * 0.3 if "bias" in key else 1 + 0.25 * drawn)
            else:
                head = key.endswith(("lm_head.weight", *tied_(tied)))
                gain = 4.0 if key.endswith("gate.weight") else spread if head else 1.5
                x.copy_(drawn * gain / x.shape[-1] ** 0.5)
    return net


def tied_(tied: bool) -> tuple[str, ...]:
    """The names of the head's matrix beside its own."""
    return ("embed_tokens.weight",) if tied else ()


def tensors(name: str, net: Any) -> dict[str, Tensor]:
    """The oracle's tensors under the names of the family's checkpoints, an expert a tensor."""
    out: dict[str, Tensor] = {}
    tied = net.config.tie_word_embeddings
    for key, x in net.state_dict().items():
        if tied and key == "lm_head.weight":
            continue
        if key.endswith("experts.gate_up_proj"):
            for e, both in enumerate(x):
                for part, half in zip(("gate_proj", "up_proj"), both.chunk(2), strict=True):
                    out[key.replace("gate_up_proj", f"{e}.{part}.weight")] = half.contiguous()
        elif key.endswith("experts.down_proj"):
            out |= {key.replace("down_proj", f"{e}.down_proj.weight"): one.contiguous() for e, one in enumerate(x)}
        else:
            out[key] = x.contiguous()
    return RENAMED.get(FAMILIES[name].published, dict)(out)


def _llada(given: dict[str, Tensor]) -> dict[str, Tensor]:
    top = {"model.embed_tokens": "wte", "model.norm": "ln_f", "lm_head": "ff_out"}
    inner = {
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ff_norm", "self_attn.q_proj": "q_proj",
        "self_attn.k_proj": "k_proj", "self_attn.v_proj": "v_proj", "self_attn.o_proj": "attn_out",
        "mlp.gate_proj": "ff_proj", "mlp.up_proj": "up_proj", "mlp.down_proj": "ff_out",
    }  # fmt: skip
    out = {}
    for key, x in given.items():
        found = re.fullmatch(r"model\.layers\.(\d+)\.(.*)\.weight", key)
        name = f"blocks.{found[1]}.{inner[found[2]]}" if found else top[key.removesuffix(".weight")]
        out[f"model.transformer.{name}.weight"] = x
    return out


def _llada2(given: dict[str, Tensor]) -> dict[str, Tensor]:
    changes = {
        "embed_tokens": "word_embeddings", "e_score_correction_bias": "expert_bias", "self_attn.o_proj":
        "attention.dense", "self_attn.q_norm": "attention.query_layernorm",
        "self_attn.k_norm": "attention.key_layernorm",
    }  # fmt: skip
    out: dict[str, Tensor] = {}
    for key, x in given.items():
        name = key
        for old, new in changes.items():
            name = name.replace(old, new)
        fused = re.sub(r"self_attn\.[qkv]_proj", "attention.query_key_value", name)
        out[fused] = torch.cat((out[fused], x)) if fused in out else x
    return out


RENAMED = {"llada_8b": _llada, "llada2_mini": _llada2}


def write(folder: Path, name: str, net: Any, stacked: bool = False) -> Path:
    """Write a checkpoint folder, its experts stacked a layer if asked for → the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    given = tensors(name, net)
    save(folder, fused(given) if stacked else given, shards=2)
    (folder / "config.json").write_text(json.dumps(config(name)))
    shape = Shape(FAMILIES[name].L, HEADS, HEADS, 16, LAYERS, E, F, VOCAB, VOCAB, stop_id=STOP, mask_id=MASK)
    write_tokenizer(folder, shape)
    return folder


def fused(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Experts as dInfer stacks them: `w13_weight` [X, 2F, E] and `w2_weight` [X, E, F]."""
    out: dict[str, Tensor] = {}
    for key, x in given.items():
        found = re.fullmatch(r"(.*\.experts\.)(\d+)\.(gate|down)_proj\.weight", key)
        if found is None:
            if ".experts." not in key:
                out[key] = x
            continue
        whole = torch.cat((x, given[key.replace("gate_proj", "up_proj")])) if found[3] == "gate" else x
        name = found[1] + ("w13_weight" if found[3] == "gate" else "w2_weight")
        out[name] = torch.cat((out[name], whole[None])) if name in out else whole[None]
    return out


def mask(n: int, L: int, prompt: int | None) -> Tensor:
    """[n, n] bool, what each position sees: block-causal, but a prompt of `prompt` tokens sees itself, whole."""
    at = torch.arange(n)
    end = (at // L + 1) * L
    if prompt is not None:
        end = torch.where(at < prompt, prompt, end)
    return at[None, :] < end[:, None]


@torch.no_grad()
def logits(net: Any, ids: Tensor, sees: Tensor) -> Tensor:
    """[T] ids under the mask [T, T] → [T, V]."""
    return net(input_ids=ids[None].long(), attention_mask=sees[None, None], use_cache=False).logits[0]
