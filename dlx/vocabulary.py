"""A tokenizer of vocab.json and merges.txt, where there is no tokenizer.json: byte-level BPE that splits as Qwen2's.

Dream and its kin publish these two files, and Python beside them, which is not run.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from dlx.errors import ModelError
from dlx.weights.files import inside, read_json

VOCABULARY, MERGES = "vocab.json", "merges.txt"
CLASSES = ("Qwen2Tokenizer", "Qwen2TokenizerFast", "DreamTokenizer")  # of tokenizer_config.json; others split otherwise
# contractions; a word with at most one sign before it; one digit; signs with a space before; line ends; other spaces
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def assembled(folder: Path, config: Mapping[str, object]) -> str:
    """What tokenizer.json would say.

    config  tokenizer_config.json, whose added_tokens_decoder has the tokens behind the vocabulary
    Raises ModelError  a class that splits texts otherwise; a file that is missing, broken, or of another tokenizer
    """
    named = config.get("tokenizer_class")
    if named not in CLASSES:
        raise ModelError(
            f"{folder} has {VOCABULARY} and no tokenizer.json, and tokenizer_class={named!r} of tokenizer_config.json "
            f"is none of {', '.join(CLASSES)}; write a tokenizer.json with transformers"
        )
    path = folder / MERGES
    try:
        lines = inside(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} cannot be read ({error}); fetch the file again") from error
    merges = [tuple(line.split()) for line in lines[lines[0].startswith("#version:") :] if line.strip()]
    vocab = read_json(folder / VOCABULARY)
    try:
        made = Tokenizer(BPE(vocab, merges))  # type: ignore[arg-type]  # it checks them
    except Exception as error:  # the library raises no narrower class
        why = " ".join(str(error).split())[:200]
        raise ModelError(f"{folder}: {VOCABULARY} and {MERGES} make no tokenizer ({why}); fetch them again") from error
    made.normalizer = normalizers.NFC()  # type: ignore[assignment]
    split = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    made.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    for i, token, flags in _added(folder, config):
        made.add_tokens([AddedToken(token, **flags)])
        if made.token_to_id(token) != i:
            raise ModelError(
                f"{folder}: tokenizer_config.json gives {token!r} the id {i}, behind {VOCABULARY} it has "
                f"{made.token_to_id(token)}; take both files from the same checkpoint"
            )
    return made.to_str()


def _added(folder: Path, config: Mapping[str, object]) -> list[tuple[int, str, dict[str, bool]]]:
    """(id, text, flags) of the added tokens, by id."""
    declared = config.get("added_tokens_decoder")
    found = []
    for i, token in (declared if isinstance(declared, dict) else {}).items():
        text = token.get("content") if isinstance(token, dict) else None
        if not (i.isascii() and i.isdigit() and isinstance(text, str) and text):
            raise ModelError(
                f"{folder}: tokenizer_config.json: added_tokens_decoder has {i!r}: {token!r}; expected an id and an "
                "object with its content"
            )
        found.append((int(i), text, {flag: token.get(flag) is True for flag in FLAGS}))
    return sorted(found, key=lambda one: one[0])
