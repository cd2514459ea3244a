"""A user's rule runs as dlx's own do, eager and compiled; one that cannot is refused by its line."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dlx import LLM, Policy, SamplingParams
from dlx.errors import PolicyError
from dlx.graphs import own
from dlx.graphs.policies import POLICIES
from dlx.graphs.rules import Candidates, Keep, Seen, Threshold
from dlx.graphs.step import Ids
from tests.graphs import own_rules

SOURCE = Path(own_rules.__file__)
CPU, ELSEWHERE = torch.device("cpu"), torch.device("meta")  # the other one stands for a GPU


@dataclass(frozen=True)
class Pairs:
    """Threshold, and what follows an accepted position if it is surer than `near`."""

    near: float = 0.3

    def __call__(self, c: Candidates, w: Seen) -> Tensor:
        take = Threshold()(c, w)
        after = torch.cat((torch.zeros_like(take[..., :1]), take[..., :-1]), -1)
        return take | w.todo & after & (c.conf > self.near)


@dataclass(frozen=True, slots=True)
class Again:
    """As Keep."""

    def __call__(self, c: Candidates, w: Seen, take: Tensor) -> Tensor:
        return torch.where(take, c.tok, w.tok)


def tried(policy: Policy, compiled: bool, device: torch.device = CPU) -> None:
    own.tried(replace(policy, L=8, full=False), Ids(31, 32), device, torch.float32, compiled)


def answers(nano: Path, policy: Policy, graphs: str) -> list[tuple[list[int], int, str]]:
    prompts = [list(range(40, 40 + n)) for n in (3, 17)]
    params = SamplingParams(max_tokens=40, threshold=1.0, ignore_eos=True)
    with LLM(nano, policy=policy, graphs=graphs, device="cpu", dtype="float32", max_num_seqs=2) as llm:
        return [(o.token_ids, o.nfe, o.finish_reason.value) for o in llm.generate(prompts, params)]


def line_of(rule: str) -> str:
    """How a refusal begins that names the line of a rule of own_rules.py."""
    source = SOURCE.read_text().splitlines()
    first = source.index(f"class {rule}:")
    at = next(i for i, line in enumerate(source) if i > first and "# here" in line)
    return f"select={rule}() cannot run on the device: {SOURCE}:{at + 1}: `{source[at].strip()}`"


def test_a_users_rule_decides(nano: Path) -> None:
    plain = answers(nano, Policy(N=2), "off")
    assert answers(nano, Policy(N=2, select=Pairs(near=1.0)), "off") == plain
    quick = answers(nano, Policy(N=2, select=Pairs(near=0.0)), "off")
    assert sum(nfe for _, nfe, _ in quick) < sum(nfe for _, nfe, _ in plain)


@pytest.mark.long
def test_a_users_rule_the_guard_and_the_budget_compile_to_the_same(nano: Path) -> None:
    policy = Policy(N=2, select=Pairs(), rewrite=Again(), max_repetition_run=3, auto_max_nfe=4)
    eager = answers(nano, policy, "off")
    assert answers(nano, policy, "compile") == eager


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("rule", "told"),
    [
        ("Reads", "it reads a value on the host"),
        ("Branches", "it reads a value on the host"),
        ("Lists", "depends on values"),
        ("Selects", "depends on values"),
        ("Copies", "numpy"),
        ("Fails", "AttributeError"),
    ],
)
def test_a_rule_that_cannot_run_on_the_device_is_refused_by_its_line(rule: str, told: str, compiled: bool) -> None:
    with pytest.raises(PolicyError) as error:
        tried(Policy(select=getattr(own_rules, rule)()), compiled)
    assert line_of(rule) in str(error.value)
    assert told in str(error.value).split("`")[-1]


@pytest.mark.parametrize("rule", ["Leaves", "LeavesOne", "Comes"])
def test_a_rule_that_copies_between_device_and_host_is_refused_by_its_line(rule: str) -> None:
    policy = Policy(select=getattr(own_rules, rule)())
    tried(policy, compiled=False)  # on a CPU nothing is copied
    with pytest.raises(PolicyError, match="copies between the device and the host") as error:
        tried(policy, False, ELSEWHERE)
    assert line_of(rule) in str(error.value)


def test_a_number_of_the_host_is_no_copy() -> None:
    tried(Policy(select=own_rules.Number()), False, ELSEWHERE)


def test_a_rule_that_breaks_the_graph_is_refused_where_it_is_compiled() -> None:
    policy = Policy(select=own_rules.Prints())
    tried(policy, compiled=False)
    with pytest.raises(PolicyError, match=r"own_rules.py:\d+: `print\(c.conf\).*`: it breaks the graph"):
        tried(policy, compiled=True)


def test_a_rule_that_writes_to_its_arguments_is_refused() -> None:
    with pytest.raises(PolicyError, match="it writes to its arguments"):
        tried(Policy(select=own_rules.Writes()), compiled=False)


def test_a_result_of_another_dtype_is_refused_with_what_it_should_be() -> None:
    with pytest.raises(PolicyError, match=r"returns \[2, 1, 8\] torch.float32 on cpu, not \[B, N, L\] bool"):
        tried(Policy(select=own_rules.Wide()), compiled=False)


def test_the_engine_refuses_before_it_decodes(nano: Path) -> None:
    with pytest.raises(PolicyError, match="Reads"):
        LLM(nano, policy=Policy(select=own_rules.Reads()), device="cpu", graphs="off")


def test_a_class_or_a_thawed_rule_is_no_rule() -> None:
    @dataclass
    class Thawed:
        def __call__(self, c: Candidates, w: Seen) -> Tensor:
            return w.todo

    for rule in (Pairs, Thawed()):
        with pytest.raises(PolicyError, match="is not a rule; pass a frozen dataclass"):
            Policy(select=rule)  # type: ignore[arg-type]


def test_rules_of_dlx_are_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own, "_step", None)
    for policy in POLICIES.values():
        own.tried(policy, Ids(31, 32), CPU, torch.float32, True)


def test_rules_of_a_canvas_and_of_a_shifted_network_are_tried_too() -> None:
    @dataclass(frozen=True)
    class Open:
        def __call__(self, c: Candidates, w: Seen, take: Tensor) -> Tensor:
            return torch.where(take, c.tok, w.mask) if w.calm is not None else w.tok[0]

    canvas = replace(POLICIES["diffusion_gemma"], L=8, full=False, rewrite=Open())
    own.tried(canvas, Ids(31, 32), CPU, torch.float32, False)
    with pytest.raises(PolicyError, match=r"rewrite=.*Open\(\) .*returns \[1, 8\]"):
        own.tried(Policy(L=8, rewrite=Open()), Ids(31, 32, shift=True), CPU, torch.float32, False)


@pytest.mark.parametrize("name", [name for name, policy in POLICIES.items() if policy.turn is not None])
def test_rules_are_tried_in_every_scope_of_a_sequence(name: str) -> None:
    policy = replace(POLICIES[name], L=8, select=Pairs())
    own.tried(policy, Ids(31, 32, shift=True), CPU, torch.float32, True)
    with pytest.raises(PolicyError, match="reads a value"):
        own.tried(replace(policy, select=own_rules.Reads()), Ids(31, 32), CPU, torch.float32, False)


def test_what_the_step_asks_of_a_rule_it_asks_of_the_same_kind() -> None:
    @dataclass(frozen=True)
    class Mine(Keep):
        more: int = 3

    twin = own._spied("rewrite", Mine(), [])
    assert isinstance(twin, Keep) and twin.more == 3 and replace(Policy(), rewrite=twin).keeps
