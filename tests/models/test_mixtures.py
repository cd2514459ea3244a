"""The ops of a mixture of experts, held against transformers' modules of the same mathematics."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import Glm4MoeConfig, Qwen3MoeConfig
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeMoE
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from dlx.ops import OPS
from dlx.ops.linear import squared

T, E, F, X, K = 9, 64, 24, 16, 4
SIZES = {"hidden_size": E, "moe_intermediate_size": F, "num_experts_per_tok": K}


def random_(module: torch.nn.Module) -> None:
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for x in (*module.parameters(), *module.buffers()):
            x.copy_(torch.randn(x.shape, generator=rng) * (0.3 if x.dim() == 1 else x.shape[-1] ** -0.5))


def rows() -> Tensor:
    return torch.randn(T, E, generator=torch.Generator().manual_seed(4))


def given(x: Tensor, ids: Tensor, weights: Tensor, experts: torch.nn.Module, gelu: bool = False) -> Tensor:
    weight = dict(experts.named_parameters())
    gate_up, down = weight["gate_up_proj"].detach(), weight["down_proj"].detach()
    return OPS["experts"](x, ids, weights, gate_up, down, None, 1e-6, gelu)[0]


@pytest.mark.parametrize("renormalise", [True, False], ids=["SDAR-MoE", "LLaDA-MoE"])
@torch.no_grad()
def test_softmax_routing_and_experts_equal_qwen3_moe(renormalise: bool) -> None:
    block = Qwen3MoeSparseMoeBlock(Qwen3MoeConfig(**SIZES, num_experts=X, norm_topk_prob=renormalise))
    random_(block)
    x = rows()
    ids, weights = OPS["route"](
        x, block.gate.weight.detach(), None, None, None, 1e-6, K, 1, 1, False, renormalise, 1.0
    )  # fmt: skip
    torch.testing.assert_close(given(x, ids, weights, block.experts), block(x[None])[0], rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_sigmoid_routing_by_groups_equals_glm4_moe_as_in_llada2() -> None:
    config = Glm4MoeConfig(
        **SIZES, n_routed_experts=X, n_shared_experts=1, n_group=4, topk_group=2, routed_scaling_factor=2.5,
        norm_topk_prob=True,
    )  # fmt: skip
    block = Glm4MoeMoE(config)
    random_(block)
    x = rows()
    router, bias = block.gate.weight.detach(), block.gate.e_score_correction_bias
    ids, weights = OPS["route"](x, router, None, bias, None, 1e-6, K, 4, 2, True, True, 2.5)
    y = given(x, ids, weights, block.experts) + block.shared_experts(x)
    torch.testing.assert_close(y, block(x[None])[0], rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_scaled_experts_of_an_unnormalised_stream_equal_diffusion_gemma() -> None:
    gemma = pytest.importorskip("transformers.models.diffusion_gemma.modeling_diffusion_gemma")
    config = gemma.DiffusionGemmaTextConfig(
        hidden_size=E, moe_intermediate_size=F, num_experts=X, top_k_experts=K, rms_norm_eps=1e-6
    )
    router, theirs = gemma.DiffusionGemmaTextRouter(config), gemma.DiffusionGemmaTextExperts(config)
    random_(router)
    random_(theirs)
    h = 3 * rows()
    folded = router.proj.weight.detach() * router.scale.detach() * E**-0.5
    ids, weights = OPS["route"](
        h, folded, squared(h), None, router.per_expert_scale.detach(), 1e-6, K, 1, 1, False, True, 1.0
    )  # fmt: skip
    x = rows()
    _, their_weights, their_ids = router(h)
    torch.testing.assert_close(
        given(x, ids, weights, theirs, gelu=True), theirs(x, their_ids, their_weights), rtol=1e-5, atol=1e-6
    )
