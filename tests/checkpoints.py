"""Tiny random SDAR checkpoints on disk, in the dialect of the published ones.

Norm weights are drawn around 1, so that a norm left out or swapped shows; the head is scaled up, so that
confidences spread over 0 to 1 and a threshold refuses some positions and accepts others.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor

PAD, START, STOP, MASK = 0, 1, 2, 3
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|MASK|>")
TEMPLATE = (
    "{% for m in messages %}"
    "{{ '<|im_start|> ' + m['role'] + ' ' + m['content'] + ' <|im_end|> ' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|> assistant ' }}{% endif %}"
)


@dataclass(frozen=True)
class Shape:
    """The dims of one checkpoint; `words` is the tokenizer's size, the rest of `vocab` is padding."""

    block_length: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: int
    hidden: int
    ffn: int
    vocab: int = 320
    words: int = 320
    tied: bool = False
    rope_theta: float = 1_000_000.0
    rms_norm_eps: float = 1e-6
    max_len: int = 1024
    stop_id: int = STOP
    mask_id: int = MASK
    also: tuple[int, ...] = ()  # further block lengths it claims to be trained for


ZOO = {
    "b4": Shape(4, heads=4, kv_heads=4, head_dim=16, layers=3, hidden=64, ffn=128),
    "b8": Shape(8, heads=6, kv_heads=2, head_dim=32, layers=2, hidden=96, ffn=160, vocab=352, words=341, tied=True),
    "b16": Shape(
        16, heads=8, kv_heads=1, head_dim=16, layers=4, hidden=128, ffn=192, rope_theta=1e4, rms_norm_eps=1e-5
    ),
    "b16-wide-heads": Shape(16, heads=2, kv_heads=1, head_dim=64, layers=5, hidden=48, ffn=256, words=300, tied=True),
    "b32": Shape(32, heads=5, kv_heads=5, head_dim=24, layers=2, hidden=80, ffn=112, rope_theta=1e5),
}
# Without block_size and mask_token_id in config.json these hold for SDAR: its tokenizer's ids, blocks of 4.
UNDECLARED = Shape(
    4, heads=4, kv_heads=2, head_dim=16, layers=2, hidden=32, ffn=64, vocab=151_936, words=151_670,
    stop_id=151_643, mask_id=151_669,
)  # fmt: skip


def write(
    folder: Path,
    shape: Shape,
    seed: int,
    *,
    declare: bool = True,
    shards: int = 1,
    dtype: torch.dtype = torch.float32,
    spread: float = 5.0,
) -> Path:
    """Write config.json, safetensors and a word tokenizer → the folder.

    declare  whether config.json has block_size and mask_token_id, and generation_config.json is there
             (published SDAR files may have neither key)
    spread   standard deviation of the logits
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawn = draw(shape, seed, spread).items()
    save(folder, {name: tensor.to(dtype).contiguous() for name, tensor in drawn}, shards)
    (folder / "config.json").write_text(json.dumps(config(shape, dtype, declare), indent=2))
    if declare:
        ends = {"eos_token_id": shape.stop_id, "pad_token_id": PAD}
        (folder / "generation_config.json").write_text(json.dumps(ends))
    write_tokenizer(folder, shape)
    return folder


def config(shape: Shape, dtype: torch.dtype, declare: bool) -> dict[str, object]:
    """→ config.json as SDAR's repositories have it."""
    declared: dict[str, object] = {}
    if declare:
        declared = {"block_size": shape.block_length, "mask_token_id": shape.mask_id}
    if shape.also:
        declared["trained_block_lengths"] = [shape.block_length, *shape.also]
    return {
        "architectures": ["SDARForCausalLM"],
        "model_type": "sdar",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": PAD,
        "eos_token_id": shape.stop_id,
        "pad_token_id": PAD,
        **declared,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "initializer_range": 0.02,
        "intermediate_size": shape.ffn,
        "max_position_embeddings": shape.max_len,
        "max_window_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "rms_norm_eps": shape.rms_norm_eps,
        "rope_scaling": None,
        "rope_theta": shape.rope_theta,
        "sliding_window": None,
        "use_sliding_window": False,
        "tie_word_embeddings": shape.tied,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "use_cache": False,
        "vocab_size": shape.vocab,
    }


def draw(shape: Shape, seed: int, spread: float) -> dict[str, Tensor]:
    """→ every tensor under its SDAR name, fp32.

    Matrices keep the size of what passes through them; what attention and the MLP add outweighs the
    embedding, which all masked positions share, so that positions differ.
    """
    gen = torch.Generator().manual_seed(seed)
    E, F, D = shape.hidden, shape.ffn, shape.head_dim

    def matrix(rows: int, cols: int, gain: float = 1.0) -> Tensor:
        return torch.randn(rows, cols, generator=gen) * gain / cols**0.5

    def around(level: float, size: int) -> Tensor:
        return level * (1 + 0.25 * torch.randn(size, generator=gen)).clamp(0.3, 1.7)

    tensors = {"model.embed_tokens.weight": matrix(shape.vocab, E, spread if shape.tied else 1.0)}
    for i in range(shape.layers):
        layer = {
            "self_attn.q_proj.weight": matrix(shape.heads * D, E),
            "self_attn.k_proj.weight": matrix(shape.kv_heads * D, E),
            "self_attn.v_proj.weight": matrix(shape.kv_heads * D, E, 2.0),
            "self_attn.o_proj.weight": matrix(E, shape.heads * D, 2.0),
            "self_attn.q_norm.weight": around(1.6, D),
            "self_attn.k_norm.weight": around(1.0, D),
            "mlp.gate_proj.weight": matrix(F, E),
            "mlp.up_proj.weight": matrix(F, E),
            "mlp.down_proj.weight": matrix(E, F, 2.0),
            "input_layernorm.weight": around(1.0, E),
            "post_attention_layernorm.weight": around(1.0, E),
        }
        tensors |= {f"model.layers.{i}.{name}": tensor for name, tensor in layer.items()}
    tensors["model.norm.weight"] = around(1.0, E)
    if not shape.tied:
        tensors["lm_head.weight"] = matrix(shape.vocab, E, spread)
    return tensors


def save(folder: Path, tensors: dict[str, Tensor], shards: int) -> None:
    """Write the tensors as one file, or as several with an index."""
    names = list(tensors)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return
    files: dict[str, str] = {}
    for i in range(shards):
        part = names[i * len(names) // shards : (i + 1) * len(names) // shards]
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
        files |= dict.fromkeys(part, file)
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def write_tokenizer(folder: Path, shape: Shape) -> None:
    """Write a tokenizer of `shape.words` words: the special ones at their ids, elsewhere w0, w1, …"""
    names = [f"w{i}" for i in range(shape.words)]
    specials = dict(zip(SPECIALS, (PAD, START, shape.stop_id, shape.mask_id), strict=True))
    for name, i in specials.items():
        names[i] = name
    names[4:7] = ["user", "assistant", "unknown"]
    tokenizer = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="unknown"))
    tokenizer.pre_tokenizer = WhitespaceSplit()  # type: ignore[assignment]
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIALS])
    tokenizer.save(str(folder / "tokenizer.json"))
    facts = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "mask_token": "<|MASK|>",
        "model_max_length": shape.max_len,
        "clean_up_tokenization_spaces": False,
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(facts, indent=2))
