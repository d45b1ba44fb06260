"""Measures answers to several people at once: one after another, and decoded together as the web page does.

    python benchmarks/chat.py --threads 1
    python benchmarks/chat.py --size tiny --repeats 1 --tokens 8   # seconds

Everybody asks about one image at the same time; answers have the same number of tokens. Both ways take turns and must
give the same tokens. Weights are random (see inference.py), answers greedy in float32.
"""

import json
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import torch
from peers import OURS, SIZES, build_inputs, build_model
from report import machine_options, parsed
from transformers.generation.streamers import BaseStreamer

from transformers_minigpt4.inference.batching import BatchedModel


PROCESSOR = SimpleNamespace(model_input_names=["input_ids", "attention_mask", "pixel_values"])


class FirstToken(BaseStreamer):
    """Notes when the first token came: the second call, after the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def answer(model, inputs: dict, number: int, tokens: int) -> tuple[list[int], float]:
    """The ids for one person, and when the first of them came."""
    row = {name: tensor[number : number + 1] for name, tensor in inputs.items()}
    streamer = FirstToken()
    output = model.generate(
        **row,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        streamer=streamer,
        return_dict_in_generate=True,
    )
    return output.sequences[0].tolist(), streamer.times[1]


def one_after_another(model, inputs: dict, people: int, tokens: int) -> list[tuple[list[int], float]]:
    return [answer(model, inputs, number, tokens) for number in range(people)]


def together(model, inputs: dict, people: int, tokens: int) -> list[tuple[list[int], float]]:
    shared = BatchedModel(model, PROCESSOR, batch_size=people)
    with ThreadPoolExecutor(people) as pool:
        return list(pool.map(lambda number: answer(shared, inputs, number, tokens), range(people)))


WAYS = {"one after another": one_after_another, "together": together}


def main() -> None:
    parser = machine_options(__doc__, repeats=3)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--people", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64, help="length of each answer")
    args = parsed(parser)
    torch.set_num_threads(args.threads)
    model = build_model(OURS, SIZES[args.size], torch.float32, args.device)
    inputs = build_inputs(model, args.people)
    results = {name: {"seconds": [], "cpu": [], "first": []} for name in WAYS}
    ids = {}
    for repeat in range(-1, args.repeats):
        for name in list(WAYS) if repeat % 2 else list(WAYS)[::-1]:
            start, cpu = time.perf_counter(), time.process_time()
            answers = WAYS[name](model, inputs, args.people, args.tokens)
            print(f"repeat {repeat}, {name}: {time.process_time() - cpu:.1f} CPU s", file=sys.stderr, flush=True)
            if repeat >= 0:
                results[name]["seconds"].append(time.perf_counter() - start)
                results[name]["cpu"].append(time.process_time() - cpu)
                results[name]["first"].append(statistics.mean(first - start for _, first in answers))
            ids[name] = [row for row, _ in answers]
    if ids["together"] != ids["one after another"]:
        raise SystemExit("the two ways gave different tokens; their times cannot be compared")
    total = args.people * args.tokens
    print("| | one after another | together | ratio |\n| --- | ---: | ---: | ---: |")
    for title, key, better in (
        (f"tokens per second, {args.people} answers of {args.tokens}", "seconds", lambda s: total / s),
        ("the same per CPU second", "cpu", lambda s: total / s),
        ("mean time to the first token (s)", "first", lambda s: s),
    ):
        values = [better(statistics.median(results[name][key])) for name in WAYS]
        print(f"| {title} | {values[0]:.1f} | {values[1]:.1f} | {values[1] / values[0]:.2f} |")
    if args.json:
        Path(args.json).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
