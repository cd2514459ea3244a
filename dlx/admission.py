"""What a request is to the device: where its window begins, its row, its pages; and what is refused before it waits."""

from __future__ import annotations

import random
from collections.abc import Sequence

from dlx.errors import RequestError
from dlx.graphs import buffer
from dlx.graphs.buffer import Row
from dlx.graphs.policies import Policy
from dlx.graphs.prefill import Stretch
from dlx.graphs.shapes import Shapes
from dlx.models.card import Card
from dlx.request import STOP_IDS, Request


class Admission:
    """Requests as one policy, model and set of shapes take them.

    ahead  positions behind the window's start that may be computed before the host hears of it; None is all of them
    """

    def __init__(
        self, policy: Policy, card: Card, shapes: Shapes, max_len: int, adapters: Sequence[str], forwards: int | None
    ) -> None:
        self.policy, self.card, self.shapes, self.max_len = policy, card, shapes, max_len
        self.adapters = ("", *adapters)  # by slot
        assert policy.L is not None, "bind() gives a policy its block length"
        self.L = policy.L
        self.whole = policy.turn is not None and policy.turn.full  # prompts are part of what is decoded
        self.step = policy.step  # what is decoded begins at a multiple
        window = self.L if policy.canvas is not None else (policy.N + 1) * self.L
        self.ahead = None if forwards is None or policy.turn is not None else forwards * policy.N * self.L + window
        self.chained = not policy.full and policy.turn is None  # K/V depends on nothing behind its own block

    def start(self, request: Request) -> int:
        """Where a window begins: with the first incomplete block. Where the first token of a block is read off the
        position before, not right behind the prompt: then the prompt's last block is looked at once more."""
        again = self.card.shift and self.policy.turn is None
        return (len(request.prompt) - int(again)) // self.step * self.step

    def pages(self, request: Request, ahead: int | None = None) -> int:
        """Pages of all that may be computed up to `ahead` positions behind the start of its window; None is all."""
        start = self.start(request)
        blocks = -(-(len(request.prompt) + request.params.max_tokens - start) // self.L)
        end = start + blocks * self.L
        end = end if ahead is None else min(end, max(start, request.final) + ahead)
        return -(-end // self.shapes.S)

    def goal(self, request: Request) -> int:
        """The position up to which K/V is there before the row decodes: all before its window."""
        return 0 if self.whole else max(request.final, self.start(request))

    def stretches(self, request: Request, room: int | None, first: bool) -> list[Stretch]:
        """What is prefilled next, of `room` positions at most (None: all): whole stretches of the prefill, or the rest.

        first  nothing else is prefilled beside it: a prompt that sees itself whole is one piece, of any length
        """
        at, goal, most = request.filled, self.goal(request), self.shapes.tokens[-1]
        if at >= goal:
            return []
        tok, lora = request.prompt + request.out, self.adapters.index(request.params.adapter or "")
        if self.policy.full:  # what is in the window is computed there too, so without more there is none
            end = len(request.prompt)
            piece = Stretch(tok[: max(goal, end)], 0, request.pages, end, lora)
            return [piece] if first or room is None or len(piece.tok) <= room else []
        if room is not None and goal - at > room:
            goal = at + room // self.shapes.C * self.shapes.C
        return [Stretch(tok[i : min(i + most, goal)], i, request.pages, lora=lora) for i in range(at, goal, most)]

    def row(self, request: Request) -> Row:
        """Its row before the first forward."""
        p, start = request.params, self.start(request)
        stops = list(dict.fromkeys((*self.card.stop_ids, *p.stop_token_ids)))
        return Row(
            tok=[] if self.policy.turn else request.prompt[start:],
            start=start,
            pages=request.pages,
            num=(
                self.policy.accept if p.threshold is None else p.threshold,
                self.policy.open_at if p.open_at is None else p.open_at,
                self.policy.force_at if p.force_at is None else p.force_at,
                p.temperature,
                self.policy.edit if p.edit is None else p.edit,
                self.policy.remask if p.remask is None else p.remask,
                self.policy.stability if p.stability is None else p.stability,
                p.top_p,
            ),
            ints=(
                len(request.prompt) + self.open(request),
                p.max_nfe or buffer.UNLIMITED,
                int(p.ignore_eos),
                p.top_k,
                len(request.prompt),
                p.max_repetition_run or self.policy.max_repetition_run or buffer.UNLIMITED,
                0,
                -1,
            ),
            stops=stops,
            seed=random.getrandbits(62) if p.seed is None else p.seed,
            lora=self.adapters.index(p.adapter or ""),
            ids=self._ids(request) if self.policy.turn else (),
            fixed=[] if self.policy.turn else [(len(request.prompt) + at, tok) for at, tok in p.fixed],
        )

    def open(self, request: Request) -> int:
        """Tokens of the answer up to the last that is not fixed; 1 at least."""
        fixed, n = dict(request.params.fixed), request.params.max_tokens
        while n > 1 and n - 1 in fixed:
            n -= 1
        return n

    def _ids(self, request: Request) -> list[int]:
        """Prompt and answer, and what is behind it; masks are decided: the last block of block-causal models whole."""
        mask, most = self.card.mask_id, request.params.max_tokens
        fixed = dict(request.params.fixed)
        beyond = int(mask == 0) if self.whole else mask
        ids = request.prompt + [fixed.get(i, mask) for i in range(most)]
        return [len(ids), *ids] + [beyond] * (self.shapes.tokens[-1] + self.L - len(ids))

    def check(self, request: Request, total: int) -> None:
        """Raise RequestError for what can never run, before it is queued.

        total  pages of the pool
        """
        request.params.check()
        prompt, params, card = request.prompt, request.params, self.card
        for name in ("edit", "remask", "stability"):
            if getattr(params, name) is not None and name not in self.policy.asks.numbers:
                raise RequestError(f"{name}={getattr(params, name)} has no rule that reads it; use another policy")
        if (params.top_k or params.top_p < 1) and not self.policy.filters:
            raise RequestError(
                f"top_k={params.top_k} and top_p={params.top_p} need filters=True; "
                "build the engine with it, or serve with --filters"
            )
        if params.adapter is not None and params.adapter not in self.adapters[1:]:
            known = ", ".join(self.adapters[1:]) or "none: build it with adapters={name: folder}"
            raise RequestError(f"adapter={params.adapter!r} is not one that the engine was built with ({known})")
        if params.max_repetition_run is not None and self.policy.max_repetition_run is None:
            raise RequestError(
                f"max_repetition_run={params.max_repetition_run} needs a policy that guards; "
                "build the engine with replace(policy, max_repetition_run=64), say, or pass None"
            )
        if not prompt:
            raise RequestError("the prompt is empty; pass at least one token")
        for at, tok in enumerate(prompt):
            if isinstance(tok, bool) or not isinstance(tok, int) or not 0 <= tok < card.vocab:
                raise RequestError(f"prompt[{at}]={tok!r} is not a token id; pass integers from 0 to {card.vocab - 1}")
            if tok == card.mask_id:
                raise RequestError(f"prompt[{at}]={tok} is the mask id, which only the decoder may write; leave it out")
        for tok in params.stop_token_ids:
            if tok >= card.vocab or tok == card.mask_id:
                raise RequestError(
                    f"stop_token_ids has {tok}; pass ids from 0 to {card.vocab - 1} other than the mask id"
                )
        if params.fixed and self.policy.canvas is not None:
            raise RequestError(
                f"fixed has {len(params.fixed)} tokens, and a canvas, which is drawn anew whole, can hold none; "
                "leave fixed out, or use a model that decodes masks"
            )
        for _, tok in params.fixed:
            if tok >= card.vocab or tok == card.mask_id:
                raise RequestError(
                    f"fixed has the id {tok}; pass ids from 0 to {card.vocab - 1} other than the mask id"
                )
        stops = {*card.stop_ids, *params.stop_token_ids}
        if len(stops) > STOP_IDS:
            raise RequestError(
                f"{len(stops)} stop ids with the model's own {card.stop_ids}; at most {STOP_IDS} are allowed"
            )
        if len(prompt) + params.max_tokens > self.max_len:
            raise RequestError(
                f"the prompt of {len(prompt)} tokens and max_tokens={params.max_tokens} pass "
                f"max_model_len={self.max_len}; shorten the prompt, lower max_tokens or raise max_model_len"
            )
        need = self.pages(request)
        if need > total:
            raise RequestError(
                f"the request needs {need} pages and the pool has {total}; lower max_tokens or raise num_pages"
            )
