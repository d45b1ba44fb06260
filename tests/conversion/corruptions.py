"""Ways to damage a checkpoint, planted in its weights or its configs; `verify` is measured with them."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from transformers_minigpt4.conversion.key_maps import HEAD, LANGUAGE, PROJECTOR, QFORMER, QUERIES, TOWER


State = dict[str, torch.Tensor]
PARTS = {"tower": TOWER, "qformer": QFORMER, "queries": QUERIES, "projector": PROJECTOR, "head": HEAD}
LAYERS = {"tower": TOWER + "encoder.layers.", "qformer": QFORMER + "encoder.layer.", "language": LANGUAGE + "layers."}


def _names(state: State, part: str, *, matrices: bool = False) -> list[str]:
    return [
        name for name in state if name.startswith(PARTS.get(part, part)) and (not matrices or state[name].ndim > 1)
    ]


def _noise_like(tensor: torch.Tensor, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(tensor.shape, generator=generator)
    deviation = tensor.float().std(unbiased=False) if tensor.numel() > 1 else 0
    return (noise * deviation + tensor.float().mean()).to(tensor.dtype)


def random(part: str, only: str = "") -> Callable[[State], None]:
    """Weights drawn anew with the mean and deviation of each tensor."""

    def change(state: State) -> None:
        for seed, name in enumerate(name for name in _names(state, part) if only in name):
            state[name] = _noise_like(state[name], seed)

    return change


def fresh(part: str) -> Callable[[State], None]:
    """Weights as a new model has them: norms of one, biases of zero."""

    def change(state: State) -> None:
        for seed, name in enumerate(_names(state, part)):
            is_norm = "norm" in name.lower()
            if state[name].ndim < 2:
                state[name] = torch.full_like(state[name], float(is_norm and name.endswith("weight")))
            else:
                state[name] = 0.02 * torch.randn(state[name].shape, generator=torch.Generator().manual_seed(seed))

    return change


def zeros(part: str, only: str = "") -> Callable[[State], None]:
    def change(state: State) -> None:
        for name in (name for name in _names(state, part) if only in name):
            state[name] = torch.zeros_like(state[name])

    return change


def ones(part: str, only: str) -> Callable[[State], None]:
    def change(state: State) -> None:
        for name in (name for name in _names(state, part) if only in name):
            state[name] = torch.full_like(state[name], float(name.endswith("weight")))

    return change


def scaled(part: str, factor: float) -> Callable[[State], None]:
    def change(state: State) -> None:
        for name in _names(state, part, matrices=True):
            state[name] = state[name] * factor

    return change


def shuffled_rows(part: str, only: str = "", dim: int = 0) -> Callable[[State], None]:
    """Rows of the matrices in another order; their biases stay."""

    def change(state: State) -> None:
        for seed, name in enumerate(name for name in _names(state, part, matrices=True) if only in name):
            order = torch.randperm(state[name].shape[dim], generator=torch.Generator().manual_seed(seed))
            state[name] = state[name].index_select(dim, order).contiguous()

    return change


def transposed(part: str, only: str = "") -> Callable[[State], None]:
    """Square matrices the other way round; others read row by row as if they were transposed."""

    def change(state: State) -> None:
        for name in (name for name in _names(state, part, matrices=True) if only in name and state[name].ndim == 2):
            state[name] = state[name].T.reshape(state[name].shape).contiguous()

    return change


def reordered_layers(part: str, order: Callable[[int], list[int]]) -> Callable[[State], None]:
    """Layers in another order, as far as both have a tensor."""

    def change(state: State) -> None:
        prefix, old = LAYERS[part], dict(state)
        count = 1 + max(int(name.removeprefix(prefix).split(".")[0]) for name in old if name.startswith(prefix))
        for to, source in enumerate(order(count)):
            for name in old:
                other = name.replace(f"{prefix}{to}.", f"{prefix}{source}.")
                if name.startswith(f"{prefix}{to}.") and other in old:
                    state[name] = old[other].clone()

    return change


def roles(part: str, order: str, only: str = "") -> Callable[[State], None]:
    """Query, key and value in another order, such as `"kqv"`, in fused and separate tensors."""
    long = {"q": "query", "k": "key", "v": "value"}

    def change(state: State) -> None:
        old = dict(state)
        for name in (name for name in _names(state, part) if only in name):
            if ".qkv." in name:
                thirds = dict(zip("qkv", old[name].chunk(3)))
                state[name] = torch.cat([thirds[letter] for letter in order]).contiguous()
            for to, source in zip("qkv", order):
                other = name.replace(f".{long[to]}.", f".{long[source]}.")
                if f".{long[to]}." in name and old[other].shape == old[name].shape:
                    state[name] = old[other].clone()

    return change


def shuffled_positions(state: State) -> None:
    name = TOWER + "embeddings.position_embedding"
    order = torch.randperm(state[name].shape[1] - 1, generator=torch.Generator().manual_seed(0)) + 1
    state[name] = torch.cat([state[name][:, :1], state[name][:, order]], dim=1).contiguous()


def shifted_positions(state: State) -> None:
    name = TOWER + "embeddings.position_embedding"
    state[name] = state[name].roll(1, dims=1).contiguous()


def flipped_channels(state: State) -> None:
    name = TOWER + "embeddings.patch_embedding.weight"
    state[name] = state[name].flip(1).contiguous()


def mirrored_patches(state: State) -> None:
    name = TOWER + "embeddings.patch_embedding.weight"
    state[name] = state[name].transpose(2, 3).contiguous()


def swapped(a: int, b: int) -> Callable[[int], list[int]]:
    def order(count: int) -> list[int]:
        layers = list(range(count))
        layers[a], layers[b] = layers[b], layers[a]
        return layers

    return order


STATE_CORRUPTIONS: dict[str, Callable[[State], None]] = {
    # tower
    "tower: all random": random("tower"),
    "tower: all fresh": fresh("tower"),
    "tower: one layer random": random("tower", "layers.1."),
    "tower: last layer random": random("tower", "layers.2."),
    "tower: first and last layer swapped": reordered_layers("tower", swapped(0, -1)),
    "tower: neighboring layers swapped": reordered_layers("tower", swapped(1, 2)),
    "tower: layers reversed": reordered_layers("tower", lambda n: list(range(n))[::-1]),
    "tower: off by one": reordered_layers("tower", lambda n: [*range(1, n), n - 1]),
    "tower: off by one downwards": reordered_layers("tower", lambda n: [0, *range(n - 1)]),
    "tower: first layer everywhere": reordered_layers("tower", lambda n: [0] * n),
    "tower: k q v": roles("tower", "kqv"),
    "tower: v k q": roles("tower", "vkq"),
    "tower: q v k": roles("tower", "qvk"),
    "tower: k v q": roles("tower", "kvq"),
    "tower: q/k/v of one layer": roles("tower", "vkq", "layers.1."),
    "tower: qkv weights only": roles("tower", "vkq", "qkv.weight"),
    "tower: zeros": zeros("tower"),
    "tower: MLPs zero": zeros("tower", "mlp."),
    "tower: rows shuffled": shuffled_rows("tower", "layers."),
    "tower: fc2 columns shuffled": shuffled_rows("tower", "fc2", 1),
    "tower: attention transposed": transposed("tower", "projection"),
    "tower: MLPs read transposed": transposed("tower", "mlp"),
    "tower: x10": scaled("tower", 10),
    "tower: x0.1": scaled("tower", 0.1),
    "tower: norms of one": ones("tower", "norm"),
    "tower: last norm of one": ones("tower", "post_layernorm"),
    "tower: biases dropped": zeros("tower", ".bias"),
    "tower: positions shuffled": shuffled_positions,
    "tower: positions zero": zeros("tower", "position_embedding"),
    "tower: positions off by one": shifted_positions,
    "tower: channels flipped": flipped_channels,
    "tower: patches mirrored": mirrored_patches,
    "tower: patch embedding random": random("tower", "patch_embedding.weight"),
    "tower: class token zero": zeros("tower", "class_embedding"),
    # Q-Former
    "qformer: all random": random("qformer"),
    "qformer: all fresh": fresh("qformer"),
    "qformer: one layer random": random("qformer", "layer.1."),
    "qformer: last layer random": random("qformer", "layer.3."),
    "qformer: layers 0 and 2 swapped": reordered_layers("qformer", swapped(0, 2)),
    "qformer: first and last layer swapped": reordered_layers("qformer", swapped(0, -1)),
    "qformer: layers reversed": reordered_layers("qformer", lambda n: list(range(n))[::-1]),
    "qformer: off by one": reordered_layers("qformer", lambda n: [*range(1, n), n - 1]),
    "qformer: k q v": roles("qformer", "kqv"),
    "qformer: v k q": roles("qformer", "vkq"),
    "qformer: q v k": roles("qformer", "qvk"),
    "qformer: q/k/v of self-attention": roles("qformer", "kqv", ".attention.attention."),
    "qformer: q/k/v of cross-attention": roles("qformer", "kqv", ".crossattention."),
    "qformer: zeros": zeros("qformer"),
    "qformer: cross-attention zero": zeros("qformer", "crossattention"),
    "qformer: cross-attention random": random("qformer", "crossattention"),
    "qformer: rows shuffled": shuffled_rows("qformer"),
    "qformer: attention transposed": transposed("qformer", "attention"),
    "qformer: x10": scaled("qformer", 10),
    "qformer: norms of one": ones("qformer", "LayerNorm"),
    "qformer: biases dropped": zeros("qformer", ".bias"),
    # queries
    "queries: zero": zeros("queries"),
    "queries: random": random("queries"),
    "queries: shuffled": lambda state: state.update({QUERIES: state[QUERIES].flip(1).contiguous()}),
    "queries: all alike": lambda state: state.update(
        {QUERIES: state[QUERIES][:, :1].expand_as(state[QUERIES]).clone()}
    ),
    "queries: x10": scaled("queries", 10),
    "queries: read transposed": lambda state: state.update(
        {QUERIES: state[QUERIES].transpose(1, 2).reshape(state[QUERIES].shape).contiguous()}
    ),
    # projector
    "projector: random": random("projector"),
    "projector: zeros": zeros("projector"),
    "projector: rows shuffled": shuffled_rows("projector"),
    "projector: columns shuffled": shuffled_rows("projector", dim=1),
    "projector: read transposed": transposed("projector"),
    "projector: x10": scaled("projector", 10),
    "projector: bias dropped": zeros("projector", ".bias"),
    "projector: negative": scaled("projector", -1),
    # head and language model
    "head: random": random("head"),
    "head: zeros": zeros("head"),
    "head: rows shuffled": shuffled_rows("head"),
    "head: read transposed": transposed("head"),
    "head: x10": scaled("head", 10),
    "language: layers reversed": reordered_layers("language", lambda n: list(range(n))[::-1]),
    "language: neighboring layers swapped": reordered_layers("language", swapped(1, 2)),
}


def edit_state(folder: Path, change: Callable[[State], None]) -> None:
    path = folder / "model.safetensors"
    state = load_file(path)
    change(state)
    save_file(state, path, metadata={"format": "pt"})


def edit_image_processor(folder: Path, **changes) -> None:
    path = folder / "processor_config.json"
    config = json.loads(path.read_text())
    config["image_processor"].update(changes)
    path.write_text(json.dumps(config))


def drop_last_layer(folder: Path) -> None:
    """The tower ends one layer early, in config and weights."""
    config = json.loads((folder / "config.json").read_text())
    last = config["vision_config"]["num_hidden_layers"] - 1
    config["vision_config"]["num_hidden_layers"] = last
    (folder / "config.json").write_text(json.dumps(config))

    def change(state: State) -> None:
        for name in [name for name in state if name.startswith(f"{LAYERS['tower']}{last}.")]:
            del state[name]

    edit_state(folder, change)


FOLDER_CORRUPTIONS: dict[str, Callable[[Path], None]] = {
    "images: mean and deviation 0.5": lambda folder: edit_image_processor(
        folder, image_mean=[0.5, 0.5, 0.5], image_std=[0.5, 0.5, 0.5]
    ),
    "images: not normalized": lambda folder: edit_image_processor(folder, do_normalize=False),
    "images: not rescaled": lambda folder: edit_image_processor(folder, do_rescale=False),
    "images: mean and deviation swapped": lambda folder: edit_image_processor(
        folder, image_mean=[0.26862954, 0.26130258, 0.27577711], image_std=[0.48145466, 0.4578275, 0.40821073]
    ),
    "tower: last layer missing": drop_last_layer,
}
