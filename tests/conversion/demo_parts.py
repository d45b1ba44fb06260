"""The demo's trained parts, the only ones in the repository, as sources for `convert`."""

from pathlib import Path

from released_files import t5_config
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    Blip2Config,
    Blip2ForConditionalGeneration,
    BlipImageProcessorPil,
)


BASE = Path(__file__).parents[2] / "src" / "transformers_minigpt4" / "demo" / "base"


def save_demo_blip2(folder: Path) -> None:
    """A BLIP-2 with the demo's tower, Q-Former and queries, and a T5 of random weights."""
    queries = load_file(BASE / "query_tokens.safetensors")
    config = Blip2Config(
        vision_config=AutoConfig.from_pretrained(BASE / "vision_tower").to_dict(),
        qformer_config=AutoConfig.from_pretrained(BASE / "qformer").to_dict(),
        text_config=t5_config().to_dict(),
        num_query_tokens=queries["query_tokens"].shape[1],
    )
    model = Blip2ForConditionalGeneration(config)
    state = {f"vision_model.{name}": tensor for name, tensor in load_file(_weights("vision_tower")).items()}
    state |= {f"qformer.{name}": tensor for name, tensor in load_file(_weights("qformer")).items()}
    missing, unexpected = model.load_state_dict({**state, **queries}, strict=False)
    assert not unexpected and all(name.startswith(("language_model.", "language_projection.")) for name in missing)
    model.save_pretrained(folder)
    BlipImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(folder)


def _weights(part: str) -> Path:
    return BASE / part / "model.safetensors"
