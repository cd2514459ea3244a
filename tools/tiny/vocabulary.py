"""The tokenizer: byte-level BPE over the tasks' text, single digits, ChatML turns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from random import Random

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from dlx.tasks import sample

PAD, START, END, MASK = range(4)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|MASK|>"]
PROMPT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
TEMPLATE = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SAMPLES = 60_000  # that the merges are learnt from
LEAST = 3  # occurrences of a merge

Document = tuple[list[int], list[int]]  # ids of prompt and answer


def train_tokenizer(mix: Mapping[str, float], size: int, seed: int = 1, samples: int = SAMPLES) -> Tokenizer:
    """A tokenizer of at most `size` ids, learnt from samples that training may see."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        min_frequency=LEAST,
    )
    tokenizer.train_from_iterator(_texts(mix, Random(seed), samples), trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, samples: Sequence[tuple[str, str]]) -> list[Document]:
    """Ids of (prompt, answer) pairs: the prompt's turn, and the answer with the end of its turn."""
    prompts = tokenizer.encode_batch([PROMPT.format(prompt) for prompt, _ in samples])
    answers = tokenizer.encode_batch([answer + SPECIAL[END] for _, answer in samples])
    return [(prompt.ids, answer.ids) for prompt, answer in zip(prompts, answers, strict=True)]


def _texts(mix: Mapping[str, float], rng: Random, samples: int) -> Iterator[str]:
    turn = PROMPT.replace(SPECIAL[START], "").replace(SPECIAL[END], "")
    for _ in range(samples):
        drawn = sample(rng, mix)
        yield turn.format(drawn.prompt)
        yield drawn.answer
