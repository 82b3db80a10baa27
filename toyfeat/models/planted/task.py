"""Planted tasks: a model, the truth about its features, and what a method may see."""

from collections.abc import Callable
from typing import NamedTuple

from toyfeat.types import Array, ArrayLike, Inputs, Params, Probed, Subject


class Truth(NamedTuple):
    """The features that a model was built or trained to have.

    Attributes:
      readers: ``[F, D]``, the covectors that the next layer takes the dot
        product with, or ``None``; ``[0, D]`` where there is nothing to find.
      writers: ``[F, D]``, the vectors that the previous layer adds, or ``None``.
      frequency: ``[F]``, how often a feature is active.
      group: ``[F]`` int, rows that share a value span one mechanism: the plane of a
        circle or of a gated unit, a subspace that an attention head reads; ``None``
        if every row stands alone.
    """

    readers: ArrayLike | None
    writers: ArrayLike | None
    frequency: ArrayLike
    group: ArrayLike | None = None


class Task(NamedTuple):
    """A model with planted features, and everything needed to score a method on it.

    The first four fields are a :class:`toyfeat.types.Subject`, which
    :func:`subject_of` takes out.  Build it by keyword.

    Attributes:
      probed: the model.
      params: its parameters.
      sample: ``(key, num) -> inputs``.
      site: where the features are.
      truth: readers and writers of the features at the site.
      side: what is scored, ``"readers"``, ``"writers"``, or ``"mechanisms"`` of
        readers, where a plane has to be returned as a plane.
      name: of the task.
      features: ``(params, inputs) -> [B, F]``, the activation of each feature.
      fit: share of the variance of its targets that the model leaves; 0 where the
        model is the definition.
      ignored: ``[Q, D]`` orthonormal rows that span structure of the activations
        that the model reads not at all, or hardly, or ``None``.
      about: a paragraph, what is planted and what makes it hard.
      limits: what no method could know.
    """

    probed: Probed
    params: Params
    sample: Callable[[Array, int], Inputs]
    site: str
    truth: Truth
    side: str
    name: str
    features: Callable[[Params, Inputs], Array]
    fit: float
    ignored: Array | None
    about: str
    limits: str


def subject_of(task: Task) -> Subject:
    """Return what a method may see of a task: no truth, no side, no name.

    Args:
      task: a planted task.

    Returns:
      Its model, parameters, inputs and site.
    """
    return Subject(
        probed=task.probed, params=task.params, sample=task.sample, site=task.site
    )
