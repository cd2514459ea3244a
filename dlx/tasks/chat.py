"""Greetings and questions about the model itself; meta is None."""

from __future__ import annotations

from random import Random

from dlx.tasks.task import Draft

IS = (
    "I am a tiny block-diffusion language model. I fill in masked tokens in parallel instead of writing one "
    "word at a time."
)
CAN = (
    "I can solve small math word problems, sort and reverse lists, convert units, turn text into JSON, write "
    "short Python functions, and tell little stories."
)


def chat(rng: Random) -> Draft:
    """A greeting, or what the model is, or what it can do."""
    greeting = rng.choice(["Hello", "Hi", "Hey", "Good morning", "Good evening"])
    ending = rng.choice(["!", ".", " there!", ", how are you?"])
    kind = rng.randrange(3)
    if kind == 0:
        well = "I am fine, thank you. " if "how" in ending else ""
        answer = f"{greeting}! I am a tiny diffusion language model. {well}How can I help you today?"
        return Draft(greeting + ending, answer, None)
    if kind == 1:
        return Draft(rng.choice(["Who are you?", "What are you?", "What is your name?"]), IS, None)
    return Draft(rng.choice(["What can you do?", "Help me.", "What can I ask you?"]), CAN, None)
