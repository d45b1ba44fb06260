"""What the benchmarks share: options, the order of timings, ratios, shares of the machine's limits, and tables."""

import argparse
import statistics
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from peers import MODELS, OURS, PEERS


ROWS = {
    "encode": ("Image encoding", "ms"),
    "first": ("Time to first token", "ms"),
    "decode": ("Decoding", "tokens/s"),
    "memory": ("Peak memory", "MiB"),
}
MIB = 2**20


def machine_options(description: str | None, repeats: int) -> argparse.ArgumentParser:
    """
    A parser with the options of the benchmarks that compare models on one machine.

    Args:
        description: The benchmark's docstring.
        repeats: Default of `--repeats`.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="CPU threads (default: all cores)"
    )
    parser.add_argument("--repeats", type=int, default=repeats, help=f"measured repeats (default: {repeats})")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write every measurement to this file")
    return parser


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments, checked; exits with status 2 if this machine cannot run them."""
    args = parser.parse_args()
    if args.repeats < 1 or args.threads < 1:
        parser.error(f"--repeats {args.repeats} --threads {args.threads}: both must be at least 1.")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no CUDA device. Use --device cpu, or a PyTorch built for your GPU.")
    if args.device == "cpu" and not Path("/proc/self/clear_refs").exists():
        parser.error("peak memory on the CPU is read from /proc, which this system does not have. Run it on Linux.")
    return args


def setting_of(args: argparse.Namespace, *packages: str) -> dict[str, str | int]:
    """What the figures depend on: the options, the device, and the versions of `packages`."""
    return {
        "size": args.size,
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "CPU",
        "dtype": args.dtype,
        "threads": args.threads,
        "repeats": args.repeats,
        **{name: version(name) for name in packages},
    }


def in_turn(names: Sequence[str], repeat: int) -> list[str]:
    """
    The order in which a repeat times its subjects.

    Each repeat times all of them, one after the other, and begins with another one, so that a slow spell of the
    machine affects all of them.
    """
    start = repeat % len(names)
    return [*names[start:], *names[:start]]


def compare(costs: dict[str, list[float]]) -> dict:
    """
    Compares one row.

    Args:
        costs: seconds or bytes of every repeat by model; less is better.

    Returns:
        The median cost of each model, each peer's cost divided by ours (above 1: ours is better), the peer with the
        lowest cost, and the quartiles of the ratio to it over the repeats (`None` for one repeat).
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
