"""
The model for lmms-eval, against the parts of its interface that a model meets.

Where lmms-eval is installed these are its own classes. Elsewhere this file provides stand-ins for the three that
`evaluation/lmms_eval_model.py` and the entry point import (as in lmms-eval 0.7.3), because its sixty dependencies
conflict with the package's.
"""

import importlib
import importlib.util
import subprocess
import sys
import types
from dataclasses import dataclass, field
from typing import Any

import pytest
from PIL import Image

from transformers_minigpt4.evaluation import lmms_eval


INSTALLED = importlib.util.find_spec("lmms_eval") is not None


def stand_in() -> dict[str, types.ModuleType]:
    class Lmms:
        is_simple = True

        def __init__(self):
            self._rank, self._world_size = 0, 1
            self.cache_hook = types.SimpleNamespace(add_partial=lambda attr, request, answer: None)
            self.task_dict = {}

        @classmethod
        def create_from_arg_string(cls, text, more=None):
            arguments = dict(part.split("=", 1) for part in text.split(",") if part)
            return cls(**arguments, **{key: value for key, value in (more or {}).items() if value is not None})

    @dataclass
    class Instance:
        request_type: str
        arguments: tuple
        idx: int
        metadata: dict[str, Any] = field(default_factory=dict)

        @property
        def args(self):
            return self.arguments

    @dataclass(frozen=True)
    class ModelManifest:
        model_id: str
        simple_class_path: str | None = None
        chat_class_path: str | None = None
        aliases: tuple[str, ...] = ()

    modules = {
        name: types.ModuleType(name)
        for name in (
            *("lmms_eval", "lmms_eval.api", "lmms_eval.api.model", "lmms_eval.api.instance"),
            *("lmms_eval.models", "lmms_eval.models.registry_v2"),
        )
    }
    modules["lmms_eval.api.model"].lmms = Lmms
    modules["lmms_eval.api.instance"].Instance = Instance
    modules["lmms_eval.models.registry_v2"].ModelManifest = ModelManifest
    return modules


@pytest.fixture(scope="module")
def adapter():
    name = "transformers_minigpt4.evaluation.lmms_eval_model"
    with pytest.MonkeyPatch.context() as patch:
        if not INSTALLED:
            for module, content in stand_in().items():
                patch.setitem(sys.modules, module, content)
        yield importlib.import_module(name)
        sys.modules.pop(name)


@pytest.fixture(scope="module")
def model(adapter, tiny_checkpoint):
    made = adapter.ImageTextToTextModel.create_from_arg_string(
        f"pretrained={tiny_checkpoint}", {"batch_size": 2, "max_batch_size": None, "device": "cpu"}
    )
    documents = [
        {"images": [Image.new("RGB", (30 + 5 * i, 40), (40 * i, 90, 200))], "text": "word " * (1 + i)}
        for i in range(5)
    ]
    documents.append({"images": [], "text": "no image"})
    made.task_dict = {"tiny": {"test": documents}}
    return made


def request(adapter, model, number, settings=None, task="tiny"):
    text = model.task_dict[task]["test"][number]["text"]
    arguments = (
        f"<image>\n{text}",
        settings or {"max_new_tokens": 4},
        lambda doc: doc["images"],
        number,
        task,
        "test",
    )
    return adapter.Instance("generate_until", arguments, 0, {"task": task, "doc_id": number, "repeats": 1})


def test_the_manifest_names_the_class(adapter):
    manifest = lmms_eval.manifest()
    module, _, name = manifest.simple_class_path.rpartition(".")
    kind = getattr(importlib.import_module(module), name)
    assert manifest.model_id == "minigpt4" and issubclass(kind, adapter.lmms) and kind.is_simple


def test_the_entry_point_loads_no_torch():
    code = "import sys, transformers_minigpt4.evaluation.lmms_eval; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_answers_come_in_order_whatever_the_batches(adapter, model):
    requests = [request(adapter, model, number) for number in (3, 0, 5, 4, 1, 2)]
    together = model.generate_until(requests)
    alone = [model.generate_until([one])[0] for one in requests]
    assert together == alone and all(isinstance(text, str) for text in together)
    assert len(set(together)) > 1


def test_settings_of_tasks(adapter, model):
    assert adapter._generation({"temperature": 0, "top_p": 1.0, "num_beams": 1, "max_new_tokens": 7}) == {
        "do_sample": False,
        "num_beams": 1,
        "repetition_penalty": 1.0,
        "max_new_tokens": 7,
    }
    sampled = adapter._generation({"temperature": 0.7, "top_p": 0.9, "image_aspect_ratio": "pad"})
    assert sampled == {"temperature": 0.7, "top_p": 0.9, "do_sample": True, "max_new_tokens": 300}
    assert adapter._generation({"temperature": 0.7, "do_sample": False})["do_sample"] is False
    (whole,) = model.generate_until([request(adapter, model, 0, {"max_new_tokens": 6})])
    stop = whole[len(whole) // 2 : len(whole) // 2 + 2]
    (cut,) = model.generate_until([request(adapter, model, 0, {"max_new_tokens": 6, "until": stop})])
    assert cut == whole[: whole.index(stop)].strip()


def test_what_it_cannot_do(adapter, model):
    model.task_dict["clips"] = {"test": [{"images": ["clip.mp4"], "text": "what?"}]}
    with pytest.raises(ValueError, match="the task clips has a str, but the model takes only images"):
        model.generate_until([request(adapter, model, 0, task="clips")])
    for method in (model.loglikelihood, model.generate_until_multi_round):
        with pytest.raises(NotImplementedError, match="not supported; choose one"):
            method([])
