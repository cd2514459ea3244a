"""A stand-in for an LLM: the nano checkpoint's tokenizer, and prepared answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

from dlx.request import Finish, Output, SamplingParams, Timings
from dlx.tokenizer import Tokenizer

NANO = Path(__file__).parents[1] / "data" / "nano"


class Answers:
    """Answers each prompt with what `say` makes of its text; every answer takes 6 tokens and 2 forwards."""

    def __init__(self, say: Callable[[str], str]) -> None:
        self.say = say
        self.tokenizer = Tokenizer.load(NANO)
        self.config = SimpleNamespace(model=NANO)
        self.prompts: list[list[int]] = []
        self.params: list[SamplingParams] = []

    def generate(
        self, prompts: Sequence[list[int]], params: Sequence[SamplingParams], progress: bool = False
    ) -> list[Output]:
        self.prompts += prompts
        self.params += params
        texts = [self.say(self.tokenizer.decode(ids)) for ids in prompts]
        some = Timings(0.0, 0.0, 0.5)
        return [
            Output(i, ids, text, [5] * 5, Finish.STOP, 6, 2, 1, some)
            for i, (ids, text) in enumerate(zip(prompts, texts))
        ]
