"""Makes the demo's frozen modules, which ship: `python -m transformers_minigpt4.demo.make_base OUT`."""

import argparse
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from .make_language import describe_lists, train_language, train_tokenizer
from .make_vision import VisionModules, train_vision


def save_half(model: PreTrainedModel, folder: Path) -> None:
    """
    Writes a transformers model with weights rounded to fp16, half the bytes, and a config that asks for fp32.

    fp16, not bf16, since it keeps three bits more and no weight here is near its limits.
    """
    model.half().save_pretrained(folder)
    config = AutoConfig.from_pretrained(folder)
    config.dtype = "float32"
    config.save_pretrained(folder)


def save_vision(vision: VisionModules, folder: Path) -> None:
    """Writes `vision_tower/`, `qformer/` and `query_tokens.safetensors` (one tensor `query_tokens`, `(1, 8, 96)`)."""
    save_half(vision.vision_tower, folder / "vision_tower")
    save_half(vision.qformer, folder / "qformer")
    save_file({"query_tokens": vision.query_tokens.detach().half()}, folder / "query_tokens.safetensors")


def main() -> None:
    """Makes the modules and prints what they can do; takes about 20 minutes on one core, less for both in parallel."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder to write to")
    parser.add_argument("--only", choices=("vision", "language"), help="make only one of the two")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # sums, and so weights, depend on the number of threads
    arguments.out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    if arguments.only != "language":
        save_vision(train_vision(seed=arguments.seed), arguments.out)
        print(f"vision tower and Q-Former in {arguments.out} after {time.perf_counter() - start:.0f} s", flush=True)
    if arguments.only != "vision":
        folder = arguments.out / "language_model"
        tokenizer = train_tokenizer(arguments.seed)
        save_half(train_language(tokenizer, seed=arguments.seed), folder)
        tokenizer.save_pretrained(folder)
        model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
        result = describe_lists(model, PreTrainedTokenizerFast.from_pretrained(folder), arguments.seed + 1, count=173)
        print(f"language model after rounding: {result}; {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
