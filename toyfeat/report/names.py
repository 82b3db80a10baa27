"""Names of any characters as text of pictures, tables and the terminal."""


def printable(text: str) -> str:
    r"""Replace what cannot be printed, such as line breaks, by its escape.

    Args:
      text: of any characters, lone surrogates included.

    Returns:
      One line that every encoding of Unicode has.

    Example:
      >>> print(printable("two\nlines \ud800"))
      two\nlines \ud800
    """
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii")
        for c in text
    )


def label(text: str) -> str:
    r"""Escape the signs that matplotlib interprets, so that a name is drawn as it is.

    Text between two dollars is a formula to matplotlib, and a line whose label begins
    with ``_`` has no entry in a legend.

    Args:
      text: a name.

    Returns:
      Text for a title, an axis or a legend.

    Example:
      >>> print(label("from $5_to_$6"))
      from \$5_to_\$6
    """
    text = printable(text).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text
