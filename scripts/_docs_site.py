"""What the documentation site needs beside ``mkdocs.yml``.

Docstrings have the roles of Sphinx.  They become Markdown here: formulas become MathML,
which browsers draw without a script, and names become links.  Pages may have formulas
between dollar signs.  Used by mkdocs (``hooks``) and by griffe (``extensions``).
"""

import re
from typing import Any

import griffe
from latex2mathml.converter import convert

_INLINE = re.compile(r":math:`([^`]+)`")
_BLOCK = re.compile(r"^( *)\.\. math::(.*(?:\n(?:\1 +\S.*| *$))*)", re.MULTILINE)
_NAME = re.compile(r":(?:class|data|func|mod):`~?([\w.]+)`")
_EXAMPLE = re.compile(r"^Example:$", re.MULTILINE)
_DOLLARS = re.compile(r"\$([^$\n]+)\$")


class Roles(griffe.Extension):
    """Rewrite every docstring that griffe reads."""

    def on_instance(self, *, obj: griffe.Object | griffe.Alias, **_: Any) -> None:
        """Rewrite the docstring of an object."""
        if not obj.is_alias and obj.docstring:
            obj.docstring.value = to_markdown(obj.docstring.value)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Turn formulas of a page into MathML, outside of code."""
    parts = re.split(r"(```.*?```|`[^`\n]+`)", markdown, flags=re.DOTALL)
    parts[::2] = [_DOLLARS.sub(_inline, part) for part in parts[::2]]
    return "".join(parts)


def to_markdown(docstring: str) -> str:
    """Turn the roles of a docstring into Markdown.

    Args:
      docstring: with ``:math:``, ``.. math::``, ``:func:``, ``:class:``, ``:data:`` and
        ``:mod:``.

    Returns:
      The same with MathML and with links to what the site has.
    """
    docstring = _BLOCK.sub(_block, docstring)
    docstring = _INLINE.sub(_inline, docstring)
    docstring = _NAME.sub(_link, docstring)
    # griffe knows the section by this name only, and shows it as code.
    docstring = _EXAMPLE.sub("Examples:", docstring)
    return docstring.replace("``", "`")


def _inline(match: re.Match[str]) -> str:
    # In a span, or a line that begins with it would be a block of its own.
    return f"<span>{convert(' '.join(match[1].split()))}</span>"


def _block(match: re.Match[str]) -> str:
    formula = convert(" ".join(match[2].split()), display="block")
    return f"{match[1]}{formula}\n\n{match[1]}"


def _link(match: re.Match[str]) -> str:
    name = match[1]
    shown = name.removeprefix("toyfeat.")
    # No warning for names that are on no page.
    return f'<autoref identifier="{name}" optional>`{shown}`</autoref>'
