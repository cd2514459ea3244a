"""Without a tokenizer.json, vocab.json and merges.txt give the ids that transformers' Qwen2Tokenizer gives."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Trained
from tokenizers import models, pre_tokenizers, trainers

from dlx.errors import ModelError
from dlx.tokenizer import Tokenizer

WORDS = "It's 1234 the then them there; we'll THEY'RE said: naïve café über\n\n  def f(x):\n    return x + 1\t# 東京 🙂"
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
PIECES = [*WORDS, *WORDS.split(), "e\u0301", "\r", "\u00a0", "²", "ſ", "'S", *SPECIALS, "<think>"]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=40).map("".join)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The two files and tokenizer_config.json, as Dream's repositories have them."""
    folder = tmp_path_factory.mktemp("old")
    made = Trained(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator([WORDS] * 4, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet))
    made.model.save(str(folder))  # vocab.json and merges.txt
    n = made.get_vocab_size()
    decoder = {
        str(n + i): {"content": text, "special": True, "normalized": False, "lstrip": False, "rstrip": False}
        for i, text in enumerate(SPECIALS)
    }
    decoder[str(n + 3)] = {"content": "<think>", "special": False, "normalized": False}
    facts = {
        "added_tokens_decoder": decoder, "tokenizer_class": "DreamTokenizer", "eos_token": SPECIALS[0],
        "pad_token": SPECIALS[0], "chat_template": TEMPLATE,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(facts))
    return folder


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    from transformers import AddedToken, Qwen2Tokenizer

    vocab = json.loads((folder / "vocab.json").read_text())
    lines = (folder / "merges.txt").read_text().splitlines()[1:]
    made = Qwen2Tokenizer(vocab=vocab, merges=[tuple(line.split(" ")) for line in lines])
    made.add_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIALS])
    made.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    return made


@pytest.fixture(scope="module")
def ours(folder: Path) -> Tokenizer:
    return Tokenizer.load(folder)


@given(text=TEXTS | st.text(st.characters(exclude_categories=["Cs"]), max_size=20))
def test_ids_are_those_of_transformers(ours: Tokenizer, reference: Any, text: str) -> None:
    assert ours.encode(text) == reference(text).input_ids


def test_merges_are_used_and_added_tokens_keep_their_ids(ours: Tokenizer) -> None:
    n = ours.size
    assert ours.encode("<|endoftext|><|im_start|><|im_end|><think>") == [n - 4, n - 3, n - 2, n - 1]
    assert set(ours.special) == set(SPECIALS)
    assert len(ours.encode(WORDS)) < 0.8 * len(WORDS.encode())
    assert (ours.eos_id, ours.mask_id) == (n - 4, None)


def test_a_text_comes_back_and_a_special_token_in_a_message_is_mere_text(ours: Tokenizer) -> None:
    assert ours.decode(ours.encode(WORDS)) == WORDS
    assert ours.chat([{"role": "user", "content": "a<|im_end|>"}]).count(ours.special["<|im_end|>"]) == 1


def edited(**changes: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


def linked(folder: Path) -> None:
    (folder / "merges.txt").rename(folder.parent / "merges.txt")
    (folder / "merges.txt").symlink_to(folder.parent / "merges.txt")


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "another class": (edited(tokenizer_class="GPT2Tokenizer"), "tokenizer_class='GPT2Tokenizer' .* is none of Qwen2"),
    "no merges": (lambda folder: (folder / "merges.txt").unlink(), r"merges\.txt cannot be read"),
    "linked merges": (linked, r"merges\.txt is a link to"),
    "merges of another": (lambda f: (f / "merges.txt").write_text("#version: 0.2\nqq zz\n"), "make no tokenizer"),
    "broken merges": (lambda f: (f / "merges.txt").write_text("#version: 0.2\nalone\n"), "make no tokenizer"),
    "a broken vocabulary": (lambda f: (f / "vocab.json").write_text("{"), r"vocab\.json cannot be read as JSON"),
    "a vocabulary of words": (lambda f: (f / "vocab.json").write_text('{"a": "b"}'), "make no tokenizer"),
    "an id that is not free": (
        edited(added_tokens_decoder={"7": {"content": "<x>", "special": True}}), "gives '<x>' the id 7, behind vocab"
    ),
    "no content": (edited(added_tokens_decoder={"7": "<x>"}), "added_tokens_decoder has '7': '<x>'"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_files_that_make_no_tokenizer_are_told_in_a_line(folder: Path, tmp_path: Path, name: str) -> None:
    damage, said = BAD[name]
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    damage(copy)
    with pytest.raises(ModelError, match=said) as caught:
        Tokenizer.load(copy)
    assert str(copy) in str(caught.value)
    assert "\n" not in str(caught.value)
