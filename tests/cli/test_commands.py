"""What commands hand on to the parts that they are doors to."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dlx import doctor
from dlx.bench.arguments import SHAPES
from dlx.cli import main
from dlx.config import Config
from dlx.errors import CapacityError
from dlx.harness.options import Options as Evaluation
from dlx.request import SamplingParams
from dlx.serve.options import Options

ROOT = Path(__file__).parents[2]
Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch


@pytest.fixture
def served(monkeypatch: Patch) -> list[tuple[Config, Options]]:
    """What the server was started with."""
    calls: list[tuple[Config, Options]] = []
    monkeypatch.setattr("dlx.serve.run.serve", lambda config, options, told: calls.append((config, options)) or 7)
    return calls


@pytest.fixture
def evaluated(monkeypatch: Patch) -> list[Evaluation]:
    """What was evaluated."""
    calls: list[Evaluation] = []
    monkeypatch.setattr("dlx.harness.run.evaluation", lambda options, *_, **__: calls.append(options) or {})
    monkeypatch.setattr("dlx.harness.run.table", lambda results: "table")
    return calls


def test_serve_hands_on_its_settings_and_gives_back_the_servers_code(
    served: list[tuple[Config, Options]], nano: Path, tmp_path: Path
) -> None:
    (tmp_path / "s.yaml").write_text("max_num_seqs: 3\nserve: {max_n: 2, served_model_name: [a, b]}\n")
    args = ["--device", "cpu", "--port", "0", "--config", str(tmp_path / "s.yaml"), "--timeout-s", "5"]
    assert main(["serve", str(nano), *args]) == 7
    ((config, options),) = served
    assert (config.model, config.max_num_seqs, config.device) == (nano, 3, "cpu")
    assert options == Options(port=0, max_n=2, served_model_name=("a", "b"), timeout_s=5.0)


def test_serve_without_its_extra_says_how_to_install_it() -> None:
    code = "import sys; sys.modules['fastapi'] = None\nfrom dlx.cli import main\nsys.exit(main(['serve']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: dlx serve needs fastapi, which is not installed; run pip install 'dlx[serve]'\n"


def test_eval_hands_on_its_options_settings_and_sampling(evaluated: list[Evaluation], capsys: Capture) -> None:
    args = (
        "--tasks tiny_gsm,tiny_add2 --limit 4 --data gsm8k=a.jsonl --no-chat --max-nfe 9 --device cpu --dtype float32"
    )
    assert main(["eval", "some/folder", *args.split()]) == 0
    assert capsys.readouterr().out == "table\n"
    assert evaluated == [
        Evaluation(
            tasks=("tiny_gsm", "tiny_add2"),
            limit=4,
            data={"gsm8k": Path("a.jsonl")},
            chat=False,
            llm={"max_num_seqs": 32, "model": Path("some/folder"), "device": "cpu", "dtype": "float32"},
            params={"max_nfe": 9},
        )
    ]


def test_flags_of_eval_go_before_its_run_file(evaluated: list[Evaluation], tmp_path: Path) -> None:
    run = tmp_path / "run.yaml"
    run.write_text(
        "engine: {max_num_reqs: 2, page_size: 32}\neval: {dataset_limit: 3, max_tokens: 5, temperature: 0.5}\n"
    )
    assert main(["eval", "--config", str(run), "--limit", "1", "--max-tokens", "6", "--page-size", "64"]) == 0
    (options,) = evaluated
    assert (options.limit, options.params) == (1, {"max_tokens": 6, "temperature": 0.5})
    assert options.llm == {"max_num_seqs": 2, "page_size": 64}


def test_shapes_are_listed(capsys: Capture) -> None:
    assert main(["bench", "shapes", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == sorted(path.stem for path in SHAPES.glob("*.json"))


def test_a_measurement_is_printed_and_written(capsys: Capture, tmp_path: Path) -> None:
    args = "bench latency --shape nano --block 16 --context 64 --device cpu --graphs off --steps 2 --json --out"
    assert main([*args.split(), str(tmp_path / "record.json")]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["what"] == "latency"
    assert json.loads((tmp_path / "record.json").read_text()) == record


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("bench latency --shape llada-9b", "known shapes are"),
        ("bench latency --shape nano --requests 0", "--requests 0"),
        ("bench startup --shape nano --buckets 1,x", "'1,x' is not allowed; write integers"),
        ("bench latency --shape nano --kv-cache-dtype fp4", "--kv-cache-dtype"),
        ("tune --op nothing", "--op nothing is unknown; use one of linear"),
        ("tune --shape nothing", "--shape nothing is unknown"),
        ("tune", "tuned on a GPU"),
        ("tune --block 32", "tuned on a GPU"),
        ("tune --block 32 --rows 8", "--rows 8 does not suit --block 32"),
        ("convert a b --shard-gb 0", "shard_gb=0"),
    ],
)
def test_what_cannot_be_done_is_a_usage_error(line: str, named: str, capsys: Capture, monkeypatch: Patch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(line.split()) == 2
    assert named in capsys.readouterr().err


def test_versions_as_json(capsys: Capture) -> None:
    assert main(["version", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["torch"] == torch.__version__


@pytest.fixture
def gpus(monkeypatch: Patch) -> Callable[..., None]:
    """Pretend that there are GPUs of a capability."""

    def there(n: int, capability: tuple[int, int] = (9, 0)) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: n > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: n)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        monkeypatch.setattr(doctor, "driver", lambda: "550.1")
        monkeypatch.setattr(doctor, "choose_threads", lambda: None)

    return there


@pytest.mark.parametrize(
    ("n", "capability", "device", "named"),
    [
        (0, (9, 0), "cuda", ["device='cuda'", f"torch {torch.__version__}", "driver 550.1", "--device cpu"]),
        (0, (9, 0), "cuda:1", ["device='cuda:1'", "driver 550.1"]),
        (1, (9, 0), "cuda:1", ["device='cuda:1'", "among the 1 there are"]),
        (1, (7, 5), "cuda", ["cuda is sm_75", "needs sm_80 or newer"]),
        (1, (7, 5), None, ["cuda is sm_75", "--device cpu"]),
    ],
)
def test_a_device_that_will_not_do_is_told_with_the_versions(
    gpus: Callable[..., None], n: int, capability: tuple[int, int], device: str | None, named: list[str]
) -> None:
    gpus(n, capability)
    with pytest.raises(CapacityError) as caught:
        doctor.settle(device)
    assert [part for part in named if part not in str(caught.value)] == []


@pytest.mark.parametrize(("n", "device"), [(2, "cuda:1"), (1, None), (1, "cpu"), (0, None), (0, "cpu")])
def test_a_device_that_will_do_is_taken(gpus: Callable[..., None], n: int, device: str | None) -> None:
    gpus(n)
    doctor.settle(device)


def test_sampling_parameters_of_the_file_and_of_flags_meet(tmp_path: Path, monkeypatch: Patch) -> None:
    from dlx.cli.flags import Call, More, asked

    monkeypatch.setenv("DLX_TOP_K", "5")
    (tmp_path / "s.yaml").write_text("sampling: {threshold: 0.5, top_k: 4, stop: [x]}\n")
    found: Any = asked(Call(tmp_path / "s.yaml"), sampling=More({"threshold": 0.7}))
    assert found.sampling == SamplingParams(threshold=0.7, top_k=5, stop=("x",))
