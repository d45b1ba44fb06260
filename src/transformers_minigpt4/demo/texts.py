"""What people would write about the toy world's images: web captions, detailed descriptions, questions."""

import random

from .world import Scene


# The authors' four instructions of stage 2 (Vision-CAIR/MiniGPT-4, `prompts/alignment.txt`).
INSTRUCTIONS = (
    "Describe this image in detail.",
    "Take a look at this image and describe what you notice.",
    "Please provide a detailed description of the picture.",
    "Could you describe the contents of this image for me?",
)
# The prompts of the paper's Tables 3 and 5 and of its curation that ask for a detailed description.
DETAIL_PROMPTS = (
    "Describe the image in detail.",
    "Please describe this image as detailed as possible.",
    "Describe this image in detail. Give as many details as possible. Say everything you see.",
)
SHORT_PROMPT = "Please describe the image shortly and precisely, in less than 20 words."

# The authors' prompt formats; `{image}` is the place of the image.
IMAGE_TOKEN = "<ImageHere>"
STAGE_2_TEMPLATE = "###Human: <Img>{image}</Img> {text} ###Assistant: "
SYSTEM = (
    "Give the following image: <Img>ImageContent</Img>. You will be able to see the image once I provide it to you. "
    "Please answer my questions."
)

_BEFORE = ("", "", "", "", "a", "one", "photo of a", "picture of a", "free clip art", "simple", "the", "cute", "my")
_AFTER = ("", "", "", "", "icon", "clip art", "stock photo", "on a plain background", "free download", "wallpaper")
_OPENINGS = (
    "The picture shows a {size} {colour} {shape}.",
    "The image shows a {colour} {shape} that is {size}.",
    "There is a {size} {colour} {shape} in this picture.",
    "This image contains a single {colour} {shape}, which is {size}.",
    "In the image, we can see a {size} {shape} that is {colour}.",
)
_PLACES = (
    "It is in the {place} of the image.",
    "It lies in the {place} of the picture.",
    "The {shape} sits in the {place} of the image.",
    "We find it in the {place}.",
)
_BACKGROUNDS = (
    "The background is plain.",
    "Around it there is only a plain background.",
    "Behind it, the background has one soft tone.",
)
_ENDINGS = (
    "There is nothing else in the picture.",
    "Nothing else can be seen.",
    "The overall impression is simple and calm.",
    "The edges of the {shape} are clear.",
)
_SHORT = (
    "A {size} {colour} {shape} in the {place} of the image.",
    "The image shows a {size} {colour} {shape} in the {place}.",
    "In the {place} there is a {size} {colour} {shape}.",
)
_QUESTIONS = {
    "What is in the picture?": ("A {colour} {shape}.", "There is a {colour} {shape} in the picture."),
    "What color is it?": ("It is {colour}.", "The {shape} is {colour}."),
    "What color is the shape?": ("It is {colour}.", "The {shape} is {colour}."),
    "What shape is it?": ("It is a {shape}.", "The shape is a {shape}."),
    "How large is it?": ("It is {size}.", "The {shape} is {size}."),
    "Is it large or small?": ("It is {size}.", "The {shape} is {size}."),
    "Where is it?": ("It is in the {place} of the image.", "In the {place}."),
    "Where is the shape?": ("It is in the {place} of the image.", "In the {place}."),
}
QUESTIONS = tuple(_QUESTIONS)


def web_caption(scene: Scene, rng: random.Random) -> str:
    """
    A short noisy caption as alternative text on the web, which seldom says how large a thing is or where.

    This is what stage 1 cannot teach and stage 2 adds: captions that name a place are too few to learn places from.
    """
    named = rng.choice(("colour shape",) * 30 + ("size shape", "shape place"))
    phrase = " ".join(getattr(scene, attribute) for attribute in named.split())
    return " ".join(part for part in (rng.choice(_BEFORE), phrase, rng.choice(_AFTER)) if part)


def detailed_description(scene: Scene, rng: random.Random) -> str:
    """Two to four sentences that name all four attributes."""
    sentences = [rng.choice(_OPENINGS), rng.choice(_PLACES)]
    extra = rng.choice(((), (_BACKGROUNDS,), (_ENDINGS,), (_BACKGROUNDS, _ENDINGS), (_BACKGROUNDS, _ENDINGS)))
    sentences += [rng.choice(choices) for choices in extra]
    return _fill(" ".join(sentences), scene)


def short_description(scene: Scene, rng: random.Random) -> str:
    """One sentence of less than 20 words that names all four attributes."""
    return _fill(rng.choice(_SHORT), scene)


def answer(question: str, scene: Scene, rng: random.Random) -> str:
    """The answer to one of `QUESTIONS`."""
    return _fill(rng.choice(_QUESTIONS[question]), scene)


def _fill(text: str, scene: Scene) -> str:
    text = text.format(colour=scene.colour, shape=scene.shape, size=scene.size, place=scene.place)
    return text.replace("a orange", "an orange").replace("A orange", "An orange")
