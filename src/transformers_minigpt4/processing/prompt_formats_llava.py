"""
LLaVA's prompt formats: how a conversation is written for training and in a chat, and what of it is learned.

System texts, roles and separators are quoted from `llava/conversation.py` and `llava/train/train.py` of
haotian-liu/LLaVA, commit c121f0432da27facab705978f83c4ada465e46fd, Apache-2.0.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias


Turn: TypeAlias = tuple[str, str]  # role and text; the text has the image marks in front
Span: TypeAlias = tuple[int, int]  # first character, and one after the last
IMAGE = "<image>"  # the authors' mark, and the image token of LLaVA's processors
_USER, _ASSISTANT = "user", "assistant"

_HELPFUL = "The assistant gives helpful, detailed, and polite answers to the {}'s questions."
_HUMAN = "A chat between a curious human and an artificial intelligence assistant. " + _HELPFUL.format("human")
_CURIOUS_USER = "A chat between a curious user and an artificial intelligence assistant. "
_VISUAL = (
    "able to understand the visual content that the user provides, and assist the user with a variety of tasks using "
    "natural language."
)
_TAGGED = (
    f"{_CURIOUS_USER}The assistant is {_VISUAL}The visual content will be provided with the following format: "
    "<Image>visual content</Image>."
)


class PromptFormat(NamedTuple):
    """
    A named format.

    Args:
        style: `single`, `two` or `llama_2`: how turns are written.
        system: The system text of conversations that bring none.
        tagged: Whether training writes images as `<Image><image></Image>`, as the authors' `mmtag` versions do.
    """

    style: str
    system: str
    tagged: bool = False


# By our names; the authors' `--version` is the same without `llava_`, but for LLaMA-2's, which has it too.
PROMPT_FORMATS: Mapping[str, PromptFormat] = {
    "llava_v0": PromptFormat("single", _HUMAN),
    "llava_v1": PromptFormat("two", _CURIOUS_USER + _HELPFUL.format("user")),
    "llava_v0_mmtag": PromptFormat("single", _TAGGED, tagged=True),
    "llava_v1_mmtag": PromptFormat("two", _TAGGED, tagged=True),
    "llava_llama_2": PromptFormat("llama_2", f"You are a helpful language and vision assistant. You are {_VISUAL}"),
}
_ROLES = {"single": ("Human", "Assistant"), "two": ("USER", "ASSISTANT"), "llama_2": ("[INST]", "[/INST]")}


class Written(NamedTuple):
    """
    A conversation as training reads it.

    Args:
        text: Everything, with `<image>` for each image.
        learned: Characters that are learned, in order.
        fault: Why the rest, from `good` on, cannot be lined up with its answers; `None` if all can.
        good: Characters in front of the fault; all of them without one.
    """

    text: str
    learned: list[Span]
    fault: str | None
    good: int


def write(name: str, turns: Sequence[Turn], system: str | None = None) -> Written:
    """
    Writes a conversation as the authors' training does, with what is learned of it.

    Of `llava_v0` these are the assistant's turns with their role, and the `###` that opens a question, which ends the
    answer before; of the others the answers with the `</s>` that ends them. A first turn by the assistant is left out,
    but for `llava_v0`, which takes turns in any order.

    Their script masks a conversation in which it does not find the answers again: empty ones, a question without
    answer, and texts that contain the assistant's role or `</s>`. Such a conversation has a `fault` here.

    Args:
        name: One of `PROMPT_FORMATS`.
        turns: Roles and texts; no system message.
        system: In place of the format's.

    Raises:
        ValueError: for roles out of order, where the authors' script fails.
    """
    prompt_format = PROMPT_FORMATS[name]
    system = prompt_format.system if system is None else system
    if prompt_format.style == "single":
        return _write_single(system, turns)
    if turns and turns[0][0] == _ASSISTANT:
        turns = turns[1:]
    roles = [role for role, _ in turns]
    if not turns or roles != [(_USER, _ASSISTANT)[place % 2] for place in range(len(turns))]:
        raise ValueError(f"roles are user and assistant in turn, not {roles!r:.120}")
    if prompt_format.style == "two":
        return _write_two(system, turns)
    return _write_llama_2(system, turns)


def _write_single(system: str, turns: Sequence[Turn]) -> Written:
    roles = dict(zip((_USER, _ASSISTANT), _ROLES["single"]))
    text, learned = f"{system}\n\n", []
    for role, said in turns:
        opening = len(text)
        text += f"### {roles[role]}: {said}\n"
        learned.append((opening, len(text) if role == _ASSISTANT else opening + len("###")))
    text += "### "
    learned.append((len(text) - len("### "), len(text)))
    return Written(text, learned, None, len(text))


def _write_two(system: str, turns: Sequence[Turn]) -> Written:
    text = system + " "
    for place, (_, said) in enumerate(turns):
        role, end = _ROLES["two"][place % 2], (" ", "</s>")[place % 2]
        text += f"{role}: {said}{end}" if said else f"{role}:"
    return _line_up(text, " ASSISTANT: ")


def _write_llama_2(system: str, turns: Sequence[Turn]) -> Written:
    if not turns[0][1]:
        raise ValueError("the first question is empty")
    text = ""
    for place, (_, said) in enumerate(turns):
        if not said:
            continue
        if place == 0 and system:
            said = f"<<SYS>>\n{system}\n<</SYS>>\n\n{said}"
        text += f" {said} </s>" if place % 2 else f"<s>[INST] {said} [/INST]"
    return _line_up(text.removeprefix("<s>"), "[/INST] ")  # the tokenizer puts the first <s> in front itself


def _line_up(text: str, mark: str) -> Written:
    """Finds the answers, which `mark` opens and `</s>` ends, as the authors' script does: round by round."""
    learned: list[Span] = []
    start = 0
    while start < len(text):
        end = text.find("</s>", start)
        stop = len(text) if end < 0 else end
        found = text.count(mark, start, stop)
        if found != 1 or end < 0:
            return Written(text, learned, _fault(mark.strip(), found, end), start)
        # The space after the role belongs to the answer's first token.
        learned.append((text.index(mark, start) + len(mark) - 1, end + len("</s>")))
        start = end + len("</s>")
    return Written(text, learned, None, len(text))


def _fault(role: str, found: int, end: int) -> str:
    if found > 1:
        return f"a text contains {role!r}, which opens answers in this prompt format"
    if end < 0:
        return "the last question has no answer"
    return "a text contains '</s>', which ends answers in this prompt format, or a question is empty"


_CONTENT = """\
{%- macro render(message) -%}
    {%- if message.content is string -%}
        {{- message.content -}}
    {%- else -%}
        {%- set texts = message.content | selectattr('type', 'equalto', 'text') | map(attribute='text') | list -%}
        {%- for part in message.content if part.type == 'image' -%}{{- IMAGE + '\\n' -}}{%- endfor -%}
        {{- texts | join(' ') -}}
    {%- endif -%}
{%- endmacro -%}
{%- if messages and messages[0].role == 'system' -%}
    {%- set system = render(messages[0]) -%}
    {%- set turns = messages[1:] -%}
{%- else -%}
    {%- set system = SYSTEM -%}
    {%- set turns = messages -%}
{%- endif -%}
"""
_UNKNOWN_ROLE = """\
    {%- else -%}
        {{- raise_exception('Unknown role ' + message.role + '. Use system (first only), user and assistant.') -}}
    {%- endif -%}
{%- endfor -%}
"""
_STYLES = {
    "single": """\
{{- system + '###' -}}
{%- for message in turns -%}
    {%- if message.role == 'user' -%}
        {{- 'Human: ' + render(message) + '###' -}}
    {%- elif message.role == 'assistant' -%}
        {{- 'Assistant: ' -}}{%- generation -%}{{- render(message) + '###' -}}{%- endgeneration -%}
"""
    + _UNKNOWN_ROLE
    + "{%- if add_generation_prompt -%}{{- 'Assistant:' -}}{%- endif -%}\n",
    "two": """\
{{- system + ' ' -}}
{%- for message in turns -%}
    {%- if message.role == 'user' -%}
        {{- 'USER: ' + render(message) + ' ' -}}
    {%- elif message.role == 'assistant' -%}
        {{- 'ASSISTANT: ' -}}{%- generation -%}{{- render(message) + eos_token -}}{%- endgeneration -%}
"""
    + _UNKNOWN_ROLE
    + "{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}\n",
    # The tokenizer puts the first <s> in front.
    "llama_2": """\
{%- for message in turns -%}
    {%- if message.role == 'user' -%}
        {%- if not loop.first -%}{{- bos_token -}}{%- endif -%}
        {{- '[INST] ' -}}
        {%- if loop.first and system -%}{{- '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' -}}{%- endif -%}
        {{- render(message) + ' [/INST]' -}}
    {%- elif message.role == 'assistant' -%}
        {{- ' ' -}}{%- generation -%}{{- render(message) + ' ' + eos_token -}}{%- endgeneration -%}
"""
    + _UNKNOWN_ROLE,
}


def template_of(name: str, image: str = IMAGE) -> str:
    """
    The Jinja template of a format: its prompts are those of the authors' chat.

    `llava_v0`'s chat has no spaces and line breaks around `###`, unlike its training, as in the authors' code.

    Args:
        name: One of `PROMPT_FORMATS`.
        image: How an image is written.
    """
    prompt_format = PROMPT_FORMATS[name]
    content = _CONTENT.replace("IMAGE", repr(image)).replace("SYSTEM", _quoted(prompt_format.system))
    return content + _STYLES[prompt_format.style]


def _quoted(text: str) -> str:
    """A Jinja string; the system texts contain single quotes and no double ones."""
    return f'"{text}"'


def stop_strings(name: str) -> list[str]:
    """What ends an answer besides `</s>`."""
    return ["###"] if PROMPT_FORMATS[name].style == "single" else []


def turn_of(message: Mapping[str, Any], tagged: bool, image: str = IMAGE) -> Turn:
    """
    Role and text of a message, with its images in front, each on a line of its own.

    Args:
        message: Role and content; a list of parts, or a text.
        tagged: Whether to write images as `<Image><image></Image>`.
        image: How an image is written otherwise.
    """
    content = message.get("content") or ""
    if isinstance(content, str):
        return str(message["role"]), content
    images = [f"<Image>{image}</Image>" if tagged else image for part in content if part["type"] == "image"]
    text = " ".join(part["text"] for part in content if part["type"] == "text")
    return str(message["role"]), "\n".join([*images, text] if text else images)
