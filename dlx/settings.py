"""What can be set of an engine: the one place that flags, DLX_* variables, YAML keys and the docs are made from.

To add a setting, write one field here, with a default and a description:

    prefix_cache: bool = Field(default=True, strict=True, description="share K/V pages of prompts that begin alike")

It is then --prefix-cache, DLX_PREFIX_CACHE, `prefix_cache:` under `engine:`, `LLM(prefix_cache=…)`, a field of Config;
`python tools/configuration.py` writes it into docs/configuration.md. A field named as a sampling parameter or as a flag
of a command says under what name it is a flag (`seed`). Nothing heavy may be imported here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field

from dlx.errors import ConfigError
from dlx.graphs.modes import Mode

Dtype = Literal["float32", "bfloat16"]
KvDtype = Literal["bf16", "fp8", "fp8_e4m3", "fp8_e5m2"]


class Settings(BaseModel, frozen=True, extra="forbid", defer_build=True):
    """The configuration of one engine as it is asked for; None leaves it to the policy, the model or the machine.

    Sizes are in tokens, pages and rows. `dlx.config.Config` is the same with what was left open filled in.
    """

    model: Path | None = Field(
        default=None, description="checkpoint folder, or ORG/NAME at huggingface.co; else the bundled model"
    )
    policy: str | None = Field(default=None, description="decoding policy, by name; else the model's own")
    graphs: Mode | None = Field(
        default=None,
        description="how steps run: off, eager; compile, by Inductor; capture, as CUDA graphs; else capture on CUDA",
    )
    device: str | None = Field(default=None, description="where: cpu, cuda or cuda:N; else CUDA if there is a GPU")
    dtype: Dtype | None = Field(
        default=None, description="number format of weights and K/V; else bfloat16 on CUDA, float32 on a CPU"
    )
    block_length: int | None = Field(
        default=None, strict=True, ge=1, le=256,
        description="tokens a block, of those the model was trained for; else the policy's or the model's",
    )  # fmt: skip
    max_num_seqs: int = Field(default=8, strict=True, ge=1, le=1024, description="rows that decode at once")
    max_model_len: int | None = Field(
        default=None, strict=True, ge=1, description="tokens of prompt and answer; else the model's, 4096 at most"
    )
    page_size: int | None = Field(
        default=None, strict=True, ge=1, le=1024,
        description="tokens a K/V page, a multiple of the block length; else the first from 16 on",
    )  # fmt: skip
    num_pages: int | None = Field(
        default=None, strict=True, ge=1, lt=2**31,
        description="pages in the pool; else what max_num_seqs rows need and memory allows",
    )  # fmt: skip
    kv_cache_dtype: KvDtype | None = Field(
        default=None, description="number format of K/V pages; fp8 is fp8_e4m3; else that of the weights"
    )
    gpu_memory_utilization: float = Field(
        default=0.9, gt=0, le=1,
        description="share of a GPU's memory that weights, K/V pages, activations and graphs may take together",
    )  # fmt: skip
    prefix_caching: bool = Field(
        default=True, strict=True, description="keep the K/V pages of finished prefixes, and find them again"
    )
    max_num_batched_tokens: int = Field(
        default=2048, strict=True, ge=1, description="tokens of prompts that a launch prefills beside what decodes"
    )
    batch_invariant: bool = Field(
        default=False, strict=True,
        description="launches of one shape, whatever runs beside a request: the same tokens alone and in any batch",
    )  # fmt: skip
    forwards: int = Field(
        default=1, strict=True, ge=1, le=4096,
        description="forwards that one launch may run on the device before the host reads what it committed",
    )  # fmt: skip
    unroll: bool = Field(
        default=False, strict=True,
        description="run the forwards of a launch one after the other, so that a profile shows each",
    )  # fmt: skip
    pack: Path | None = Field(
        default=None, description="folder of a pack, or of packs, of `dlx pack`: graphs are read from it, not compiled"
    )
    quantization: Literal["fp8"] | None = Field(
        default=None, description="of the layers' weights: fp8 is e4m3 with a scale a row, made while they are read"
    )
    load_format: Literal["safetensors", "dummy"] = Field(
        default="safetensors",
        description="what weights are; dummy: random ones of the true shape, config.json is enough",
    )
    seed: int = Field(
        default=0,
        strict=True,
        ge=0,
        lt=2**63,
        description="seed of dummy weights",
        json_schema_extra={"flag": "dummy_seed"},
    )
    check_weights: bool = Field(default=False, strict=True, description="refuse NaN and infinities, tensor by tensor")
    lora: Path | None = Field(
        default=None, description="LoRA adapter to merge into the weights: a folder in PEFT's layout, or ORG/NAME"
    )
    adapters: dict[str, Path] = Field(
        default={},
        max_length=64,
        description="name → LoRA adapter, a folder or ORG/NAME, that requests ask for by name",
    )
    filters: bool = Field(
        default=False, strict=True, description="let requests ask for top_k and top_p, which makes a step slower"
    )
    watch: bool = Field(
        default=False, strict=True, description="keep proposals and confidences of undecided tokens for whoever watches"
    )

    def check(self) -> None:
        """Raise ConfigError for what no machine could do."""
        kind, colon, index = (self.device or "cpu").partition(":")
        if kind not in ("cpu", "cuda") or (colon and not index.isdecimal()):
            raise ConfigError(f"device={self.device!r} is not supported; use cpu or cuda")
        if "" in self.adapters:
            raise ConfigError("adapters has an empty name; give each a name that requests can ask for")
        if self.lora is not None and self.load_format == "dummy":
            raise ConfigError(
                f"lora={str(self.lora)!r} cannot be merged into random weights; use adapters, or a checkpoint"
            )

    def given(self) -> dict[str, Any]:
        """What was set, by name: the arguments of `Config.from_args` and `LLM`."""
        return {name: getattr(self, name) for name in sorted(self.model_fields_set)}
