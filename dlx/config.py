"""What an engine is built with: settings with nothing left open, checked once, frozen, never rewritten."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from pydantic import ConfigDict, InstanceOf, ValidationError

from dlx.environment import environment
from dlx.errors import ConfigError, PolicyError
from dlx.graphs.modes import MODES, Mode
from dlx.graphs.policies import POLICIES, Policy, named
from dlx.graphs.rules import SubBlock, Within
from dlx.graphs.shapes import Shapes, plan
from dlx.models.card import Card
from dlx.settings import Dtype, KvDtype, Settings
from dlx.sources import nearest
from dlx.weights.hub import fetched

TINY = Path(__file__).parent / "assets" / "tiny"
KV_DTYPES: dict[KvDtype, torch.dtype] = {
    "bf16": torch.bfloat16,
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}


class Config(Settings, frozen=True):
    """The resolved configuration of one engine; `from_args` builds it.

    A subclass, for it is the same fields, which are described in `Settings`: those below are no longer open, and the
    policy is a value, not yet bound to a card.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    model: Path = TINY
    policy: InstanceOf[Policy] | None = None  # pyright: ignore[reportIncompatibleVariableOverride]  named before
    graphs: Mode = "off"
    device: str = "cpu"
    dtype: Dtype = "float32"

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
            unknown = first["type"] == "extra_forbidden"
            allowed = f"no such setting{nearest(name, Config.model_fields)}" if unknown else first["msg"]
            raise ConfigError(f"{name}={first['input']!r} is not allowed: {allowed}") from None
        config.check()
        return config

    def check(self) -> None:
        """Raise ConfigError for what this machine cannot do."""
        super().check()
        kind = self.device.partition(":")[0]
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


def buckets(config: Config, card: Card, policy: Policy) -> Shapes:
    """The sizes of a worker's graphs, for a policy that `bind` returned. Raises ConfigError as `geometry` does."""
    assert policy.L is not None, "bind() gives a policy its block length"
    S, max_len = geometry(config, card, policy.L)
    last = max_len + policy.L - policy.step  # the last canvas may begin at any position
    most = 256 if config.batch_invariant else 2048  # one size for all prompts: a short one pays for it whole
    # a prompt that sees itself whole is one forward, and so is a sequence
    whole = policy.full or policy.turn is not None
    chunk = max_len if whole else min(most, config.max_num_batched_tokens)
    return plan(config.max_num_seqs, last, policy.step, S, chunk, config.batch_invariant)
