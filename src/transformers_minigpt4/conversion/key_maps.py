"""Names of tensors in every released format, and what a MiniGPT-4 checkpoint calls each: data and a matcher."""

import functools
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass


TOWER = "model.vision_tower."
QFORMER = "model.qformer."
QUERIES = "model.query_tokens"
LANGUAGE = "model.language_model."
PROJECTOR = "model.multi_modal_projector."
HEAD = "lm_head.weight"
EMBEDDING = LANGUAGE + "embed_tokens.weight"
POST_LAYERNORM = TOWER + "post_layernorm."

# A target with such an ending is one third of the rows of a fused query, key and value; a third that no source has is
# zero (the ViT has no key bias).
THIRDS = ("@q", "@k", "@v")

_FIELDS = {"n": r"(?P<n>\d+)", "part": r"(?P<part>weight|bias)", "rest": r"(?P<rest>.+)"}


@dataclass(frozen=True)
class KeyMap:
    """
    Where the tensors of one format go.

    In names, `{n}` means a number, `{part}` `weight` or `bias`, and `{rest}` whatever follows. The first matching name
    counts, those to be ignored before those in use.

    Args:
        name: The format, for error messages.
        used: Name in the source to name in a MiniGPT-4 checkpoint.
        ignored: Names in the source that a MiniGPT-4 checkpoint does not have.
    """

    name: str
    used: dict[str, str]
    ignored: tuple[str, ...] = ()

    def target(self, key: str) -> str | None:
        """The checkpoint's name for `key`, or `None` if it is not used."""
        if self.is_ignored(key):
            return None
        for pattern, target in self.used.items():
            if match := _regex(pattern).fullmatch(key):
                return target.format(**match.groupdict())
        return None

    def is_ignored(self, key: str) -> bool:
        return any(_regex(pattern).fullmatch(key) for pattern in self.ignored)

    def apply(self, keys: Iterable[str], where: str) -> dict[str, str]:
        """
        Maps all keys of a source.

        Args:
            keys: Names in the source.
            where: The source, for the error message.

        Returns:
            `dict[str, str]`: Name in the source to name in the checkpoint, of those that are used.

        Raises:
            ValueError: for keys that are neither used nor ignored, and for two with the same target.
        """
        targets = {key: self.target(key) for key in keys}
        unknown = sorted(key for key, target in targets.items() if target is None and not self.is_ignored(key))
        if unknown:
            raise ValueError(
                f"{where} contains {len(unknown)} tensors that are not known in {self.name}: {shorten(unknown)}. "
                "Nothing is left out silently: check that this is the right file, and of the right kind."
            )
        used = {key: target for key, target in targets.items() if target is not None}
        twice = sorted(target for target, count in Counter(used.values()).items() if count > 1)
        if twice:
            raise ValueError(
                f"{where} contains several tensors for the same name: {shorten(twice)}. Remove one of them."
            )
        return used


@functools.cache
def _regex(pattern: str) -> re.Pattern[str]:
    parts = re.split(r"\{(\w+)\}", pattern)
    return re.compile("".join(_FIELDS[part] if i % 2 else re.escape(part) for i, part in enumerate(parts)))


def shorten(names: list[str], limit: int = 12) -> str:
    """The first of many names, as one line."""
    return ", ".join(names[:limit]) + (f", … and {len(names) - limit} more" if len(names) > limit else "")


_LAYER = TOWER + "encoder.layers.{n}."

# eva_vit_g.pth. It has no `ln_vision`, and its own last norm and head are not used (golden/README.md).
EVA_VIT = KeyMap(
    "EVA-CLIP's eva_vit_g.pth",
    {
        "cls_token": TOWER + "embeddings.class_embedding",
        "pos_embed": TOWER + "embeddings.position_embedding",
        "patch_embed.proj.{part}": TOWER + "embeddings.patch_embedding.{part}",
        "blocks.{n}.norm1.{part}": _LAYER + "layer_norm1.{part}",
        "blocks.{n}.norm2.{part}": _LAYER + "layer_norm2.{part}",
        "blocks.{n}.attn.qkv.weight": _LAYER + "self_attn.qkv.weight",
        "blocks.{n}.attn.q_bias": _LAYER + "self_attn.qkv.bias@q",
        "blocks.{n}.attn.v_bias": _LAYER + "self_attn.qkv.bias@v",
        "blocks.{n}.attn.proj.{part}": _LAYER + "self_attn.projection.{part}",
        "blocks.{n}.mlp.fc1.{part}": _LAYER + "mlp.fc1.{part}",
        "blocks.{n}.mlp.fc2.{part}": _LAYER + "mlp.fc2.{part}",
    },
    ("norm.{part}", "fc_norm.{part}", "head.{part}"),
)

_BERT = "Qformer.bert.encoder.layer.{n}."
_LAVIS_QFORMER_USED = {
    "query_tokens": QUERIES,
    "Qformer.bert.embeddings.LayerNorm.{part}": QFORMER + "layernorm.{part}",
    _BERT + "attention.self.{rest}": QFORMER + "encoder.layer.{n}.attention.attention.{rest}",
    _BERT + "attention.output.{rest}": QFORMER + "encoder.layer.{n}.attention.output.{rest}",
    _BERT + "crossattention.self.{rest}": QFORMER + "encoder.layer.{n}.crossattention.attention.{rest}",
    _BERT + "crossattention.output.{rest}": QFORMER + "encoder.layer.{n}.crossattention.output.{rest}",
    _BERT + "intermediate_query.{rest}": QFORMER + "encoder.layer.{n}.intermediate_query.{rest}",
    _BERT + "output_query.{rest}": QFORMER + "encoder.layer.{n}.output_query.{rest}",
}
_LAVIS_TEXT_BRANCH = (
    "Qformer.bert.embeddings.position_ids",
    "Qformer.bert.embeddings.position_embeddings.weight",
    "Qformer.bert.embeddings.word_embeddings.weight",
    _BERT + "intermediate.dense.{part}",
    _BERT + "output.dense.{part}",
    _BERT + "output.LayerNorm.{part}",
    "Qformer.cls.{rest}",
)

# blip2_pretrained_flant5xxl.pth and its family: Q-Former, queries and `ln_vision`.
LAVIS_QFORMER = KeyMap(
    "BLIP-2's blip2_pretrained_flant5xxl.pth",
    {**_LAVIS_QFORMER_USED, "ln_vision.{part}": POST_LAYERNORM + "{part}"},
    (*_LAVIS_TEXT_BRANCH, "t5_proj.{part}", "opt_proj.{part}", "itm_head.{part}", "temp"),
)

# The authors' checkpoints hold what was trained, and every buffer. Variant (c) trained the Q-Former too, and some
# (`ckpt_with_ln_vision.pth`) hold the LayerNorm after the tower, which then replaces the one of BLIP-2.
AUTHORS_PROJECTOR = KeyMap(
    "the authors' checkpoints of MiniGPT-4",
    {
        "llama_proj.{part}": PROJECTOR + "linear_1.{part}",
        "ln_vision.{part}": POST_LAYERNORM + "{part}",
        **_LAVIS_QFORMER_USED,
    },
    ("Qformer.bert.embeddings.position_ids", "llama_model.model.layers.{n}.self_attn.rotary_emb.inv_freq"),
)
# Entries next to "model" in a file of the authors or of LAVIS.
CHECKPOINT_ENTRIES = ("model", "optimizer", "config", "scaler", "epoch")

# BLIP-2 in transformers. `post_layernorm` is `ln_vision`, which BLIP-2 trained with the Q-Former.
_BLIP2_TOWER_USED = {
    "vision_model.embeddings.{rest}": TOWER + "embeddings.{rest}",
    "vision_model.encoder.{rest}": TOWER + "encoder.{rest}",
}
_BLIP2_QFORMER_USED = {
    "query_tokens": QUERIES,
    "qformer.layernorm.{part}": QFORMER + "layernorm.{part}",
    "qformer.encoder.{rest}": QFORMER + "encoder.{rest}",
    "vision_model.post_layernorm.{part}": POST_LAYERNORM + "{part}",
}
_BLIP2_IGNORED = ("language_model.{rest}", "language_projection.{part}")
BLIP2_TOWER = KeyMap(
    "BLIP-2's vision tower in transformers",
    _BLIP2_TOWER_USED,
    (*_BLIP2_IGNORED, *_BLIP2_QFORMER_USED, "qformer.embeddings.{rest}"),
)
BLIP2_QFORMER = KeyMap(
    "BLIP-2's Q-Former in transformers",
    _BLIP2_QFORMER_USED,
    (*_BLIP2_IGNORED, *_BLIP2_TOWER_USED, "qformer.embeddings.{rest}"),
)

# Any other tower of transformers, alone or in a two-tower model such as SigLIP or CLIP.
TWO_TOWERS = KeyMap(
    "a model with a vision and a text tower in transformers",
    {"vision_model.{rest}": TOWER + "{rest}"},
    (
        "text_model.{rest}",
        "logit_scale",
        "logit_bias",
        "visual_projection.weight",
        "text_projection.weight",
        "vision_model.embeddings.position_ids",
    ),
)
TOWER_ALONE = KeyMap("a vision tower in transformers", {"{rest}": TOWER + "{rest}"}, ("embeddings.position_ids",))

_LANGUAGE_IGNORED = ("model.layers.{n}.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq")
LANGUAGE_MODEL = KeyMap(
    "a causal language model in transformers", {"model.{rest}": LANGUAGE + "{rest}", HEAD: HEAD}, _LANGUAGE_IGNORED
)
# With tied embeddings the head is the embedding, and some files contain it nevertheless.
TIED_LANGUAGE_MODEL = KeyMap(
    "a causal language model with tied embeddings in transformers",
    {"model.{rest}": LANGUAGE + "{rest}"},
    (*_LANGUAGE_IGNORED, HEAD),
)

# LLaVA's authors: `mm_projector.bin` of stage 1, and complete checkpoints, some with their tower.
_LLAVA_PROJECTOR_USED = {
    "model.mm_projector.{part}": PROJECTOR + "{part}",
    "model.mm_projector.0.{part}": PROJECTOR + "linear_1.{part}",
    "model.mm_projector.2.{part}": PROJECTOR + "linear_2.{part}",
}
LLAVA_PROJECTOR = KeyMap("the authors' mm_projector.bin of LLaVA", _LLAVA_PROJECTOR_USED)
_LLAVA_TOWER = "model.vision_tower.vision_tower.vision_model."
LLAVA_LLAMA = KeyMap(
    "the authors' checkpoints of LLaVA",
    {
        **_LLAVA_PROJECTOR_USED,
        _LLAVA_TOWER + "{rest}": TOWER + "{rest}",
        "model.embed_tokens.weight": EMBEDDING,
        "model.layers.{rest}": LANGUAGE + "layers.{rest}",
        "model.norm.weight": LANGUAGE + "norm.weight",
        HEAD: HEAD,
    },
    (*_LANGUAGE_IGNORED, _LLAVA_TOWER + "embeddings.position_ids"),
)
# Ours and transformers', by today's names and those that transformers wrote before.
OUR_LLAVA_PROJECTOR = KeyMap(
    "LLaVA in transformers",
    {
        prefix + ours: theirs
        for prefix in (PROJECTOR, PROJECTOR.removeprefix("model."))
        for ours, theirs in (
            ("{part}", "model.mm_projector.{part}"),
            ("linear_1.{part}", "model.mm_projector.0.{part}"),
            ("linear_2.{part}", "model.mm_projector.2.{part}"),
        )
    },
)
