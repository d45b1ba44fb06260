"""Compares MiniGPT-4's inference with transformers' BLIP-2, InstructBLIP and LLaVA of equal size, in one process.

    python benchmarks/inference.py

Random weights, batches of 1 and 8: image encoding, time to first token, decoding, peak memory, and how near each comes
to the matmul rate and the memory bandwidth that the same run measures. docs/benchmarks.md explains the rows.
"""

import argparse
import gc
import json
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median

import torch
import transformers
from peers import (
    IMAGE_TOKEN_ID,
    MODELS,
    OURS,
    PEERS,
    SIZES,
    TEXT_TOKENS,
    Size,
    build_inputs,
    build_model,
    check_equal_work,
    encode,
    generate,
    image_seq_length,
    language_decoder,
    share_weights,
)
from PIL import Image
from report import (
    compare,
    comparison_table,
    in_turn,
    limit_shares,
    machine_options,
    measured_limits,
    parsed,
    setting_of,
    share_table,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel, StoppingCriteria

from transformers_minigpt4.inference.prefix_cache import PrefixCache


BATCH_SIZES = (1, 8)
MATMUL_SIDE = {"cpu": 2048, "cuda": 8192}
BANDWIDTH_BYTES = {"cpu": 2**29, "cuda": 2**32}  # far beyond the caches


class Clock(StoppingCriteria):
    """Notes when each token of the batch was ready; never stops the generation."""

    def __init__(self, device: str):
        self.device = device
        self.times: list[float] = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs) -> torch.BoolTensor:
        self.times.append(now(self.device))
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def now(device: str) -> float:
    """Seconds, after all work given to the device is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(call: Callable[[], object], device: str) -> float:
    """Wall time of one call."""
    start = now(device)
    call()
    return now(device) - start


def time_generation(
    model: PreTrainedModel, inputs: dict, decode_tokens: int, device: str
) -> tuple[float, float, float]:
    """
    Times one greedy generation from pixels and ids.

    Returns:
        Seconds to the first token, the part of them from the start of the language model on (the prefill), and seconds
        per further step of the batch.
    """
    clock = Clock(device)
    prefill_start: list[float] = []
    hook = language_decoder(model).register_forward_pre_hook(
        lambda *_: prefill_start.append(now(device)) if not prefill_start else None
    )
    start = now(device)
    generate(model, inputs, 1 + decode_tokens, clock)
    hook.remove()
    if len(clock.times) != 1 + decode_tokens:
        raise RuntimeError(f"{type(model).__name__} took {len(clock.times)} steps instead of {1 + decode_tokens}.")
    first, last = clock.times[0], clock.times[-1]
    return first - start, first - prefill_start[0], (last - first) / decode_tokens


def limit_probes(dtype: torch.dtype, device: str, small: bool) -> tuple[dict[str, Callable], float, dict[str, float]]:
    """
    What the limits are measured with.

    Returns:
        The calls by name, the floating-point operations of `"matmul"`, and the bytes that each of the others moves.
    """
    side = 256 if small else MATMUL_SIDE[device]
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    count = (2**24 if small else BANDWIDTH_BYTES[device]) // 4
    floats = torch.ones(count, device=device)
    target = torch.empty_like(floats)
    # Both products read the matrix once, as a step of decoding reads the weights: the first as BLAS would have it, the
    # second as a linear layer asks for it.
    matrix = torch.ones(count * 4 // dtype.itemsize, dtype=dtype, device=device).view(-1, 4096)
    vector = torch.ones(4096, dtype=dtype, device=device)
    probes = {
        "matmul": lambda: left @ right,
        "sum": floats.sum,
        "copy": lambda: target.copy_(floats),
        "matrix-vector product": lambda: matrix @ vector,
        "linear layer on one row": lambda: torch.nn.functional.linear(vector[None], matrix),
    }
    # A copy reads and writes.
    return (
        probes,
        2.0 * side**3,
        {name: (8.0 if name == "copy" else 4.0) * count for name in probes if name != "matmul"},
    )


def count_flops(call: Callable[[], object]) -> int:
    """
    Floating-point operations of all matrix products, convolutions and attention in one call, two per multiply-add.

    Attention runs in its plain form here, which the counter sees on every device: every position attends to every
    other, causal or not.
    """
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        call()
    return counter.get_total_flops()


def decode_bytes(model: PreTrainedModel, batch_size: int, decode_tokens: int) -> int:
    """Bytes that one step of the batch must read: language model and head once, and its keys and values."""
    text = model.config.text_config
    decoder, head = language_decoder(model), model.get_output_embeddings()
    embeddings = decoder.get_input_embeddings().weight  # one row of it is read
    read = sum(parameter.nbytes for parameter in (*decoder.parameters(), *head.parameters())) - embeddings.nbytes
    positions = image_seq_length(model) + TEXT_TOKENS + decode_tokens / 2  # the mean over the steps
    cache = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * head.weight.itemsize
    return int(read + batch_size * positions * cache)


def resident_bytes(field: str) -> int:
    """`VmRSS` (resident now) or `VmHWM` (highest since the last reset) of this process; Linux only."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}.")


def measure_memory(name: str, size: Size, dtype: torch.dtype, device: str, threads: int) -> dict[int, int]:
    """Peak bytes by batch size of one model in a fresh process, weights included, while it encodes and generates."""
    torch.set_num_threads(threads)
    before = resident_bytes("VmRSS") if device == "cpu" else 0
    model = build_model(name, size, dtype, device)
    gc.collect()
    peaks = {}
    for batch_size in BATCH_SIZES:
        inputs = build_inputs(model, batch_size)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, see `man 5 proc`
        with torch.inference_mode():
            generate(model, inputs, 1 + size.decode_tokens)
        peaks[batch_size] = torch.cuda.max_memory_allocated() if device == "cuda" else resident_bytes("VmHWM") - before
    return peaks


def peak_memory(size: Size, dtype: torch.dtype, device: str, threads: int) -> dict[str, dict[int, int]]:
    """`measure_memory` of every model, each in its own process."""
    # A forked process has the imports already, but cannot use CUDA.
    context = multiprocessing.get_context("spawn" if device == "cuda" else "fork")
    peaks = {}
    for name in MODELS:
        with ProcessPoolExecutor(max_workers=1, mp_context=context) as process:
            peaks[name] = process.submit(measure_memory, name, size, dtype, device, threads).result()
    return peaks


@torch.inference_mode()
def measure_times(
    models: dict[str, PreTrainedModel], size: Size, probes: dict[str, Callable], repeats: int, device: str
) -> tuple[dict[str, dict[str, list[float]]], dict[str, list[float]]]:
    """
    Times of every repeat in seconds, as `times[row][model]`, and of the probes.

    Within each repeat the models take turns at every row, see `report.in_turn`.
    """
    times: dict[str, dict[str, list[float]]] = {}
    probe_times: dict[str, list[float]] = {name: [] for name in probes}
    inputs = {(name, batch): build_inputs(model, batch) for name, model in models.items() for batch in BATCH_SIZES}
    for repeat in range(-1, repeats):  # repeat -1 warms up
        order = in_turn(MODELS, repeat)
        measured: dict[str, dict[str, float]] = {}
        for name, probe in probes.items():
            elapsed = seconds(probe, device)
            if repeat >= 0:
                probe_times[name].append(elapsed)
        for batch in BATCH_SIZES:
            for name in order:
                elapsed = seconds(partial(encode, models[name], inputs[name, batch]), device)
                measured.setdefault(f"encode {batch}", {})[name] = elapsed
            for name in order:
                spans = time_generation(models[name], inputs[name, batch], size.decode_tokens, device)
                for kind, elapsed in zip(("first", "prefill", "decode"), spans, strict=True):
                    measured.setdefault(f"{kind} {batch}", {})[name] = elapsed
        print(f"repeat {repeat + 1} of {repeats}", flush=True)
        if repeat >= 0:
            for row, by_model in measured.items():
                for name, elapsed in by_model.items():
                    times.setdefault(row, {}).setdefault(name, []).append(elapsed)
    return times, probe_times


@torch.inference_mode()
def measure_second_turn(model: PreTrainedModel, size: Size, repeats: int, device: str) -> dict[str, list[float]]:
    """
    Seconds to the first token of a second turn: with the keys and values of the first, and reading all anew.

    The second turn has no image. Its prompt goes on where the answer ended, as a chat template would write it; what a
    template writes otherwise is read by `Chat.prepare` between the turns.
    """
    inputs = build_inputs(model, 1)
    image = Image.new("RGB", (1, 1))  # stands for the pixels in `inputs`
    settings = {"do_sample": False, "max_new_tokens": size.decode_tokens, "return_dict_in_generate": True}
    question = torch.randint(3, IMAGE_TOKEN_ID, (1, TEXT_TOKENS // 2), generator=torch.Generator().manual_seed(0))
    times: dict[str, list[float]] = {"kept": [], "anew": []}
    first_ids: dict[str, list[int]] = {}
    for repeat in range(-1, repeats):  # repeat -1 warms up
        for name in in_turn(tuple(times), repeat):
            prefix = PrefixCache()
            output = model.generate(**inputs, **settings)
            if name == "kept":
                prefix.keep(output, inputs["input_ids"][0].tolist(), [image])
            ids = torch.cat([output.sequences, question.to(device)], dim=1)
            second = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
            start = now(device)
            shortened = prefix.shorten(second, [image], IMAGE_TOKEN_ID)
            answer = model.generate(**shortened, do_sample=False, max_new_tokens=1)
            elapsed = now(device) - start
            first_ids[name] = answer[0].tolist()
            if repeat >= 0:
                times[name].append(elapsed)
    if model.dtype == torch.float32 and first_ids["kept"] != first_ids["anew"]:
        raise RuntimeError("The second turn gives another token with the keys and values of the first.")
    return times


def second_turn_line(times: dict[str, list[float]]) -> str:
    """The medians in words."""
    kept, anew = (median(times[name]) for name in ("kept", "anew"))
    ratio = median(one / other for one, other in zip(times["kept"], times["anew"]))
    return (
        f"Second turn, time to first token, batch 1: {kept * 1000:.1f} ms with the first turn kept, "
        f"{anew * 1000:.1f} ms reading all anew, ratio {ratio:.2f}."
    )


def parse_args() -> argparse.Namespace:
    parser = machine_options(__doc__, repeats=9)
    parser.add_argument("--size", choices=SIZES, default="small", help="size of the models (default: small)")
    return parsed(parser)


def main() -> None:
    args = parse_args()
    size, dtype = SIZES[args.size], getattr(torch, args.dtype)
    transformers.logging.set_verbosity_error()
    # First, while this process is small and has not touched the device.
    memory = peak_memory(size, dtype, args.device, args.threads)
    torch.set_num_threads(args.threads)

    # In other dtypes rounding decides between random tokens, and at full size float32 may not fit.
    agreement = check_equal_work(size if dtype == torch.float32 else SIZES["tiny"], args.device)
    gc.collect()
    models = {OURS: build_model(OURS, size, dtype, args.device)}
    for name in PEERS:
        models[name] = build_model(name, size, dtype, args.device)
        share_weights(models[OURS], models[name])  # at once, so that two language models at most are in memory

    flops: dict[str, dict[str, int]] = {}
    step_bytes: dict[int, dict[str, int]] = {batch: {} for batch in BATCH_SIZES}
    with torch.inference_mode():
        for name, model in models.items():
            for batch in BATCH_SIZES:
                inputs = build_inputs(model, batch)
                flops.setdefault(f"encode {batch}", {})[name] = count_flops(partial(encode, model, inputs))
                flops.setdefault(f"first {batch}", {})[name] = count_flops(partial(generate, model, inputs, 1))
                step_bytes[batch][name] = decode_bytes(model, batch, size.decode_tokens)

    probes, matmul_flops, probe_bytes = limit_probes(dtype, args.device, args.size == "tiny")
    times, probe_times = measure_times(models, size, probes, args.repeats, args.device)

    second_turn = measure_second_turn(models[OURS], size, args.repeats, args.device)
    limits = measured_limits(probe_times, matmul_flops, probe_bytes)
    shares = limit_shares(times, flops, step_bytes, limits)
    costs = {
        f"{kind} {batch}": times[f"{kind} {batch}"] for kind in ("encode", "first", "decode") for batch in BATCH_SIZES
    }
    costs |= {f"memory {batch}": {name: [float(memory[name][batch])] for name in MODELS} for batch in BATCH_SIZES}
    rows = {row: compare(by_model) for row, by_model in costs.items()}
    setting = setting_of(args, "torch", "transformers")

    print("\n" + ", ".join(f"{key} {value}" for key, value in setting.items()))
    print(agreement + "\n")
    print("\n".join(comparison_table(rows)))
    rates = ", ".join(f"{name} {rate / 1e9:.1f}" for name, rate in limits["all_bytes_per_s"].items())
    matmul, bandwidth = limits["matmul_flops_per_s"] / 1e9, limits["bytes_per_s"] / 1e9
    print(f"\nMeasured limits: {matmul:.0f} GFLOP/s (matmul), {bandwidth:.1f} GB/s (the best of: {rates}).\n")
    print("\n".join(share_table(shares)))
    print("\n" + second_turn_line(second_turn))
    if args.json is not None:
        results = {
            "setting": setting,
            "agreement": agreement,
            "rows": rows,
            "limits": limits,
            "shares": shares,
            "second_turn": second_turn,
            "flops": flops,
            "step_bytes": step_bytes,
            "costs": costs,
            "probe_times": probe_times,
        }
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
