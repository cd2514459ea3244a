"""One field, written once: what a setting is called, what it says of itself, and what its module costs."""

from __future__ import annotations

import subprocess
import sys

import pytest

from dlx.config import Config
from dlx.settings import Settings


def test_a_configuration_has_the_fields_of_the_settings_and_no_other() -> None:
    assert list(Config.model_fields) == list(Settings.model_fields)


@pytest.mark.parametrize("name", Settings.model_fields)
def test_every_setting_describes_itself(name: str) -> None:
    assert Settings.model_fields[name].description


def test_settings_without_torch() -> None:
    code = "import sys, dlx.settings; print({'torch', 'transformers', 'cyclopts'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_what_was_given_is_what_a_configuration_is_built_with() -> None:
    settings = Settings(max_num_seqs=3, device="cpu", graphs=None)
    assert settings.given() == {"device": "cpu", "graphs": None, "max_num_seqs": 3}
    assert Config.from_args(**settings.given()).max_num_seqs == 3
