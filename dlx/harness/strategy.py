"""The policy that a run file's keys of decoding describe."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from dlx.errors import ConfigError
from dlx.graphs.policies import POLICIES, Policy
from dlx.graphs.rules import Calm, Canvas, Edit, Hard, Merge, Smooth, Stable, SubBlock, Within
from dlx.harness.keys import ENGINE

Values = dict[str, Any]  # Any, as files hold what they hold

STRATEGIES = {"block_diffusion": "multi_bd", "multi_block_diffusion": "multi_bd", "fast_dllm": "multi_bd"}
# keys that describe a policy: one that the strategy does not use is refused
PLACED = {
    "sampling_mode", "buffer_size", "max_post_edit_steps", "auto_max_nfe_warmup_steps", "fdv2_use_block_cache",
    *(name for name in ENGINE if name.startswith(("token_merge_", "diffusion_gemma_"))),
} - {"diffusion_gemma_entropy_bound"}  # fmt: skip


def strategy(engine: Values) -> Policy | None:
    """The policy that the keys of decoding describe; None leaves it to the model.

    Raises ConfigError  for a key that this strategy has no place for
    """
    said = engine.get("decoding_strategy")
    edits = {"naive": False, "edit": True}.get(engine.get("sampling_mode", "naive"))
    if edits is None:
        raise refused("sampling_mode", engine["sampling_mode"], "use naive or edit")
    used = {"decoding_strategy", "sampling_mode"}
    name = STRATEGIES.get(said, said) if isinstance(said, str) else said
    if name is None and (edits or set(engine) & PLACED):
        raise ConfigError(f"decoding_strategy is missing beside {', '.join(sorted(set(engine) & PLACED))}; name one")
    if name is None:
        return None
    if name not in POLICIES:
        raise refused("decoding_strategy", said, f"use one of {', '.join([*STRATEGIES, *POLICIES])}")
    if name == "multi_bd" and edits:
        name = "edit"
    if name == "dmax" and engine.get("token_merge_mode") == "iter_smooth_topk":
        name = "token_merge"
    if name == "fast_dllm_v2" and engine.get("fdv2_use_block_cache", True):
        name = "fast_dllm_v2_cached"
    policy = POLICIES[name]
    if edits and not isinstance(policy.rewrite, Edit):
        raise refused("sampling_mode", "edit", f"{name} does not edit; use multi_bd, dmax or token_merge")
    if name.startswith("fast_dllm_v2"):
        used |= {"buffer_size", "fdv2_use_block_cache"}
        if "block_size" in engine:
            size = engine["block_size"]
            turn = policy.turn and SubBlock(size)
            policy = replace(policy, select=Within(size), turn=turn)
    elif "buffer_size" in engine:
        used |= {"buffer_size"}
        policy = replace(policy, N=engine["buffer_size"])
    if isinstance(policy.settle, Calm) and "max_post_edit_steps" in engine:
        used |= {"max_post_edit_steps"}
        policy = replace(policy, settle=replace(policy.settle, limit=engine["max_post_edit_steps"]))
    policy, more = merged(policy, engine)
    used |= more
    if isinstance(policy.canvas, Canvas) and isinstance(policy.settle, Stable):
        policy, more = canvas(policy, policy.canvas, policy.settle, engine)
        used |= more
    if "auto_max_nfe_warmup_steps" in engine:
        used |= {"auto_max_nfe_warmup_steps"}
        policy = replace(policy, auto_max_nfe=engine["auto_max_nfe_warmup_steps"])
    left = sorted(set(engine) & PLACED - used)
    if left:
        raise refused(left[0], engine[left[0]], f"decoding_strategy={said!r} has no place for it")
    return policy


def merged(policy: Policy, engine: Values) -> tuple[Policy, set[str]]:
    """The policy with token merge as the keys say, and the keys that it took."""
    top, weight = engine.get("token_merge_top_k", 1), engine.get("token_merge_weight", 1.0)
    if isinstance(policy.embed, Smooth):
        smooth = Smooth(k=engine.get("token_merge_top_k", policy.embed.k), weight=weight, first=weight)
        return replace(policy, embed=smooth), {"token_merge_mode", "token_merge_top_k", "token_merge_weight"}
    if not isinstance(policy.embed, Merge):
        return policy, set()
    if engine.get("token_merge_mode", "dmax_topk") != "dmax_topk":
        raise refused("token_merge_mode", engine["token_merge_mode"], "use dmax_topk or iter_smooth_topk")
    if top != 1 or weight not in (0, 1):
        name, value = ("token_merge_top_k", top) if top != 1 else ("token_merge_weight", weight)
        raise refused(name, value, ENGINE[name].why)
    embed = Merge(engine.get("token_merge_renormalize", True)) if weight else Hard()
    return replace(policy, embed=embed), {name for name in ENGINE if name.startswith("token_merge_")}


def canvas(policy: Policy, shape: Canvas, settle: Stable, engine: Values) -> tuple[Policy, set[str]]:
    """The policy with a canvas as the keys say, and the keys that it took."""
    at = "diffusion_gemma_"
    fields = {"steps": "max_denoising_steps", "cold": "t_min", "hot": "t_max"}
    shape = replace(shape, **{field: engine[at + key] for field, key in fields.items() if at + key in engine})
    if at + "stability_threshold" in engine:
        settle = replace(settle, forwards=engine[at + "stability_threshold"] - 1)
    if at + "confidence_threshold" in engine:
        settle = replace(settle, below=engine[at + "confidence_threshold"])
    return replace(policy, canvas=shape, settle=settle), {name for name in ENGINE if name.startswith(at)}


def refused(name: str, value: Any, why: str) -> ConfigError:
    return ConfigError(f"{name}={value!r} cannot be had: {why}")
