"""The candidates ops against plain loops; parts of a vocabulary, and tiles of any shape, against the whole."""

from __future__ import annotations

import math
from importlib import import_module
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from dlx.errors import ShapeError
from dlx.ops import OPS
from dlx.ops.candidates import NUCLEUS, Launch, Parts, listed, walk

MASK, V, E = 3, 90, 16
OP, PARTIAL, COMBINE = (OPS[name] for name in ("candidates", "candidates_partial", "candidates_combine"))
parts_module = import_module("dlx.ops.candidates.parts")
answer_module = import_module("dlx.ops.candidates.answer")


class Answer(NamedTuple):
    tok: Tensor
    conf: Tensor
    top: Tensor
    likely: Tensor
    entropy: Tensor
    margin: Tensor


class Inputs(NamedTuple):
    h: Tensor
    head: Tensor
    temp: Tensor
    seed: Tensor
    pos: Tensor
    age: Tensor


def inputs(T: int = 6, V: int = V, temp: float = 0.0, scale: float = 1.0) -> Inputs:
    rng = torch.Generator().manual_seed(T + V)
    seed = torch.randint(0, 2**62, (T,), generator=rng)
    return Inputs(
        scale * torch.randn(T, E, generator=rng), torch.randn(V, E, generator=rng), torch.full((T,), temp), seed,
        torch.arange(T, dtype=torch.int32), torch.full((T,), 2, dtype=torch.int32),
    )  # fmt: skip


def ask(
    x: Inputs, vocab: int | None = None, k: int = 0, entropy: bool = False, margin: bool = False, softcap: float = 0.0,
    bias_tok: Tensor | None = None, bias: Tensor | None = None, top_k: list[int] | None = None,
    top_p: list[float] | None = None, forbidden: list[int] | None = None, fn: Any = OP,
) -> Answer:  # fmt: skip
    ks = None if top_k is None else torch.tensor(top_k, dtype=torch.int32)
    ps = None if top_p is None else torch.tensor(top_p)
    never = None if forbidden is None else torch.tensor(forbidden, dtype=torch.int32)
    options = (k, entropy, margin, softcap, bias_tok, bias, ks, ps, never)
    return Answer(*fn(*x, MASK, vocab or len(x.head), *options))


def ranked(z: Tensor) -> list[int]:
    """Ids of a row in the order of their z, ties to the lowest id, without those that are never chosen."""
    return sorted((v for v in range(len(z)) if z[v] > -math.inf), key=lambda v: (-float(z[v]), v))


def dreams(z: Tensor, top_k: int, top_p: float) -> list[int]:
    """The ids that Dream's sampler keeps of a row: up to the first that passes top_p, then the k likeliest."""
    ids = ranked(z)
    if top_p < 1:
        p, n, mass = z.double().softmax(-1), 0, 0.0
        while n < len(ids) and mass <= top_p:
            mass += float(p[ids[n]])
            n += 1
        ids = ids[: max(1, n)]
    return ids[:top_k] if top_k > 0 else ids


def logits(x: Inputs) -> Tensor:
    z = x.h.double() @ x.head.double().T / torch.where(x.temp > 0, x.temp, 1.0).double()[:, None]
    z[:, MASK] = -math.inf
    return z


def test_a_greedy_row_is_the_argmax_and_its_probability() -> None:
    x = inputs()
    z = logits(x)
    got = ask(x)
    assert got.tok.tolist() == [ranked(row)[0] for row in z]
    for t in range(6):
        mass = sum(math.exp(float(z[t, v])) for v in range(V) if v != MASK)
        assert float(got.conf[t]) == pytest.approx(math.exp(float(z[t].max())) / mass, rel=1e-5)


def test_what_is_not_asked_for_has_no_elements() -> None:
    got = ask(inputs())
    assert [x.numel() for x in got[2:]] == [0, 0, 0, 0]


def test_the_list_holds_the_likeliest_ids_in_order_and_ties_go_to_the_lowest() -> None:
    x = inputs()
    x = x._replace(h=(2 * x.h).round(), head=(2 * x.head).round())  # whole numbers: many ties
    z = logits(x)
    got = ask(x, k=9)
    for t in range(6):
        best = ranked(z[t])[:9]
        assert got.top[t].tolist() == best
        torch.testing.assert_close(got.likely[t].double(), z[t].softmax(-1)[best], rtol=1e-5, atol=1e-7)


def test_fewer_ids_than_asked_for_end_in_none() -> None:
    got = ask(inputs(V=6), k=5, forbidden=[0, 5])
    assert all(sorted(row[:3]) == [1, 2, 4] and row[3:] == [-1, -1] for row in got.top.tolist())
    assert got.likely[:, 3:].eq(0).all()


def test_a_filtered_row_follows_dreams_sampler() -> None:
    x = inputs(temp=0.5)
    top_k, top_p = [0, 0, 4, 2, 5, 0], [0.8, 0.3, 1.0, 0.9, 0.5, 1.0]
    got = ask(x, k=6, entropy=True, margin=True, top_k=top_k, top_p=top_p)
    z = logits(x)
    for t in range(6):
        ids = dreams(z[t], top_k[t], top_p[t])
        p = {v: float(q) for v, q in zip(ids, z[t][ids].softmax(-1), strict=True)}
        assert int(got.tok[t]) in p
        assert float(got.conf[t]) == pytest.approx(p[int(got.tok[t])], rel=1e-5)
        best = ranked(z[t])[:6]
        assert got.top[t].tolist() == best
        assert got.likely[t].tolist() == pytest.approx([p.get(v, 0.0) for v in best], rel=1e-5, abs=1e-7)
        assert float(got.entropy[t]) == pytest.approx(-sum(q * math.log(q) for q in p.values()), abs=1e-5)
        assert float(got.margin[t]) == pytest.approx(p[best[0]] - p.get(best[1], 0.0), abs=1e-5)


def test_a_filtered_draw_is_a_draw_from_what_is_kept_renormalised() -> None:
    T, one = 4000, inputs(1, temp=1.0, scale=0.3)
    x = Inputs(one.h.expand(T, E).contiguous(), one.head, torch.ones(T), torch.full((T,), 7), *(
        torch.arange(T, dtype=torch.int32) for _ in range(2)
    ))  # fmt: skip
    got = ask(x, top_k=[4] * T)
    ids = ranked(logits(one)[0])[:4]
    p = logits(one)[0][ids].softmax(-1)
    counts = [int((got.tok == v).sum()) for v in ids]
    assert sum(counts) == T
    for n, q in zip(counts, p.tolist(), strict=True):
        assert abs(n - T * q) < 4 * math.sqrt(T * q * (1 - q))


def test_a_filter_of_one_row_changes_no_other() -> None:
    x = inputs(temp=0.7)
    plain = ask(x, entropy=True)
    mixed = ask(x, entropy=True, top_k=[0, 1, 0, 0, 2, 0], top_p=[1.0] * 6)
    for t in (0, 2, 3, 5):
        assert plain.tok[t] == mixed.tok[t] and plain.conf[t] == mixed.conf[t] and plain.entropy[t] == mixed.entropy[t]
    assert mixed.conf[1] == 1 and mixed.entropy[1] == 0


def test_a_nucleus_holds_the_64_likeliest_ids_at_most() -> None:
    x = inputs(2, V=200)._replace(h=torch.zeros(2, E))  # all are equally likely
    got = ask(x, k=4, entropy=True, top_p=[0.9, 1.0], top_k=[0, 150])
    assert got.conf.tolist() == pytest.approx([1 / NUCLEUS] * 2)
    assert got.entropy.tolist() == pytest.approx([math.log(NUCLEUS)] * 2)
    assert got.top.tolist() == [[0, 1, 2, 4]] * 2


def test_pairs_are_added_before_the_temperature_and_an_id_named_twice_gets_both() -> None:
    x = inputs(3, temp=0.0)._replace(temp=torch.tensor([0.0, 0.5, 0.0]))
    tok = torch.tensor([[8, 8, -1], [-5, 20, 20], [MASK, 90, 41]], dtype=torch.int32)
    bias = torch.tensor([[3.0, 4.0, 99.0], [99.0, 1.5, -0.5], [99.0, 99.0, 5.0]])
    z = logits(x)
    z[0, 8] += 7
    z[1, 20] += 1.0 / 0.5
    z[2, 41] += 5
    got = ask(x, k=4, bias_tok=tok, bias=bias)
    for t in range(3):
        best = ranked(z[t])[:4]
        assert got.top[t].tolist() == best
        torch.testing.assert_close(got.likely[t].double(), z[t].softmax(-1)[best], rtol=1e-5, atol=1e-7)


def test_forbidden_ids_and_padding_are_never_chosen_nor_counted() -> None:
    x = inputs()
    gone = [ranked(row)[0] for row in logits(x)]
    got = ask(x, vocab=80, k=3, forbidden=gone)
    z = logits(x)[:, :80]
    z[:, [v for v in gone if v < 80]] = -math.inf
    for t in range(6):
        assert got.top[t].tolist() == ranked(z[t])[:3]
        assert float(got.conf[t]) == pytest.approx(float(z[t].softmax(-1).max()), rel=1e-5)


def test_the_softcap_comes_before_everything() -> None:
    x = inputs(temp=0.0, scale=4.0)._replace(temp=torch.full((6,), 0.25))
    raw = x.h.double() @ x.head.double().T
    z = 6.0 * torch.tanh(raw / 6.0)
    z[:, 5] += 2.0
    z = z / 0.25
    z[:, MASK] = -math.inf
    pair = (torch.full((6, 1), 5, dtype=torch.int32), torch.full((6, 1), 2.0))
    got = ask(x, k=5, softcap=6.0, bias_tok=pair[0], bias=pair[1])
    best = torch.stack([z[t].softmax(-1)[ranked(z[t])[:5]] for t in range(6)])
    torch.testing.assert_close(got.likely.double(), best, rtol=1e-4, atol=1e-6)


def test_entropy_and_margin_of_the_flat_and_of_the_sure() -> None:
    flat = inputs(2)._replace(h=torch.zeros(2, E))
    got = ask(flat, entropy=True, margin=True)
    assert got.entropy.tolist() == pytest.approx([math.log(V - 1)] * 2)
    assert got.margin.tolist() == [0, 0]
    sure = ask(inputs(2, scale=60.0), entropy=True, margin=True)
    assert all(0 <= H < 1e-3 for H in sure.entropy.tolist())
    assert sure.margin.tolist() == pytest.approx([1, 1], abs=1e-3)


CUTS = {"one": [90], "two": [50, 40], "three, uneven": [13, 64, 13], "padding alone behind": [70, 20, 30]}
ASKED: dict[str, dict[str, Any]] = {
    "defaults": {},
    "everything": {"k": 5, "entropy": True, "margin": True, "softcap": 9.0, "forbidden": [17, 60]},
    "filtered": {"k": 3, "entropy": True, "margin": True, "top_k": [0, 0, 3, 0], "top_p": [1.0, 0.6, 1.0, 0.05]},
}


def check_parts(cut: str, asked: str, partial: Any, combine: Any) -> None:
    """Parts of the vocabulary, told apart and combined, answer as the whole does."""
    x = inputs(4, V=sum(CUTS[cut]), temp=0.0)._replace(temp=torch.tensor([0.0, 0.8, 1.2, 0.0]))
    vocab = 90
    tok = torch.tensor([[4, 60], [30, 30], [-1, 89], [88, 2]], dtype=torch.int32)
    bias = torch.tensor([[3.0, 2.0], [1.0, 2.5], [1.0, 4.0], [2.0, 2.0]])
    options = ASKED[asked]
    want = ask(x, vocab, bias_tok=tok, bias=bias, fn=OP.reference, **options)
    k, entropy, margin = (options.get(name, 0) for name in ("k", "entropy", "margin"))
    filters = [
        None if name not in options else torch.tensor(options[name], dtype=dtype)
        for name, dtype in (("top_k", torch.int32), ("top_p", torch.float32))
    ]
    never = None if "forbidden" not in options else torch.tensor(options["forbidden"], dtype=torch.int32)
    keep = listed(k, bool(margin), "top_k" in options)
    told, first = [], 0
    for n in CUTS[cut]:
        head = x.head[first : first + n]
        args = (x.h, head, *x[2:], MASK, first, vocab, keep, bool(entropy), options.get("softcap", 0.0))
        told.append(partial(*args, tok, bias, never))
        first += n
    stacked = [torch.stack(parts, 1) for parts in zip(*told, strict=True)]
    got = Answer(*combine(*stacked, *x[2:], k, bool(entropy), bool(margin), *filters))
    assert torch.equal(got.tok, want.tok) and torch.equal(got.top, want.top)
    for name in ("conf", "likely", "entropy", "margin"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("cut", CUTS)
def test_parts_of_a_vocabulary_combine_to_the_whole(cut: str, asked: str) -> None:
    check_parts(cut, asked, PARTIAL, COMBINE)


@pytest.mark.interp
@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("cut", ["three, uneven"])
def test_interpreted_parts_of_a_vocabulary_combine_to_the_whole(cut: str, asked: str) -> None:
    check_parts(cut, asked, PARTIAL.kernel, COMBINE.kernel)


TILES = [
    (Launch(BT=16, BV=32, BE=8, programs=1, warps=4, stages=2), "everything"),
    (Launch(BT=16, BV=64, BE=16, programs=1, warps=4, stages=2), "filtered"),
    (Launch(BT=32, BV=64, BE=16, programs=100, warps=4, stages=2), "everything"),
    (Launch(BT=64, BV=64, BE=16, programs=1, warps=4, stages=2), "everything"),
    (Launch(BT=128, BV=128, BE=16, programs=1, warps=4, stages=2), "filtered"),
]


@pytest.mark.interp
@pytest.mark.parametrize(("config", "asked"), TILES, ids=lambda x: x if isinstance(x, str) else f"{x.BT} rows")
def test_every_tile_gives_the_same(config: Launch, asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = inputs(17, V=110, temp=0.9)
    x = x._replace(temp=torch.where(torch.arange(17) % 3 == 0, 0.0, x.temp))
    options = ASKED[asked] | {
        name: (ASKED[asked][name] * 5)[:17] for name in ("top_k", "top_p") if name in ASKED[asked]
    }
    want = ask(x, 100, fn=OP.reference, **options)
    monkeypatch.setattr(parts_module, "choose", lambda *_: config)
    got = ask(x, 100, fn=OP.kernel, **options)
    assert torch.equal(got.tok, want.tok) and torch.equal(got.top, want.top)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=2e-5, atol=2e-6)


@pytest.mark.interp
def test_the_bare_walk_gives_the_maxima_of_the_logits() -> None:
    x = inputs(20, V=300)
    config = Launch(BT=16, BV=64, BE=16, programs=1, warps=4, stages=2)
    parts = walk(*x, MASK, 0, 300, 0, False, 0.0, None, None, None, config, bare=True)
    torch.testing.assert_close(parts.stats[..., 0].amax(1), (x.h @ x.head.T).amax(1))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("options", [{}, {"top_p": [0.9, 0.9, 1.0, 0.2]}], ids=["plain", "top_p"])
@pytest.mark.parametrize(
    "fn", [OP.reference, pytest.param(OP.kernel, marks=pytest.mark.interp)], ids=["reference", "kernel"]
)
def test_a_row_that_is_no_number_says_so_and_spoils_no_other(fn: Any, options: dict[str, Any]) -> None:
    x = inputs(4, temp=0.0)
    good = ask(x, fn=fn, **options)
    x.h[1, 2] = math.nan
    got = ask(x, fn=fn, **options)
    assert got.conf.isnan().tolist() == [False, True, False, False]
    assert bool(((got.tok >= 0) & (got.tok < V)).all())
    rest = torch.tensor([0, 2, 3])
    assert torch.equal(got.tok[rest], good.tok[rest]) and torch.equal(got.conf[rest], good.conf[rest])


@pytest.mark.parametrize("T", [4, 64, 128, 512])
@pytest.mark.parametrize("asked", ASKED)
def test_extra_memory_stays_below_64_mib(asked: str, T: int, monkeypatch: pytest.MonkeyPatch) -> None:
    class Nothing:
        def __getitem__(self, grid: object) -> Any:
            return lambda *args, **options: None

    held: list[Parts] = []

    def noted(*args: Any) -> Parts:
        held.append(walk(*args))
        return held[-1]

    vocab = 151936
    monkeypatch.setattr(parts_module, "_candidates", Nothing())
    monkeypatch.setattr(answer_module, "_candidates_answer", Nothing())
    monkeypatch.setattr(parts_module, "processors", lambda x: 132)
    monkeypatch.setattr(import_module("dlx.ops.candidates"), "walk", noted)
    row = torch.zeros(T, dtype=torch.int32)
    filters: list[Any] = [row, torch.ones(T)] if asked == "filtered" else [None, None]
    keep = (8, True, True) if asked != "defaults" else (0, False, False)
    h, head = torch.empty(T, 64, dtype=torch.bfloat16), torch.empty(vocab, 64, dtype=torch.bfloat16)
    out = OP.kernel(h, head, torch.zeros(T), row.long(), row, row, MASK, vocab, *keep, 0.0, None, None, *filters, None)
    assert sum(x.nbytes for x in (*held[0], *out)) < 64 << 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 33}, "candidates' k is 33; expected 0 \\(none\\) to 32"),
        ({"softcap": -1.0}, "candidates' softcap is -1.0"),
        ({"bias": torch.zeros(6, 2)}, "bias_tok and bias is one of two; expected both or neither"),
        ({"bias_tok": torch.zeros(6, 2, dtype=torch.int32), "bias": torch.zeros(6, 3)}, "shape of candidates' bias"),
        ({"top_k": [1, 2]}, "shape of candidates' top_k"),
        ({"forbidden": list(range(65))}, "number of forbidden ids is 65; expected 1 to 64"),
    ],
)
def test_a_wrong_option_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        ask(inputs(), **options)


def test_lists_shorter_than_the_question_are_refused() -> None:
    x = inputs()
    told = PARTIAL(*x, MASK, 0, V, 2)
    with pytest.raises(ShapeError, match="length of top_z is 2; expected 8 or more"):
        COMBINE(*(part[:, None] for part in told), *x[2:], 5)
    with pytest.raises(ShapeError, match="keep is 3; expected one of"):
        PARTIAL(*x, MASK, 0, V, 3)
