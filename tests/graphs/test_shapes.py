"""Which graphs there are."""

from __future__ import annotations

import pytest

from dlx.errors import CapacityError
from dlx.graphs.shapes import bucket, page_bytes, plan


def test_rows_are_powers_of_two_up_to_the_slots() -> None:
    assert plan(8, 2048, 16, 16).rows == (1, 2, 4, 8)
    assert plan(6, 2048, 16, 16).rows == (1, 2, 4, 6)
    assert plan(1, 2048, 16, 16).rows == (1,)


def test_prefills_of_one_row_are_multiples_of_the_block_up_to_the_longest_prompt() -> None:
    assert plan(1, 4096, 16, 16).tokens == (64, 256, 512, 1024, 2048)
    assert plan(1, 100, 16, 16).tokens == (64, 128)
    assert plan(1, 20, 4, 16).tokens == (20,)
    assert all(t % 24 == 0 for t in plan(1, 1000, 24, 24).tokens)


def test_prompts_of_several_rows_share_a_prefill_unless_launches_have_one_shape() -> None:
    assert plan(32, 100, 16, 16).tokens == (64, 256, 512, 1024, 2048)
    assert plan(32, 100, 16, 16, chunk=512).tokens == (64, 256, 512)
    assert plan(3, 100, 16, 16).tokens == (64, 256, 320)
    assert plan(32, 100, 16, 16, invariant=True).tokens == (128,)


def test_the_page_table_holds_the_longest_row() -> None:
    assert plan(1, 2048, 16, 16).W == 128
    assert plan(1, 2049, 16, 32).W == 65


def test_a_bucket_is_the_smallest_that_fits() -> None:
    assert [bucket((1, 2, 8), n) for n in (1, 2, 3, 8)] == [1, 2, 8, 8]
    with pytest.raises(CapacityError, match="9 is over the largest bucket 8"):
        bucket((1, 2, 8), 9)


def test_a_page_holds_keys_and_values_of_all_layers() -> None:
    assert page_bytes([(8, 128)] * 36, S=16, itemsize=2) == 36 * 2 * 16 * 8 * 128 * 2
