"""Turns the measurements of inference.py into ratios, shares of the machine's limits, and Markdown tables."""

import statistics

from peers import MODELS, OURS, PEERS


ROWS = {
    "encode": ("Image encoding", "ms"),
    "first": ("Time to first token", "ms"),
    "decode": ("Decoding", "tokens/s"),
    "memory": ("Peak memory", "MiB"),
}
MIB = 2**20


def compare(costs: dict[str, list[float]]) -> dict:
    """
    Compares one row.

    Args:
        costs: seconds or bytes of every repeat by model; less is better.

    Returns:
        The median cost of each model, each peer's cost over ours (above 1: ours is better), the peer with the least
        cost, and the quartiles of the ratio to it over the repeats (`None` with one), each of which ran all models one
        after the other.
    """
    medians = {name: statistics.median(values) for name, values in costs.items()}
    best = min(PEERS, key=medians.__getitem__)
    pairs = [theirs / ours for theirs, ours in zip(costs[best], costs[OURS], strict=True)]
    quartiles = statistics.quantiles(pairs, n=4, method="inclusive") if len(pairs) > 1 else None
    return {
        "median": medians,
        "ratio": {name: medians[name] / medians[OURS] for name in PEERS},
        "best_peer": best,
        "ratio_quartiles": None if quartiles is None else [quartiles[0], quartiles[2]],
    }


def measured_limits(probe_times: dict[str, list[float]], matmul_flops: float, probe_bytes: dict[str, float]) -> dict:
    """FLOP/s of the matmul, and bytes/s of the other probes, whose highest is the limit; from medians of the times."""
    rates = {name: size / statistics.median(probe_times[name]) for name, size in probe_bytes.items()}
    return {
        "matmul_flops_per_s": matmul_flops / statistics.median(probe_times["matmul"]),
        "bytes_per_s": max(rates.values()),
        "all_bytes_per_s": rates,
    }


def limit_shares(times: dict, flops: dict, step_bytes: dict, limits: dict) -> dict[str, dict[str, float]]:
    """
    Shares of the measured limits by row and model.

    Args:
        times: seconds as `times[row][model]`, a list over the repeats.
        flops: operations of `encode N` and `first N` by model.
        step_bytes: bytes that one step of decoding must read, as `step_bytes[batch][model]`.
    """
    shares: dict[str, dict[str, float]] = {}
    for batch, by_model in step_bytes.items():
        rate = limits["matmul_flops_per_s"]
        for name in MODELS:
            cost = {
                kind: statistics.median(times[f"{kind} {batch}"][name]) for kind in ("encode", "prefill", "decode")
            }
            encode_flops = flops[f"encode {batch}"][name]
            prefill_flops = flops[f"first {batch}"][name] - encode_flops
            shares.setdefault(f"encode {batch}", {})[name] = encode_flops / cost["encode"] / rate
            shares.setdefault(f"prefill {batch}", {})[name] = prefill_flops / cost["prefill"] / rate
            shares.setdefault(f"decode {batch}", {})[name] = by_model[name] / cost["decode"] / limits["bytes_per_s"]
    return shares


def comparison_table(rows: dict[str, dict]) -> list[str]:
    """Markdown lines; `rows` maps `"encode 1"` and the like to what `compare` returns."""
    lines = [
        f"| | {OURS} | {' | '.join(PEERS)} | against the best peer |",
        "| --- |" + " ---: |" * (len(MODELS) + 1),
    ]
    for row, result in rows.items():
        kind, batch = row.split()
        title, unit = ROWS[kind]
        cells = []
        for name in MODELS:
            cost = result["median"][name]
            value = {"ms": cost * 1000, "tokens/s": int(batch) / cost, "MiB": cost / MIB}[unit]
            ratio = "" if name == OURS else f" ({result['ratio'][name]:.2f})"
            cells.append(f"{value:.1f}{ratio}")
        best, spread = result["best_peer"], result["ratio_quartiles"]
        quartiles = "" if spread is None else f" [{spread[0]:.2f}, {spread[1]:.2f}]"
        cells.append(f"{result['ratio'][best]:.2f}{quartiles} {best}")
        lines.append(f"| {title}, batch {batch} ({unit}) | {' | '.join(cells)} |")
    return lines


def share_table(shares: dict[str, dict[str, float]]) -> list[str]:
    """Markdown lines; `shares` is what `limit_shares` returns."""
    titles = {
        "encode": "Image encoding, of the matmul rate",
        "prefill": "Prefill, of the matmul rate",
        "decode": "Decoding, of the memory bandwidth",
    }
    lines = [f"| | {' | '.join(MODELS)} |", "| --- |" + " ---: |" * len(MODELS)]
    for kind, title in titles.items():
        for row, by_model in shares.items():
            if row.split()[0] == kind:
                cells = " | ".join(f"{by_model[name]:.0%}" for name in MODELS)
                lines.append(f"| {title}, batch {row.split()[1]} | {cells} |")
    return lines
