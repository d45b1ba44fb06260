"""What the local web pages share; the page itself is tested with the review's."""

import pytest

from transformers_minigpt4.web.html import MAX_NAME, escape, image_html, person_name


@pytest.mark.parametrize(
    "text,shown",
    [
        ("<script>alert(1)</script>", "&lt;script&gt;alert(1)&lt;/script&gt;"),
        ("a & b \"c\" 'd'", "a &amp; b &quot;c&quot; &#x27;d&#x27;"),
        ("${x} {{y}}", "&#36;&#123;x&#125; &#123;&#123;y&#125;&#125;"),
        ("two\r\nlines\tand", "two\nlines\tand"),
        ("\x00\u202eab", '<span class="control">U+0000</span><span class="control">U+202E</span>ab'),
    ],
)
def test_foreign_text_is_shown_and_not_run(text, shown):
    assert escape(text) == shown


def test_an_image_s_name_cannot_leave_its_folder_or_its_attribute():
    assert image_html('../a "b".png', '"><i>') == (
        '<div class="image"><img src="files/..%2Fa%20%22b%22.png" alt="&quot;&gt;&lt;i&gt;"></div>'
    )


def test_one_person_has_one_name():
    assert person_name("  Änna   B ") == person_name("A\u0308NNA B") == "änna b"


@pytest.mark.parametrize("name,told", [("", "your name"), ("x" * (MAX_NAME + 1), "too long"), ("a\x07", "invisible")])
def test_an_invalid_name_is_refused(name, told):
    with pytest.raises(ValueError, match=told):
        person_name(name)
