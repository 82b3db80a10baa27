"""Small pictures of inputs: images as PNG, vectors as bars, without matplotlib."""

import html
import struct
import zlib

import numpy as np

from toyfeat.report.plots import data_uri

_BAR, _HEIGHT = 4, 60  # width of a bar and height of the picture, in units of the SVG


def png_bytes(pixels: np.ndarray) -> bytes:
    """Encode pixels as a PNG file.

    Args:
      pixels: ``[H, W, 3]`` uint8.

    Returns:
      The bytes of the file.
    """
    height, width, _ = pixels.shape

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    # Every row begins with the number of its filter, 0 for none.
    rows = np.zeros((height, 1 + 3 * width), np.uint8)
    rows[:, 1:] = pixels.reshape(height, -1)
    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(rows.tobytes()))
    return b"\x89PNG\r\n\x1a\n" + parts + chunk(b"IEND", b"")


def pixels_of(image: np.ndarray) -> np.ndarray:
    """Convert an image to pixels: uint8 as it is, other numbers from black to white.

    Args:
      image: ``[H, W]``, ``[H, W, 1]`` or ``[H, W, 3]``.

    Returns:
      ``[H, W, 3]`` uint8; the least finite number is black and the largest white.
    """
    if image.ndim == 2:
        image = image[..., None]
    if image.dtype != np.uint8:
        values = np.asarray(image, np.float64)
        finite = values[np.isfinite(values)]
        low, high = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
        scaled = (np.nan_to_num(values, nan=low) - low) / ((high - low) or 1.0)
        image = np.round(255 * np.clip(scaled, 0, 1)).astype(np.uint8)
    return np.broadcast_to(image, (*image.shape[:2], 3))


def image_html(
    image: np.ndarray,
    text: str,
    spot: tuple[tuple[int, int], tuple[int, ...]] | None = None,
) -> str:
    """Render an image, with a frame around one cell of a grid.

    Args:
      image: as of :func:`pixels_of`.
      text: its alternative text.
      spot: the cell and the shape of the grid, or ``None``.

    Returns:
      HTML.
    """
    uri, frame = data_uri(png_bytes(pixels_of(image))), ""
    if spot is not None:
        (row, column), (rows, columns) = spot
        frame = (
            f'<span class="spot" style="left:{100 * column / columns:.2f}%;'
            f"top:{100 * row / rows:.2f}%;width:{100 / columns:.2f}%;"
            f'height:{100 / rows:.2f}%"></span>'
        )
    alt = html.escape(text, quote=True)
    return f'<div class="frame"><img src="{uri}" alt="{alt}">{frame}</div>'


def bars_svg(vector: np.ndarray, text: str) -> str:
    """Render a vector as bars up and down from its middle.

    Args:
      vector: ``[D]``; entries that are not finite have no bar.
      text: its alternative text.

    Returns:
      An SVG element.
    """
    values = np.nan_to_num(np.asarray(vector, np.float64), nan=0, posinf=0, neginf=0)
    heights = values / (np.abs(values).max(initial=0.0) or 1.0) * _HEIGHT / 2
    bars = "".join(
        f'<rect x="{_BAR * i}" y="{_HEIGHT / 2 - max(h, 0):.1f}" '
        f'width="{_BAR - 1}" height="{abs(h):.1f}"/>'
        for i, h in enumerate(heights)
    )
    width = _BAR * len(values)
    return (
        f'<svg viewBox="0 0 {width} {_HEIGHT}" preserveAspectRatio="none" '
        f'style="height:3.5rem" fill="#0072b2" role="img" '
        f'aria-label="{html.escape(text, quote=True)}">{bars}</svg>'
    )
