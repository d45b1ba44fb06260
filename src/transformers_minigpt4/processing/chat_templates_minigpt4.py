"""Chat templates of MiniGPT-4 as data: the authors' Vicuna-v0 and LLaMA-2 formats, and a frame for any other."""

# Content is text, or a list of parts; parts are joined by one space, as the authors join the image and the question.
_RENDER_CONTENT = """\
{%- macro render(message) -%}
    {%- if message.content is string -%}
        {{- message.content -}}
    {%- else -%}
        {%- for part in message.content -%}
            {%- if not loop.first -%}{{- ' ' -}}{%- endif -%}
            {%- if part.type == 'text' -%}
                {{- part.text -}}
            {%- elif part.type == 'image' and message.role == 'user' -%}
                {{- '<Img><ImageHere></Img>' -}}
            {%- else -%}
                {{- raise_exception('A ' + message.role + ' message holds a part of type ' + part.type
                    + '. MiniGPT-4 takes text anywhere and images in user messages.') -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
"""

# `CONV_VISION_*.system` of Vision-CAIR/MiniGPT-4, the same for both language models.
_SYSTEM = """\
{%- if messages and messages[0].role == 'system' -%}
    {%- set system = render(messages[0]) -%}
    {%- set turns = messages[1:] -%}
{%- else -%}
    {%- set system = 'Give the following image: <Img>ImageContent</Img>. You will be able to see the image once I \
provide it to you. Please answer my questions.' -%}
    {%- set turns = messages -%}
{%- endif -%}
"""

_UNKNOWN_ROLE = """\
        {{- raise_exception('Unknown role ' + message.role + '. Use system (first only), user and assistant.') -}}
"""

# Vicuna v0: every message ends with ###, and the prompt ends in "Assistant: " with its space.
VICUNA_V0 = (
    _RENDER_CONTENT
    + _SYSTEM
    + """\
{{- bos_token -}}
{%- if system -%}{{- system + '###' -}}{%- endif -%}
{%- for message in turns -%}
    {%- if message.role == 'user' -%}
        {{- 'Human: ' + render(message) + '###' -}}
    {%- elif message.role == 'assistant' -%}
        {{- 'Assistant: ' -}}
        {%- generation -%}
        {{- render(message) + '###' -}}
        {%- endgeneration -%}
    {%- else -%}
"""
    + _UNKNOWN_ROLE
    + """\
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'Assistant: ' -}}{%- endif -%}
"""
)

# LLaMA-2-chat: no separator between the turns of a chat. ` [/INST] ` opens an answer, as in the authors' roles, so two
# questions in a row have none between them. The answer that closes a conversation ends with </s>.
LLAMA_2 = (
    _RENDER_CONTENT
    + _SYSTEM
    + """\
{{- bos_token + system -}}
{%- for message in turns -%}
    {%- if message.role == 'user' -%}
        {{- '<s>[INST] ' + render(message) -}}
    {%- elif message.role == 'assistant' -%}
        {{- ' [/INST] ' -}}
        {%- generation -%}
        {{- render(message) -}}
        {%- if loop.last -%}{{- eos_token -}}{%- endif -%}
        {%- endgeneration -%}
    {%- else -%}
"""
    + _UNKNOWN_ROLE
    + """\
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- ' [/INST] ' -}}{%- endif -%}
"""
)

# As the authors train conversations, every answer has its end mark; LLaMA-2's chat leaves out those of earlier turns.
LLAMA_2_TRAINING = LLAMA_2.replace("{%- if loop.last -%}{{- eos_token -}}{%- endif -%}", "{{- eos_token -}}")

CHAT_TEMPLATES = {"vicuna_v0": VICUNA_V0, "llama_2": LLAMA_2}
TRAINING_TEMPLATES = {LLAMA_2: LLAMA_2_TRAINING}  # by the template that is asked

# Rows have no thoughts to learn, so models that may think are asked without, unless the caller wishes otherwise.
_NO_THINKING = """\
{%- if enable_thinking is not defined -%}{%- set enable_thinking = false -%}{%- endif -%}
"""


# TRL looks for the mark by a regular expression, also in comments, and would refuse `assistant_only_loss` without one.
_ANSWERS_ARE_FOUND = """\
{#- MiniGPT4Processor finds the answers, as if they were between {% generation %} and {% endgeneration %}. -#}
"""


def is_authors(chat_template: object) -> bool:
    """Whether a template is one of the authors' formats, with which every text segment is tokenized separately."""
    return isinstance(chat_template, str) and chat_template.startswith(_RENDER_CONTENT + _SYSTEM)


def with_images(chat_template: str) -> str:
    """
    Frames a language model's own chat template so that it takes images.

    Args:
        chat_template (`str`): A template that expects the content of a message to be text.

    Returns:
        `str`: A template that first turns lists of parts into text, each image as `<Img><ImageHere></Img>`. One that
        has a switch `enable_thinking` has it off unless the caller sets it.
    """
    if "<ImageHere>" in chat_template:  # it places images itself
        return chat_template
    return (
        _RENDER_CONTENT
        + _ANSWERS_ARE_FOUND
        + """\
{%- set framed = namespace(messages=[]) -%}
{%- for message in messages -%}
    {%- set framed.messages = framed.messages + [dict(message, content=render(message))] -%}
{%- endfor -%}
{%- set messages = framed.messages -%}
"""
        + (_NO_THINKING if "enable_thinking" in chat_template else "")
        + chat_template
    )


def with_end_marks(chat_template: str) -> str:
    """
    Frames a chat template so that it prints the end-of-sequence token after each answer.

    For templates such as that of the `llava-hf` checkpoints, which print nothing there.

    Args:
        chat_template (`str`): A template that takes contents as texts or as lists of parts.
    """
    return _END_MARKS + chat_template


_END_MARKS = """\
{%- set ended = namespace(messages=[]) -%}
{%- for message in messages -%}
    {%- if message.role != 'assistant' -%}
        {%- set ended.messages = ended.messages + [message] -%}
    {%- elif message.content is string -%}
        {%- set ended.messages = ended.messages + [dict(message, content=message.content + eos_token)] -%}
    {%- else -%}
        {%- set texts = message.content | selectattr('type', 'equalto', 'text') | map(attribute='text') | list -%}
        {%- set part = {'type': 'text', 'text': texts | join(' ') + eos_token} -%}
        {%- set ended.messages = ended.messages + [dict(message, content=[part])] -%}
    {%- endif -%}
{%- endfor -%}
{%- set messages = ended.messages -%}
"""
