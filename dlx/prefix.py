"""What names a prefix of tokens: a chain of sha256 digests over its pages.

    digest[0]     = sha256(salt, adapter)
    digest[i + 1] = sha256(digest[i], the S ids of page i)

Two prefixes have one name only if salt, adapter and every id agree: whole digests are compared, and none is guessed
from another without its salt. The K/V of a page depends on nothing else where every block sees only what is before
its own end; of other models and policies no page is ever published.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import sha256


def root(salt: str, adapter: str | None) -> bytes:
    """The digest that a chain begins with."""
    parts = [salt.encode("utf-8", "surrogatepass"), (adapter or "").encode("utf-8", "surrogatepass")]
    return sha256(b"".join(len(part).to_bytes(8, "little") + part for part in parts)).digest()


def following(digest: bytes, ids: Sequence[int]) -> bytes:
    """The digest of a prefix and one page more."""
    return sha256(digest + array("q", ids).tobytes()).digest()


def extend(digests: list[bytes], first: bytes, ids: Sequence[int], S: int) -> None:
    """Append the digests of the next pages, whose ids these are, in place; `first` is the last digest, or the root."""
    for at in range(0, len(ids) - S + 1, S):
        first = following(first, ids[at : at + S])
        digests.append(first)
