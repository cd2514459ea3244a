"""LoRA adapters in PEFT's layout: a folder of adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from dlx.errors import ModelError
from dlx.models.card import Place
from dlx.models.decoder import Decoder
from dlx.models.layers import Linear, LowRank
from dlx.weights.files import Json, Stored, headers, inside, listed, opened, read, read_json
from dlx.weights.parameters import FLOATS, Delta

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
NAME = re.compile(r"base_model\.model\.(.+)\.lora_([AB])(?:\.default)?\.weight")
# what only some adapters have and dlx does not compute: a key, the values that ask for nothing
PLAIN: tuple[tuple[str, tuple[object, ...]], ...] = (
    ("use_dora", (None, False)),
    ("use_qalora", (None, False)),
    ("bias", (None, "none")),
    ("lora_bias", (None, False)),
    ("fan_in_fan_out", (None, False)),
    ("modules_to_save", (None, [])),
    ("target_parameters", (None, [])),
    ("trainable_token_indices", (None, [], {})),
    ("megatron_config", (None,)),
    ("alora_invocation_tokens", (None, [])),
    ("layer_replication", (None, [])),
)
MOVED = ("pissa", "olora", "corda", "loftq", "lora_ga")  # initialisations that also change the base weights


class Pair(NamedTuple):
    """The headers of one matrix's factors, and the factor of their product."""

    a: Stored  # [r, in]
    b: Stored  # [out, r]
    scale: float


class Adapter(NamedTuple):
    """An adapter whose headers were checked: base module name → factors. `deltas` reads them."""

    folder: Path
    pairs: Mapping[str, Pair]

    @staticmethod
    def open(folder: str | Path, places: Mapping[str, Place]) -> Adapter:
        """Check an adapter by its config and headers against the tensors of a base model.

        places  the base model's checkpoint names → where they go
        Raises ModelError  no adapter, a damaged file; what dlx does not compute; a target that matches nothing; an
                           adapter of another model: names, shapes, dtypes
        """
        folder = Path(folder).expanduser()
        for name in (CONFIG, WEIGHTS):
            if not (folder / name).is_file():
                pickled = f", and {PICKLE} may run code" if name == WEIGHTS and (folder / PICKLE).is_file() else ""
                raise ModelError(f"{folder} has no {name}{pickled}; name the folder of a LoRA adapter in PEFT's layout")
        path = inside(folder / WEIGHTS)
        config = read_json(folder / CONFIG)
        _refuse(folder / CONFIG, config)
        found: dict[str, dict[str, Stored]] = {}
        for name, stored in headers([path]).items():
            match = NAME.fullmatch(name)
            if match is None:
                raise ModelError(
                    f"{path}: {name} is no factor of a linear layer; dlx reads base_model.model.MODULE.lora_A.weight, "
                    "and lora_B"
                )
            if stored.dtype not in FLOATS:
                raise ModelError(
                    f"{path}: {name} has dtype {stored.dtype}, expected one of {', '.join(sorted(FLOATS))}"
                )
            if match[2] in found.setdefault(match[1], {}):
                raise ModelError(f"{path}: lora_{match[2]} of {match[1]} is twice there; fetch the file again")
            found[match[1]][match[2]] = stored
        wrong, pairs = [], {}
        for module, factors in found.items():
            fault = _misfit(config, module, factors, places)
            if fault:
                wrong.append(f"{module}: {fault}")
            else:
                pairs[module] = Pair(factors["A"], factors["B"], _scale(config, module))
        if wrong:
            raise ModelError(f"{path} does not suit the model: {listed(wrong, '; ')}. Name an adapter of this model")
        targets = _targets(config)
        idle = [target for target in targets if not any(_matches(target, module) for module in pairs)]
        stray = [module for module in pairs if not any(_matches(target, module) for target in targets)]
        if idle or stray or not pairs:
            fault = f"target_modules has {listed(idle)}, which matches nothing that {WEIGHTS} adapts"
            if not idle:
                fault = f"target_modules has nothing for {listed(stray) or 'any matrix'}, which {WEIGHTS} adapts"
            raise ModelError(f"{folder / CONFIG}: {fault}; the two files must be of one adapter")
        return Adapter(folder, pairs)

    def deltas(self, places: Mapping[str, Place], finite: bool = False) -> dict[str, list[Delta]]:
        """Parameter → what this adapter adds to its rows; reads the file. `places` are those it was opened with.

        Raises ModelError  with `finite`, for a factor with NaN or infinities
        """
        out: dict[str, list[Delta]] = {}
        path = self.folder / WEIGHTS
        with opened(path) as shard:
            names = {match.groups(): name for name in shard.keys() if (match := NAME.fullmatch(name))}  # noqa: SIM118
            for module, pair in self.pairs.items():
                place = places[f"{module}.weight"]
                a, b = (read(path, shard, names[module, factor]).clone() for factor in "AB")
                if finite and not (bool(a.isfinite().all()) and bool(b.isfinite().all())):
                    raise ModelError(f"{path}: a factor of {module} holds NaN or infinite values; fetch the file again")
                out.setdefault(place.param, []).append(Delta(place.row, a, b, pair.scale))
        return out


def install(net: nn.Module, adapters: Sequence[Adapter], places: Mapping[str, Place], finite: bool = False) -> None:
    """Give the linear layers of a network the factors of adapters, which get slots from 1 on in their order.

    Parts of a fused matrix (q, k, v) have ranks of their own, so their factors lie behind one another.
    finite  refuse NaN and infinities
    Raises ModelError  for a matrix that is no linear layer: the head, an expert, a router
    """
    every = [adapter.deltas(places, finite) for adapter in adapters]
    for param in dict.fromkeys(param for deltas in every for param in deltas):
        of = [deltas.get(param, []) for deltas in every]
        layer = dict(net.named_modules()).get(param.removesuffix(".weight"))
        if not isinstance(layer, Linear):
            who = adapters[next(i for i, deltas in enumerate(of) if deltas)].folder
            raise ModelError(f"{who} adapts {param}, which only merged adapters can; use lora={str(who)!r}")
        rows = sorted({delta.row for deltas in of for delta in deltas})
        R = max(len(delta.a) for deltas in of for delta in deltas)
        n_out, n_in = layer.weight.shape
        a, b = torch.zeros(len(of), len(rows), R, n_in), torch.zeros(len(of), len(rows), R, n_out)
        for slot, deltas in enumerate(of):
            for row, low, high, scale in deltas:
                at, r = rows.index(row), len(low)
                a[slot, at, :r] = low
                b[slot, at, :r, row : row + len(high)] = scale * high.float().T
        like = next(x for x in net.parameters() if x.dtype in (torch.float32, torch.bfloat16))
        a, b = (x.flatten(0, 2).to(layer.weight.device, like.dtype) for x in (a, b))
        layer.adapters = LowRank(a, b, len(of))
    if isinstance(net, Decoder) and any(every):
        net.plain = False


def _refuse(path: Path, config: Json) -> None:
    """Raise ModelError for an adapter that is no LoRA, or one that computes more than scale · B · A."""
    kind = config.get("peft_type")
    if kind not in (None, "LORA"):
        raise ModelError(f"{path}: peft_type={kind!r} is not supported; dlx reads LORA")
    for key, plain in PLAIN:
        if config.get(key) not in plain:
            raise ModelError(
                f"{path}: {key}={config[key]!r} is not supported; dlx adds scale · B · A to matrices and nothing else"
            )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(MOVED):
        raise ModelError(f"{path}: init_lora_weights={start!r} changed the base weights too; export it as plain LoRA")
    _number(path, "r", config.get("r"), rank=True)
    _number(path, "lora_alpha", config.get("lora_alpha"))
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(key) or {}
        if not isinstance(patterns, dict):
            raise ModelError(f"{path}: {key}={patterns!r} is not allowed; expected an object of patterns and numbers")
        for pattern, value in patterns.items():
            _number(path, f"{key}[{pattern!r}]", value, rank=key == "rank_pattern")
            try:
                re.compile(pattern)
            except re.error as error:
                raise ModelError(f"{path}: {key} has {pattern!r}, which is no regular expression ({error})") from None


def _number(path: Path, key: str, value: object, rank: bool = False) -> None:
    """Raise ModelError unless it is a finite number from 0 on, or as a rank an integer from 1 on."""
    good = isinstance(value, int if rank else int | float) and not isinstance(value, bool)
    if not good or not int(rank) <= value < float("inf"):  # type: ignore[operator]
        kind = "an integer from 1 on" if rank else "a number from 0 on"
        raise ModelError(f"{path}: {key}={value!r} is not allowed; expected {kind}")


def _misfit(config: Json, module: str, factors: dict[str, Stored], places: Mapping[str, Place]) -> str:
    """Why a module's factors do not fit the base model; empty if they do."""
    place = places.get(f"{module}.weight")
    if place is None or len(place.shape) != 2:
        return "the model has no such matrix"
    if len(factors) != 2:
        return f"lora_{'B' if 'A' in factors else 'A'} is missing"
    r = int(_pattern(config, "rank_pattern", "r", module))
    out, n_in = place.shape
    for factor, shape in (("A", (r, n_in)), ("B", (out, r))):
        if factors[factor].shape != shape:
            return f"lora_{factor} has shape {list(factors[factor].shape)}, expected {list(shape)}"
    return ""


def _scale(config: Json, module: str) -> float:
    r = _pattern(config, "rank_pattern", "r", module)
    return _pattern(config, "alpha_pattern", "lora_alpha", module) / (r**0.5 if config.get("use_rslora") else r)


def _pattern(config: Json, key: str, default: str, module: str) -> float:
    """A number of the config, which a pattern may replace for some modules: the first that ends the module's name."""
    patterns = config.get(key)
    for pattern, value in (patterns if isinstance(patterns, dict) else {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            return float(value)
    return float(config[default])  # type: ignore[arg-type]  # _refuse has checked


def _targets(config: Json) -> list[str]:
    targets = config.get("target_modules")
    return [targets] if isinstance(targets, str) else [str(t) for t in targets] if isinstance(targets, list) else []


def _matches(target: str, module: str) -> bool:
    """As PEFT reads a target: a module's name or its end; a pattern of whole names; all linear layers."""
    if target == "all-linear" or module == target or module.endswith(f".{target}"):
        return True
    try:
        return re.fullmatch(target, module) is not None
    except re.error:
        return False
