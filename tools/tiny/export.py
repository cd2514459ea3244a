"""The trained network as a checkpoint folder in the Hugging Face layout, and back."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from tools.tiny.network import EPS, INIT_STD, Network, Shape
from tools.tiny.vocabulary import END, MASK, PAD, SPECIAL, TEMPLATE

SHARD_BYTES = 15 << 20
MAX_LEN = 2048  # positions
PREFIX = "model."
INDEX = "model.safetensors.index.json"


def export(
    network: Network,
    tokenizer: Tokenizer,
    blocks: Sequence[int],
    folder: Path,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write bf16 shards, their index, the configurations and the tokenizer.

    blocks  the block lengths trained, the model's own first
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("model-*.safetensors"):
        old.unlink()
    tensors = {
        PREFIX + name: tensor.detach().to("cpu", torch.bfloat16).contiguous()
        for name, tensor in network.state_dict().items()
    }
    shards = _shards(tensors, shard_bytes)
    where: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, {"format": "pt"})
        (folder / file).chmod(0o644)  # safetensors leaves 0600
        where.update(dict.fromkeys(shard, file))
    size = sum(tensor.nbytes for tensor in tensors.values())
    _write(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": where})
    _write(folder / "config.json", _config(network.shape, blocks))
    generation = {
        "eos_token_id": END,
        "pad_token_id": PAD,
        "block_length": blocks[0],
        "confidence_threshold": 0.9,
    }
    _write(folder / "generation_config.json", generation)
    _write(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": SPECIAL[END],
            "pad_token": SPECIAL[PAD],
            "mask_token": SPECIAL[MASK],
            "model_max_length": MAX_LEN,
            "clean_up_tokenization_spaces": False,
            "chat_template": TEMPLATE,
        },
    )
    tokenizer.save(str(folder / "tokenizer.json"))


def load(folder: Path) -> Network:
    """The network of a folder that `export` wrote, in fp32."""
    config = json.loads((folder / "config.json").read_text())
    network = Network(
        Shape(
            hidden=config["hidden_size"],
            layers=config["num_hidden_layers"],
            heads=config["num_attention_heads"],
            kv_heads=config["num_key_value_heads"],
            head_dim=config["head_dim"],
            ffn=config["intermediate_size"],
            vocab=config["vocab_size"],
            theta=config["rope_theta"],
        )
    )
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values())):
        tensors |= load_file(folder / file)
    network.load_state_dict({name.removeprefix(PREFIX): tensor.float() for name, tensor in tensors.items()})
    return network


def _shards(tensors: dict[str, Tensor], shard_bytes: int) -> list[dict[str, Tensor]]:
    """Tensors in their order, cut before a shard would pass its size."""
    shards: list[dict[str, Tensor]] = [{}]
    for name, tensor in tensors.items():
        full = sum(other.nbytes for other in shards[-1].values()) + tensor.nbytes > shard_bytes
        if shards[-1] and full:
            shards.append({})
        shards[-1][name] = tensor
    return shards


def _config(shape: Shape, blocks: Sequence[int]) -> dict[str, object]:
    return {
        "architectures": ["SDARForCausalLM"],
        "model_type": "sdar",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "block_size": blocks[0],
        "block_length": blocks[0],
        "trained_block_lengths": list(blocks),
        "mask_token_id": MASK,
        "bos_token_id": PAD,
        "eos_token_id": END,
        "pad_token_id": PAD,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "initializer_range": INIT_STD,
        "intermediate_size": shape.ffn,
        "max_position_embeddings": MAX_LEN,
        "max_window_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "rms_norm_eps": EPS,
        "rope_scaling": None,
        "rope_theta": shape.theta,
        "sliding_window": None,
        "use_sliding_window": False,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": shape.vocab,
    }


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")
