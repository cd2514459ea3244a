"""Random LoRA adapters on disk, in PEFT's layout."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

CONFIG = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "some/base", "inference_mode": True,
    "r": 4, "lora_alpha": 6, "use_rslora": False, "use_dora": False, "bias": "none", "fan_in_fan_out": False,
    "lora_dropout": 0.05, "modules_to_save": None, "rank_pattern": {}, "alpha_pattern": {}, "init_lora_weights": True,
}  # fmt: skip


def drawn(shapes: dict[str, tuple[int, int]], r: int, seed: int) -> dict[str, Tensor]:
    """Factors under PEFT's names, of base modules with weights [out, in]."""
    gen = torch.Generator().manual_seed(seed)
    out: dict[str, Tensor] = {}
    for module, (rows, cols) in shapes.items():
        out[f"base_model.model.{module}.lora_A.weight"] = torch.randn(r, cols, generator=gen) / cols**0.5
        out[f"base_model.model.{module}.lora_B.weight"] = torch.randn(rows, r, generator=gen) / r**0.5
    return out


def write_adapter(folder: Path, shapes: dict[str, tuple[int, int]], seed: int = 0, **config: object) -> Path:
    """Write an adapter of these base modules; `config` changes its adapter_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    facts = CONFIG | {"target_modules": sorted({module.split(".")[-1] for module in shapes})} | config
    (folder / "adapter_config.json").write_text(json.dumps(facts, indent=2))
    r = facts["r"]
    assert isinstance(r, int)
    save_file(drawn(shapes, r, seed), folder / "adapter_model.safetensors", {"format": "pt"})
    return folder
