"""The matmuls' ring goes round, sums of splits are added up, and attention's splits meet, under explicit launches."""

from __future__ import annotations

import pytest
import torch

from dlx.ops import OPS
from dlx.ops.attention.launches import Launch
from dlx.ops.attention.launches import launch as attend
from dlx.ops.linear import reference, stream
from dlx.ops.linear.stream import Stream
from dlx.ops.op import locks

pytestmark = pytest.mark.gpu

CONFIGS = [
    Stream(64, 128, 1, 2, 1),  # the ring goes round
    Stream(64, 64, 3, 3, 8),  # a sum of three
    Stream(128, 64, 2, 2, 14),  # two warp groups
    Stream(64, 128, 40, 4, 8),  # more splits than steps
]


def tensors(T: int, K: int, N: int, fp8: bool) -> tuple[torch.Tensor, ...]:
    rng = torch.Generator("cuda").manual_seed(T)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=rng, device="cuda")

    weight = normal(N, K) * K**-0.5
    scale = weight.abs().amax(1) / 448 if fp8 else torch.ones(N, device="cuda")
    kind = torch.float8_e4m3fn if fp8 else torch.bfloat16
    x, h = normal(T, K).bfloat16(), normal(T, N).bfloat16()
    return x, (weight / scale[:, None]).to(kind), scale, h, normal(N).bfloat16(), normal(N).bfloat16()


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("kind", [0, 1, 2], ids=["project", "swiglu", "accumulate"])
@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize(("T", "K", "N"), [(5, 1040, 320), (12, 1040, 320), (40, 2048, 640), (130, 1040, 320)])
def test_a_launch_agrees_with_the_reference(T: int, K: int, N: int, fp8: bool, kind: int, config: Stream) -> None:
    x, weight, scale, h, gain, bias = tensors(T, K, N, fp8)
    squares = reference.squared(x.double()).float()
    args = (kind, x, weight, squares if kind < 2 else None, h, gain, 1e-6, scale, bias, config)
    got = stream.launch(*args)
    if kind < 2:
        want = (reference.project(x.double(), squares.double(), weight.double(), 1e-6, kind == 1, scale, bias),)
    else:
        want = reference.accumulate(x.double(), weight.double(), h.double(), gain.double(), scale, bias)
    for g, w in zip(got, want, strict=False):
        torch.testing.assert_close(g.double(), w, rtol=2e-2, atol=3e-2)
    for one, two in zip(got, stream.launch(*args), strict=True):
        assert torch.equal(one, two)
    assert not locks(x.device).any()


@pytest.mark.parametrize("T", [5, 12, 40])
def test_fp16_activations_take_fp8_weights(T: int) -> None:
    x, weight, scale, *_ = tensors(T, 1040, 320, fp8=True)
    x, squares = x.half(), reference.squared(x.double()).float()
    got, *_ = stream.launch(0, x, weight, squares, None, None, 1e-6, scale, None, Stream(64, 128, 1, 2, 1))
    want = reference.project(x.double(), squares.double(), weight.double(), 1e-6, False, scale, None)
    torch.testing.assert_close(got.double(), want, rtol=2e-2, atol=3e-2)


@pytest.mark.parametrize("splits", [2, 16, 64])
@pytest.mark.parametrize("BM", [16, 64])
def test_many_splits_of_the_keys_meet(splits: int, BM: int) -> None:
    B, C, H, G, D, S, W = 2, 24, 8, 2, 128, 16, 320
    rng = torch.Generator("cuda").manual_seed(splits)
    q = torch.randn(B, C, H, D, generator=rng, device="cuda").bfloat16()
    kv = torch.randn(2, B * W, S, G, D, generator=rng, device="cuda").bfloat16()
    pages = torch.randperm(B * W, generator=rng, device="cuda").int().view(B, W)
    seen = torch.tensor([5000, 37], device="cuda").int()[:, None] + torch.arange(C, device="cuda").int()
    args = (q, kv, pages, seen.contiguous(), D**-0.5, None, None, None)
    got = attend(*args, Launch(BM, 64, splits, 4, 3))
    want = OPS["attention"].reference(*(x.cpu() if isinstance(x, torch.Tensor) else x for x in args))
    torch.testing.assert_close(got.cpu().float(), want.float(), rtol=2e-2, atol=2e-2)
    assert torch.equal(got, attend(*args, Launch(BM, 64, splits, 4, 3)))
    assert not locks(q.device).any()
