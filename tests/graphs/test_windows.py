"""Several blocks at once on a random model, forward for forward, against the loop of tests/reference.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dlx import SamplingParams
from dlx.graphs.policies import POLICIES
from dlx.graphs.rules import Fixed
from tests.checkpoints import STOP, ZOO, write
from tests.graphs.test_strategies import differ, opened, prompts, trail
from tests.reference import Ask, Qwen3, Strategy, decode
from tests.windows import Whole, excusable, walked

L = ZOO["b8"].block_length
RUNNING = Strategy(L, N=4, open_at=0.1)
WINDOWS = {
    "multi_bd": (POLICIES["multi_bd"], RUNNING),
    "late blocks": (
        replace(POLICIES["multi_bd"], open_at=0.5, force_at=1.0),
        replace(RUNNING, open_at=0.5, force_at=1),
    ),
    "d2f": (POLICIES["d2f"], RUNNING),
    "fixed": (POLICIES["fixed"], Strategy(L, fixed=1)),
    "fixed, three": (replace(POLICIES["fixed"], select=Fixed(3)), Strategy(L, fixed=3)),
}


def hold(folder: Path, name: str, many: list[list[int]], most: int) -> int:
    """Every trail is the loop's, but for one in twenty that rounding may have parted → the most blocks at once."""
    policy, strategy = WINDOWS[name]
    net, excused, width = Whole(folder, L) if name == "d2f" else Qwen3(folder, L), 0, 0
    with opened(folder, policy, rows=1) as llm:
        for i, prompt in enumerate(many):
            if isinstance(net, Whole):
                net.prompt = len(prompt)
            bar = (0.35, 0.6, 0.85)[i % 3]
            how = replace(strategy, threshold=torch.tensor(bar).item())
            decoded = decode(net, prompt, how, Ask(most, stop_ids=frozenset({STOP})))
            want = walked(decoded, prompt, net)
            got = trail(llm, prompt, SamplingParams(max_tokens=most, threshold=bar), net.mask_id)
            if differ(got, want):
                assert excusable(got, want, decoded), (name, prompt, bar, got, want)
                excused += 1
            width = max(width, *(f.opened - f.lead for f in decoded.forwards))
    assert excused <= len(many) / 20
    return width


@pytest.fixture
def folder(tmp_path: Path, all_to_all: Callable[[Path], Path]) -> Callable[[str], Path]:
    """The folder of a random checkpoint that a policy suits."""
    return lambda name: (all_to_all if name == "d2f" else Path)(write(tmp_path, ZOO["b8"], 3))


@pytest.mark.parametrize("name", WINDOWS)
def test_a_window_decodes_forward_for_forward_like_its_loop(name: str, folder: Callable[[str], Path]) -> None:
    assert (hold(folder(name), name, prompts(3, 1), 24) > 1) != name.startswith("fixed")


@pytest.mark.long
@pytest.mark.parametrize("name", WINDOWS)
def test_a_window_decodes_sixty_prompts_like_its_loop(name: str, folder: Callable[[str], Path]) -> None:
    width = hold(folder(name), name, prompts(60, 2), 40)
    assert width == 4 if name in ("multi_bd", "d2f") else (width > 1) != name.startswith("fixed")


@pytest.mark.parametrize(
    ("name", "wrongly"), [("multi_bd", {"N": 3}), ("multi_bd", {"open_at": 0.3}), ("d2f", {"force_at": 0.1})]
)
def test_a_loop_with_another_number_decodes_otherwise(
    name: str, wrongly: dict[str, float], folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, strategy = WINDOWS[name]
    monkeypatch.setitem(WINDOWS, name, (policy, replace(strategy, **wrongly)))  # type: ignore[arg-type]
    with pytest.raises(AssertionError):
        hold(folder(name), name, prompts(6, 2), 40)
