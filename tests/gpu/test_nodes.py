"""Conditional nodes: the device runs what its tensors ask for, with no host in between."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dlx.graphs import loop
from dlx.graphs.either import Either, both
from dlx.graphs.nodes import Nodes

pytestmark = pytest.mark.gpu


def captured(fn: Callable[[], object]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        fn()
    return graph


def rows(B: int, places: int) -> tuple[Tensor, Tensor]:
    """Which blocks are whole, and which rows are done: none."""
    return torch.zeros(B, places, dtype=torch.bool, device="cuda"), torch.zeros(B, dtype=torch.bool, device="cuda")


@pytest.mark.parametrize(("B", "places"), [(1, 2), (2, 2), (5, 3)])
def test_an_if_node_runs_the_forward_that_the_rows_ask_for(B: int, places: int) -> None:
    whole, done = rows(B, places)
    ran = torch.zeros(2, dtype=torch.int32, device="cuda")
    turn = both(captured, Either(lambda: ran[0].add_(1), lambda: ran[1].add_(1), whole, done))
    nodes = Nodes(turn)

    def after() -> list[int]:
        nodes.replay()
        return ran.tolist()

    assert after() == [0, 1]
    whole[B - 1, 1] = True  # waits for the block before it
    assert after() == [0, 2]
    whole[B - 1, 0] = True
    assert after() == [1, 2]
    done[B - 1] = True
    assert after() == [1, 3]


def test_each_turn_of_a_loop_chooses_anew() -> None:
    whole, done = rows(1, 2)
    ran = torch.zeros(2, dtype=torch.int32, device="cuda")
    launch = loop.allocate(1, 4, 8, torch.device("cuda"))

    def committing() -> None:
        ran[0].add_(1)
        whole[0, 0].fill_(False)

    def plain() -> None:
        ran[1].add_(1)
        whole[0, 0].copy_(ran[1] % 3 == 0)  # every third one leaves a block to commit

    begin = captured(lambda: launch.on.fill_(1))
    nodes = Nodes(both(captured, Either(committing, plain, whole, done)), begin, launch)
    for forwards, seen in ((3, [0, 3]), (1, [1, 3]), (7, [2, 9])):
        launch.left.fill_(forwards)
        launch.epoch.fill_(1)
        nodes.replay()
        assert ran.tolist() == seen
        assert int(launch.left) == 0
    launch.left.fill_(5)
    launch.halt.fill_(1)
    nodes.replay()
    assert ran.tolist() == [2, 9]
