"""Run files as the field writes them: YAML with sections `engine:` and `eval:`. `keys.py` says what each key is.

Settings and sampling parameters of dlx may stand there by their own names, too.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from dlx import documents
from dlx.errors import ConfigError
from dlx.graphs.policies import Policy
from dlx.harness.keys import ENGINE, EVAL, FAMILIES, Key
from dlx.harness.strategy import Values, refused, strategy
from dlx.request import SamplingParams
from dlx.settings import Settings

FIELD_MASK = 151666  # the field's default of mask_token_id, for which it looks itself
NUMBERS = {  # key of decoding_thresholds → field of SamplingParams; NAME_threshold is the flat spelling of each
    "add_block": "open_at",
    "semi_complete": "force_at",
    "accept": "threshold",
    "edit": "edit",
    "remask": "remask",
    "token_stability": "stability",
}
FLAT = {f"{name}_threshold": field for name, field in NUMBERS.items()}
READ = ("edit", "remask", "stability")  # numbers that only some rules read
SWITCHES = (
    *("enforce_eager", "enable_full_static_runner", "use_lora", "fdv2_use_block_cache", "token_merge_renormalize"),
    *("save_results", "confirm_run_unsafe_code", "chat"),
)
WHOLE = (
    *("block_size", "buffer_size", "max_post_edit_steps", "token_merge_top_k", "eos", "mask_token_id", "device_start"),
    *("diffusion_gemma_max_denoising_steps", "diffusion_gemma_stability_threshold"),
)
REAL = ("token_merge_weight", *(f"diffusion_gemma_{x}" for x in ("t_min", "t_max", "confidence_threshold")))
# dlx's own names, of what the field has no key for or another one
SETTINGS = tuple(name for name in Settings.model_fields if name not in (*ENGINE, "seed"))
PARAMS = tuple(field.name for field in fields(SamplingParams) if field.name not in EVAL)
KINDS = {bool: ("true or false", SWITCHES), int: ("a whole number", WHOLE), float: ("a number", REAL)}


def read(path: Path) -> Values:
    """What a run file asks for, as arguments of `options`.

    Raises ConfigError  if it is no such file; for a key that is unknown, or asks for what dlx cannot do
           PolicyError  for numbers that the strategy does not allow
    """
    said = documents.read(path)
    unknown = [name for name in said if name not in ("engine", "eval")]
    if unknown:
        raise ConfigError(f"{path} has a section {unknown[0]!r}; a run file has engine and eval")
    engine = section(path, said, "engine", (*ENGINE, *SETTINGS))
    return translated(engine, section(path, said, "eval", (*EVAL, *PARAMS)))


def translated(engine: Values, evals: Values) -> Values:
    """The sections as arguments of `options`. Raises as `read`."""
    for keys, values in ((ENGINE, engine), (EVAL, evals)):
        for name, value in values.items():
            typed(name, value)
            if name in keys:
                nothing(name, value, keys[name])
    path = engine.get("model_path", engine.get("model"))
    tokenizer = engine.get("tokenizer_path")
    if tokenizer is not None and tokenizer != path:
        raise refused("tokenizer_path", tokenizer, f"{ENGINE['tokenizer_path'].why} ({path!r})")
    policy = strategy(engine)
    if policy is not None and evals.get("max_repetition_run") is not None:
        policy = replace(policy, max_repetition_run=evals["max_repetition_run"])
    elif evals.get("max_repetition_run") is not None:
        raise refused("max_repetition_run", evals["max_repetition_run"], "name a decoding_strategy beside it")
    llm: Values = {
        "model": None if path == "tiny" else path,
        "policy": policy,
        "block_length": length(engine),
        "max_num_seqs": engine.get("max_num_reqs"),
        "max_model_len": engine.get("max_model_len"),
        "max_num_batched_tokens": engine.get("max_num_batched_tokens"),
        "gpu_memory_utilization": engine.get("gpu_memory_utilization"),
        "prefix_caching": engine.get("enable_prefix_caching"),
        "page_size": engine.get("page_size"),
        "num_pages": None if engine.get("num_pages") == -1 else engine.get("num_pages"),
        "lora": adapter(engine),
        "graphs": "off" if engine.get("enforce_eager") or engine.get("enable_full_static_runner") is False else None,
        "device": device(engine),
    }
    out: Values = {
        "llm": joined(llm, {name: engine[name] for name in SETTINGS if name in engine}),
        "params": joined(
            numbers(engine, policy) | params(evals, engine.get("eos", -1)),
            {name: evals[name] for name in PARAMS if name in evals},
        ),
        "family": family(engine),
        "mask_id": None if engine.get("mask_token_id", FIELD_MASK) == FIELD_MASK else engine["mask_token_id"],
        "tasks": tasks(evals),
        "limit": evals.get("dataset_limit"),
        "out": evals.get("output_dir"),
    }
    out |= {name: evals.get(name) for name in ("data", "chat", "save_results", "include_path")}
    out["confirm_run_unsafe_code"] = evals.get("confirm_run_unsafe_code")
    return {name: value for name, value in out.items() if value is not None}


def joined(theirs: Values, own: Values) -> Values:
    """What the field's keys say, and what dlx's own names say. Raises ConfigError  for what both say."""
    said = {name: value for name, value in theirs.items() if value is not None}
    for name in own:
        if name in said:
            raise refused(name, own[name], f"a key of the field says {said[name]!r}; keep one of both")
    return said | own


def numbers(engine: Values, policy: Policy | None) -> Values:
    """Thresholds, of the dict and of the flat keys, which go before it."""
    said = engine.get("decoding_thresholds") or {}
    if not isinstance(said, Mapping) or set(said) - set(NUMBERS):
        raise refused("decoding_thresholds", said, f"use a mapping of {', '.join(NUMBERS)}")
    found = {NUMBERS[name]: value for name, value in said.items() if value is not None}
    found |= {field: engine[name] for name, field in FLAT.items() if engine.get(name) is not None}
    if engine.get("diffusion_gemma_entropy_bound") is not None:
        found["threshold"] = engine["diffusion_gemma_entropy_bound"]
    for name in READ:
        if name in found and name not in (policy.asks.numbers if policy else ()):
            key = next(key for key, field in FLAT.items() if field == name)
            if found.pop(name) != 0:
                raise refused(key, engine.get(key, said), ENGINE[key].why)
    return found


def params(evals: Values, eos: int) -> Values:
    """Arguments of SamplingParams that the eval section says."""
    names = ("temperature", "max_tokens", "max_nfe", "ignore_eos", "seed")
    found = {name: evals[name] for name in names if evals.get(name) is not None}
    return found if eos == -1 else found | {"stop_token_ids": (eos,)}


def length(engine: Values) -> int | None:
    """Tokens a block; of fast_dllm_v2 those of all its sub-blocks."""
    size = engine.get("block_size")
    whole = size is not None and engine.get("decoding_strategy") == "fast_dllm_v2"
    return size * engine.get("buffer_size", 4) if whole else size


def adapter(engine: Values) -> str | None:
    """The adapter to merge."""
    path = engine.get("lora_path") or None
    if engine.get("use_lora") and path is None:
        raise refused("use_lora", True, "name the adapter's folder with lora_path")
    return path if engine.get("use_lora", True) else None


def device(engine: Values) -> str | None:
    """cuda:N where one is named; None takes what is there."""
    ids = engine.get("device_ids") or []
    if not isinstance(ids, list) or len(ids) > 1:
        raise refused("device_ids", ids, "dlx decodes on one GPU; name one, and start a process a GPU")
    n = ids[0] if ids else engine.get("device_start", 0)
    return f"cuda:{n}" if ids or n else None


def family(engine: Values) -> tuple[str, ...]:
    """The families that a checkpoint may be of; none: any."""
    name = engine.get("model_name")
    if name is None:
        return ()
    if name not in FAMILIES:
        raise refused("model_name", name, f"use one of {', '.join(FAMILIES)}")
    return FAMILIES[name]


def tasks(evals: Values) -> tuple[str, ...] | None:
    """The tasks, one or several by commas."""
    said = evals.get("dataset_name")
    if said is None:
        return None
    if not isinstance(said, str):
        raise refused("dataset_name", said, "use the name of a task, or several by commas")
    return tuple(filter(None, (name.strip() for name in said.split(","))))


def typed(name: str, value: Any) -> None:
    """Refuse a value of another kind than what is made of it, where no later check would."""
    for kind, (words, names) in KINDS.items():
        fits = isinstance(value, kind) or (kind is float and isinstance(value, int))
        if name in names and value is not None and (not fits or (kind is not bool and isinstance(value, bool))):
            raise refused(name, value, f"use {words}")


def nothing(name: str, value: Any, key: Key) -> None:
    """Refuse a value that asks for something where dlx has nothing."""
    if value is not None and key.only and not key.to and value not in key.only:
        allowed = " or ".join(repr(one) for one in key.only)
        raise refused(name, value, f"{key.why}; only {allowed} is accepted")


def section(path: Path, said: Values, name: str, keys: Sequence[str]) -> Values:
    """One section, every key of which is known."""
    found = said.get(name) or {}
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: {name} is a {type(found).__name__}; use a mapping of keys")
    for key in found:
        if key not in keys:
            near = difflib.get_close_matches(str(key), keys, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"{path}: {name} has no key {key!r}{hint} docs/keys.md lists them all")
    return found
