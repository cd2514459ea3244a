"""Packs: what fits is handed to the compilers, what does not is told of once, and no answer changes."""

from __future__ import annotations

import errno
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dlx import LLM, SamplingParams, caches, cli, pack
from dlx.caches import GRAPHS
from dlx.config import Config
from dlx.environment import environment
from dlx.errors import CapacityError, ConfigError, ModelError
from dlx.graphs.policies import POLICIES
from dlx.graphs.rules import Fixed
from dlx.ops.positions import _positions
from dlx.worker import Worker

ROOT = Path(__file__).parents[2]
ENTRY = "ABCDEF"  # of Triton's cache
HELD = {
    pack.EXPORTS: b"{}",
    GRAPHS: b"graphs",
    f"triton/{ENTRY}/__grp__k.json": json.dumps({"child_paths": {"k.cubin": "k.cubin"}}).encode(),
    f"triton/{ENTRY}/k.cubin": b"cubin",
    "inductor/ab/cab.so": b"object",
}
Patch = pytest.MonkeyPatch
Logged = pytest.LogCaptureFixture


@pytest.fixture
def handed(tmp_path: Path, monkeypatch: Patch) -> list[bytes]:
    """What torch is given to load; Inductor's and Triton's caches are below tmp_path."""
    given: list[bytes] = []
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.setattr(torch.compiler, "load_cache_artifacts", lambda data: given.append(data) or True)
    return given


def worker(model: Path, policy: Any = "single_bd", **values: Any) -> Worker:
    """A worker that compiles when a graph is first run, so not here."""
    config = {"device": "cpu", "graphs": "compile", "max_num_seqs": 2, "max_model_len": 256, "load_format": "dummy"}
    return Worker(Config.from_args(model, policy, **config | values))


def packed(folder: Path, of: Worker) -> Path:
    """A pack for a worker, of files that say what they are."""
    files = {name: pack.sha256(data) for name, data in HELD.items()}
    manifest = {"schema": pack.SCHEMA, "key": pack.key(of), "files": files}
    pack.put(HELD | {pack.MANIFEST: json.dumps(manifest).encode()}, folder)
    return folder


def warnings(caplog: Logged) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def test_a_pack_that_fits_is_handed_to_the_compilers(
    nano: Path, tmp_path: Path, handed: list[bytes], caplog: Logged
) -> None:
    maker = worker(nano)
    folder = packed(tmp_path / "packs" / "one", maker)
    worker(nano, pack=folder)
    assert handed == [b"graphs"]
    assert (tmp_path / "inductor" / "ab" / "cab.so").read_bytes() == b"object"
    entry = tmp_path / "triton" / ENTRY
    assert (entry / "k.cubin").read_bytes() == b"cubin"
    assert json.loads((entry / "__grp__k.json").read_text()) == {"child_paths": {"k.cubin": str(entry / "k.cubin")}}
    assert not warnings(caplog)
    assert {p.name for p in tmp_path.rglob("*") if p.is_file()} == {*(Path(n).name for n in HELD), pack.MANIFEST}


def test_of_a_folder_of_packs_the_one_that_fits_is_taken(
    nano: Path, tmp_path: Path, handed: list[bytes], caplog: Logged
) -> None:
    packed(tmp_path / "packs" / "a", worker(nano, max_num_seqs=1))
    packed(tmp_path / "packs" / "b", worker(nano))
    packed(tmp_path / "packs" / ".half", worker(nano, max_num_seqs=4))
    worker(nano, pack=tmp_path / "packs")
    assert handed == [b"graphs"]
    assert not warnings(caplog)
    worker(nano, pack=tmp_path / "packs", max_num_seqs=4)
    (told,) = warnings(caplog)
    assert "nor do 1 more beside it" in told and "max_num_seqs 1, here 4" in told


def rewritten(**values: Any) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        path = folder / pack.MANIFEST
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return damage


def of_another(name: str, value: object) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        key = json.loads((folder / pack.MANIFEST).read_text())["key"]
        rewritten(key=key | {name: value})(folder)

    return damage


def with_exports(data: bytes) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        (folder / pack.EXPORTS).write_bytes(data)
        files = json.loads((folder / pack.MANIFEST).read_text())["files"]
        rewritten(files=files | {pack.EXPORTS: pack.sha256(data)})(folder)

    return damage


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda folder: (folder / pack.MANIFEST).write_text("{"), "Expecting"),
        (lambda folder: (folder / pack.MANIFEST).write_bytes(b"\xff\xfe\x00"), "decode"),
        (lambda folder: (folder / pack.MANIFEST).write_text("[]"), "schema"),
        (lambda folder: (folder / pack.MANIFEST).unlink(), "No such file"),
        (lambda folder: (folder / GRAPHS).unlink(), "No such file"),
        (lambda folder: (folder / GRAPHS).write_bytes(b"graphz"), "graphs.bin is damaged"),
        (lambda folder: (folder / "inductor/ab/cab.so").write_bytes(b""), "cab.so is damaged"),
        (lambda folder: (folder / pack.EXPORTS).write_bytes(b'{"a": 1}'), "exports.json is damaged"),
        (with_exports(b"[]"), "items"),
        (with_exports(b'{"a": ["x"]}'), "missing"),
        (with_exports(b'{"a": '), "Expecting"),
        (lambda folder: [path.unlink() for path in folder.rglob("*") if path.is_file()], "No such file"),
        (rewritten(schema=1), "schema 2"),
        (rewritten(files=None), "lacks a key or files"),
        (rewritten(key=[]), "lacks a key or files"),
        (rewritten(files={pack.EXPORTS: pack.sha256(b"{}"), "../x": ""}), "outside"),
        (rewritten(files={pack.EXPORTS: pack.sha256(b"{}"), "/etc/passwd": ""}), "outside"),
        (of_another("torch", "1.0"), f"torch 1.0, here {torch.__version__}"),
        (of_another("triton", "1.0"), "triton 1.0"),
        (of_another("dlx", "0.0"), "dlx 0.0"),
        (of_another("code", "0"), "code 0"),
        (of_another("machine", "NVIDIA A100"), "machine NVIDIA A100, here cpu"),
        (of_another("more", 1), "more 1, here None"),
    ],
)
def test_a_pack_that_is_damaged_or_foreign_is_told_of_once_and_passed_over(
    nano: Path,
    tmp_path: Path,
    handed: list[bytes],
    caplog: Logged,
    damage: Callable[[Path], object],
    told: str,
) -> None:
    folder = packed(tmp_path / "packs" / "one", worker(nano))
    damage(folder)
    worker(nano, pack=folder)
    (warning,) = warnings(caplog)
    assert told in warning and str(folder) in warning
    assert not handed
    assert not (tmp_path / "inductor").exists() and not (tmp_path / "triton").exists()


def test_graphs_that_torch_cannot_load_are_told_of(
    nano: Path, tmp_path: Path, handed: list[bytes], caplog: Logged, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(torch.compiler, "load_cache_artifacts", lambda data: None)
    worker(nano, pack=packed(tmp_path / "one", worker(nano)))
    (told,) = warnings(caplog)
    assert "graphs.bin cannot be loaded" in told


@pytest.mark.parametrize(
    "values",
    [
        {"max_num_seqs": 1},
        {"max_model_len": 128},
        {"page_size": 32},
        {"num_pages": 5},
        {"dtype": "bfloat16"},
        {"kv_cache_dtype": "fp8"},
        {"forwards": 4},
        {"policy": "multi_bd"},
        {"policy": replace(POLICIES["single_bd"], select=Fixed(2))},
    ],
    ids=str,
)
def test_what_the_graphs_depend_on_is_in_the_key(nano: Path, values: dict[str, Any]) -> None:
    assert pack.differences(pack.key(worker(nano)), pack.key(worker(nano, **values)))


def test_what_they_do_not_depend_on_is_not(nano: Path, tmp_path: Path) -> None:
    plain = pack.key(worker(nano))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.symlink_to(nano)
    assert plain == json.loads(json.dumps(plain))
    assert not pack.differences(plain, pack.key(worker(elsewhere, seed=5, unroll=True)))


def test_the_hash_of_the_code_follows_the_recorded_launch_configurations(tmp_path: Path, monkeypatch: Patch) -> None:
    before = pack.code()
    monkeypatch.setattr(pack.tuned, "folder", lambda: tmp_path)
    nothing = pack.code()
    (tmp_path / "attention.json").write_text("{}")
    assert pack.code() != nothing
    monkeypatch.undo()
    assert pack.code() == before


def test_an_eager_engine_reads_no_pack(nano: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(pack, "load", lambda *_: pytest.fail("read"))
    with LLM(nano, graphs="off", device="cpu", pack=tmp_path) as llm:
        assert llm.generate([5], SamplingParams(max_tokens=1))[0].tokens == 1


def test_the_environment_names_a_pack_unless_the_argument_does(monkeypatch: Patch) -> None:
    monkeypatch.delenv("DLX_PACK", raising=False)
    assert Config.from_args(device="cpu").pack is None
    monkeypatch.setenv("DLX_PACK", "there")
    assert environment().pack == Path("there")
    assert Config.from_args(device="cpu").pack == Path("there")
    assert Config.from_args(device="cpu", pack="here").pack == Path("here")
    monkeypatch.setenv("DLX_PACK", "")
    assert environment().pack is None
    with pytest.raises(ConfigError, match="pack=5"):
        Config.from_args(device="cpu", pack=5)


def test_a_pack_takes_the_place_of_one_before(nano: Path, tmp_path: Path) -> None:
    folder = packed(tmp_path / "one", worker(nano))
    (folder / "old").write_text("")
    packed(folder, worker(nano))
    assert not (folder / "old").exists()
    assert {p.name for p in tmp_path.iterdir()} == {"one"}


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.ENOSPC, CapacityError), (errno.EDQUOT, CapacityError), (errno.EROFS, ConfigError)]
)
def test_a_pack_that_cannot_be_written_leaves_nothing(
    tmp_path: Path, monkeypatch: Patch, number: int, kind: type[Exception]
) -> None:
    def full(self: Path, data: bytes) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(kind, match="out="):
        pack.put(HELD, tmp_path / "one")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("values", "buckets", "kind", "told"),
    [
        ({"graphs": "off"}, {}, ConfigError, "graphs='off' compiles nothing"),
        ({}, {"rows": [3]}, ConfigError, "a bucket of 3 passes max_num_seqs=2; use some of 1, 2, or raise it"),
        ({"max_num_seqs": 4}, {"rows": [3]}, ConfigError, "no bucket of 3; use some of 1, 2, 4"),
        ({}, {"tokens": [63]}, ConfigError, "no bucket of 63; use some of 64, 256"),
        ({"model": Path("nowhere")}, {}, ModelError, "nowhere"),
    ],
)
def test_what_cannot_be_packed_is_refused(
    nano: Path, tmp_path: Path, values: dict[str, Any], buckets: dict[str, Any], kind: type[Exception], told: str
) -> None:
    base = {"model": nano, "device": "cpu", "graphs": "compile", "max_num_seqs": 2, "max_model_len": 256}
    with pytest.raises(kind, match=told):
        pack.make(Config.from_args(**base | values), tmp_path, **buckets)
    assert not list(tmp_path.iterdir())


def test_a_shape_is_enough_where_only_the_shape_is_asked_for(nano: Path, tmp_path: Path) -> None:
    shape = tmp_path / "shape"
    shape.mkdir()
    (shape / "config.json").write_bytes((nano / "config.json").read_bytes())
    base = {"device": "cpu", "graphs": "compile", "max_num_seqs": 2}
    with pytest.raises(ConfigError, match="a bucket of 3 passes"):  # so the worker is built
        pack.make(Config.from_args(shape, load_format="dummy", **base), tmp_path, rows=[3])
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        pack.make(Config.from_args(shape, **base), tmp_path, rows=[3])


@pytest.mark.parametrize("forwards", [1, 3])
def test_graphs_are_prepared_the_largest_first_and_touch_nothing(nano: Path, forwards: int) -> None:
    w = worker(nano, graphs="off", forwards=forwards)
    for pages in w.kv:
        pages.normal_()
    before = [t.clone() for t in (*w.kv, *w.buf[:-1])]
    w.prepare([1, 2], [64])
    assert list(w.graphs._run) == [("prefill", 64), ("step", 2), ("step", 1)]
    assert all(torch.equal(a, b) for a, b in zip(before, (*w.kv, *w.buf[:-1]), strict=True))


def test_the_command_says_what_is_to_be_packed(
    nano: Path, tmp_path: Path, monkeypatch: Patch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(pack, "make", lambda *args: asked.append(args) or tmp_path / "one")
    line = "--shape-only --rows 1 --rows 2 --policy multi_bd --device cpu --max-num-seqs 4 --forwards 2"
    assert cli.main(["pack", str(nano), *line.split(), "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'one'}\n"
    ((config, out, rows, tokens, _),) = asked
    assert (config.graphs, config.load_format, config.policy) == ("compile", "dummy", POLICIES["multi_bd"])
    assert (config.max_num_seqs, config.forwards, out, rows, tokens) == (4, 2, tmp_path, [1, 2], ())
    assert cli.main(["pack", str(nano), "--rows", "many"]) == 2
    assert cli.main(["pack", "no/such/folder", "--graphs", "capture", "--device", "cpu"]) == 2
    monkeypatch.undo()
    assert cli.main(["pack", "no/such/folder", "--device", "cpu"]) == 3


def test_a_process_that_has_run_kernels_is_refused(nano: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setitem(_positions.device_caches, 0, ({}, {}, None, None, None))
    with pytest.raises(ConfigError, match="in one of its own"):
        pack.make(Config.from_args(nano, graphs="compile", device="cpu"), tmp_path)


def test_an_entry_of_tritons_cache_serves_in_another_place(tmp_path: Path, monkeypatch: Patch) -> None:
    names = ("start_ptr", "open_ptr", "given_ptr", "pos_ptr", "seen_ptr", "C", "L")
    sizes = {"BLOCK": 128, "GIVEN": True, "PDL": True}
    signature = {name: "*i32" if name.endswith("_ptr") else "i32" for name in names}
    source = ASTSource(_positions, signature | dict.fromkeys(sizes, "constexpr"), sizes)
    hits: list[bool] = []
    monkeypatch.setattr(knobs.compilation, "listener", lambda **seen: hits.append(seen["cache_hit"]))
    monkeypatch.setattr(torch.compiler, "save_cache_artifacts", lambda: (b"graphs", None))
    monkeypatch.setattr(torch.compiler, "load_cache_artifacts", lambda data: True)

    def build() -> bytes:
        return triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]

    (tmp_path / "cold").mkdir()
    with caches.empty(tmp_path / "cold"):
        cubin = build()
    files = caches.collected(tmp_path / "cold")
    assert cubin in files.values()
    assert not [name for name, data in files.items() if str(tmp_path).encode() in data and name.endswith(".json")]
    (tmp_path / "packed").mkdir()
    with caches.empty(tmp_path / "packed"):
        caches.fill(files, torch.device("cpu"))
        assert build() == cubin
    assert hits == [False, True]


def test_what_is_in_a_cache_stays(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "x.so"
    caches.write(path, b"first")
    caches.write(path, b"second")
    assert path.read_bytes() == b"first"
    assert list(path.parent.iterdir()) == [path]


ANSWER = """
import json, logging, sys
import torch
torch.set_num_threads(1)
from dlx import LLM, SamplingParams
logging.basicConfig()
model, packs, how = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
answers, params = [], [SamplingParams(max_tokens=40, ignore_eos=True, temperature=t, seed=3) for t in (0.0, 0.8)]
for more in ({"pack": packs}, {"graphs": sys.argv[4]}):
    with LLM(model, **how | more) as llm:
        said = llm.generate([list(range(40, 140)), list(range(60, 160))], params)
    answers.append([(one.token_ids, one.prefill_forwards) for one in said])
    if "pack" in more:
        compilers = [name for name in ("torch._dynamo", "torch._inductor") if name in sys.modules]
print(json.dumps([*answers, compilers]))
"""


def process(place: Path, *args: str) -> str:
    """What a process prints whose compilers' caches are in a new folder; dlx warns of nothing."""
    folders = {"TORCHINDUCTOR_CACHE_DIR": str(place), "TRITON_CACHE_DIR": str(place / "t")}
    done = subprocess.run([sys.executable, *args], capture_output=True, text=True, cwd=ROOT, env=os.environ | folders)
    assert done.returncode == 0 and "WARNING:dlx" not in done.stderr, done.stderr
    return done.stdout


def start(model: Path, place: Path, how: dict[str, Any], other: str) -> tuple[Path, list[Any]]:
    """A pack of one prefill of 256 and a step; what a start from it answers, then one without that runs its graphs so,
    and which compilers the first had imported."""
    line = [word for name, value in how.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    what = "-m", "dlx.cli", "pack", str(model), *line, "--rows", "2", "--tokens", "256", "--out", str(place / "packs")
    (folder,) = map(Path, process(place / "cold", *what).split())
    said = process(place / "new", "-c", ANSWER, str(model), str(place / "packs"), json.dumps(how), other)
    return folder, json.loads(said)


@pytest.mark.slow
def test_a_packed_start_compiles_nothing_and_answers_the_same(nano: Path, tmp_path: Path) -> None:
    how = {"graphs": "compile", "device": "cpu", "max_num_seqs": 2, "max_model_len": 256, "forwards": 3}
    folder, (packed, eager, compilers) = start(nano, tmp_path, how, "off")
    assert folder.parent == tmp_path / "packs"
    assert not list((tmp_path / "cold").rglob("*.so"))  # the caches of the user were not touched
    manifest = json.loads((folder / pack.MANIFEST).read_text())
    assert manifest["graphs"] == {"rows": [2], "tokens": [256]}
    assert manifest["made"]["command"].startswith("dlx pack ")
    assert GRAPHS not in manifest["files"]  # all is exported: a prompt's layer and the parts of a loop too
    assert [prefills for _, prefills in packed] == [1, 1]
    assert packed == eager
    assert not compilers
    assert not (tmp_path / "new").exists()
