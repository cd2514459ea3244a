"""The scene decodes at the schedule that it is told, where it is told to, and its floor counts what a forward reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dlx.bench import How, Scene, decode, floor_bytes, stand
from dlx.errors import ConfigError, ModelError

CPU = How(graphs="off", device="cpu")


@pytest.mark.parametrize(("accept", "each"), [(4, 4.0), (1, 1.0), (24, 16.0)])
@pytest.mark.parametrize("forwards", [1, 4])
def test_every_row_commits_what_is_accepted(nano: Path, accept: int, each: float, forwards: int) -> None:
    scene = Scene(nano, block=16, context=48, requests=3, accept=accept)
    done = decode(stand(scene.worker(CPU._replace(forwards=forwards), 1248), scene), launches=32 // forwards)
    assert done.nfe == 3 * 32  # none of them for a commit alone
    assert done.forwards == 32
    assert done.tokens_per_forward == each
    assert done.wall_s > done.launches_s > 0


def test_a_stretch_that_ends_within_a_block_counts_what_it_decided(nano: Path) -> None:
    scene = Scene(nano, block=16, context=48, requests=1, accept=2)
    done = decode(stand(scene.worker(CPU, 248), scene), launches=3)
    assert done.nfe == 3 and done.tokens_per_forward == 2.0


def test_rewound_rows_decode_behind_their_context_again(nano: Path) -> None:
    scene = Scene(nano, block=16, context=50, requests=2, accept=16)
    at = stand(scene.worker(CPU, 2000), scene)
    with torch.no_grad():
        for _ in range(5):
            at.turn()
        assert at.reached() > 2 * (48 + 4 * 16)
        at.rewind()
    assert at.reached() == 2 * 48


def test_requests_that_were_dropped_leave_room_for_others(nano: Path) -> None:
    scene = Scene(nano, block=16, context=48, requests=2, accept=4)
    at = stand(scene.worker(CPU, 128), scene)
    at.leave()
    assert at.scheduler.idle
    assert at.worker.buf.done.all()


def test_the_floor_is_the_weights_once_and_the_keys_and_values_of_the_tokens(nano: Path) -> None:
    scene = Scene(nano, block=16, context=48, requests=2, accept=4)
    E, F, H, G, D, V = 96, 256, 3, 1, 32, 320  # tests/data/nano/config.json
    layer = (H + 2 * G) * D * E + E * H * D + 3 * E * F + 2 * E + 2 * D
    need = floor_bytes(scene.worker(CPU, 128), 2 * 48)
    assert need == {
        "weights": 4 * (3 * layer + E + V * E),
        "kv": 4 * 2 * 3 * G * D * 2 * 48,
    }  # tied: the table is the head


def test_an_input_table_of_its_own_is_not_in_the_floor(nano: Path, tmp_path: Path) -> None:
    raw = json.loads((nano / "config.json").read_text())
    path = tmp_path / "untied.json"
    path.write_text(json.dumps(raw | {"tie_word_embeddings": False}))
    tied, untied = (floor_bytes(Scene(shape, 16, 48, 1, 4).worker(CPU, 128), 48)["weights"] for shape in (nano, path))
    assert untied == tied


def test_a_shape_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        Scene(Path("nowhere"), 4, 64, 1, 4).worker(CPU, 128)


def test_a_family_that_is_not_built_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text(json.dumps({"architectures": ["SomethingModelLM"]}))
    with pytest.raises(ModelError, match="SomethingModelLM"):
        Scene(path, 4, 64, 1, 4).worker(CPU, 128)


def test_the_tokenizer_that_is_written_knows_every_id(nano: Path) -> None:
    engine = Scene(nano, 16, 48, 1, 4).engine(CPU, 128, rows=1)
    assert engine.tokenizer.size == engine.worker.card.vocab == 320
    assert engine.tokenizer.encode("7 319 0") == [7, 319, 0]
