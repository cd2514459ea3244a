"""Commands about checkpoints: convert one, and list those that dlx knows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from dlx.cli.notices import set_logging


def convert(
    model: Annotated[Path, Parameter(help="Folder of a checkpoint, or ORG/NAME at huggingface.co.")],
    out: Annotated[Path, Parameter(help="Folder to write; it must not be there.")],
    /,
    *,
    lora: Annotated[Path | None, Parameter(help="Adapter to merge: a folder in PEFT's layout, or ORG/NAME.")] = None,
    fp8: Annotated[bool, Parameter(help="Matmul weights in fp8 (e4m3), with a scale a row.")] = False,
    shard_gb: Annotated[float, Parameter(help="Size of a file at most, in GB.")] = 5.0,
    as_json: Annotated[bool, Parameter(name="--json", help="Print the folder in a JSON object.")] = False,
    debug: Annotated[bool, Parameter(help="Log everything, and show tracebacks.")] = False,
) -> None:
    """Rewrite a checkpoint as dlx holds it: fused, with an adapter merged, or in fp8; prints the folder."""
    from dlx.errors import ConfigError
    from dlx.live import waiting

    set_logging(debug)
    if not 0.001 <= shard_gb <= 1000:
        raise ConfigError(f"shard_gb={shard_gb:g} is not allowed; use 0.001 to 1000")
    with waiting("converting"):
        from dlx.convert import convert as write
        from dlx.weights import fetched

        folder = write(fetched(model), out, None if lora is None else fetched(lora), fp8, int(shard_gb * 1e9))
    print(json.dumps({"folder": str(folder)}) if as_json else folder)


def models(*, as_json: Annotated[bool, Parameter(name="--json", help="Print one JSON object a line.")] = False) -> None:
    """List the families that dlx loads: architecture, checkpoints, default policy, status."""
    rows = known()
    if as_json:
        print("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
        return
    short = [name for name in rows[0] if name != "checkpoints"]
    wide = {name: max(len(name), *(len(row[name]) for row in rows)) for name in short}
    for row in [{name: name for name in rows[0]}, *rows]:
        print("  ".join([f"{row[name]:<{wide[name]}}" for name in short] + [row["checkpoints"]]))


def known() -> list[dict[str, str]]:
    """A row a family, from the tables of models and policies."""
    from dlx.models.families import FAMILIES

    return [
        {
            "family": facts.name,
            "architecture": arch,
            "policy": facts.policy,
            "block": str(facts.block),
            "status": f"decodes; checked with {facts.checked}",
            "checkpoints": facts.repos,
        }
        for arch, facts in FAMILIES.items()
    ]
