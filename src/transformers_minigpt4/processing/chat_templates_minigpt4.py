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

# LLaMA-2-chat: no separator between the turns of a chat; the answer that closes a conversation, which is the one that
# training learns, ends with </s>.
LLAMA_2 = (
    _RENDER_CONTENT
    + _SYSTEM
    + """\
{{- bos_token + system -}}
{%- for message in turns -%}
    {%- if message.role == 'user' -%}
        {{- '<s>[INST] ' + render(message) -}}
        {%- if not loop.last or add_generation_prompt -%}{{- ' [/INST] ' -}}{%- endif -%}
    {%- elif message.role == 'assistant' -%}
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
"""
)

CHAT_TEMPLATES = {"vicuna_v0": VICUNA_V0, "llama_2": LLAMA_2}


def with_images(chat_template: str) -> str:
    """
    Frames a language model's own chat template so that it takes images.

    Args:
        chat_template (`str`): A template that expects the content of a message to be text.

    Returns:
        `str`: A template that first turns lists of parts into text, each image as `<Img><ImageHere></Img>`.
    """
    if chat_template.startswith(_RENDER_CONTENT):
        return chat_template
    return (
        _RENDER_CONTENT
        + """\
{%- set framed = namespace(messages=[]) -%}
{%- for message in messages -%}
    {%- set framed.messages = framed.messages + [dict(message, content=render(message))] -%}
{%- endfor -%}
{%- set messages = framed.messages -%}
"""
        + chat_template
    )
