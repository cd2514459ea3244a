"""Cases over K/V pages: attention of a few queries or of a prompt, and the store before it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from dlx.ops import OPS
from dlx.ops.bench.case import Case, normal
from dlx.ops.bench.chain import Built, copies
from dlx.ops.bench.shapes import SHAPES, Shape

QUERIES = (4, 32)
CONTEXTS = (512, 2048, 8192, 32768)
FP8_CONTEXTS = (2048, 16384)
BATCH = (16, 32, 4096)  # requests, queries of each, their context
PROMPTS = (2048, 8192)
STORE_ROWS = (4, 32, 64, 256)


def attention(name: str) -> Iterator[Case]:
    """One request, sixteen of them, and a prompt."""
    layers = SHAPES[name].layers
    for C in QUERIES:
        for context in CONTEXTS:
            yield Case("attention", name, f"1 × {C} at {context}", C, partial(_window, name, 1, C, context), layers)
    B, C, context = BATCH
    yield Case("attention", name, f"{B} × {C} at {context}", B * C, partial(_window, name, *BATCH), layers)
    for T in PROMPTS:
        yield Case("attention", name, f"prompt of {T}", T, partial(_prompt, name, T), layers)


def attention_fp8(name: str) -> Iterator[Case]:
    """The same over pages in e4m3 with scales, beside itself over pages in bf16."""
    layers = SHAPES[name].layers
    for C in QUERIES:
        for context in FP8_CONTEXTS:
            call = partial(_window, name, 1, C, context, fp8=True)
            yield Case("attention_fp8", name, f"1 × {C} at {context}", C, call, layers)
    B, C, context = BATCH
    call = partial(_window, name, *BATCH, fp8=True)
    yield Case("attention_fp8", name, f"{B} × {C} at {context}", B * C, call, layers)


def kv_store(name: str) -> Iterator[Case]:
    """One request's positions: qk-norm, rope, and K/V into pages."""
    for T in STORE_ROWS:
        yield Case("kv_store", name, f"1 × {T}", T, partial(_store, name, T), SHAPES[name].layers)


def page(shape: Shape) -> int:
    """Tokens a page, as an engine chooses them: the first multiple of the block from 16 on."""
    return -(-16 // shape.block) * shape.block


def tables(n: int, B: int, W: int, device: torch.device) -> list[Tensor]:
    """n page tables [B, W] that share no page, pages in no order."""
    return list(torch.randperm(n * B * W, device=device).int().view(n, B, W))


def _window(name: str, B: int, C: int, context: int, device: torch.device, fp8: bool = False) -> Built:
    """C new queries a row behind a context: every one sees all keys, the new ones among them."""
    shape = SHAPES[name]
    H, G, D, S = shape.H, shape.G, shape.D, page(shape)
    keys = context + C
    W = -(-keys // S)
    n = copies((2 if fp8 else 4) * B * keys * G * D)
    kv = normal(device, 2, n * B * W, S, G, D)
    q = normal(device, B, C, H, D)
    seen = torch.full((B, C), keys, device=device, dtype=torch.int32)
    op = OPS["attention"]
    args = [(q, kv, pages, seen, D**-0.5) for pages in tables(n, B, W, device)]
    if fp8:
        small, ones = kv.to(torch.float8_e4m3fn), torch.ones(2, n * B * W, G, device=device)
        less = [(q, small, *rest, None, None, ones) for _, _, *rest in args]
        return Built(lambda i: op(*less[i]), {"bf16": lambda i: op(*args[i])}, n, op.cost(*less[0]))
    dense = [(normal(device, B, G, keys, D), normal(device, B, G, keys, D)) for _ in range(n)]
    # all heads of a group see the same keys: as queries of one head they cost SDPA no copy of the keys
    packed = normal(device, B, G, C * (H // G), D)
    others = {"SDPA": lambda i: F.scaled_dot_product_attention(packed, *dense[i])}
    return Built(lambda i: op(*args[i]), others, n, op.cost(*args[0]))


def _prompt(name: str, T: int, device: torch.device) -> Built:
    """A prompt, blocks seeing themselves and what is before them; SDPA has causal visibility instead."""
    shape = SHAPES[name]
    H, G, D, S = shape.H, shape.G, shape.D, page(shape)
    n = copies(2 * T * (2 * H + 2 * G) * D)
    W = T // S
    kv = normal(device, 2, n * W, S, G, D)
    queries = [normal(device, 1, T, H, D) for _ in range(n)]
    seen = (torch.arange(T, device=device) // shape.block + 1).mul_(shape.block).int()[None]
    args = [(q, kv, pages, seen, D**-0.5) for q, pages in zip(queries, tables(n, 1, W, device), strict=True)]
    dense = [(normal(device, 1, G, T, D), normal(device, 1, G, T, D)) for _ in range(n)]

    def sdpa(i: int) -> Tensor:
        return F.scaled_dot_product_attention(
            queries[i].transpose(1, 2), *dense[i], is_causal=True, enable_gqa=H != G
        )  # fmt: skip

    op = OPS["attention"]
    return Built(lambda i: op(*args[i]), {"SDPA, causal": sdpa}, n, op.cost(*args[0]))


def _store(name: str, T: int, device: torch.device) -> Built:
    shape = SHAPES[name]
    H, G, D, S = shape.H, shape.G, shape.D, page(shape)
    n = copies(2 * T * 2 * (H + 2 * G) * D)
    W = -(-T // S)
    kv = normal(device, 2, n * W, S, G, D)
    qkv = normal(device, n, 1, T, H + 2 * G, D)
    gain = normal(device, D) if shape.qk_norm else None
    pos = torch.arange(T, device=device, dtype=torch.int32)[None]
    frequencies = 1e6 ** -(torch.arange(0, shape.rotary, 2, device=device) / shape.rotary)
    args = [
        (qkv[i], gain, gain, pos, frequencies, kv, pages, pos + 1, 1e-6)
        for i, pages in enumerate(tables(n, 1, W, device))
    ]
    op = OPS["kv_store"]
    return Built(lambda i: op(*args[i]), {}, n, op.cost(*args[0]))
