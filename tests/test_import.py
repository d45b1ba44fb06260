"""What importing the package loads, and that MiniGPT-4 is registered whatever is imported first, in new processes."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import transformers_minigpt4


PACKAGE = Path(transformers_minigpt4.__file__).parent
HEAVY = ("torch", "transformers", "numpy", "PIL", "datasets")

CHECK = """
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.pipelines import PIPELINE_REGISTRY
assert type(AutoConfig.for_model("minigpt4")).__module__ == "transformers_minigpt4.modeling.configuration_minigpt4"
assert MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["minigpt4"] == "MiniGPT4ForConditionalGeneration"
task = PIPELINE_REGISTRY.supported_tasks["image-text-to-text"]
assert task["impl"].__name__ == "MiniGPT4ImageToTextPipeline"
"""


def run(code: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "code",
    [
        "import transformers_minigpt4",
        "import transformers_minigpt4 as m; dir(m); m.__version__; m.__all__",
        "import transformers_minigpt4.utils.files",
    ],
)
def test_importing_the_package_loads_nothing_heavy(code):
    assert run(f"{code}\nimport sys; print([name for name in {HEAVY} if name in sys.modules])") == "[]\n"


def slow(*codes: str) -> list:
    return [pytest.param(code, marks=pytest.mark.slow) for code in codes]


FIRST = [
    "import transformers",
    "from transformers import LlamaForCausalLM",  # imports the tables of the Auto classes half-way through
    *slow(
        "import transformers.pipelines",
        "import trl",
        "import peft",
        "import datasets",
        "from transformers import AutoProcessor",
        "from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    ),
]


@pytest.mark.parametrize("other", FIRST)
def test_registered_where_the_package_comes_first(other):
    run(f"import transformers_minigpt4\n{other}\n{CHECK}")


@pytest.mark.parametrize("other", ["import transformers", "from transformers import AutoModel"])
def test_registered_where_the_package_comes_second(other):
    run(f"{other}\nimport transformers_minigpt4\n{CHECK}")


OWN = [
    "from transformers_minigpt4 import MiniGPT4Config",
    "from transformers_minigpt4.auto import register; register()",  # as vLLM does
    *slow(*(f"import {name}" for name in transformers_minigpt4._AWAITED if name != "transformers")),
]


@pytest.mark.parametrize("own", OWN)
def test_registered_whichever_module_of_ours_comes_first(own):
    run(f"{own}\n{CHECK}")


def test_a_light_module_of_the_processor_loads_no_transformers():
    """Curation's commands look at images without ever loading a model."""
    run("import sys, transformers_minigpt4.processing.image_utils_minigpt4\nassert 'transformers' not in sys.modules")


@pytest.mark.parametrize(
    ("first", "names"),
    [
        # transformers itself cannot be imported by several threads at once.
        ("import transformers_minigpt4, transformers", ["from transformers import AutoModel", "import trl"]),
        ("import transformers_minigpt4", ["from transformers_minigpt4 import MiniGPT4Model"]),
    ],
)
def test_threads_find_it_registered(first, names):
    run(
        f"""
import threading
{first}
failed = []
def check(words):
    try:
        exec(words)
    except BaseException as error:
        failed.append(repr(error))
code = {CHECK!r}
threads = [threading.Thread(target=check, args=(f"{{name}}\\n{{code}}",)) for name in {names!r} * 4]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert not failed, failed
"""
    )


def test_auto_classes_load_a_checkpoint(tiny_checkpoint):
    code = """
import sys, transformers_minigpt4
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1])
processor = AutoProcessor.from_pretrained(sys.argv[1])
pipe = pipeline("image-to-text", model=model, processor=processor)
print(type(model).__module__, type(processor).__name__, type(pipe).__name__)
"""
    found = run(code, tiny_checkpoint).split()
    assert found[0] == "transformers_minigpt4.modeling.modeling_minigpt4"
    assert found[1:] == ["MiniGPT4Processor", "MiniGPT4ImageToTextPipeline"]


def test_a_spawned_process_finds_it_registered(tmp_path):
    script = tmp_path / "spawn.py"
    script.write_text(
        f"""
import multiprocessing, transformers_minigpt4
def child():
{"".join(f"    {line}" + chr(10) for line in CHECK.strip().splitlines())}
if __name__ == "__main__":
    process = multiprocessing.get_context("spawn").Process(target=child)
    process.start()
    process.join()
    assert process.exitcode == 0
"""
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_unknown_names_are_refused_as_usual():
    with pytest.raises(AttributeError, match="has no attribute 'MiniGPT6'"):
        _ = transformers_minigpt4.MiniGPT6
    assert set(transformers_minigpt4.__all__) <= set(dir(transformers_minigpt4))


def test_every_shipped_module_that_loads_transformers_is_awaited():
    """A module that loads transformers is incomplete when the registration is told of it, see `__init__`."""
    for path in (path for room in ("modeling", "processing") for path in (PACKAGE / room).glob("*_*.py")):
        loads = any(
            isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "transformers"
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        )
        awaited = f"transformers_minigpt4.{path.parent.name}.{path.stem}" in transformers_minigpt4._AWAITED
        assert loads == awaited, path.name
