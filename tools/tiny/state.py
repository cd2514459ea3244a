"""What training changes: network, optimizers, progress; made new, saved, and taken up again."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer

from tools.tiny.export import load
from tools.tiny.muon import Muon
from tools.tiny.network import PRESETS, Network, Shape
from tools.tiny.recipe import Recipe
from tools.tiny.vocabulary import train_tokenizer

log = logging.getLogger(__name__)

ROUND = 64  # the vocabulary is padded to a multiple of this


@dataclass
class Progress:
    """How far training is."""

    step: int = 0
    tokens: int = 0  # clean ones
    used_s: float = 0.0
    calls: int = 0
    history: list[dict[str, float]] = field(default_factory=list)


class Model(NamedTuple):
    """What is trained, with the optimizers of its matrices and of everything else."""

    network: Network
    tokenizer: Tokenizer
    muon: Muon
    adamw: torch.optim.AdamW
    progress: Progress


def start(recipe: Recipe, state: Path, init: Path | None, device: torch.device) -> Model:
    """A model from the state file if it is there, else from the checkpoint folder `init`, else a new one."""
    torch.manual_seed(recipe.seed)
    saved: dict[str, Any] | None = None  # Any: a saved state nests tensors, numbers and text
    if state.exists():
        saved = torch.load(state, map_location="cpu", weights_only=True)
        assert saved is not None
        tokenizer = Tokenizer.from_str(saved["tokenizer"])
        network = Network(Shape(**saved["shape"]))
    elif init is not None:
        tokenizer = Tokenizer.from_file(str(init / "tokenizer.json"))
        network = load(init)
    else:
        shape = PRESETS[recipe.preset]
        tokenizer = train_tokenizer(recipe.mix, shape.vocab)
        padded = -(-tokenizer.get_vocab_size() // ROUND) * ROUND
        network = Network(replace(shape, vocab=padded))
    model = build(recipe, network.to(device), tokenizer)
    if saved is not None:
        network.load_state_dict(saved["network"])
        model.muon.load_state_dict(saved["muon"])
        model.adamw.load_state_dict(saved["adamw"])
        model = model._replace(progress=Progress(**saved["progress"]))
    size = sum(weight.numel() for weight in network.parameters())
    log.info("%.2f M parameters, vocabulary %d, on %s", size / 1e6, network.shape.vocab, device)
    return model


def build(recipe: Recipe, network: Network, tokenizer: Tokenizer) -> Model:
    """Muon for the layers' matrices, AdamW without decay for embeddings and norms; nothing trained yet."""
    named = network.named_parameters()
    matrices = {name: weight for name, weight in named if weight.dim() == 2 and name.startswith("layers")}
    rest = [weight for name, weight in network.named_parameters() if name not in matrices]
    adamw = torch.optim.AdamW(rest, lr=recipe.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=rest[0].is_cuda)
    return Model(network, tokenizer, Muon(matrices.values(), recipe.lr, recipe.decay), adamw, Progress())


def save(model: Model, path: Path) -> None:
    """Write the state beside its place, then move it there: a broken write leaves the old one."""
    value = {
        "network": model.network.state_dict(),
        "shape": vars(model.network.shape),
        "tokenizer": model.tokenizer.to_str(),
        "muon": model.muon.state_dict(),
        "adamw": model.adamw.state_dict(),
        "progress": vars(model.progress),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".new")
    torch.save(value, new)
    new.replace(path)
