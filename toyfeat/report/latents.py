"""Page of latents: how often they act, the inputs that show them, what they promote."""

import html
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from toyfeat.dictionary.latents import Latent
from toyfeat.lm.contexts import Context, cut_context
from toyfeat.metrics.latents import Example
from toyfeat.report import page
from toyfeat.report.tables import html_lines
from toyfeat.report.thumbnails import bars_svg, image_html

_OPACITY = 0.6  # of the darkest shade, on which the text can still be read
_ABOUT = (
    "Density is the share of the examples in which a latent is active, attribution "
    "the mean of its absolute first-order effect on the readout. Promoted outputs are "
    "those that rise most when its writer is added; nearest readers are latents that "
    "read nearly the same direction."
)
_STYLE = """<style>
ul.examples { padding-left: 1.2rem; } ul.examples li { margin: .25rem 0; }
ul.thumbs { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: .8rem; }
ul.thumbs figure { margin: 0; width: 7rem; } ul.thumbs .frame { position: relative; }
ul.thumbs img, ul.thumbs svg { display: block; width: 7rem; height: auto;
  image-rendering: pixelated; border-radius: 3px; box-sizing: border-box; }
ul.thumbs .spot { position: absolute; box-sizing: border-box;
  outline: 2px solid #d55e00; outline-offset: -1px; }
ul.thumbs svg { border: 1px solid var(--line); }
ul.thumbs figcaption { font-size: .78rem; line-height: 1.3; }
</style>"""


def write_latents(
    path: str | Path,
    latents: Sequence[Latent],
    inputs: Any,
    *,
    title: str = "Latents",
    names: Callable[[int], str] | Sequence[str] | None = None,
    header: Mapping[str, Any] | None = None,
    unit: str = "",
) -> Path:
    """Write a page on latents of any model, which needs no other file.

    Args:
      path: of the page.
      latents: from :func:`toyfeat.metrics.latents.describe_latents`.
      inputs: what the examples are of: whole numbers ``[B, T]`` are tokens, other
        numbers ``[B, H, W]`` or ``[B, H, W, 1 or 3]`` images, ``[B, D]`` vectors.
      title: of the page.
      names: of tokens, or of the entries of vectors; their numbers by default.
      header: settings, for the foot of the page.
      unit: of attributions, such as ``"nats"``.

    Returns:
      The path.

    Raises:
      ValueError: if there are no latents, or the inputs are others or of another kind.
    """
    if not latents:
        raise ValueError(
            "write_latents: wanted latents, got none: none has an effect; train longer "
            "or take another readout"
        )
    path, inputs = Path(path), np.asarray(inputs)
    shown = [e.index for x in latents for e in (*x.activating, *x.attributed)]
    if max(shown, default=-1) >= len(inputs):
        raise ValueError(
            f"write_latents: an example is input {max(shown)}, of inputs there are "
            f"{len(inputs)}; give those that describe_latents was given"
        )
    show, layout = _shower(inputs, names, unit)
    sections = [_STYLE, page.section(f"{len(latents)} latents", _overview(latents))]
    parts = [
        latent_html(latent, show=show, layout=layout, unit=unit, outputs="outputs")
        for latent in latents
    ]
    sections.append(page.section("One by one", parts))
    footer = ", ".join(f"{name}: {value}" for name, value in (header or {}).items())
    path.parent.mkdir(parents=True, exist_ok=True)
    page.write_page(path, title, sections, footer)
    return path


def _overview(latents: Sequence[Latent]) -> list[str]:
    """Render a line for every latent, under what the columns mean."""
    lines = [("latent", "density", "attribution", "promotes")]
    lines += [
        (
            str(latent.index),
            f"{latent.frequency:.2%}",
            f"{latent.effect:.2g}",
            ", ".join(latent.promoted[:3]),
        )
        for latent in latents
    ]
    table = page.table(html_lines(lines))
    return [page.paragraph(_ABOUT), table]


def latent_html(
    latent: Latent,
    *,
    show: Callable[[Any], str] | None = None,
    layout: str = "examples",
    unit: str = "nats",
    outputs: str = "tokens",
) -> str:
    """Render a latent as a part of a page.

    Args:
      latent: to render.
      show: renders an example; that of contexts of a text by default.
      layout: class of the lists of examples.
      unit: of attributions.
      outputs: word for what a latent promotes.

    Returns:
      HTML.
    """
    show = context_html if show is None else show
    # How often and how strongly it acts, and which latents read almost the same.
    near = ", ".join(f"{index} ({cosine:.2f})" for index, cosine in latent.neighbours)
    effect = f"{latent.effect:.2g} {unit}".rstrip()
    head = (
        f"activation density {latent.frequency:.2%}, mean absolute attribution {effect}"
    )
    head += f"; nearest readers: {near}" if near else ""
    # What its writer promotes, then its examples of either kind.
    parts = [f"<h3>Latent {latent.index}</h3>", page.paragraph(head)]
    for title, words in (
        (f"promoted {outputs}:", latent.promoted),
        (f"suppressed {outputs}:", latent.suppressed),
    ):
        if words:
            shown = " ".join(f"<code>{html.escape(_visible(w))}</code>" for w in words)
            parts.append(f"<p>{title} {shown}</p>")
    for title, examples in (
        ("Top activations", latent.activating),
        ("Top attributions", latent.attributed),
    ):
        rows = "".join(f"<li>{show(example)}</li>" for example in examples)
        parts.append(f'<h4>{title}</h4><ul class="{layout}">{rows}</ul>')
    return "\n".join(parts)


def context_html(context: Context, *, unit: str = "nats") -> str:
    """Render tokens, shaded by the latent's code; the context's own is underlined."""
    largest = max((abs(v) for v in context.values), default=0.0) or 1.0
    spans = []
    for i, (token, value) in enumerate(
        zip(context.tokens, context.values, strict=True)
    ):
        alpha = min(1.0, abs(value) / largest) * _OPACITY
        style = f"background:rgba(213,94,0,{alpha:.2f})"
        if i == context.at:
            style += ";text-decoration:underline"
        spans.append(f'<span style="{style}">{html.escape(_visible(token))}</span>')
    return f"{''.join(spans)} <small>{context.effect:+.2g} {unit}</small>"


def _visible(token: str) -> str:
    """Show line breaks as a sign."""
    return token.replace("\n", "⏎")


def _shower(
    inputs: np.ndarray, names: Any, unit: str
) -> tuple[Callable[[Example], str], str]:
    """Choose how inputs are shown, and the class of their lists."""
    name: Any = names if callable(names) else str
    if names is not None and not callable(names):
        tokens = inputs.ndim == 2 and np.issubdtype(inputs.dtype, np.integer)
        wanted = int(inputs.max(initial=-1)) + 1 if tokens else inputs.shape[-1]
        if inputs.ndim == 2 and len(names) < wanted:
            raise ValueError(
                f"write_latents: wanted names of {wanted} tokens or entries, got "
                f"{len(names)}; give one each"
            )
        name = names.__getitem__
    if inputs.ndim == 2 and np.issubdtype(inputs.dtype, np.integer):
        return partial(_text_html, inputs, name, unit), "examples"
    if inputs.ndim == 2:
        return partial(_vector_html, inputs, name, unit), "thumbs"
    if inputs.ndim == 3 or (inputs.ndim == 4 and inputs.shape[-1] in (1, 3)):
        return partial(_image_html, inputs, unit), "thumbs"
    raise ValueError(
        "write_latents: inputs must be tokens [B, T], images [B, H, W] or [B, H, W, 1 "
        f"or 3], or vectors [B, D], got {inputs.dtype} of shape {inputs.shape}; pass "
        "what is to be seen of each input"
    )


def _text_html(
    tokens: np.ndarray, name: Callable[[int], str], unit: str, example: Example
) -> str:
    """Render the tokens around the position, all of them shaded alike without any."""
    if example.shape == tokens.shape[1:]:
        return context_html(cut_context(example, tokens, name), unit=unit)
    # The site has no positions of the text.
    words = tuple(name(int(i)) for i in tokens[example.index])
    values = (0.0,) * len(words)
    return context_html(Context(words, values, -1, example.effect), unit=unit)


def _caption(example: Example, unit: str, more: str = "") -> str:
    """Describe an example in two or three short lines."""
    effect = f"{example.effect:+.2g} {unit}".rstrip()
    code = f"{example.values[example.at]:.3g}"
    text = f"input {example.index}<br>code {code}<br>effect {effect}"
    return f"<figcaption>{text}{more}</figcaption>"


def _image_html(images: np.ndarray, unit: str, example: Example) -> str:
    """Render an image, with a frame around the position if there are rows of them."""
    spot = None
    if len(example.shape) == 2:
        spot = divmod(example.at, example.shape[1]), example.shape
    picture = image_html(images[example.index], f"input {example.index}", spot)
    return f"<figure>{picture}{_caption(example, unit)}</figure>"


def _vector_html(
    vectors: np.ndarray, name: Callable[[int], str], unit: str, example: Example
) -> str:
    """Render a vector as bars, with its largest entries."""
    vector = vectors[example.index].astype(np.float64)
    largest = np.argsort(-np.abs(vector), kind="stable")[:3]
    entries = ", ".join(
        f"{html.escape(name(int(i)))}: {vector[i]:.2g}" for i in largest
    )
    picture = bars_svg(vector, f"input {example.index}")
    return f"<figure>{picture}{_caption(example, unit, f'<br>{entries}')}</figure>"
