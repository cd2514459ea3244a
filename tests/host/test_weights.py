"""Weights arrive in the right rows, and every kind of damaged folder is told apart."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dlx import weights
from dlx.errors import ModelError
from dlx.models.card import Place

PLACES = {
    "q.weight": Place("qkv", 0, (4, 3)),
    "k.weight": Place("qkv", 4, (2, 3)),
    "v.weight": Place("qkv", 6, (2, 3)),
    "norm.weight": Place("norm", 0, (3,)),
}


def drawn(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(place.shape, generator=generator) for name, place in PLACES.items()}


def empty(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {
        "qkv": torch.full((8, 3), torch.nan, dtype=dtype),
        "norm": torch.full((3,), torch.nan, dtype=dtype),
    }


def sharded(folder: Path, tensors: dict[str, Tensor]) -> Path:
    """Two shards and their index."""
    files = {name: f"model-0000{1 + n % 2}-of-00002.safetensors" for n, name in enumerate(tensors)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in files if files[name] == file}, folder / file)
    (folder / weights.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return folder


def single(folder: Path, tensors: dict[str, Tensor]) -> Path:
    save_file(tensors, folder / weights.SINGLE)
    return folder


def refusal(folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        weights.load(folder, PLACES, empty())
    return str(caught.value)


@pytest.mark.parametrize("write", [single, sharded])
def test_tensors_land_in_their_rows(tmp_path: Path, write: Callable[[Path, dict[str, Tensor]], Path]) -> None:
    tensors, params = drawn(), empty()
    weights.load(write(tmp_path, tensors), PLACES, params)
    assert torch.equal(params["qkv"], torch.cat([tensors[f"{name}.weight"] for name in "qkv"]))
    assert torch.equal(params["norm"], tensors["norm.weight"])


@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
def test_tensors_are_cast_to_the_dtype_of_the_parameter(
    tmp_path: Path, stored: torch.dtype, wanted: torch.dtype
) -> None:
    tensors, params = {name: tensor.to(stored) for name, tensor in drawn().items()}, empty(wanted)
    weights.load(single(tmp_path, tensors), PLACES, params)
    assert torch.equal(params["norm"], tensors["norm.weight"].to(wanted))


def test_fp8_parameters_take_fp8_tensors_as_they_are_and_no_others(tmp_path: Path) -> None:
    params = {"w.weight": torch.zeros(4, 3, dtype=weights.FP8), "w.scale": torch.zeros(4)}
    places = {"w": Place("w.weight", 0, (4, 3)), "s": Place("w.scale", 0, (4,))}
    stored = {"w": torch.randn(4, 3).to(weights.FP8), "s": torch.ones(4)}
    weights.load(single(tmp_path, stored), places, params, finite=True)
    assert torch.equal(params["w.weight"].float(), stored["w"].float())
    with pytest.raises(ModelError, match=r"w has dtype F32, expected one of F8_E4M3 \(in model\.safetensors\)"):
        weights.load(single(tmp_path, {"w": torch.zeros(4, 3), "s": torch.ones(4)}), places, params)


def test_rows_of_a_stack_of_matrices_are_counted_through_all_of_them(tmp_path: Path) -> None:
    tensors = {f"e{i}": torch.randn(2, 3) for i in range(4)}
    params = {"w": torch.zeros(2, 4, 3)}  # two matrices of two tensors each
    weights.load(single(tmp_path, tensors), {f"e{i}": Place("w", 2 * i, (2, 3)) for i in range(4)}, params)
    assert torch.equal(params["w"], torch.cat(list(tensors.values())).view(2, 4, 3))


def test_a_parameter_that_asks_for_gradients_is_filled_too(tmp_path: Path) -> None:
    params: dict[str, Tensor] = {name: torch.nn.Parameter(value) for name, value in empty().items()}
    weights.load(single(tmp_path, drawn()), PLACES, params)
    assert params["norm"].isfinite().all()


def test_a_head_beside_tied_embeddings_is_left_alone(tmp_path: Path) -> None:
    params = empty()
    weights.load(single(tmp_path, drawn() | {"lm_head.weight": torch.ones(5, 3)}), PLACES, params)
    assert params["qkv"].isfinite().all()


@pytest.mark.parametrize("target", ["../../blobs/0a", "blob"])
def test_a_link_within_the_folder_or_into_the_blobs_of_the_hub_cache_is_followed(tmp_path: Path, target: str) -> None:
    folder = tmp_path / "models--a--b" / "snapshots" / "0f"
    folder.mkdir(parents=True)
    (tmp_path / "models--a--b" / "blobs").mkdir()
    (single(folder, drawn()) / weights.SINGLE).rename(folder / target)
    (folder / weights.SINGLE).symlink_to(target)
    params = empty()
    weights.load(folder, PLACES, params)
    assert params["norm"].isfinite().all()


def test_places_that_leave_rows_open_are_our_own_fault(tmp_path: Path) -> None:
    short = {name: place for name, place in PLACES.items() if name != "v.weight"}
    with pytest.raises(AssertionError, match="cover the parameters"):
        weights.load(single(tmp_path, drawn()), short, empty())


def test_a_folder_that_is_not_there_is_named_with_how_to_fetch_one(tmp_path: Path) -> None:
    message = refusal(tmp_path / "nowhere")
    assert f"the folder {tmp_path / 'nowhere'} does not exist" in message
    assert "hf download" in message


def test_a_file_in_a_folders_place_is_told(tmp_path: Path) -> None:
    path = single(tmp_path, drawn()) / weights.SINGLE
    assert refusal(path) == f"{path} is a file; name the checkpoint's folder, {tmp_path}"


def test_a_folder_without_weights_is_told_what_it_lacks(tmp_path: Path) -> None:
    assert refusal(tmp_path) == (
        f"{tmp_path} has no weights; expected model.safetensors, "
        "or model.safetensors.index.json and the shards it names"
    )


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pt", "weights.pth", "last.ckpt"])
def test_pickles_are_refused_unread_with_a_way_to_convert_them(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    message = refusal(tmp_path)
    assert f"pickle weights only ({name})" in message
    assert "save_pretrained" in message


@pytest.mark.parametrize("keep", [0, 4, 40, -8])
def test_a_truncated_file_is_named(tmp_path: Path, keep: int) -> None:
    path = single(tmp_path, drawn()) / weights.SINGLE
    path.write_bytes(path.read_bytes()[:keep])
    assert refusal(tmp_path).startswith(f"{path} is truncated or no safetensors file (")


def test_a_file_of_another_format_is_named(tmp_path: Path) -> None:
    path = tmp_path / weights.SINGLE
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    assert refusal(tmp_path).startswith(f"{path} is truncated or no safetensors file (")


def test_one_damaged_shard_of_several_is_named(tmp_path: Path) -> None:
    path = sharded(tmp_path, drawn()) / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    assert refusal(tmp_path).startswith(f"{path} is truncated")


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    (sharded(tmp_path, drawn()) / "model-00001-of-00002.safetensors").unlink()
    message = refusal(tmp_path)
    assert message.startswith(f"{tmp_path} lacks model-00001-of-00002.safetensors, which {weights.INDEX} names")


@pytest.mark.parametrize("name", ["../x.safetensors", "/x.safetensors", "sub/x.safetensors", "..", "a\\b.safetensors"])
def test_an_index_cannot_lead_out_of_its_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / weights.INDEX).write_text(json.dumps({"weight_map": {"q.weight": name}}))
    message = refusal(tmp_path)
    assert f"names the shard {name!r}" in message
    assert "in the same folder" in message


def test_an_index_cannot_name_a_pickle(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(b"")
    (tmp_path / weights.INDEX).write_text(json.dumps({"weight_map": {"q.weight": "x.bin"}}))
    assert "allowed are *.safetensors files" in refusal(tmp_path)


@pytest.mark.parametrize("index", ["{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', '{"weight_map": []}'])
def test_an_index_without_a_map_is_told(tmp_path: Path, index: str) -> None:
    (tmp_path / weights.INDEX).write_text(index)
    assert 'has no "weight_map"' in refusal(tmp_path)


@pytest.mark.parametrize("index", ["", "{", "[1]", "\ud800"])
def test_an_index_that_is_no_json_object_is_told(tmp_path: Path, index: str) -> None:
    (tmp_path / weights.INDEX).write_bytes(index.encode("utf-8", "surrogatepass"))
    assert refusal(tmp_path).startswith(str(tmp_path / weights.INDEX))


def test_every_missing_extra_and_misshapen_tensor_is_named_at_once(tmp_path: Path) -> None:
    tensors = drawn()
    tensors["k.weight"] = torch.zeros(3, 2)
    tensors["bias"] = tensors.pop("v.weight")
    message = refusal(single(tmp_path, tensors))
    assert "k.weight has shape [3, 2], expected [2, 3]" in message
    assert "bias is extra (in model.safetensors; the network has no such tensor)" in message
    assert "v.weight is missing (shape [2, 3]; not in model.safetensors)" in message
    assert "q.weight" not in message


def test_nothing_is_written_before_all_tensors_are_checked(tmp_path: Path) -> None:
    tensors, params = drawn(), empty()
    del tensors["v.weight"]
    with pytest.raises(ModelError):
        weights.load(single(tmp_path, tensors), PLACES, params)
    assert params["qkv"].isnan().all()


def test_a_tensor_that_two_shards_hold_is_told(tmp_path: Path) -> None:
    sharded(tmp_path, drawn())
    save_file(drawn(), tmp_path / "model-00002-of-00002.safetensors")
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    assert f"q.weight is twice there (in {first} and {second})" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("dtype", "name"), [(torch.int32, "I32"), (torch.int8, "I8"), (torch.float8_e4m3fn, "F8_E4M3")]
)
def test_tensors_that_are_no_plain_floats_are_refused(tmp_path: Path, dtype: torch.dtype, name: str) -> None:
    tensors = drawn()
    tensors["q.weight"] = torch.zeros(4, 3).to(dtype)
    assert f"q.weight has dtype {name}, expected one of BF16, F16, F32, F64" in refusal(single(tmp_path, tensors))


def test_a_long_list_of_wrong_tensors_is_cut_and_counted(tmp_path: Path) -> None:
    single(tmp_path, {f"extra{n:02}": torch.zeros(1) for n in range(30)})
    message = refusal(tmp_path)
    assert message.count(" is extra ") == weights.SHOWN
    assert "and 14 more" in message  # 30 extra and 4 missing, less the 20 shown


def test_a_config_and_its_generation_config_are_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"a": 1}')
    assert weights.read_config(tmp_path) == ({"a": 1}, {})
    (tmp_path / "generation_config.json").write_text('{"b": 2}')
    assert weights.read_config(str(tmp_path)) == ({"a": 1}, {"b": 2})


def test_a_folder_without_a_config_is_told(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json"):
        weights.read_config(tmp_path)
    with pytest.raises(ModelError, match="does not exist"):
        weights.read_config(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("text", ["{", "[]", "null"])
def test_a_broken_config_is_named(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_text(text)
    with pytest.raises(ModelError) as caught:
        weights.read_config(tmp_path)
    assert str(caught.value).startswith(str(tmp_path / name))


def test_random_weights_follow_from_the_seed() -> None:
    a, b, c = ({"w": torch.empty(64, 64), "norm": torch.empty(64)} for _ in range(3))
    weights.random(a, seed=1)
    weights.random(b, seed=1)
    weights.random(c, seed=2)
    assert torch.equal(a["w"], b["w"])
    assert not torch.equal(a["w"], c["w"])
    assert a["norm"].eq(1).all()
    assert a["w"].std().item() == pytest.approx(0.02, rel=0.1)
