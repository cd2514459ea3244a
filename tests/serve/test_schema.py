"""schemathesis sends what the server's description allows and what it forbids: no 5xx, no answer of another shape.

Case 18 of docs/faults.md; the five minutes of it are `long`.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dlx.async_engine import AsyncEngine
from dlx.config import Config
from tests.serve.served import Served

# a body of wrong fields that is too large is refused for its size
SETTINGS = """
[checks.negative_data_rejection]
expected-statuses = [400, 401, 404, 405, 413, 415]
"""
# what a schema allows may be refused all the same: a prompt that is too long, a text for a model without filters
LEFT_OUT = "positive_data_acceptance"
SHORT = ["--phases", "fuzzing", "--max-examples", "15", "--generation-deterministic"]
FIVE_MINUTES = ["--max-time", "300"]


@pytest.mark.parametrize(
    "phases",
    [
        pytest.param(SHORT, marks=pytest.mark.slow, id="short"),
        pytest.param(FIVE_MINUTES, marks=[pytest.mark.long, pytest.mark.timeout(900)], id="five minutes"),
    ],
)
def test_no_request_that_can_be_made_up_is_a_server_error(nano: Path, tmp_path: Path, phases: list[str]) -> None:
    settings = tmp_path / "schemathesis.toml"
    settings.write_text(SETTINGS)
    program = [sys.executable, "-c", "import sys; from schemathesis.cli import schemathesis; sys.exit(schemathesis())"]
    engine = AsyncEngine(Config.from_args(nano, graphs="off", device="cpu", max_num_seqs=8, max_model_len=32))
    with Served(engine) as served:
        described = [
            f"{served.url}/openapi.json",
            "--exclude-checks",
            LEFT_OUT,
            "--request-timeout",
            "60",
            "--no-color",
        ]
        command = [*program, "--config-file", str(settings), "run", *described, *phases]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
        assert served.client.get("/health").status_code == 200
        stats = served.inside(engine.stats)
    assert (stats.running, stats.waiting, stats.pages_used) == (0, 0, 0)
