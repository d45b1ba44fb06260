"""Compares training steps: TRL's own collator with LLaVA and with MiniGPT-4, and this package's optimizations in turn.

    python benchmarks/training.py

Random weights, only the projector is trained, rows as long as those of stages 1 and 2. All variants take their steps
on the same rows, in turns, and the matmul rate is measured between them. docs/benchmarks.md explains the rows.
"""

import argparse
import gc
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from inference import count_flops, limit_probes, now, resident_bytes, seconds
from peers import IMAGE, OURS, build_model
from report import in_turn, machine_options, parsed, setting_of
from training_models import (
    CACHED,
    LABELLED,
    PACKED,
    PADDED,
    SIZES,
    STAGES,
    TRL_OURS,
    VARIANTS,
    Variant,
    make_processor,
    make_rows,
    necessary_flops,
)

from transformers_minigpt4.training.feature_building import build_feature_cache


RUNS = {"tiny": ("tiny",), "small": ("mini", "medium"), "7b": ("7b",)}
BATCHES = 2  # different batches, which repeats take in turn
MIB = 2**20
Options = tuple[str, torch.dtype, int]  # device, dtype, threads


def batches(size: str, stage: str, device: str) -> list[list[dict[str, Any]]]:
    """The same rows in every process."""
    spec = STAGES[stage]
    count = 2 if size == "tiny" else spec.gpu_batch_size if device == "cuda" else spec.batch_size
    rows = make_rows(spec, count * BATCHES, seed=list(STAGES).index(stage))
    return [rows[start : start + count] for start in range(0, len(rows), count)]


def build_cache(size: str, folder: str, options: Options) -> float:
    """Encodes all images in its own process; returns images per second."""
    device, dtype, threads = options
    torch.set_num_threads(threads)
    model = build_model(OURS, SIZES[size], dtype, device)
    images = [
        image for stage in STAGES for rows in batches(size, stage, device) for row in rows for image in row["images"]
    ]
    start = now(device)
    counts = build_feature_cache(model, make_processor(OURS).image_processor, images, folder)
    return counts["encoded"] / (now(device) - start)


def measure_memory(name: str, size: str, stage: str, cache: str, options: Options) -> int:
    """Peak bytes of one variant in a fresh process, weights included, over one step."""
    device, dtype, threads = options
    torch.set_num_threads(threads)
    before = resident_bytes("VmRSS") if device == "cpu" else 0
    variant = Variant(name, size, cache, device, dtype)
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, see `man 5 proc`
    variant.step(batches(size, stage, device)[0])
    return torch.cuda.max_memory_allocated() if device == "cuda" else resident_bytes("VmHWM") - before


def alone(call: Any, *args: Any, device: str) -> Any:
    """Runs a call in its own process. A forked one has the imports already, but cannot use CUDA."""
    context = multiprocessing.get_context("spawn" if device == "cuda" else "fork")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as process:
        return process.submit(call, *args).result()


def measured(call: Callable[[], object], options: Options) -> float:
    """
    Seconds of one call.

    On one CPU thread these are the process's own, user and system, which other programs on the machine disturb less
    than they disturb wall time. Otherwise they are wall time.
    """
    device, _, threads = options
    if device == "cuda" or threads > 1:
        return seconds(call, device)
    start = time.process_time()
    call()
    return time.process_time() - start


def check_equal_loss(variants: dict[str, Variant], rows: list[dict[str, Any]]) -> str:
    """
    Checks that all variants of MiniGPT-4 have the same loss before anything is timed.

    Raises:
        RuntimeError: if they differ, because the timings would then compare different work.
    """
    with torch.no_grad():
        losses = {name: v.loss(v.collator(rows)).item() for name, v in variants.items()}
    exact = [losses[name] for name in (TRL_OURS, PADDED, PACKED, LABELLED)]
    gap, cached = max(exact) - min(exact), abs(losses[CACHED] - losses[TRL_OURS])
    if gap > 1e-3 or cached > 1e-2:
        raise RuntimeError(f"The variants' losses differ, so their work does: {losses}.")
    return f"losses of the variants differ by {gap:.0e}, and with features in bf16 by {cached:.0e}"


def measure(size: str, stage: str, cache: str, repeats: int, options: Options) -> dict[str, Any]:
    """
    Seconds per step of every repeat and variant, of the collators alone, and of the matmul that is the limit.

    Within each repeat the variants take turns, see `report.in_turn`.
    """
    device, dtype, _ = options
    variants = {name: Variant(name, size, cache, device, dtype) for name in VARIANTS}
    data = batches(size, stage, device)
    agreement = check_equal_loss(variants, data[0])
    with torch.no_grad():
        pixels = torch.zeros(1, 3, IMAGE["image_size"], IMAGE["image_size"], dtype=dtype, device=device)
        encode = {
            name: 0 if name == CACHED else count_flops(partial(v.model.get_image_features, pixels))
            for name, v in variants.items()
        }
    probes, matmul_flops, _ = limit_probes(dtype, device, size == "tiny")
    times: dict[str, list[float]] = {name: [] for name in VARIANTS}
    collating: dict[str, list[float]] = {name: [] for name in VARIANTS}
    shares: dict[str, list[float]] = {name: [] for name in VARIANTS}
    rates: list[float] = []
    for repeat in range(repeats):  # the check above has warmed up
        rows = data[repeat % len(data)]
        for name in in_turn(VARIANTS, repeat):
            variant = variants[name]
            rates.append(matmul_flops / measured(probes["matmul"], options))
            collating[name].append(measured(partial(variant.collator, rows), options) / len(rows))
            elapsed = measured(partial(variant.step, rows), options)
            times[name].append(elapsed / len(rows))
            shares[name].append(necessary_flops(variant, rows, encode[name]) / elapsed)
        print(f"{size}, {stage}: repeat {repeat + 1} of {repeats}", flush=True)
    limit = statistics.median(rates)
    return {
        "agreement": agreement,
        "batch": len(data[0]),
        "matmul_flops_per_s": limit,
        "matmul_all": rates,
        "seconds_per_sample": times,
        "collating_per_sample": collating,
        "share": {name: statistics.median(values) / limit for name, values in shares.items()},
    }


def table(result: dict[str, Any], memory: dict[str, int]) -> list[str]:
    """Markdown lines of one size and stage; ratios are against TRL's collator with the same model."""
    base = statistics.median(result["seconds_per_sample"][TRL_OURS])
    lines = [
        "| variant | samples/s | against TRL's collator | peak memory | of the matmul limit | collator alone |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name in VARIANTS:
        median = statistics.median(result["seconds_per_sample"][name])
        collating = statistics.median(result["collating_per_sample"][name])
        lines.append(
            f"| {name} | {1 / median:.2f} | {base / median:.2f}× | {memory[name] / MIB:.0f} MiB "
            f"({memory[name] / memory[TRL_OURS]:.2f}×) | {result['share'][name]:.0%} | {1 / collating:.0f}/s |"
        )
    return lines


def parse_args() -> argparse.Namespace:
    parser = machine_options(__doc__, repeats=5)
    parser.add_argument("--size", choices=RUNS, default="small", help="models of the run (default: small)")
    parser.add_argument("--stage", choices=tuple(STAGES), action="append", help="lengths of rows (default: both)")
    return parsed(parser)


def main() -> None:
    args = parse_args()
    transformers.logging.set_verbosity_error()
    options = args.device, getattr(torch, args.dtype), args.threads
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        memory: dict[str, dict[str, int]] = {}
        encoding = {}
        # First, while this process is small and has not touched the device.
        for size in RUNS[args.size]:
            encoding[size] = alone(build_cache, size, f"{folder}/{size}", options, device=args.device)
            for stage in args.stage or STAGES:
                memory[f"{size}, {stage}"] = {
                    name: alone(measure_memory, name, size, stage, f"{folder}/{size}", options, device=args.device)
                    for name in VARIANTS
                }
        torch.set_num_threads(args.threads)
        for size in RUNS[args.size]:
            for stage in args.stage or STAGES:
                key = f"{size}, {stage}"
                results[key] = measure(size, stage, f"{folder}/{size}", args.repeats, options)
                results[key].update(memory=memory[key], encoded_per_s=encoding[size])
                gc.collect()
    setting = setting_of(args, "torch", "transformers", "trl")
    print("\n" + ", ".join(f"{key} {value}" for key, value in setting.items()))
    for key, result in results.items():
        print(f"\n**{key}**, batch {result['batch']}: {result['agreement']}; matmul limit ", end="")
        print(f"{result['matmul_flops_per_s'] / 1e9:.0f} GFLOP/s; cache built at {result['encoded_per_s']:.1f}/s.\n")
        print("\n".join(table(result, result["memory"])))
    if args.json is not None:
        args.json.write_text(json.dumps({"setting": setting, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
