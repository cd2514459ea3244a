"""What dlx makes public, and what importing it costs."""

from __future__ import annotations

import subprocess
import sys

import pytest

import dlx
from dlx import errors

PUBLIC = {
    "LLM",
    "AsyncEngine",
    "DecodeSession",
    "BusyError",
    "SamplingParams",
    "Output",
    "Chunk",
    "Policy",
    "DlxError",
    "ConfigError",
    "PolicyError",
    "ModelError",
    "ShapeError",
    "CapacityError",
    "RequestError",
    "EngineError",
    "__version__",
}


def loaded_after(statement: str) -> set[str]:
    """Modules that a fresh interpreter holds after a statement."""
    code = f"import sys; {statement}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_the_public_names_are_exactly_these() -> None:
    assert set(dlx.__all__) == PUBLIC
    assert set(dir(dlx)) == PUBLIC


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_every_public_name_resolves_to_what_bears_it(name: str) -> None:
    value = getattr(dlx, name)
    assert name == "__version__" or value.__name__ == name


def test_a_name_that_is_not_public_is_refused_with_those_that_are() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'Engine'; its public names are LLM, "):
        _ = dlx.Engine  # type: ignore[attr-defined]


def test_every_deliberate_error_is_public_and_under_one_root() -> None:
    tree = {name: value for name, value in vars(errors).items() if isinstance(value, type)}
    assert set(tree) <= PUBLIC
    assert all(issubclass(error, dlx.DlxError) for error in tree.values())


def test_importing_dlx_imports_none_of_its_heavy_dependencies() -> None:
    heavy = {"torch", "transformers", "triton", "tokenizers", "numpy"}
    assert not heavy & loaded_after("import dlx; dlx.SamplingParams; dlx.RequestError")


def test_the_eager_path_starts_without_the_compiler_and_without_transformers() -> None:
    llm = 'dlx.LLM("tests/data/nano", device="cpu", graphs="off", dtype="float32")'
    loaded = loaded_after(f"import dlx; {llm}.generate('1 + 1', dlx.SamplingParams(max_tokens=4))")
    assert not {"transformers", "torch._dynamo", "torch._inductor"} & loaded
