"""How long until the graphs asked for can be replayed: cold, and from a pack that another process has written.

Each is measured in a process of its own, whose Inductor and Triton caches are empty folders. Weights are left out of
the sum and stated beside it: how they are read is a matter of the disk.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dlx.bench.forward import SCHEMA
from dlx.bench.scene import How, Scene
from dlx.environment import inherited
from dlx.errors import ConfigError, EngineError
from dlx.provenance import provenance

STARTS = ("cold", "packed")
CACHES = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
TAIL = 2000  # characters of a failed process's last words


def startup(
    scene: Scene, how: How, buckets: Sequence[int], prefill_tokens: int, policy: str, command: str,
    starts: Sequence[str] = STARTS, pack: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """One record: seconds from the start of a process until its graphs are ready, weights apart.

    buckets         rows of the steps
    prefill_tokens  of the one prefill graph; 0 is none
    starts          which are measured
    pack            a pack that is there already, or a folder of packs; None writes one
    """
    if not buckets or min(buckets) < 1:
        raise ConfigError(f"buckets {list(buckets)} are not allowed; name rows of a step, such as 1,8,32")
    asked = {
        "scene": [str(scene.shape.absolute()), *scene[1:]],
        "how": list(how),
        "buckets": sorted(set(buckets)),
        "prefill_tokens": prefill_tokens,
        "policy": policy,
        "command": command,
    }
    done: dict[str, dict[str, Any] | None] = dict.fromkeys(STARTS)
    with tempfile.TemporaryDirectory() as folder:
        room = Path(folder)
        if "cold" in starts:
            done["cold"] = measured(asked, room / "cold")
        if "packed" in starts:
            if pack is None:
                pack = room / "packs"
                measured(asked | {"write": str(pack)}, room / "packing")
            done["packed"] = measured(asked | {"read": str(pack.absolute())}, room / "packed")
    one = next(run for run in done.values() if run)
    return {
        "schema": SCHEMA,
        "what": "startup",
        "scene": {"shape": scene.describe()["shape"], "block": scene.block},
        "policy": policy,
        "graphs": one["graphs"],
        "loop": {"forwards": how.forwards},
        "buckets": asked["buckets"],
        "prefill_tokens": prefill_tokens,
        **done,
        "made": provenance(command, one["device"]),
    }


def measured(asked: dict[str, Any], caches: Path) -> dict[str, Any]:
    """What `child` reports from a process whose compilers' caches are new folders."""
    folders = {name: str(caches / kind) for name, kind in CACHES.items()}
    env = inherited("DLX_PACK", **folders)
    return in_process("from dlx.bench.start import child; child()", asked | {"began": time.time()}, env)


def in_process(code: str, asked: Mapping[str, Any], env: Mapping[str, str]) -> dict[str, Any]:
    """The JSON that code prints last in a process of its own, whose argument is `asked`. Raises EngineError."""
    env = {**env, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(asked)], env=env, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise EngineError(f"the process that was measured failed: {done.stderr.strip()[-TAIL:]}")
    sys.stderr.write(done.stderr)  # warnings: what was not packed, or is compiled all the same, and why
    return json.loads(done.stdout.splitlines()[-1])


def child() -> None:
    """Make the graphs that the command line asks for, or a pack of them; print how long each stage took."""
    asked = json.loads(sys.argv[1])
    import torch

    from dlx.bench.clock import wait
    from dlx.config import bind, buckets
    from dlx.graphs.policies import named
    from dlx.graphs.shapes import bucket
    from dlx.worker import Worker

    imports_s = time.time() - asked["began"]
    scene, how = Scene(Path(asked["scene"][0]), *asked["scene"][1:]), How(*asked["how"])
    device_s = seconds(lambda: torch.zeros(1, device=how.device or ("cuda" if torch.cuda.is_available() else "cpu")))
    with tempfile.TemporaryDirectory() as folder:
        scene.files(Path(folder))
        rows, most = asked["buckets"], max(asked["prefill_tokens"], scene.block) + 4 * scene.block
        config = scene.config(Path(folder), how, most, named(asked["policy"]), rows[-1])
        sizes = buckets(config, card := scene.card(), bind(config.policy, card, config.block_length))
        rows = sorted({bucket(sizes.rows, n) for n in rows}, reverse=True)
        tokens = [bucket(sizes.tokens, asked["prefill_tokens"])] if asked["prefill_tokens"] else []
        if "write" in asked:
            from dlx import pack

            pack.make(config, Path(asked["write"]), rows, tokens, asked["command"])
            print(json.dumps({}))
            return
        began = time.monotonic()
        worker = Worker(config)
        wait(worker.device)
        weights_s = time.monotonic() - began
    pack_s = None
    if "read" in asked:
        began = time.monotonic()
        from dlx import pack

        if not pack.load(Path(asked["read"]), worker):
            raise ConfigError(f"the pack {asked['read']} does not fit this start; write one for it")
        pack_s = time.monotonic() - began
    graphs_s = {f"prefill {T}": seconds(lambda T=T: worker.prepare([], [T])) for T in tokens}
    graphs_s |= {f"step {B}": seconds(lambda B=B: worker.prepare([B], [])) for B in rows}
    wait(worker.device)
    ready_s = time.time() - asked["began"] - weights_s
    stages = {"imports_s": imports_s, "device_s": device_s, "pack_s": pack_s, "graphs_s": graphs_s}
    print(json.dumps({"ready_s": ready_s, **stages, "weights_s": weights_s, "graphs": config.graphs,
                      "device": config.device}))  # fmt: skip


def seconds(fn: Callable[[], object]) -> float:
    """Of one call."""
    began = time.monotonic()
    fn()
    return time.monotonic() - began
