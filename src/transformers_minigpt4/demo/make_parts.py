"""Makes the demo's frozen parts, which ship: `python -m transformers_minigpt4.demo.make_parts OUT`."""

import argparse
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer, Blip2QFormerModel, Blip2VisionModel, LlamaForCausalLM

from .make_language import describe_lists, train_language, train_tokenizer
from .make_vision import POST_LAYERNORM_EPS, VisionParts, train_vision


def save_half(model: torch.nn.Module, folder: Path) -> None:
    """
    Writes a transformers model with weights rounded to fp16, half the bytes, and a config that asks for fp32.

    fp16, not bf16, since it keeps three bits more and no weight here is near its limits.
    """
    model.half().save_pretrained(folder)
    config = AutoConfig.from_pretrained(folder)
    config.dtype = "float32"
    config.save_pretrained(folder)


def save_vision(parts: VisionParts, folder: Path) -> None:
    """Writes `vision_tower/`, `qformer/` and `query_tokens.safetensors` (one tensor `query_tokens`, `(1, 8, 96)`)."""
    save_half(parts.vision_tower, folder / "vision_tower")
    save_half(parts.qformer, folder / "qformer")
    save_file({"query_tokens": parts.query_tokens.detach().half()}, folder / "query_tokens.safetensors")


def load_vision(folder: Path) -> VisionParts:
    """The parts that `save_vision` wrote, in fp32."""
    parts = VisionParts()
    parts.vision_tower = Blip2VisionModel.from_pretrained(folder / "vision_tower", dtype=torch.float32)
    parts.vision_tower.post_layernorm.eps = POST_LAYERNORM_EPS
    parts.qformer = Blip2QFormerModel.from_pretrained(folder / "qformer", dtype=torch.float32)
    parts.query_tokens.data = load_file(folder / "query_tokens.safetensors")["query_tokens"].float()
    return parts.eval()


def main() -> None:
    """Makes the parts and prints what they can do; about 20 minutes of one core, the two parts side by side less."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder to write to")
    parser.add_argument("--only", choices=("vision", "language"), help="make one of the two parts alone")
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
        result = describe_lists(model, AutoTokenizer.from_pretrained(folder), arguments.seed + 1, count=173)
        print(f"language model after rounding: {result}; {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
