"""The attention layer over pages is attention over all keys: torch's own, without pages."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from dlx.models.attention import Attention
from dlx.models.card import Card
from dlx.ops.attention import View
from dlx.weights import read_config


@pytest.mark.parametrize("qk_norm", [True, False])
def test_a_layer_with_and_without_norms_of_heads_attends_like_torch(nano: Path, qk_norm: bool) -> None:
    card = replace(Card.from_hf(*read_config(nano)), qk_norm=qk_norm)
    H, G, D = card.heads, card.kv_heads, card.head_dim
    torch.manual_seed(0)
    layer = Attention(card, torch.device("cpu"), torch.float32)
    assert {"q_norm.weight", "k_norm.weight"} & {name for name, _ in layer.named_parameters()} == (
        {"q_norm.weight", "k_norm.weight"} if qk_norm else set()
    )
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    C, S = 8, 4
    pos = torch.arange(C, dtype=torch.int32)[None]
    seen = (pos // 4 + 1) * 4
    view = View(pos, torch.tensor([[2, 0]], dtype=torch.int32), seen)
    frequencies = card.theta ** -(torch.arange(0, D, 2) / D)
    qkv = torch.randn(1, C, (H + 2 * G) * D)
    got = layer(qkv, view, frequencies, torch.zeros(2, 3, S, G, D))

    q, k, v = qkv.view(1, C, -1, D).split((H, G, G), 2)
    if layer.q_norm is not None and layer.k_norm is not None:
        q = F.rms_norm(q, (D,), layer.q_norm.weight, card.eps)
        k = F.rms_norm(k, (D,), layer.k_norm.weight, card.eps)
    turn = torch.polar(torch.ones(C, D // 2), pos[0, :, None] * frequencies)[:, None]
    q, k = (torch.complex(*x.chunk(2, -1)) * turn for x in (q, k))
    q, k, v = (torch.cat((x.real, x.imag), -1) if x.is_complex() else x for x in (q, k, v))
    mask = torch.arange(C) < seen[0, :, None]
    want = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, enable_gqa=True
    )
    torch.testing.assert_close(got, want.transpose(1, 2).flatten(2), rtol=1e-4, atol=1e-5)
