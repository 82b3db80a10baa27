"""Matplotlib figures and their PNG bytes.  Needs matplotlib (the extra ``plot``)."""

import base64
import io
from typing import Any

# Okabe and Ito's colours, which people with any colour vision tell apart.
BLUE, ORANGE, GREEN, RED, GREY = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#777777"
SKY, PINK = "#56b4e9", "#cc79a7"


def figure(width: float, height: float) -> Any:
    """Make an empty matplotlib figure, not registered with pyplot; sizes in inches.

    Raises:
      ImportError: without matplotlib, naming the extra.
    """
    return _figure_class()(figsize=(width, height), layout="constrained")


def plain_ticks(side: Any) -> None:
    """Label a logarithmic axis at 1, 2, 5, 10 and so on."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    side.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
    side.set_major_formatter(StrMethodFormatter("{x:g}"))
    side.set_minor_formatter(NullFormatter())


def add_legend(axis: Any, **style: Any) -> None:
    """Add a legend to an axis on which something with a label is drawn."""
    if axis.get_legend_handles_labels()[0]:
        axis.legend(**style)


def png(figure: Any) -> bytes:
    """Render a figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, facecolor="white")
    return buffer.getvalue()


def data_uri(image: bytes) -> str:
    """Return PNG bytes as a data URI, which an ``img`` tag can hold."""
    return "data:image/png;base64," + base64.b64encode(image).decode("ascii")


def _figure_class() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "toyfeat.report.plots: matplotlib is missing; install toyfeat[plot]"
        ) from error
    return Figure
