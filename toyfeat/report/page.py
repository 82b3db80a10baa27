"""A self-contained HTML page: text, tables and pictures, nothing fetched."""

import html
from collections.abc import Iterable, Sequence
from pathlib import Path

from toyfeat.files.atomic import write_whole

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --paper: #fff; --soft: #555;
  --line: #ddd; --rule: #eee; --mark: #0072b2; --good: #00704f; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --paper: #16181b;
  --soft: #a9adb3; --line: #44484e; --rule: #2c3035; --mark: #6db9e8;
  --good: #4fc39a; --bad: #ff8a80; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink);
  background: var(--paper); max-width: 68rem; margin: 2rem auto; padding: 0 1rem;
  overflow-wrap: break-word; }
h1 { line-height: 1.2; } h2 { margin-top: 2.5rem; }
p { max-width: 46rem; }
figure { margin: 1rem 0; } figcaption { color: var(--soft); font-size: .9rem; }
img { width: 100%; height: auto; border: 1px solid var(--line); border-radius: 4px; }
@media (prefers-color-scheme: dark) { img.drawn {
  filter: invert(.9) hue-rotate(180deg); border-color: #ccc; } }
.panels { display: grid; gap: .5rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 25rem), 1fr)); }
details { margin: .5rem 0 1rem; } summary { cursor: pointer; color: var(--mark); }
summary:focus-visible { outline: 2px solid var(--mark); outline-offset: 2px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; width: 100%;
  font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .2rem .45rem;
  border-bottom: 1px solid var(--rule); }
.num { text-align: right; white-space: nowrap; }
th.num { white-space: normal; vertical-align: bottom; }
td:first-child:not(.num) { min-width: 9rem; }
.scroll td:first-child, .scroll th:first-child { position: sticky; left: 0;
  background: var(--paper); }
h4 { margin: 1rem 0 .3rem; }
th[scope=rowgroup] { padding-top: 1.2rem; color: var(--mark); }
td.ok { color: var(--good); } td.missed { color: var(--bad); font-weight: 600; }
@media (max-width: 40rem) { body { margin: 1rem auto; } h1 { font-size: 1.6rem; }
  th, td { padding: .2rem .35rem; } .detail { display: none; } }
footer { margin: 3rem 0; color: var(--soft); font-size: .85rem; }
"""


def section(title: str, body: Iterable[str]) -> str:
    """Return a section with a heading; ``body`` holds HTML fragments."""
    return "\n".join([f"<section><h2>{html.escape(title)}</h2>", *body, "</section>"])


def paragraph(text: str) -> str:
    """Return text as an HTML paragraph."""
    return f"<p>{html.escape(text)}</p>"


def picture(uri: str, caption: str) -> str:
    """Return a drawing with its caption, which is also its alternative text."""
    return panels([(uri, caption)], caption)


def panels(drawings: Sequence[tuple[str, str]], caption: str) -> str:
    """Return drawings under one caption, side by side where the screen is wide enough.

    The page inverts their lightness on a dark screen: they are for charts on white.

    Args:
      drawings: a data URI and its alternative text each.
      caption: plain text.

    Returns:
      HTML.
    """
    images = "".join(
        f'<img class="drawn" src="{uri}" alt="{html.escape(text, quote=True)}">'
        for uri, text in drawings
    )
    if len(drawings) > 1:
        images = f'<div class="panels">{images}</div>'
    text = html.escape(caption)
    return f"<figure>{images}<figcaption>{text}</figcaption></figure>"


def fold(title: str, body: Iterable[str]) -> str:
    """Return HTML fragments behind a line that opens and closes them."""
    line = f"<summary>{html.escape(title)}</summary>"
    return "\n".join([f"<details>{line}", *body, "</details>"])


def table(rows: str) -> str:
    """Return a table that scrolls by itself on a narrow screen."""
    return f'<div class="scroll">{rows}</div>'


def write_page(path: Path, title: str, sections: Iterable[str], footer: str) -> None:
    """Write a page that needs no other file.

    Args:
      path: the file; it appears whole or not at all.
      title: plain text.
      sections: HTML fragments.
      footer: plain text, such as versions and settings.
    """
    name = html.escape(title)
    write_whole(
        path,
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{name}</title><style>{_STYLE}</style></head>\n<body><h1>{name}</h1>\n"
        + "\n".join(sections)
        + f"\n<footer>{html.escape(footer)}</footer></body></html>\n",
    )
