"""Losses, logits, gradients and answers of the authors' LLaVA, and checkpoints of ours."""

import pytest
import torch
from golden_llava import GOLDEN, IGNORED, IMAGE_MARK, build, expanded, image, our_name, recorded, tensors
from transformers import AutoModelForImageTextToText, LlavaForConditionalGeneration
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from transformers_minigpt4 import LlavaLinearForConditionalGeneration
from transformers_minigpt4.training.loss import keep_image_token_out


CASES = sorted(name for name, case in recorded("model")["cases"].items() if "loss" in case)
CHATS = sorted(name for name, case in recorded("model")["cases"].items() if "new_ids" in case)
CONFIGS = {
    "last_layer_plain": {"vision_feature_layer": -1},
    "cls_patch_plain": {"vision_feature_select_strategy": "full"},
}


def pixels(names: list[str], mode: str = "square") -> torch.Tensor:
    known = recorded("model")["preprocess_images"]
    prepared = tensors()[f"preprocess.{mode}"]
    return torch.stack([prepared[known.index(name)] for name in names])


def model_of(name: str):
    projector, case = name.split(".", 1)
    model = build(projector, **CONFIGS.get(case, {}))
    if type(model) is LlavaForConditionalGeneration:
        keep_image_token_out(model)
    return model


def inputs_of(name: str, model) -> dict[str, torch.Tensor]:
    case = recorded("model")["cases"][name]
    ids, labels = tensors()[f"{name}.input_ids"], tensors()[f"{name}.input_labels"]
    # Pads are ids that only follow; the recorded mask is the one after images are put in.
    limit = case["tokenizer_model_max_length"]
    each = model.config.image_seq_length + (model.config.vision_feature_select_strategy == "full")
    inputs = {
        "input_ids": expanded(ids, ids, each, model.config.image_token_id)[:, :limit],
        "labels": expanded(labels, ids, each, None)[:, :limit],
        "attention_mask": tensors()[f"{name}.attention_mask"].long(),
    }
    length = inputs["attention_mask"].shape[1]
    inputs["input_ids"], inputs["labels"] = inputs["input_ids"][:, :length], inputs["labels"][:, :length]
    shown = [file for file in case["images"] if file != "zeros"]
    return {**inputs, "pixel_values": pixels(shown)}


@pytest.mark.parametrize("name", CASES)
def test_loss_logits_and_gradients_equal_the_authors(name):
    case = recorded("model")["cases"][name]
    model = model_of(name)
    inputs = inputs_of(name, model)
    assert torch.equal(inputs["labels"], tensors()[f"{name}.labels"].long())
    outputs = model(**inputs)
    torch.testing.assert_close(outputs.loss, tensors()[f"{name}.loss"][0], atol=3e-6, rtol=0)
    learned = inputs["labels"][:, 1:] != IGNORED
    assert int(learned.sum()) == case["supervised"]
    logits = outputs.logits[:, :-1][learned][:8, :-1]
    torch.testing.assert_close(logits, tensors()[f"{name}.logits_supervised"], atol=1e-5, rtol=0)
    if "grad_norms" not in case:
        return
    outputs.loss.backward()
    parameters = dict(model.named_parameters())
    trained = {name: parameters[our_name(name)].grad for name in case["grad_norms"]}
    assert case["trains"] != "stage2" or len(trained) == sum("vision_tower" not in n for n in parameters)
    vocabulary = parameters["lm_head.weight"].shape[0] - 1
    for theirs, norm in case["grad_norms"].items():
        found = trained[theirs][:vocabulary] if trained[theirs].shape[0] == vocabulary + 1 else trained[theirs]
        assert found.norm().item() == pytest.approx(norm, rel=1e-5), theirs
        exact = tensors().get(f"{name}.grad.{theirs}")
        if exact is not None:
            assert (found - exact).norm() <= 1e-5 * exact.norm(), theirs


@pytest.mark.parametrize("projector", ["linear", "mlp2x_gelu"])
def test_image_features_equal_the_authors(projector):
    features = build(projector).get_image_features(pixels(recorded("model")["vision_images"])).pooler_output
    torch.testing.assert_close(torch.stack(features), tensors()[f"{projector}.image_features"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", CHATS)
def test_greedy_answers_equal_the_authors(name):
    case = recorded("model")["cases"][name]
    model = model_of(name)
    ids = torch.tensor([case["input_ids"]])
    ids = expanded(ids, ids, model.config.image_seq_length, model.config.image_token_id)
    options = {"pixel_values": pixels([case["image"]]), "attention_mask": torch.ones_like(ids)}
    first = model(input_ids=ids, **options).logits[0, -1, :-1]
    torch.testing.assert_close(first, tensors()[f"{name}.first_logits"], atol=1e-5, rtol=0)
    new = model.generate(ids, **options, do_sample=False, max_new_tokens=len(case["new_ids"]), eos_token_id=[])
    assert new[0, ids.shape[1] :].tolist() == case["new_ids"]


@pytest.mark.parametrize("mode", ["square", "pad"])
def test_prepared_images_equal_the_authors(mode):
    processor = LlavaImageProcessorPil.from_pretrained(GOLDEN / "clip", do_pad=mode == "pad")
    names = recorded("model")["preprocess_images"]
    found = processor([image(name) for name in names], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(found, tensors()[f"preprocess.{mode}"], atol=1e-6, rtol=0)


def test_marks_are_where_images_are():
    """The cases would prove little if none of them had two images, an image in a later turn, or none."""
    ids = {name: tensors()[f"{name}.input_ids"] for name in CASES}
    counts = {int(count) for rows in ids.values() for count in (rows == IMAGE_MARK).sum(1)}
    assert {0, 1, 2} <= counts


def test_checkpoint_loads_by_the_auto_classes_and_brings_its_code(tmp_path):
    model = build("linear", vision_feature_layer=-1)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert isinstance(loaded, LlavaLinearForConditionalGeneration) and loaded.config.vision_feature_layer == -1
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), atol=0, rtol=0)
    assert {path.name for path in tmp_path.glob("*.py")} == {
        "configuration_llava.py",
        "kept_positions_minigpt4.py",
        "modeling_llava.py",
    }
