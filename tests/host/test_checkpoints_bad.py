"""Bad checkpoints and adapters: one line that names file and tensor, and nothing half-loaded stays in memory.

The cost of loading: every header and tensor is read a fixed number of times, and one shard at a time is mapped.
"""

from __future__ import annotations

import gc
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dlx import LLM, ModelError, terminal, weights
from dlx.live import waiting
from dlx.models.card import Place
from dlx.weights import files
from dlx.weights.hub import fetched
from tests.checkpoints import ZOO, write

QKV = "model.layers.1.self_attn.q_proj.weight"
SECOND = "model-00002-of-00003.safetensors"
Damage = Callable[[Path], None]


def opened(folder: Path, **more: Any) -> LLM:
    return LLM(folder, graphs="off", device="cpu", dtype="float32", **more)


def change(edit: Callable[[dict[str, Tensor]], object]) -> Damage:
    """Rewrite the shard that holds QKV."""

    def damage(folder: Path) -> None:
        path = folder / SECOND
        tensors = load_file(path)
        assert QKV in tensors
        edit(tensors)
        save_file(tensors, path)

    return damage


def truncated(folder: Path) -> None:
    path = folder / SECOND
    path.write_bytes(path.read_bytes()[:-100])


def pointed(name: str) -> Damage:
    """An index that names another file."""

    def damage(folder: Path) -> None:
        path = folder / weights.INDEX
        index = json.loads(path.read_text())
        index["weight_map"][QKV] = name
        (folder.parent / "outside.safetensors").write_bytes((folder / SECOND).read_bytes())
        path.write_text(json.dumps(index))

    return damage


def linked(name: str) -> Damage:
    """A file of the checkpoint that is a link out of the folder."""

    def damage(folder: Path) -> None:
        (folder / name).rename(folder.parent / name)
        (folder / name).symlink_to(folder.parent / name)

    return damage


def nested(name: str) -> Damage:
    """A file of JSON that is nested deeper than a parser goes."""

    def damage(folder: Path) -> None:
        (folder / name).write_text("[" * 200_000)

    return damage


def dangling(folder: Path) -> None:
    (folder / SECOND).unlink()
    (folder / SECOND).symlink_to("/nowhere/model.safetensors")


def template(folder: Path) -> None:
    (folder / "chat_template.jinja").symlink_to("/etc/hostname")


def pickled(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")


def put(name: str, value: Tensor | None) -> Damage:
    return change(lambda tensors: tensors.update({name: value}) if value is not None else tensors.pop(name))


BAD: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "missing": (put(QKV, None), (QKV, "is missing", weights.INDEX)),
    "extra": (put("model.layers.9.bias", torch.ones(3)), ("model.layers.9.bias is extra", SECOND)),
    "misshapen": (put(QKV, torch.ones(65, 64)), (f"{QKV} has shape [65, 64], expected [64, 64]", SECOND)),
    "integers": (put(QKV, torch.ones(64, 64, dtype=torch.int8)), (f"{QKV} has dtype I8, expected", SECOND)),
    "fp8": (put(QKV, torch.ones(64, 64).to(weights.FP8)), (f"{QKV} has dtype F8_E4M3, expected", SECOND)),
    "NaN": (put(QKV, torch.full((64, 64), torch.nan)), (f"{SECOND}: {QKV} holds NaN",)),
    "truncated": (truncated, (f"{SECOND} is truncated",)),
    "an index that climbs": (pointed("../outside.safetensors"), (weights.INDEX, "'../outside.safetensors'")),
    "a link out of the folder": (linked(SECOND), (SECOND, "is a link to", "outside of its folder")),
    "a link to nothing out of the folder": (dangling, (SECOND, "is a link to /nowhere", "outside of its folder")),
    "a tokenizer out of the folder": (linked("tokenizer.json"), ("tokenizer.json", "is a link to")),
    "a template out of the folder": (template, ("chat_template.jinja", "is a link to")),
    "a name of two lines": (put("a\n\x1b[1mb", torch.ones(3)), (SECOND, repr("a\n\x1b[1mb"), "is no name")),
    "a config without end": (nested("config.json"), ("config.json cannot be read as JSON",)),
    "an index without end": (nested(weights.INDEX), (weights.INDEX, "cannot be read as JSON")),
    "a tokenizer's config without end": (nested("tokenizer_config.json"), ("tokenizer_config.json is no JSON",)),
    "a config out of the folder": (linked("config.json"), ("config.json", "is a link to")),
    "pickles": (pickled, ("pickle weights only (pytorch_model.bin)",)),
}


def held() -> int:
    """Bytes of all tensors that Python holds; those of the meta device have none."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if type(x) in (Tensor, torch.nn.Parameter) and not x.is_meta]
    return sum({id(x): x.untyped_storage().nbytes() for x in tensors}.values())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "checkpoint", ZOO["b4"], seed=0, shards=3)


@pytest.mark.parametrize("name", BAD)
def test_a_bad_checkpoint_is_refused_in_one_line_and_leaves_nothing_in_memory(folder: Path, name: str) -> None:
    damage, words = BAD[name]
    damage(folder)
    before = held()
    with pytest.raises(ModelError) as caught:
        opened(folder, check_weights=True)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message
    assert held() < before + 50_000  # though the error's traceback holds the frames; the weights are 600 kB


def test_a_good_checkpoint_passes_the_same_check_and_is_held(folder: Path) -> None:
    before = held()
    with opened(folder, check_weights=True) as llm:
        assert held() > before + 600_000
        assert llm.card.layers == 3


def test_nan_is_looked_for_only_when_asked(folder: Path) -> None:
    BAD["NaN"][0](folder)
    opened(folder).close()


def test_code_of_a_checkpoint_is_not_executed(folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | {"auto_map": {"AutoModelForCausalLM": "modeling.Own"}}
    path.write_text(json.dumps(config))
    (folder / "modeling.py").write_text("raise SystemExit('executed')")
    opened(folder).close()


class Counted:
    """Counts what is asked of safetensors."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opens, self.reads, self.mapped, self.most = 0, 0, 0, 0
        real = files.safe_open

        def counting(path: Path, framework: str) -> Any:
            self.opens += 1
            return real(path, framework=framework)

        def reading(path: Path, shard: Any, name: str) -> Tensor:
            self.reads += 1
            return shard.get_tensor(name)

        monkeypatch.setattr(files, "safe_open", counting)
        monkeypatch.setattr("dlx.weights.parameters.read", reading)


@pytest.mark.parametrize("n", [3_000, 24_000])
def test_the_work_of_loading_is_linear_in_the_number_of_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n: int
) -> None:
    names = [f"model.layers.{i // 256}.mlp.experts.{i % 256}.gate_proj.weight" for i in range(n)]
    values = torch.arange(2 * n, dtype=torch.float32).view(n, 1, 2)
    index = {}
    for at in range(0, n, 1_000):
        part = dict(zip(names[at : at + 1_000], values[at : at + 1_000].unbind()))
        save_file(part, tmp_path / f"{at}.safetensors")
        index |= dict.fromkeys(part, f"{at}.safetensors")
    (tmp_path / weights.INDEX).write_text(json.dumps({"weight_map": index}))
    counted, params = Counted(monkeypatch), {"w": torch.zeros(n, 2)}
    weights.load(tmp_path, {name: Place("w", i, (1, 2)) for i, name in enumerate(names)}, params)
    assert torch.equal(params["w"], values[:, 0])
    assert (counted.opens, counted.reads) == (2 * n // 1_000, n)  # each header twice, each tensor once


PEAK = """
import sys, torch
from pathlib import Path
from dlx import weights
from dlx.models.card import Place
from dlx.weights import parameters

def memory(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))

kept = []
if sys.argv[3] == "all at once":
    parameters.read = lambda path, shard, name: kept.append(shard.get_tensor(name)) or kept[-1]
n, params = int(sys.argv[2]), {}
for i in range(n):
    params[f"w{i}"] = torch.ones(4, 1 << 20)
places = {f"t{i}": Place(f"w{i}", 0, (4, 1 << 20)) for i in range(n)}
Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
before = memory("VmRSS")
weights.load(sys.argv[1], places, params)
assert all(float(params[f"w{i}"][3, -1]) == i for i in range(n))
print(memory("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux resets the peak of a process")
def test_loading_takes_less_memory_beside_the_parameters_than_a_shard_and_a_fifth(tmp_path: Path) -> None:
    n, shard_bytes = 6, 16 << 20
    for i in range(n):
        save_file({f"t{i}": torch.full((4, 1 << 20), float(i))}, tmp_path / f"{i}.safetensors")
    index = {f"t{i}": f"{i}.safetensors" for i in range(n)}
    (tmp_path / weights.INDEX).write_text(json.dumps({"weight_map": index}))

    def peak(how: str) -> int:
        done = subprocess.run([sys.executable, "-c", PEAK, tmp_path, str(n), how], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    assert peak("a shard at a time") < 1.2 * shard_bytes
    assert peak("all at once") > 3 * shard_bytes  # what the measurement would show


def test_progress_is_told_when_asked(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    places = {name: Place(name, 0, stored.shape) for name, stored in weights.index(folder).items()}
    params = {name: torch.zeros(place.shape) for name, place in places.items()}
    weights.load(folder, places, params)
    assert capsys.readouterr().err == ""
    weights.load(folder, places, params, progress=True)
    assert "kB" in capsys.readouterr().err


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_bar_is_drawn_under_a_commands_spinner_and_not_over_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = {name: Place(name, 0, stored.shape) for name, stored in weights.index(folder).items()}
    params = {name: torch.zeros(place.shape) for name, place in places.items()}
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", screen := Terminal())
    terminal.stderr.cache_clear()  # what it found stderr to be when it was made
    with waiting("loading the model"):
        weights.load(folder, places, params, progress=True)
    terminal.stderr.cache_clear()
    assert re.search(r"loading the model[^\n]*\n[^\n]*kB", screen.getvalue())


class Hub:
    """huggingface.co, as the test says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, answer: Path | Exception) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []

        def download(repo: str, **how: Any) -> str:
            self.asked.append((repo, how))
            if isinstance(answer, Exception):
                raise answer
            return str(answer)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)


def test_a_repository_is_fetched_without_pickles_and_code(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(monkeypatch, folder)
    with LLM("JetLM/SDAR-test", graphs="off", device="cpu") as llm:
        assert llm.config.model == folder
    ((repo, how),) = hub.asked
    assert repo == "JetLM/SDAR-test"
    assert set(how["allow_patterns"]) == {"*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"}
    assert how["ignore_patterns"] == ["*/*"]


def test_a_folder_that_is_there_or_names_no_repository_is_not_asked_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(monkeypatch, folder)
    monkeypatch.chdir(folder.parent)
    for name in ("checkpoint", "../x/y", "one", "/a/b", "a/b/c", "~/a"):
        assert fetched(name) == Path(name).expanduser()
    Path("org/name").mkdir(parents=True)
    assert fetched("org/name") == Path("org/name")
    assert hub.asked == []


def test_without_a_network_the_way_to_fetch_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    Hub(monkeypatch, LocalEntryNotFoundError("offline"))
    with pytest.raises(ModelError) as caught:
        LLM("JetLM/SDAR-test", device="cpu")
    message = str(caught.value)
    assert message.startswith("JetLM/SDAR-test is no folder here, is not in the cache")
    assert "HF_HUB_OFFLINE=1" in message
    assert "hf download JetLM/SDAR-test --local-dir DIR" in message


@pytest.mark.parametrize(
    ("error", "words"), [(OSError("no\nroom"), "no room; try again"), (RepositoryNotFoundError, "no such repository")]
)
def test_a_download_that_fails_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch, error: Any, words: str) -> None:
    if isinstance(error, type):
        error = error("404", response=SimpleNamespace(headers={}, request=None))
    Hub(monkeypatch, error)
    with pytest.raises(ModelError, match=words) as caught:
        fetched("JetLM/SDAR-test")
    assert "\n" not in str(caught.value)
