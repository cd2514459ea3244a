"""A record in a line."""

from __future__ import annotations

from typing import Any

Record = dict[str, Any]


def sentence(record: Record) -> str:
    """What a record of latency, throughput, startup or invariance says."""
    says = {"latency": _latency, "throughput": _throughput, "startup": _startup, "invariance": _invariance}
    return says[record["what"]](record)


def _latency(r: Record) -> str:
    scene = r["scene"]
    parts = [f"{scene['shape']} block {scene['block']}, {scene['requests']} at {scene['context']}: "]
    if "ms_per_forward" in r:
        parts.append(f"{_forward(r)}; {_rest(r)}; ")
    if r.get("experts_touched"):
        parts.append(f"{r['experts_touched']['mean']:.1f} of {r['experts_touched']['of']} experts a layer; ")
    if r.get("floor_note"):
        parts.append(f"{r['floor_note']}; ")
    if r["prefill"]:
        p = r["prefill"]
        parts.append(
            f"prefill of {p['tokens']}: {p['ms']['p50']:.2f} ms (p99 {p['ms']['p99']:.2f}), {p['tflops']:.1f} of "
            f"{p['matmul_tflops']:.1f} TFLOP/s = {100 * p['of_matmul_rate']:.1f} %; "
        )
    if r["first_block"]:
        f = r["first_block"]
        parts.append(
            f"first block of {f['prompt_tokens']}: {f['ms']['p50']:.2f} ms (p99 {f['ms']['p99']:.2f}), prefill "
            f"{f['prefill_ms']['p50']:.2f}, {f['forwards']} forwards; "
        )
    parts.append(f"load {r['load_s']:.0f} s, peak {r['peak_gib']:.1f} GiB")
    return "".join(parts)


def _throughput(r: Record) -> str:
    scene, wall_s = r["scene"], r["wall_s"]
    return (
        f"{scene['shape']} block {scene['block']}, {scene['requests']} requests of {scene['context']} + "
        f"{scene['max_tokens']} tokens, {scene['rows']} at once: {r['tokens']} tokens in {wall_s:.2f} s; "
        f"{_forward(r)}; {_rest(r)}; "
        f"prefill {100 * r['prefill_s'] / wall_s:.1f} %, decode {100 * r['decode_s'] / wall_s:.1f} %; "
        f"{100 * r['roof']['share']:.1f} % of the roof that binds ({_binding(r['roof'])}); "
        f"load {r['load_s']:.0f} s, peak {r['peak_gib']:.1f} GiB"
    )


def _binding(roof: Record) -> str:
    """What bounds prompts and what bounds forwards."""
    pairs = {name: (roof["memory_s"][name], roof["compute_s"][name]) for name in ("prefill", "decode")}
    return ", ".join(f"{name} {'memory' if m > c else 'compute'} {max(m, c):.2f} s" for name, (m, c) in pairs.items())


def _forward(r: Record) -> str:
    ms = r["ms_per_forward"]
    return (
        f"{ms['mean']:.3f} ms a forward (p50 {ms['p50']:.3f}, p99 {ms['p99']:.3f}), "
        f"floor {r['floor_ms']:.3f} ms, ratio {r['ratio']:.3f} "
        f"(with K/V {r['floor_with_kv_ms']:.3f}, {r['ratio_with_kv']:.3f})"
    )


def _rest(r: Record) -> str:
    loop = r["loop"]
    launch = "step by step" if loop["route"] is None else f"{loop['forwards']} forwards a launch ({loop['route']})"
    gap, syncs, share = r["idle"]["gap_us"], r["host_syncs"], r["idle"]["share"]
    share = r["idle"]["outside_share"] if share is None else share
    return (
        f"{launch}, {r['tokens_per_forward']:.2f} tokens per forward, {r['tokens_per_s']:.0f} tok/s; "
        f"idle {100 * share:.2f} %{'' if gap is None else f' (traced gap {gap:.1f} µs)'}, "
        f"host syncs {'-' if syncs is None else syncs}, kernels {_number(r['kernels_per_step'])} "
        f"({_number(r['kernels_per_layer'])} a layer); read {r['read_gbps']:.0f} GB/s, graphs {r['graphs_s']:.0f} s"
    )


def _startup(r: Record) -> str:
    said = [f"{r['scene']['shape']} buckets {', '.join(map(str, r['buckets']))}, prefill {r['prefill_tokens']}"]
    for name in ("cold", "packed"):
        run = r[name]
        if run is None:
            continue
        read = "" if run["pack_s"] is None else f"pack {run['pack_s']:.1f}, "
        graphs = ", ".join(f"{key} {s:.1f}" for key, s in run["graphs_s"].items())
        said.append(
            f"{name}: ready after {run['ready_s']:.1f} s (imports {run['imports_s']:.1f}, "
            f"device {run['device_s']:.1f}, {read}{graphs}), weights and K/V {run['weights_s']:.1f} s apart"
        )
    return "; ".join(said)


def _invariance(r: Record) -> str:
    scene, cost = r["scene"], r["cost"]
    return (
        f"{scene['shape']} block {scene['block']}, {r['n']} requests of up to {scene['context']} + "
        f"{scene['max_tokens']} tokens, {scene['requests']} at once: {r['invariant']['same']} the same alone and in a "
        f"batch, {r['plain']['same']} without batch_invariant; it costs {cost['alone_s']:.3f} x the time alone, "
        f"{cost['together_s']:.3f} x together"
    )


def _number(n: float | None) -> str:
    return "-" if n is None else f"{n:g}"


def lines(r: Record) -> list[str]:
    """A record of a roofline as a table."""
    head = ("op", "of", "calls", "MB", "floor µs", "µs", "% of floor")
    rows = [
        (x["op"], x["of"], str(x["calls"]), *_least(x["bytes"], x["floor_us"]), *_took(x["us"], x["floor_us"]))
        for x in r["rows"]
    ]
    least = _least(sum(x["bytes"] for x in r["rows"]), r["floor_us"])
    if r["others"] is not None:
        ops_us = sum(x["us"] or 0.0 for x in r["rows"])
        rows += [("all ops", "", "", *least, *_took(ops_us, r["floor_us"]))]
        rows += [("other", x["name"][:60], str(x["n"]), "", "", f"{x['us']:.1f}", "") for x in r["others"]]
        rows += [("gaps", "in the step", "", "", "", f"{r['gaps_us']:.1f}", "")]
        rows += [("traced", "", "", "", "", f"{r['traced_us']:.1f}", "")]
    rows += [("step", r["graphs"], "", *least, *_took(r["ms_per_forward"]["p50"] * 1e3, r["floor_us"]))]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    said = []
    for row in (head, *rows):
        cells = [v.ljust(w) if i < 2 else v.rjust(w) for i, (v, w) in enumerate(zip(row, widths, strict=True))]
        said.append("  ".join(cells).rstrip())
    roof = f"read {r['read_gbps']:.0f} GB/s, matmul {r['matmul_tflops']:.1f} TFLOP/s"
    return [*said, f"floor: the larger of bytes and operations at the roof of this run: {roof}"]


def _least(moved: int, floor_us: float) -> tuple[str, str]:
    return f"{moved / 1e6:.2f}", f"{floor_us:.1f}"


def _took(us: float | None, floor_us: float) -> tuple[str, str]:
    return ("-", "-") if us is None else (f"{us:.1f}", f"{100 * floor_us / us:.1f}" if us else "-")
