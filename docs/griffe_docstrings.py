"""A griffe extension for the API pages: reads docstrings in the style of transformers, which marks up the types."""

import re

import griffe


class TransformersStyle(griffe.Extension):
    """
    Functions show the types of their signature; classes those of their docstring, without the markup.

    "[`~inference.describe.describe`]", which transformers' own doc builder makes a link of, becomes plain code.
    """

    def on_object(self, *, obj: griffe.Object, **kwargs: object) -> None:
        if obj.docstring is None:
            return
        text = re.sub(r"\[`~?(?:\w+\.)*(\w+)`\]", r"`\1`", obj.docstring.value)
        text = re.sub(r"^(\s+)`[^`\n]+`: ", r"\1", text, flags=re.MULTILINE)
        parameter = re.compile(r"^(\s+\*{0,2}\w+) (\(`.*\)):", flags=re.MULTILINE)
        if obj.is_function:
            text = parameter.sub(r"\1:", text)
        else:
            text = parameter.sub(lambda match: f"{match[1]} {match[2].replace('`', '').replace('*', '')}:", text)
        obj.docstring.value = text
