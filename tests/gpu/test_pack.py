"""Packs of a GPU: what is captured from one runs without a compiler and answers as what is compiled here."""

from __future__ import annotations

from pathlib import Path

import pytest

from dlx.caches import GRAPHS
from tests.host.test_pack import start

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("forwards", "dtype"), [(1, "float32"), (4, "bfloat16")])
def test_a_packed_start_compiles_nothing_and_answers_the_same(
    tiny: Path, tmp_path: Path, forwards: int, dtype: str
) -> None:
    how = {"graphs": "capture", "device": "cuda", "dtype": dtype, "max_num_seqs": 2, "max_model_len": 512}
    folder, (packed, compiled, compilers) = start(tiny, tmp_path, how | {"forwards": forwards}, "capture")
    assert not (folder / GRAPHS).exists()
    assert packed == compiled
    assert not compilers
