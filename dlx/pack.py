"""Packs: what the compilers made of a model's graphs, kept in a folder, so that the next start does not compile.

    <out>/<machine>--<model>--<policy>--<hash of the key>/
        manifest.json   schema, key, graphs (buckets that were made), files (name → sha256), seconds it took, made
        exports.json    graphs that need no compiler: Inductor's generated source, and the kernels that it calls
        triton/         entries of Triton's cache: the cubin of every kernel that ran, launchers
        inductor/       shared objects that Inductor built for a CPU
        graphs.bin      Inductor's artefacts, as torch.compiler.save_cache_artifacts gives them, where a graph could
                        not be exported

A pack makes a start faster and changes nothing else: graphs are looked up by what they are made of, and what cannot be
seen there of dlx is in the key. One that is damaged or does not fit is told of and passed over. It holds source,
machine code and, as graphs.bin, pickles: load only what you would run.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import sys
import sysconfig
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import torch
import triton

import dlx
from dlx.caches import TRITON, Files, collected, empty, fill, kernels
from dlx.config import Config
from dlx.errors import CapacityError, ConfigError
from dlx.exports import Export, Exports
from dlx.graphs.policies import POLICIES
from dlx.models.decoder import Decoder
from dlx.ops import tuned
from dlx.provenance import provenance, slug
from dlx.tokenizer import FILE, Tokenizer
from dlx.weights import read_config

if TYPE_CHECKING:
    from dlx.recorder import Recorder
    from dlx.worker import Worker

log = logging.getLogger(__name__)

SCHEMA = 2
MANIFEST, EXPORTS = "manifest.json", "exports.json"
TRACED = ("graphs", "models", "ops")  # folders whose code the graphs are made of
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
SHOWN = 3  # differences that one message names

Key = dict[str, Any]


def make(config: Config, out: Path, rows: Sequence[int] = (), tokens: Sequence[int] = (), command: str = "") -> Path:
    """Build a model's graphs with empty caches and keep what the compilers wrote; the folder of the pack.

    In a process that has run no kernel yet: one that is in memory leaves no file.

    rows, tokens  buckets of the step and of the prefill; none is all
    Raises ConfigError    graphs="off"; kernels have run; no such bucket; `out` cannot be written
           CapacityError  no room for the pack
    """
    from dlx.recorder import Recorder
    from dlx.worker import Worker

    if config.graphs == "off":
        raise ConfigError("graphs='off' compiles nothing that could be packed; use graphs='compile' or 'capture'")
    if any(kernel.device_caches for kernel in kernels()):
        raise ConfigError("this process has run kernels, which leave no file a second time; pack in one of its own")
    config = config.local()
    read_config(config.model)  # first, for the plainer word on a folder that is not there
    named = config.load_format != "dummy" or (config.model / FILE).is_file()
    vocab = Tokenizer.load(config.model).size if named else None
    with tempfile.TemporaryDirectory(prefix="dlx-pack-", ignore_cleanup_errors=True) as folder, empty(Path(folder)):
        worker = Worker(config.model_copy(update={"pack": None}), vocab)  # to size its pages it may run kernels
        buckets = {
            "rows": chosen(rows, worker.shapes.rows, "max_num_seqs"), "tokens": chosen(tokens, worker.shapes.tokens)
        }  # fmt: skip
        recorder = Recorder()
        compile_by(worker, recorder)
        began = time.monotonic()
        worker.prepare(**buckets)
        took_s = time.monotonic() - began
        files = collected(Path(folder), artefacts=recorder.left_out > 0)
        if not recorder.left_out:  # without what Inductor alone would read
            used = {facts["file"] for export in recorder.exports.values() for facts in export.kernels.values()}
            entries = {PurePosixPath(name).parent for name in used}
            own = {name for name in files if name.startswith(TRITON) and PurePosixPath(name).parent not in entries}
            files = {name: files[name] for name in used | own}
        files[EXPORTS] = json.dumps(recorder.exports).encode()
    facts = key(worker)
    manifest = {
        "schema": SCHEMA,
        "key": facts,
        "graphs": buckets,
        "files": {name: sha256(data) for name, data in files.items()},
        "cold_s": round(took_s, 3),
        "made": provenance(command, config.device),
    }
    target = out.expanduser() / title(config, facts)
    put(files | {MANIFEST: json.dumps(manifest, indent=1).encode() + b"\n"}, target)
    return target


def load(path: Path, worker: Worker) -> bool:
    """Give the compilers what a pack holds, before they are asked; whether there was one that fits.

    path  a pack, or a folder of packs
    """
    path = path.expanduser()
    within = [each.parent for each in sorted(path.glob(f"[!.]*/{MANIFEST}"))]
    wanted, faults = key(worker), []
    for folder in [path] if (path / MANIFEST).is_file() or not within else within:
        try:
            files = read(folder, wanted)
            exports = {name: Export(*values) for name, values in json.loads(files[EXPORTS]).items()}
            fill(files, worker.device)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            faults.append(f"{folder}: {error}")
        else:
            compile_by(worker, Exports(exports, folder.absolute()))
            log.info("graphs come from the pack %s", folder)
            return True
    more = f", nor do {len(faults) - 1} more beside it" if len(faults) > 1 else ""
    log.warning("graphs are compiled, for this pack does not serve%s: %s", more, faults[0])
    return False


def compile_by(worker: Worker, compiler: Exports | Recorder) -> None:
    worker.graphs.compiled = compiler.graph
    if isinstance(worker.net, Decoder):
        worker.net.layer = compiler.layer


def key(worker: Worker) -> Key:
    """All that decides what the compilers make of a worker's graphs, as JSON gives it back."""
    config, shapes = worker.config, worker.shapes
    adapted = [(name, x) for name, x in worker.net.named_buffers() if ".adapters." in name]
    facts = {
        "machine": machine(worker.device),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "python": sysconfig.get_config_var("SOABI") or sys.version.split()[0],
        "dlx": dlx.__version__,
        "code": code(),
        "card": asdict(worker.card),
        "ids": worker.ids._asdict(),
        "dtype": config.dtype,
        "policy": worker.policy.describe(),
        "max_num_seqs": config.max_num_seqs,
        "forwards": config.forwards,
        "adapters": sorted({f"{n.split('.', 2)[2]} {tuple(x.shape)}" for n, x in adapted}),
        "kv_dtype": str(config.kv_dtype),
        "torch's settings": [str(torch.get_default_dtype()), torch.are_deterministic_algorithms_enabled()],
        "pages": {"num_pages": worker.num_pages, "page_size": shapes.S, "of a row": shapes.W},
    }
    return json.loads(json.dumps(facts))


def machine(device: torch.device) -> str:
    """What compiled code depends on: a GPU and its architecture, or a CPU's instructions and torch's threads."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"{torch.cuda.get_device_name(device)}, sm_{major}{minor}"
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.is_file() else []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return (
        f"cpu, {torch.get_num_threads()} threads, instructions {sha256(' '.join(sorted(flags.split())).encode())[:8]}"
    )


def code() -> str:
    """A hash of the traced code and of the recorded launch configurations: what an opaque op hides."""
    package = Path(dlx.__file__).parent
    parts = [path for folder in TRACED for path in sorted((package / folder).rglob("*.py"))]
    parts += sorted(tuned.folder().rglob("*.json"))
    return sha256(b"".join(path.name.encode() + b"\0" + path.read_bytes() + b"\0" for path in parts))


def title(config: Config, facts: Key) -> str:
    """The name of a pack's folder."""
    own = facts["card"]["policy"] if config.policy is None else "own"
    policy = next((name for name, policy in POLICIES.items() if policy == config.policy), own)
    names = slug(facts["machine"]), slug(config.model.resolve().name), policy
    return "--".join((*names, sha256(json.dumps(facts).encode())[:12]))


def chosen(wanted: Sequence[int], there: Sequence[int], limit: str = "") -> list[int]:
    """The buckets that are wanted, or all; `limit` is the field that the last one there equals, if there is one.

    Raises ConfigError  for one that is not there
    """
    for n in wanted:
        if n not in there:
            known = ", ".join(map(str, there))
            if limit and n > there[-1]:
                raise ConfigError(f"a bucket of {n} passes {limit}={there[-1]}; use some of {known}, or raise it")
            raise ConfigError(f"there is no bucket of {n}; use some of {known}")
    return sorted(set(wanted)) or list(there)


def put(files: Files, target: Path) -> None:
    """Write a pack, which appears whole or not at all; one that was there before goes."""
    fresh = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        for name, data in files.items():
            (fresh / name).parent.mkdir(parents=True, exist_ok=True)
            (fresh / name).write_bytes(data)
        if target.exists():
            shutil.rmtree(target)
        fresh.rename(target)
    except OSError as error:
        shutil.rmtree(fresh, ignore_errors=True)
        why = f"out={str(target.parent)!r} cannot be written: {error.strerror}; use another folder"
        raise (CapacityError if error.errno in NO_ROOM else ConfigError)(why) from error


def read(folder: Path, wanted: Key) -> Files:
    """The files of a pack. Raises OSError or ValueError if it is damaged or of another key."""
    manifest = json.loads((folder / MANIFEST).read_bytes())
    if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
        raise ValueError(f"its manifest is not of schema {SCHEMA}; pack again")
    facts, named = manifest.get("key"), manifest.get("files")
    if not isinstance(facts, dict) or not isinstance(named, dict) or EXPORTS not in named:
        raise ValueError("its manifest lacks a key or files")
    other = differences(facts, wanted)
    if other:
        raise ValueError(f"it was made for something else: {other}")
    files = {}
    for name, expected in named.items():
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise ValueError(f"its manifest names {name!r}, which is outside of it")
        files[name] = (folder / name).read_bytes()
        if sha256(files[name]) != expected:
            raise ValueError(f"{name} is damaged; pack again")
    return files


def differences(facts: Mapping[str, Any], wanted: Key) -> str:
    """What differs between two keys, in words; empty if nothing does."""
    parts = []
    for name in wanted | dict(facts):
        theirs, ours = facts.get(name), wanted.get(name)
        if isinstance(theirs, dict) and isinstance(ours, dict) and theirs != ours:
            at = next(field for field in ours | theirs if theirs.get(field) != ours.get(field))
            name, theirs, ours = f"{name}.{at}", theirs.get(at), ours.get(at)
        if theirs != ours:
            parts.append(f"{name} {str(theirs)[:60]}, here {str(ours)[:60]}")
    return "; ".join(parts[:SHOWN]) + (f"; and {len(parts) - SHOWN} more" if len(parts) > SHOWN else "")


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
