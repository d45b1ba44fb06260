"""Measures `convert_checkpoint` against copying the same files: peak resident memory, and seconds.

    python benchmarks/convert.py --folder /var/tmp

Creates files of random weights in the released formats and sizes, copies them with `shutil.copyfile`, and converts
them in a separate process. Both end on the disk (fsync) and start with files that are not in the page cache. Copying
is done before and after, and the faster run is compared with converting. The full size needs 35 GB of disk; --size
tiny shows that it runs. Only Linux reports the peak memory of a process.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Blip2QFormerConfig,
    Blip2VisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from transformers_minigpt4.conversion.weights import Piece, save_pieces


VOCABULARY = 32000
QUERIES = 32
SIZES = {
    "full": {
        "language": {},  # LLaMA-7B is the default
        "vision": {},  # ViT-g
        "qformer": {},  # BERT-base
        "shard": "10GB",
    },
    "tiny": {
        "language": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
        "vision": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
        "qformer": {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4},
        "shard": "4MB",
    },
}
CONVERT = """
import json, sys, time
from transformers_minigpt4.conversion.convert import convert_checkpoint
start = time.perf_counter()
convert_checkpoint(**json.loads(sys.argv[1]))
print(time.perf_counter() - start)
# Not `ru_maxrss`: a process inherits that of the one which started it.
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
# Weights of a normal distribution; one block, repeated, because drawing 8 billion takes longer than writing them.
BLOCK = torch.randn(2**22, generator=torch.Generator().manual_seed(0)) * 0.02


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Weights of `shape` from the block."""
    count = torch.Size(shape).numel()
    block = BLOCK.to(dtype)
    # A copy, because torch.save writes the whole storage of a slice.
    return block.repeat(-(-count // block.numel()))[:count].reshape(shape).clone()


def make_language_model(folder: Path, changes: dict, shard: str) -> None:
    """A LLaMA in bf16 shards, with a tokenizer of as many tokens."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, max_position_embeddings=2048, architectures=["LlamaForCausalLM"], **changes
    )
    config.save_pretrained(folder)
    with torch.device("meta"):
        state = LlamaForCausalLM(config).state_dict()
    pieces = {
        name: Piece(torch.bfloat16, tuple(tensor.shape), lambda s=tensor.shape: random_tensor(s, torch.bfloat16))
        for name, tensor in state.items()
    }
    save_pieces(folder, pieces, dict.fromkeys(pieces, torch.bfloat16), shard)

    words = ["<unk>", "<s>", "</s>", "▁", *(f"word{i}" for i in range(VOCABULARY - 4))]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Metaspace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)


def make_eva(config: Blip2VisionConfig) -> dict[str, torch.Tensor]:
    """`eva_vit_g.pth` in fp16, with one block more than is used."""
    width, hidden, patch = config.hidden_size, config.intermediate_size, config.patch_size
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 1 + (config.image_size // patch) ** 2, width),
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "patch_embed.proj.bias": (width,),
    }
    for block in range(config.num_hidden_layers + 1):
        prefix = f"blocks.{block}."
        for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "attn.q_bias", "attn.v_bias"):
            shapes[prefix + name] = (width,)
        shapes[prefix + "attn.qkv.weight"] = (3 * width, width)
        shapes[prefix + "attn.proj.weight"], shapes[prefix + "attn.proj.bias"] = (width, width), (width,)
        shapes[prefix + "mlp.fc1.weight"], shapes[prefix + "mlp.fc1.bias"] = (hidden, width), (hidden,)
        shapes[prefix + "mlp.fc2.weight"], shapes[prefix + "mlp.fc2.bias"] = (width, hidden), (width,)
    return {name: random_tensor(shape, torch.float16) for name, shape in shapes.items()}


def make_qformer(config: Blip2QFormerConfig) -> dict[str, torch.Tensor]:
    """`blip2_pretrained_flant5xxl.pth` in fp32."""
    width, hidden, encoder = config.hidden_size, config.intermediate_size, config.encoder_hidden_size
    shapes: dict[str, tuple[int, ...]] = {"query_tokens": (1, QUERIES, width)}
    for part in ("weight", "bias"):
        shapes[f"ln_vision.{part}"] = (encoder,)
        shapes[f"Qformer.bert.embeddings.LayerNorm.{part}"] = (width,)
    for layer in range(config.num_hidden_layers):
        linear: dict[str, tuple[int, int]] = {
            "intermediate_query.dense": (hidden, width),
            "output_query.dense": (width, hidden),
        }
        kinds = ["attention"] + ["crossattention"] * (layer % config.cross_attention_frequency == 0)
        for kind in kinds:
            source = width if kind == "attention" else encoder
            linear[f"{kind}.self.query"] = linear[f"{kind}.output.dense"] = (width, width)
            linear[f"{kind}.self.key"] = linear[f"{kind}.self.value"] = (width, source)
        name = f"Qformer.bert.encoder.layer.{layer}."
        for key, shape in linear.items():
            shapes[f"{name}{key}.weight"], shapes[f"{name}{key}.bias"] = shape, (shape[0],)
        for key in [*(f"{kind}.output" for kind in kinds), "output_query"]:
            for part in ("weight", "bias"):
                shapes[f"{name}{key}.LayerNorm.{part}"] = (width,)
    return {name: random_tensor(shape, torch.float32) for name, shape in shapes.items()}


def make_sources(folder: Path, size: dict) -> dict:
    """Writes all files; returns what `convert_checkpoint` takes to read them."""
    vision = Blip2VisionConfig(**size["vision"])
    qformer = Blip2QFormerConfig(encoder_hidden_size=vision.hidden_size, **size["qformer"])
    make_language_model(folder / "llm", size["language"], size["shard"])
    torch.save(make_eva(vision), folder / "eva_vit_g.pth")
    torch.save({"model": make_qformer(qformer)}, folder / "blip2_pretrained_flant5xxl.pth")
    width = LlamaConfig(**size["language"]).hidden_size
    projector = {"llama_proj.weight": random_tensor((width, qformer.hidden_size), torch.float32)}
    projector["llama_proj.bias"] = random_tensor((width,), torch.float32)
    torch.save({"model": projector, "epoch": 4}, folder / "minigpt4.pth")
    return {
        "vision": str(folder / "eva_vit_g.pth"),
        "qformer": str(folder / "blip2_pretrained_flant5xxl.pth"),
        "language_model": str(folder / "llm"),
        "projector": str(folder / "minigpt4.pth"),
        "vision_config": {"num_attention_heads": vision.num_attention_heads},
        "qformer_config": {"num_attention_heads": qformer.num_attention_heads},
    }


def settle(files: list[Path]) -> None:
    """Writes files out and drops them from the page cache."""
    for path in files:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def copy(files: list[Path], target: Path) -> float:
    """Seconds to copy all files, down to the disk."""
    target.mkdir()
    start = time.perf_counter()
    for i, path in enumerate(files):
        shutil.copyfile(path, target / str(i))
        handle = os.open(target / str(i), os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    seconds = time.perf_counter() - start
    shutil.rmtree(target)
    return seconds


def convert(arguments: dict) -> tuple[float, int]:
    """Seconds that the conversion takes, and the largest resident size in bytes of its process, imports included."""
    done = subprocess.run(
        [sys.executable, "-c", CONVERT, json.dumps(arguments)], stdout=subprocess.PIPE, text=True, check=True
    )
    seconds, kibibytes = done.stdout.split()[-2:]
    return float(seconds), int(kibibytes) * 1024


def measure(folder: Path, size: str, dtype: str) -> dict[str, float]:
    """Creates, copies and converts; removes everything again."""
    with tempfile.TemporaryDirectory(dir=folder, prefix="convert-benchmark-") as scratch:
        place = Path(scratch)
        sources = make_sources(place, SIZES[size])
        files = [path for path in place.rglob("*") if path.is_file()]
        copied = []
        for _ in range(2):  # before and after, since the speed of a disk varies
            settle(files)
            copied.append(copy(files, place / "copy"))
            if len(copied) == 1:
                settle(files)
                seconds, peak = convert({**sources, "output": str(place / "out"), "dtype": dtype})
                written = sum(path.stat().st_size for path in (place / "out").iterdir())
                shutil.rmtree(place / "out")
        read = sum(path.stat().st_size for path in files)
    return {
        "read_gb": read / 1e9,
        "written_gb": written / 1e9,
        "copy_seconds": min(copied),
        "slower_copy_seconds": max(copied),
        "convert_seconds": seconds,
        "speed_of_copying": min(copied) / seconds,
        "peak_gb": peak / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where the files go")
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--dtype", default="auto", help="what is stored: auto, bfloat16, float16 or float32")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    figures = measure(options.folder, options.size, options.dtype)
    print("| read | written | copying | converting | speed of copying | peak resident |")
    print("| --- | --- | --- | --- | --- | --- |")
    print(
        "| {read_gb:.1f} GB | {written_gb:.1f} GB | {copy_seconds:.1f} and {slower_copy_seconds:.1f} s "
        "| {convert_seconds:.1f} s | {speed_of_copying:.2f} | {peak_gb:.2f} GB |".format(**figures)
    )
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
