"""What a policy's own rules cost in a step: each beside a forced schedule of the same window, in one run.

A forward's time does not depend on how many tokens it accepts: shapes are static, what is attended to follows from
where the window stands, and no block commits in it. So that every forward timed is the same one, the rows are put back
before each of them to one state, behind the same context; a policy and its counterpart take turns. What differs is
their rules alone.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dlx.bench.clock import Replays, between_ms, mark, spread, there, wait
from dlx.bench.scene import How, Scene, Stand, stand, taken
from dlx.bench.trace import trace
from dlx.config import bind
from dlx.errors import PolicyError
from dlx.graphs.policies import POLICIES, Policy, named
from dlx.graphs.rules import Fixed
from dlx.provenance import provenance

SCHEMA = 1
WARM = 5  # rounds before those that are timed

Run = dict[str, Any]


class Pinned(NamedTuple):
    """Requests, and the state of their rows that every forward begins in."""

    at: Stand
    state: list[Tensor]

    @staticmethod
    def of(scene: Scene, how: How, policy: Policy, most: int) -> Pinned:
        pages = scene.requests * (-(-most // scene.block) + 1)  # a page holds a block at least
        at = stand(scene.worker(how, most, policy, pages), scene)
        if policy.turn is not None:
            at = narrowed(at, len(policy.turn.scopes) - 1)
        return Pinned(at, [t.clone() for t in rows(at)])

    def restore(self) -> None:
        """Put the rows back."""
        for t, kept in zip(rows(self.at), self.state, strict=True):
            t.copy_(kept)


def narrowed(at: Stand, scope: int) -> Stand:
    """The same requests at forwards of that scope: the last one of a policy is that of most forwards."""
    for request in at.scheduler.running.values():
        request.want = scope
    at.worker.sequences.want.fill_(scope)
    plan = at.scheduler.plan()
    assert plan is not None  # requests run
    with Replays(at.worker) as replays:
        at.worker.launch(plan)
    taken(at.worker, at.scheduler)
    at.worker.sequences.want.fill_(scope)  # random tokens may have asked for another
    return at._replace(key=replays.keys[-1])


def rows(at: Stand) -> list[Tensor]:
    """All that a forward changes but K/V, which it writes alike each time."""
    buf, sequences = at.worker.buf, at.worker.sequences
    return [*buf[:-1], *buf.mem.values(), *sequences]


def policies(
    scene: Scene, how: How, names: Sequence[str], rounds: int, command: str, before: Mapping[str, Run] | None = None
) -> Iterator[dict[str, Any]]:
    """A record after each policy; its `runs` hold those of `before` and all so far, and why one could not be.

    names   none: all that are not in `before`
    rounds  forwards timed of a policy and of its counterpart each
    Raises PolicyError  for an unknown name
    """
    runs: dict[str, Run] = dict(before or {})
    wanted = {name: named(name) for name in names or POLICIES if names or name not in runs}
    forced = {name: replace(Policy(), N=p.N, full=p.full, turn=p.turn, select=Fixed(scene.accept))
              for name, p in wanted.items()}  # fmt: skip
    most = scene.context + 8 * scene.block * (1 + max(p.N for p in POLICIES.values()))  # the same whatever is wanted
    kept: tuple[Policy, Pinned] | None = None
    for name in sorted(wanted, key=lambda name: repr(forced[name])):  # one that suits several is built once
        try:
            bind(wanted[name], scene.card(), scene.block)
            if wanted[name].canvas is not None:
                raise PolicyError("a canvas has no masks to accept, so no schedule can be forced")
        except PolicyError as error:
            runs[name] = {"left_out": str(error).splitlines()[0]}
        else:
            if kept is None or kept[0] != forced[name]:
                kept = None  # two sets of weights fit where three may not
                gc.collect()
                kept = forced[name], Pinned.of(scene, how, forced[name], most)
            runs[name] = beside(kept[1], Pinned.of(scene, how, wanted[name], most), rounds)
            runs[name]["made"] = provenance(command, str(kept[1].at.worker.device))
            gc.collect()  # graphs and what they run hold each other
        described = {"scene": scene.describe(), "how": how._asdict(), "runs": dict(runs)}
        yield {"schema": SCHEMA, "what": "policies", **described}


@torch.no_grad()
def beside(counterpart: Pinned, own: Pinned, rounds: int) -> Run:
    """Milliseconds a forward of a policy and of its counterpart, which take turns; what the former has more."""
    device = own.at.worker.device
    pairs = []
    with there(device):
        for _ in range(WARM + rounds):
            marks = []
            for pinned in (counterpart, own):
                pinned.restore()
                began = mark(device)
                pinned.at.launch()
                marks.append((began, mark(device)))
            pairs.append(marks)
        wait(device)
        ms = [[between_ms(*marks) for marks in side] for side in zip(*pairs[WARM:], strict=True)]
        kernels = [None, None]
        if device.type == "cuda":
            found = [trace(pinned.at.turn).table() for pinned in (counterpart, own)]
            kernels = [sum(row["n"] for row in table) for table in found]
    fixed, mine = (statistics.median(each) for each in ms)
    return {
        "policy": own.at.worker.policy.describe(),
        "graphs": own.at.worker.config.graphs,
        "ms_per_forward": spread(ms[1]),
        "fixed_ms_per_forward": spread(ms[0]),
        "overhead": mine / fixed - 1,
        "kernels_per_step": kernels[1],
        "fixed_kernels_per_step": kernels[0],
    }


def table(runs: Mapping[str, Run]) -> str:
    """A record's runs as text: a row a policy, the dearest rules first."""
    timed = sorted((name for name in runs if "overhead" in runs[name]), key=lambda name: -runs[name]["overhead"])
    lines = [f"{'policy':22} {'ms a forward':>12} {'Fixed':>8} {'overhead':>9}  more kernels"]
    for name in timed:
        run = runs[name]
        more = (
            "-" if run["kernels_per_step"] is None else f"{run['kernels_per_step'] - run['fixed_kernels_per_step']:+g}"
        )
        lines.append(
            f"{name:22} {run['ms_per_forward']['p50']:12.3f} {run['fixed_ms_per_forward']['p50']:8.3f} "
            f"{100 * run['overhead']:+8.2f}%  {more}"
        )
    lines += [f"{name:22} left out: {run['left_out']}" for name, run in runs.items() if "left_out" in run]
    return "\n".join(lines)
