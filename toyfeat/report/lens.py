"""Page of a lens: what it reads at every layer and position of a prompt."""

import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from toyfeat.jobs.lens import LensReading, LensRun
from toyfeat.lens import Estimate
from toyfeat.report import page

PAGE = "lens.html"
"""Name of the page in the folder of a job."""

_STYLE = """<style>
body { max-width: 90rem; }
table.lens { width: auto; border-collapse: separate; border-spacing: 1px; }
table.lens td, table.lens th { text-align: left; padding: .15rem .35rem; border: 0;
  white-space: pre; font: 12px/1.4 ui-monospace, monospace;
  max-width: 6.5rem; overflow: hidden; text-overflow: ellipsis; }
table.lens th { color: var(--soft); font-weight: 400; }
table.lens th[scope=row] { position: sticky; left: 0; background: var(--paper); }
</style>"""
_ABOUT = (
    "A row is a layer, the model's own output on top; a column is a position of the "
    "prompt, under its token. A cell has the token that the lens says comes next, the "
    "darker the likelier; point at it for the others. Read upwards, what comes next "
    "takes shape."
)
_DARKEST = 0.65  # opacity at which black text is still read


def write_lens(folder: Path, run: LensRun) -> Path:
    """Write the page of a lens, which needs no other file.

    Args:
      folder: of the page.
      run: from :func:`toyfeat.jobs.lens.run_lens`.

    Returns:
      The path, ``lens.html``.
    """
    path = folder / PAGE
    sections = [_STYLE, page.paragraph(_ABOUT)]
    for reading in run.readings:
        heat = page.table(heat_map(run.tokens, reading))
        sections.append(page.section(f"{reading.name} lens".capitalize(), [heat]))
    sites = run.readings[0].sites[:-1]  # in the order of the depth
    if run.estimate is not None:
        sections.append(_errors(sites, run.estimate))
    if run.divergences is not None:
        sections.append(_divergences(sites, run.divergences))
    footer = ", ".join(f"{name}: {value}" for name, value in run.lens.about.items())
    page.write_page(path, "What the layers say", sections, footer)
    return path


def heat_map(tokens: Sequence[str], reading: LensReading) -> str:
    """Render the top tokens of a reading as a table, the final layer on top.

    Args:
      tokens: ``T`` texts of the prompt.
      reading: of ``S`` sites.

    Returns:
      HTML; texts of the model are escaped.
    """
    head = "".join(f'<th scope="col">{_shown(token)}</th>' for token in tokens)
    lines = [f"<tr><th></th>{head}</tr>"]
    rows = zip(reading.sites, reading.tops, reading.shares, strict=True)
    for site, tops, shares in reversed(list(rows)):
        cells = "".join(map(_cell, tops, shares))
        name = "output" if site == reading.sites[-1] else _layer(site)
        lines.append(f'<tr><th scope="row">{name}</th>{cells}</tr>')
    # The prompt again below, under the first layers.
    lines.append(lines[0])
    return f'<table class="lens">{"".join(lines)}</table>'


def _layer(site: str) -> str:
    """Name a layer for people: the output of block 3 of a decoder is layer 3."""
    block = re.fullmatch(r"blocks_(\d+)/resid_post", site)
    return f"layer {block[1]}" if block else html.escape(site)


def _cell(tops: Sequence[str], shares: np.ndarray) -> str:
    """Cell of one layer and position."""
    parts = zip(tops, shares, strict=True)
    title = "&#10;".join(f"{share:.3f} {_shown(token)}" for token, share in parts)
    # NaN, of a stream that overflowed, stays white.
    opacity = float(np.nan_to_num(_DARKEST * shares[0]))
    colour = f"rgba(0, 114, 178, {opacity:.3f})"
    return f'<td style="background: {colour}" title="{title}">{_shown(tops[0])}</td>'


def _shown(token: Any) -> str:
    """Escape a token; breaks, tabs and tokens of spaces are shown as such."""
    text = str(token).replace("\n", "\\n").replace("\t", "\\t").replace("\r", "\\r")
    if not text.strip():  # hard spaces too
        text = "␣" * len(text)
    return html.escape(text, quote=True)


def _errors(sites: Sequence[str], estimate: Estimate) -> str:
    """Section with the errors of a fit by site."""
    about = "Error by the jackknife over prompts, and cosine of two halves of them."
    heads = '<th class="num">relative error</th><th class="num">cosine of halves</th>'
    lines = [f"<tr><th>layer</th>{heads}</tr>"]
    for site in sites:
        error = float(estimate.relative_error[site])
        cosine = float(estimate.refit_cosine[site])
        lines.append(
            f'<tr><td>{_layer(site)}</td><td class="num">{error:.3f}</td>'
            f'<td class="num">{cosine:.4f}</td></tr>'
        )
    return _section("How sure the fit is", about, lines)


def _divergences(sites: Sequence[str], found: Mapping[str, dict[str, float]]) -> str:
    """Section with the divergences of lenses from the output by site."""
    about = (
        "Divergence of what a lens says of the next token from what the model says, "
        "in nats, mean over held-out tokens."
    )
    heads = "".join(f'<th class="num">{name} lens</th>' for name in found)
    lines = [f"<tr><th>layer</th>{heads}</tr>"]
    for site in sites:
        cells = "".join(f'<td class="num">{x[site]:.3f}</td>' for x in found.values())
        lines.append(f"<tr><td>{_layer(site)}</td>{cells}</tr>")
    return _section("How far from the output", about, lines)


def _section(title: str, about: str, lines: Sequence[str]) -> str:
    """Section of a sentence and a table."""
    table = page.table(f"<table>{''.join(lines)}</table>")
    return page.section(title, [page.paragraph(about), table])
