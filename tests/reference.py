"""The reference decoder: block diffusion at T = 0, slowly and plainly, and the comparison with it.

It shares no code with dlx. The network is transformers' Qwen3ForCausalLM in fp32 over the whole
sequence at every forward (no K/V cache) under a 4D block-causal mask; the rules are loops over lists.

    ids   the sequence so far: prompt, decided tokens, and the mask id where nothing is decided
    L     tokens of a block; block b holds the positions b·L to (b+1)·L − 1
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

CONF_ATOL = 1e-5  # confidences nearer than this to a threshold or to each other may fall either way
LOGIT_ATOL = 1e-4  # so may two logits nearer than this


class Network(Protocol):
    """What `decode` asks of a network."""

    mask_id: int
    vocab: int  # ids from here on are padding of the vocabulary

    def __call__(self, ids: list[int], rows: list[int]) -> Tensor:
        """→ [len(rows), V] fp32 logits at the positions `rows` of `ids`."""
        ...


class Qwen3:
    """An SDAR checkpoint folder, run by transformers."""

    def __init__(self, folder: Path, block_length: int, mask_id: int | None = None) -> None:
        facts: dict[str, Any] = json.loads((folder / "config.json").read_text())
        known = {key: value for key, value in facts.items() if key not in ("architectures", "model_type")}
        config = Qwen3Config(**known)
        config.use_cache = False
        self.net = Qwen3ForCausalLM(config).float().eval()
        self.net.set_attn_implementation("eager")
        tensors = {k: v.float() for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}
        missing, extra = self.net.load_state_dict(tensors, strict=False)
        tied = ["lm_head.weight"] if config.tie_word_embeddings else []
        assert missing in ([], tied), missing
        assert not extra, extra
        self.net.tie_weights()
        self.L = block_length
        found = facts["mask_token_id"] if mask_id is None else mask_id
        self.mask_id = int(found)
        ids = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab(with_added_tokens=True).values()
        self.vocab = min(max(ids) + 1, config.vocab_size)

    def __call__(self, ids: list[int], rows: list[int]) -> Tensor:
        block = torch.arange(len(ids)) // self.L
        hidden = block[None, :] > block[:, None]
        bias = torch.zeros(1, 1, len(ids), len(ids)).masked_fill(hidden, torch.finfo(torch.float32).min)
        with torch.inference_mode():
            out = self.net(torch.tensor([ids]), attention_mask=bias, logits_to_keep=torch.tensor(rows))
        return out.logits[0]


@dataclass(frozen=True)
class Strategy:
    """How blocks are opened and tokens accepted; `fixed` is the number of tokens a forward, no threshold."""

    L: int
    N: int = 1
    threshold: float = 0.9
    open_at: float = 1.0
    force_at: float = 0.9
    fixed: int | None = None


@dataclass(frozen=True)
class Ask:
    """What one request may spend, and what ends it."""

    max_tokens: int = 64
    max_nfe: int | None = None
    stop_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    fixed: Mapping[int, int] = field(default_factory=dict)  # offset in the answer → token that stands there


class Forward(NamedTuple):
    """One forward: the state it saw, what it wrote, how near its decisions were to falling otherwise."""

    base: int  # first block whose final K/V is not yet there
    opened: int  # open blocks from base
    lead: int  # leading blocks that were whole before
    seen: list[int]  # the ids of the open blocks before
    wrote: dict[int, int]  # absolute position → token
    forced: list[int]  # blocks in which only the best was accepted
    tau_gap: float  # smallest |confidence − threshold| of a masked position
    token_gap: float  # smallest top-1 − top-2 logit of an accepted one
    best_gap: float  # smallest last accepted − first refused confidence, where a rank decided

    def near(self) -> bool:
        """True if rounding may have decided here."""
        return min(self.tau_gap, self.best_gap) < CONF_ATOL or self.token_gap < LOGIT_ATOL


class Decoded(NamedTuple):
    """The answer of the reference, and every forward."""

    tokens: list[int]  # as delivered, the stop id included
    finish: str
    nfe: int
    forwards: list[Forward]
    age: list[int]  # for each token the forward, counted from 0, that wrote it

    def kept(self) -> list[int]:
        """→ the tokens without the stop id that ended them."""
        return self.tokens[:-1] if self.finish == "stop" else self.tokens


class Answer(Protocol):
    """What `compare` reads of an answer of dlx."""

    @property
    def token_ids(self) -> list[int]: ...  # without the stop id
    @property
    def finish_reason(self) -> str: ...
    @property
    def tokens(self) -> int: ...  # with it
    @property
    def nfe(self) -> int: ...


class Choice(NamedTuple):
    """A masked position's candidate."""

    pos: int
    tok: int
    conf: float
    gap: float  # top-1 − top-2 logit


def decode(network: Network, prompt: list[int], strategy: Strategy, ask: Ask) -> Decoded:
    """Decode one prompt."""
    mask, L = network.mask_id, strategy.L
    stops = frozenset() if ask.ignore_eos else ask.stop_ids
    most = ask.max_tokens
    while most > 1 and most - 1 in ask.fixed:  # what is fixed behind the last gap is not decoded
        most -= 1
    limit = len(prompt) + most
    fixed = {len(prompt) + i: tok for i, tok in ask.fixed.items()}
    base, opened = len(prompt) // L, 1
    ids = prompt + [fixed.get(p, mask) for p in range(len(prompt), (base + 1) * L)]
    out: list[int] = []
    age = dict.fromkeys(fixed, 0)
    forwards: list[Forward] = []
    while True:
        lead = leading(ids, base, L, mask) if forwards else 0  # a block is whole once a forward left it so
        room = min(strategy.N + (1 if lead > 0 else 0), math.ceil((limit - base * L) / L))
        if progress(ids, base + opened - 1, L, mask) >= strategy.open_at and room > opened:
            opened += 1
            ids = ids + [fixed.get(len(ids) + i, mask) for i in range(L)]
        forward = look(network, ids, base, opened, lead, strategy)
        ids = list(ids)
        for pos, tok in forward.wrote.items():
            ids[pos] = tok
            age[pos] = len(forwards)
        forwards.append(forward)
        base, opened = base + lead, opened - lead
        end = (base + leading(ids, base, L, mask)) * L
        settled = ids.index(mask, base * L) if mask in ids[base * L :] else len(ids)  # nothing before it changes
        if settled >= limit or any(ids[p] in stops and p not in fixed for p in range(len(prompt) + len(out), settled)):
            end = settled
        finish = deliver(ids, len(prompt), end, limit, stops, out, fixed)
        if finish is None and len(forwards) == ask.max_nfe:
            finish = deliver(ids, len(prompt), settled, limit, stops, out, fixed) or "max_nfe"
        if finish == "length":
            out += [ask.fixed[i] for i in range(most, ask.max_tokens)]
        if finish is not None:
            ages = [age[len(prompt) + i] for i in range(len(out))]
            return Decoded(out, finish, len(forwards), forwards, ages)


def leading(ids: list[int], base: int, L: int, mask: int) -> int:
    """→ the number of blocks from `base` on without a mask, up to the first that has one."""
    n = 0
    while (base + n + 1) * L <= len(ids) and mask not in ids[(base + n) * L : (base + n + 1) * L]:
        n += 1
    return n


def progress(ids: list[int], block: int, L: int, mask: int) -> float:
    """→ the share of a block's positions that are not masks."""
    return sum(tok != mask for tok in ids[block * L : (block + 1) * L]) / L


def deliver(
    ids: list[int], first: int, end: int, limit: int, stops: Iterable[int], out: list[int], fixed: Iterable[int] = ()
) -> str | None:
    """Append the tokens that follow `out` up to position `end` → why the answer ends, if it does."""
    while first + len(out) < min(end, limit):
        out.append(ids[first + len(out)])
        if out[-1] in stops and first + len(out) - 1 not in fixed:
            return "stop"
    return "length" if first + len(out) == limit else None


def look(network: Network, ids: list[int], base: int, opened: int, lead: int, strategy: Strategy) -> Forward:
    """Run the network over everything up to the last open block, and decide."""
    L, mask = strategy.L, network.mask_id
    todo = [p for p in range(base * L, (base + opened) * L) if ids[p] == mask]
    found = {c.pos: c for c in choices(network, ids, todo)}
    wrote: dict[int, int] = {}
    forced: list[int] = []
    tau_gap = token_gap = best_gap = math.inf
    tau = torch.tensor(strategy.threshold).item()  # as fp32 sees it
    for block in range(base, base + opened):
        here = [found[p] for p in range(block * L, (block + 1) * L) if p in found]
        if not here:
            continue
        ranked = sorted(here, key=lambda c: (-c.conf, c.pos))
        if strategy.fixed is not None:
            take = ranked[: strategy.fixed]
            rank = True
        else:
            take = [c for c in here if c.conf > tau]
            tau_gap = min([tau_gap, *(abs(c.conf - tau) for c in here)])
            before = 1.0 if block == base else progress(ids, block - 1, L, mask)
            rank = not take and before >= strategy.force_at
            if rank:
                take = ranked[:1]
                forced.append(block)
        if rank and len(ranked) > len(take):
            best_gap = min(best_gap, ranked[len(take) - 1].conf - ranked[len(take)].conf)
        token_gap = min([token_gap, *(c.gap for c in take)])
        wrote.update({c.pos: c.tok for c in take})
        if strategy.fixed is not None:
            break
    return Forward(base, opened, lead, ids[base * L :], wrote, forced, tau_gap, token_gap, best_gap)


def choices(network: Network, ids: list[int], rows: list[int]) -> list[Choice]:
    """→ for each position its most probable token (ties: lowest id) and the confidence in it."""
    if not rows:
        network(ids, [len(ids) - 1])
        return []
    logits = network(ids, rows).float().clone()
    logits[:, network.mask_id] = -math.inf
    logits[:, network.vocab :] = -math.inf
    found = []
    for pos, row in zip(rows, logits, strict=True):
        top = row.max().item()
        tok = row.tolist().index(top)
        second = torch.cat((row[:tok], row[tok + 1 :])).max().item()
        found.append(Choice(pos, tok, row.softmax(0)[tok].item(), top - second))
    return found


def compare(expected: Decoded, got: Answer) -> bool:
    """Hold an answer of dlx against the reference's: token ids, their number, finish and forwards.

    → False if all are equal; True if they differ and some forward up to the first difference was within
    CONF_ATOL or LOGIT_ATOL of deciding otherwise: excused, to be counted by the caller.
    Raises AssertionError  for any other difference, with both sides
    """
    ours = expected.kept()
    if (got.token_ids, got.tokens, got.finish_reason, got.nfe) == (
        ours,
        len(expected.tokens),
        expected.finish,
        expected.nfe,
    ):
        return False
    unlike = [i for i, (a, b) in enumerate(zip(ours, got.token_ids, strict=False)) if a != b]
    last = min((expected.age[i] for i in unlike), default=expected.nfe - 1)
    if any(forward.near() for forward in expected.forwards[: last + 1]):
        return True
    at = min(unlike, default=min(len(ours), len(got.token_ids)))
    lines = [
        f"the answers part at token {at}, forward {last + 1} or before; no decision up to there was near",
        f"reference: {expected.finish}, {expected.nfe} forwards, {len(expected.tokens)} tokens, {ours}",
        f"got:       {got.finish_reason}, {got.nfe} forwards, {got.tokens} tokens, {got.token_ids}",
    ]
    for i, f in list(enumerate(expected.forwards, 1))[max(0, last - 1) : last + 1]:
        state = f"base {f.base} open {f.opened} lead {f.lead} saw {f.seen} wrote {f.wrote} forced {f.forced}"
        gaps = f"gaps: threshold {f.tau_gap:.1e} token {f.token_gap:.1e} rank {f.best_gap:.1e}"
        lines.append(f"reference forward {i}: {state}; {gaps}")
    raise AssertionError("\n".join(lines))
