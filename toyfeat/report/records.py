"""Records of latents in the form of Neuronpedia's features, as JSON."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from toyfeat.dictionary.latents import Latent
from toyfeat.files.atomic import replace_files
from toyfeat.interop.hooks import in_their_words
from toyfeat.lm.contexts import Context


def latent_record(
    latent: Latent, *, model: str, site: str, source: str
) -> dict[str, Any]:
    """Describe a latent with the names that Neuronpedia has for features.

    Args:
      latent: with the contexts that show it.
      model: name of the model (``modelId``).
      site: of the dictionary; ``hookName`` is in TransformerLens' words.
      source: name of the dictionary (``sourceId``).

    Returns:
      JSON values: ``index``, ``frac_nonzero``, ``pos_str`` and ``neg_str`` (tokens that
      the latent promotes and suppresses), ``maxActApprox``, ``activations`` (texts with
      a value at every token).  ``effect``, ``attributions`` and ``neighbours`` are of
      this library, and Neuronpedia leaves them out.

    Example:
      >>> latent = Latent(7, 0.1, 0.02, (), (), (" a",), (" b",), ((3, 0.5),))
      >>> record = latent_record(
      ...     latent, model="m", site="blocks_3/resid_post", source="topk"
      ... )
      >>> record["hookName"], record["pos_str"], record["maxActApprox"]
      ('blocks.3.hook_resid_post', [' a'], 0.0)
    """
    activations = [_activation(context) for context in latent.activating]
    return {
        "modelId": model,
        "sourceId": source,
        "hookName": in_their_words(site),
        "index": str(latent.index),
        "frac_nonzero": latent.frequency,
        "pos_str": list(latent.promoted),
        "neg_str": list(latent.suppressed),
        "maxActApprox": max((a["maxValue"] for a in activations), default=0.0),
        "activations": activations,
        "effect": latent.effect,
        "attributions": [_activation(context) for context in latent.attributed],
        "neighbours": [
            {"index": str(index), "cosine": cosine}
            for index, cosine in latent.neighbours
        ],
    }


def _activation(context: Context) -> dict[str, Any]:
    """Describe one text, with the largest value and where it is."""
    values = [float(value) for value in context.values]
    largest = max(range(len(values)), key=values.__getitem__, default=0)
    return {
        "tokens": list(context.tokens),
        "values": values,
        "maxValue": values[largest] if values else 0.0,
        "maxValueTokenIndex": largest,
        "minValue": min(values, default=0.0),
        "at": context.at,
        "effect": float(context.effect),
    }


def write_records(
    path: Path, latents: Sequence[Latent], *, model: str, site: str, source: str
) -> None:
    """Write the records of a dictionary's latents to a JSON file.

    Args:
      path: of the file; its folder is made if it does not exist.
      latents: what is described.
      model: as of :func:`latent_record`.
      site: as of :func:`latent_record`.
      source: as of :func:`latent_record`.
    """
    records = [
        latent_record(latent, model=model, site=site, source=source)
        for latent in latents
    ]
    text = json.dumps(records, indent=1, allow_nan=False) + "\n"
    replace_files(
        "write_records",
        path.parent,
        {path.name: lambda part: part.write_text(text, encoding="utf-8")},
    )
