"""What an engine is built with: checked once, frozen, never rewritten. The only reader of the environment."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from pydantic import BaseModel, ConfigDict, Field, InstanceOf, ValidationError

from dlx.errors import ConfigError, PolicyError
from dlx.graphs.capture import MODES, Mode
from dlx.graphs.policies import POLICIES, Policy, named
from dlx.graphs.rules import SubBlock, Within
from dlx.models.card import Card
from dlx.weights.hub import fetched

TINY = Path(__file__).parent / "assets" / "tiny"
Dtype = Literal["float32", "bfloat16"]
KvDtype = Literal["bf16", "fp8", "fp8_e4m3", "fp8_e5m2"]
KV_DTYPES: dict[KvDtype, torch.dtype] = {
    "bf16": torch.bfloat16,
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}


class Environment(NamedTuple):
    """What dlx reads of the process environment."""

    threads: int | None  # OMP_NUM_THREADS, where it is a number
    pack: Path | None  # DLX_PACK, what Config.pack is by default


def environment() -> Environment:
    """Read the environment now."""
    threads = os.environ.get("OMP_NUM_THREADS", "")
    pack = os.environ.get("DLX_PACK")
    return Environment(int(threads) if threads.isdigit() and int(threads) > 0 else None, Path(pack) if pack else None)


class Config(BaseModel):
    """The resolved configuration of one engine; `from_args` builds it. Sizes in tokens, pages and rows.

    model         checkpoint folder, or ORG/NAME at huggingface.co
    policy        decoding strategy, not yet bound to a card; None takes the model's
    graphs        off: eager; compile: Inductor; capture: Inductor and CUDA graphs
    device, dtype where and in what the network runs
    block_length  tokens a block, of those the model was trained for; None takes the policy's or the card's
    max_num_seqs  rows that decode at once
    max_model_len tokens of prompt and answer; None takes the model's, 4096 at most
    page_size     tokens a K/V page, a multiple of the block length; None takes the first from 16 on
    num_pages     pages in the pool; None takes what max_num_seqs rows need and memory allows
    kv_cache_dtype          of K/V pages: bf16, fp8 (fp8_e4m3) or fp8_e5m2; None takes the model's
    gpu_memory_utilization  share of a GPU's memory that weights, pages, activations and graphs may take together
    forwards      that one launch may run on the device before the host reads what it committed
    unroll        run the forwards of a launch one after the other, so that a profile shows each
    pack          folder of a pack, or of packs, that `dlx pack` wrote: graphs are read from it instead of compiled;
                  None takes $DLX_PACK
    quantization  fp8: weights of the layers in e4m3 with a scale a row, quantised while they are read; None leaves them
    load_format   safetensors, or dummy: random weights of the true shape
    seed          of dummy weights
    check_weights refuse NaN and infinities, tensor by tensor
    lora          folder of a LoRA adapter (PEFT), or ORG/NAME, merged into the weights as they are read
    adapters      name → folder of a LoRA adapter, or ORG/NAME, that requests may ask for by name
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    model: Path
    policy: InstanceOf[Policy] | None
    graphs: Mode
    device: str
    dtype: Dtype
    block_length: int | None = Field(default=None, strict=True, ge=1, le=256)
    max_num_seqs: int = Field(default=8, strict=True, ge=1, le=1024)
    max_model_len: int | None = Field(default=None, strict=True, ge=1)
    page_size: int | None = Field(default=None, strict=True, ge=1, le=1024)
    num_pages: int | None = Field(default=None, strict=True, ge=1, lt=2**31)
    kv_cache_dtype: KvDtype | None = Field(
        default=None, description="dtype of K/V pages; fp8 is fp8_e4m3; None takes the model's dtype"
    )
    gpu_memory_utilization: float = Field(
        default=0.9,
        gt=0,
        le=1,
        description="share of a GPU's memory that weights, K/V pages, activations and graphs may take together",
    )
    forwards: int = Field(default=1, strict=True, ge=1, le=4096)
    unroll: bool = Field(default=False, strict=True)
    pack: Path | None = None
    quantization: Literal["fp8"] | None = None
    load_format: Literal["safetensors", "dummy"] = "safetensors"
    seed: int = Field(default=0, strict=True, ge=0, lt=2**63)
    check_weights: bool = Field(default=False, strict=True)
    lora: Path | None = None
    adapters: dict[str, Path] = Field(default={}, max_length=64)

    @staticmethod
    def from_args(
        model: str | Path | None = None,
        policy: str | Policy | None = None,
        graphs: str | None = None,
        device: str | None = None,
        dtype: str | None = None,
        **rest: Any,
    ) -> Config:
        """Fill in what was left open, for this machine. Raises ConfigError or PolicyError."""
        if device is not None and not isinstance(device, str):
            raise ConfigError(f"device={device!r} is not supported; use cpu or cuda, as text")
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        on_gpu = device.split(":")[0] == "cuda"
        values = {
            "model": TINY if model is None else Path(model).expanduser() if isinstance(model, str | Path) else model,
            "policy": None if policy is None else named(policy),
            "graphs": graphs or ("capture" if on_gpu else "off"),
            "device": device,
            "dtype": dtype or ("bfloat16" if on_gpu else "float32"),
            **rest,
            "pack": rest.get("pack") or environment().pack,
        }
        try:
            config = Config(**values)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(str(part) for part in first["loc"])
            allowed = first["msg"] if first["type"] != "extra_forbidden" else f"use {', '.join(Config.model_fields)}"
            raise ConfigError(f"{name}={first['input']!r} is not allowed: {allowed}") from None
        config.check()
        return config

    def check(self) -> None:
        """Raise ConfigError for what this machine cannot do."""
        kind, _, index = self.device.partition(":")
        if kind not in ("cpu", "cuda") or (":" in self.device and not index.isdecimal()):
            raise ConfigError(f"device={self.device!r} is not supported; use cpu or cuda")
        if kind == "cuda" and not torch.cuda.is_available():
            raise ConfigError(f"device={self.device!r} is not there: torch sees no CUDA device; use device='cpu'")
        if self.kv_cache_dtype == "bf16" and self.dtype != "bfloat16":
            raise ConfigError(
                f"kv_cache_dtype='bf16' does not go with dtype={self.dtype!r}; use fp8_e4m3 or fp8_e5m2, "
                "or dtype='bfloat16'"
            )
        if kind == "cuda" and self.kv_dtype == torch.float8_e4m3fn:
            major, minor = torch.cuda.get_device_capability(self.device)
            if (major, minor) < (8, 9):
                raise ConfigError(
                    f"kv_cache_dtype={self.kv_cache_dtype!r} needs a GPU of sm_89 or above, and {self.device} is "
                    f"sm_{major}{minor}; use kv_cache_dtype='fp8_e5m2'"
                )
        if "" in self.adapters:
            raise ConfigError("adapters has an empty name; give each a name that requests can ask for")
        if self.lora is not None and self.load_format == "dummy":
            raise ConfigError(
                f"lora={str(self.lora)!r} cannot be merged into random weights; use adapters, or a checkpoint"
            )
        if self.graphs == "capture" and kind != "cuda":
            raise ConfigError(
                f"graphs='capture' needs a CUDA device, not {self.device}; use one of {', '.join(MODES[:2])}"
            )

    def local(self) -> Config:
        """The same with folders in place of repositories, which are fetched. Raises ModelError where one cannot be."""
        adapters = {name: fetched(path) for name, path in self.adapters.items()}
        lora = None if self.lora is None else fetched(self.lora)
        return self.model_copy(update={"model": fetched(self.model), "lora": lora, "adapters": adapters})

    @property
    def torch_dtype(self) -> torch.dtype:
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[self.dtype]

    @property
    def kv_dtype(self) -> torch.dtype:
        """Of K/V pages."""
        return self.torch_dtype if self.kv_cache_dtype is None else KV_DTYPES[self.kv_cache_dtype]


assert set(get_args(Mode)) == set(MODES)
assert set(get_args(KvDtype)) == set(KV_DTYPES)


class Geometry(NamedTuple):
    """The sizes that model, policy and configuration agree on."""

    S: int  # tokens a page
    max_len: int  # tokens of prompt and answer


def bind(policy: Policy | None, card: Card, block_length: int | None) -> Policy:
    """The policy, or the family's, with the block length and visibility that it will have.

    Raises PolicyError for what the model was not trained for
    """
    policy = policy or POLICIES[card.policy]
    own = policy.full if policy.turn is None else policy.turn.full
    full = card.full if own is None else own
    if full is not card.full:
        trained = "all-to-all" if card.full else "block-causal"
        raise PolicyError(
            f"full={full} does not suit this {card.family} checkpoint, which was trained {trained}; "
            f"use policy={card.policy!r}, or one with full=None"
        )
    L = block_length or policy.L or card.blocks[0]
    if L not in card.blocks and not card.full:
        trained = ", ".join(map(str, card.blocks))
        raise PolicyError(
            f"blocks of {L} tokens do not suit this {card.family} checkpoint, which was trained with {trained}; "
            f"use block_length={card.blocks[0]}"
        )
    for rule in (policy.select, policy.turn):
        if isinstance(rule, Within | SubBlock) and L % rule.size:
            raise PolicyError(
                f"{rule} does not divide the {L} tokens of this {card.family} checkpoint's blocks; use a size that does"
            )
    if (policy.canvas is None) == (card.gemma is not None):
        use = "policy='diffusion_gemma'" if card.gemma else "one without a canvas, as policy='single_bd'"
        raise PolicyError(f"canvas={policy.canvas} does not suit this {card.family} checkpoint; use {use}")
    return replace(policy, L=L, full=full)


def geometry(config: Config, card: Card, L: int) -> Geometry:
    """Page size and longest row. Raises ConfigError where they do not fit the blocks."""
    S = config.page_size or -(-16 // L) * L
    if S % L:
        near = -(-S // L) * L
        raise ConfigError(f"page_size={S} is not a multiple of the block length {L}; use {near}")
    max_len = config.max_model_len or min(card.max_len, 4096)
    if max_len > card.max_len:
        raise ConfigError(f"max_model_len={max_len} passes the {card.max_len} positions of the model; use at most that")
    return Geometry(S, max_len)
