"""Text that is not fusectl's own on its way out: names from a checkpoint, paths, what a record says.

A checkpoint comes from anywhere, and its names may hold anything. Each way out has one function, which is called where
text is printed or drawn; JSON and Python have escapes of their own.
"""

from __future__ import annotations

import re
import shlex


# What Markdown, GitHub's included, takes for more than itself; an underscore inside of a word is none.
_MARKS = re.compile(r"[\\`*{}\[\]<>#|~$&!]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")


def visible(text: str) -> str:
    r"""A text as one line of a terminal: what would move its cursor, end the line or turn its direction is escaped.

    >>> print(visible("a\x1b[2K\nb\u202e"))
    a\x1b[2K\nb\u202e
    """
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def word(text: str) -> str:
    r"""A text as one word of a shell's command line, visible and to be pasted.

    >>> print(word("a"), word("a b"), word("a\n'b"))
    a 'a b' $'a\n\'b'
    """
    if text.isprintable():
        return shlex.quote(text)
    return "$'{}'".format(text.encode("unicode_escape").decode().replace("'", r"\'"))


def markdown(text: str) -> str:
    r"""A text on a page of Markdown, in a table, too: no code, HTML, link, heading or column begins in it.

    >>> print(markdown("layers_0 <b>|`"))
    layers_0 \<b\>\|\`
    """
    return _MARKS.sub(r"\\\g<0>", visible(text))


def code(text: str) -> str:
    """A text as code on a page of Markdown, or, where that would end in it, as `markdown` has it."""
    plain = text.isprintable() and text.strip() == text != "" and not {"`", "|"} & set(text)
    return f"`{text}`" if plain else markdown(text)


def caption(text: str) -> str:
    r"""A text in a picture of matplotlib's, which takes what stands between dollars for a formula.

    >>> print(caption("$a$"))
    \$a\$
    """
    return visible(text).replace("$", r"\$")
