"""What names a prefix of tokens: a chain of sha256 digests over its pages.

    digest[0]     = sha256(salt, adapter)
    digest[i + 1] = sha256(digest[i], the S ids of page i)

Two prefixes have one name only if salt, adapter and every id agree: whole digests are compared, and none is guessed
from another without its salt. The K/V of a page depends on nothing else where every block sees only what is before
its own end; of other models and policies no page is ever published.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from hashlib import sha256


def root(salt: str, adapter: str | None) -> bytes:
    """The digest that a chain begins with."""
    parts = [salt.encode("utf-8", "surrogatepass"), (adapter or "").encode("utf-8", "surrogatepass")]
    return sha256(b"".join(len(part).to_bytes(8, "little") + part for part in parts)).digest()


def chain(digest: bytes, ids: Sequence[int], S: int) -> Iterator[bytes]:
    """The digests behind `digest` of the whole pages of `ids`."""
    for at in range(0, len(ids) - S + 1, S):
        digest = sha256(digest + array("q", ids[at : at + S]).tobytes()).digest()
        yield digest
