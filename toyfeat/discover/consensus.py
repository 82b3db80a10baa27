r"""Find the readers of a model as the directions that many dictionaries agree on.

Gradients of one example are combinations of the readers that are active in it.  Which
combinations, and of how many readers, depends on the readout and on the model.  A
dictionary trained on the wrong gradients, or with the wrong number of codes, finds
other atoms than the readers, but other ones every time.  So several dictionaries are
trained on the gradients of two readouts, and the directions that they share are kept
and refined on the gradients.

``training`` trains the dictionaries, ``agreement`` compares them, ``refinement`` makes
directions exact, ``circles`` finds the planes that no sparse code describes, and
``subspaces`` merges directions that are parts of one mechanism.
"""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from toyfeat.discover.agreement import SAME_COSINE, Agreement, agree_and_refine
from toyfeat.discover.gradients import acts_covariance
from toyfeat.discover.strengths import attribution_shares
from toyfeat.discover.subspaces import find_subspaces, subspace_supports
from toyfeat.discover.tables import GradientTables, gradient_tables, tap_readouts
from toyfeat.discover.training import train_dictionaries
from toyfeat.types import Array, ArrayLike, Features, Subject, Taps

# Largest share of a dictionary's latents that may be needed: a dictionary that has none
# to spare may lack some.  docs/research.md, section 14.
_MAX_NEEDED = 2 / 3


class ConsensusConfig(NamedTuple):
    """Settings of :func:`toyfeat.discover.consensus`; the defaults serve all models.

    Attributes:
      examples: inputs that are tapped; ``None`` for 20,000, or a hundred per dimension
        of the site where that is more.
      num_directions: random directions of the output per example.
      ks: codes per gradient; a dictionary is trained with each.
      starts: random starts of each dictionary, every one on gradients of its own.
      latents_per_dim: latents per dimension that the gradients span, fewest first;
        more are tried where fewer do not explain the gradients.
      max_latents: most latents of a dictionary.
      steps: of training.
      batch_size: gradients per step.
    """

    examples: int | None = None
    num_directions: int = 4
    ks: tuple[int, ...] = (1, 2, 4)
    starts: int = 2
    latents_per_dim: tuple[int, ...] = (2, 4, 8)
    max_latents: int = 8192
    steps: int = 60
    batch_size: int = 2048


DEFAULT_CONFIG = ConsensusConfig()


class ConsensusResult(NamedTuple):
    """Features found by :func:`toyfeat.discover.consensus`.

    Attributes:
      features: readers and their writers; rows of a plane or a subspace, as of a gated
        unit, an attention head or a circle, share a ``group``.  ``strength`` is the
        share of the attribution, gradient times activation, of half the squared norm of
        the output that goes through a mechanism.  ``support`` is the share of the
        dictionaries that have it, half of which saw other examples than the other half;
        1 for a circular plane, which held-out gradients have confirmed.
      support: ``[R]`` int, in how many dictionaries a reader is, or atoms that span its
        subspace; 0 for the two rows of a circular plane.
      num_dictionaries: how many dictionaries voted.
      explain: whether the gradients of a readout are sparse in the directions.  If not,
        what recurs is returned, and more of it may be sums of readers.
    """

    features: Features
    support: np.ndarray
    num_dictionaries: int
    explain: bool


def consensus(
    key: Array,
    subject: Subject,
    *,
    config: ConsensusConfig = DEFAULT_CONFIG,
    support: float | None = None,
    cosine: float = SAME_COSINE,
    progress: bool | None = None,
) -> ConsensusResult:
    r"""Find the readers of a model by the agreement of dictionaries of its gradients.

    1. Tap the gradients of two readouts: half the squared norm of the output, whose
       gradient :math:`J^\top y` weighs every reader by what it adds to the output (the
       only one that tells readers apart behind a linear read-out), and random
       directions :math:`J^\top u` (the only one that tells apart features that always
       come together).
    2. Train dictionaries of each by sparse coding, with several codes per gradient, and
       starts on gradients of their own.
    3. Keep the directions that enough dictionaries share within ``cosine``.
    4. Refine them on the gradients of the readout that is sparse in them, and leave out
       those that are not needed there and have little support.
    5. Begin again with more latents where the gradients are not clearly sparse in what
       is left, or where the dictionaries have few latents to spare.
    6. Add the circles of the first readout (:func:`toyfeat.discover.circular_planes`),
       which no sparse code describes, and leave out other directions in their span.
       Merge directions that are parts of one mechanism, such as of a gated unit
       (:func:`toyfeat.discover.subspaces.find_subspaces`).
    7. Return the regression patterns :math:`\Sigma r` of the readers as writers, and
       the share of the attribution that goes through each.

    Training takes time with the product of dimensions, latents and examples, and memory
    for the gradients, ``examples * num_directions * D`` floats, nine times over.  A
    reader has to be active in some forty examples (``docs/research.md``, section 15).

    Args:
      key: random key.
      subject: the model, its inputs and the site.
      config: how gradients are sampled and dictionaries are trained.
      support: share of the dictionaries in which a reader has to be, in (0, 1];
        ``None`` for the largest share whose directions explain the gradients as well
        as those of less support do, a third of the largest one at least
        (``docs/research.md``, sections 8 and 14).
      cosine: ``|cos|`` from which two directions are the same; refinement moves none
        further than that.
      progress: whether to write a line to standard error for every stage; by default
        if it is a terminal.

    Returns:
      :class:`toyfeat.discover.ConsensusResult`; single readers with the largest support
      first, then subspaces, circular planes last.

    Raises:
      ValueError: if the support or the cosine is out of range, or all gradients are 0.

    Example:
      >>> import jax
      >>> from toyfeat.models import planted
      >>> task = planted.product_space(jax.random.key(0), colours=2, shapes=2, dim=6)
      >>> short = ConsensusConfig(examples=500, steps=20, latents_per_dim=(2,))
      >>> result = consensus(jax.random.key(1), planted.subject_of(task), config=short)
      >>> readers, writers = result.features[:2]
      >>> readers.shape[1], readers.shape == writers.shape
      (6, True)

    References:
      Meinshausen and Bühlmann (2010), "Stability selection"; Haufe et al. (2014),
      equation 6, for the writers; ``docs/research.md`` for the experiments.
    """
    _check_options(support, cosine)
    tap_key, train_key = jax.random.split(key)
    norm_taps, direction_taps = tap_readouts(
        tap_key,
        subject,
        examples=config.examples,
        num_directions=config.num_directions,
    )
    return consensus_of_taps(
        train_key,
        norm_taps,
        direction_taps,
        config=config,
        support=support,
        cosine=cosine,
        progress=progress,
    )


def consensus_of_taps(
    key: Array,
    norm_taps: Taps,
    direction_taps: Taps,
    *,
    config: ConsensusConfig = DEFAULT_CONFIG,
    support: float | None = None,
    cosine: float = SAME_COSINE,
    progress: bool | None = None,
) -> ConsensusResult:
    """Find readers by the agreement of dictionaries of gradients that are there.

    The steps of :func:`consensus` after the taps, for models that are no subject, and
    for gradients that were stored.

    Args:
      key: random key.
      norm_taps: activations ``[N, D]`` and gradients ``[N, 1, D]`` of a readout that
        weighs every reader by its effect, such as half the squared norm of the output.
      direction_taps: gradients ``[N', K, D]`` of readouts that differ from example to
        example and have no preferred sign, such as random directions of the output, or
        log-probabilities of sampled labels.
      config: how dictionaries are trained; how many are tapped does not matter here.
      support: as in :func:`consensus`.
      cosine: as in :func:`consensus`.
      progress: as in :func:`consensus`.

    Returns:
      :class:`toyfeat.discover.ConsensusResult`.

    Raises:
      ValueError: as :func:`consensus`, or if the taps are of different widths.

    Example:
      >>> import jax
      >>> from toyfeat.models import planted
      >>> from toyfeat.discover.tables import tap_readouts
      >>> task = planted.product_space(jax.random.key(0), colours=2, shapes=2, dim=6)
      >>> subject, size = planted.subject_of(task), dict(examples=500, num_directions=2)
      >>> taps = tap_readouts(jax.random.key(1), subject, **size)
      >>> short = ConsensusConfig(steps=20, latents_per_dim=(2,))
      >>> found = consensus_of_taps(jax.random.key(2), *taps, config=short).features
      >>> found.readers.shape[1]
      6
    """
    _check_options(support, cosine)
    tables_key, *level_keys = jax.random.split(key, 1 + len(config.latents_per_dim))
    tables = gradient_tables(tables_key, norm_taps, direction_taps)
    vote = partial(
        _vote,
        tables=tables,
        per_readout=len(config.ks) * config.starts,
        support=support,
        cosine=cosine,
        tell=sys.stderr.isatty() if progress is None else progress,
    )
    agreement, voters = _train_and_vote(level_keys, tables, config, vote)
    agreement, group = _group_rows(agreement, tables, voters)
    share = agreement.supports / len(voters)
    share[len(share) - len(tables.planes) :] = 1
    readers = jnp.asarray(agreement.rows, float)
    writers = readers @ acts_covariance(tables.taps)
    strength = attribution_shares(tables.taps, readers, group, tables.coordinates)
    return ConsensusResult(
        features=Features(readers, writers, group, strength, share),
        support=agreement.supports,
        num_dictionaries=len(voters),
        explain=agreement.explain,
    )


def _train_and_vote(
    keys: Sequence[Array],
    tables: GradientTables,
    config: ConsensusConfig,
    vote: Callable[[Sequence[ArrayLike]], Agreement],
) -> tuple[Agreement, Sequence[ArrayLike]]:
    """Train with few latents that clearly explain the gradients, else let all vote."""
    dictionaries: list[np.ndarray] = []
    for key, size in zip(keys, config.latents_per_dim, strict=True):
        level = _train_level(key, tables, config, size)
        dictionaries += level
        agreement = vote(level)
        most = _MAX_NEEDED * max(map(len, level))
        if agreement.clear and len(agreement.rows) <= most:
            return agreement, level
    if len(config.latents_per_dim) > 1:
        agreement = vote(dictionaries)
    return agreement, dictionaries


def _check_options(support: float | None, cosine: float) -> None:
    if not (support is None or 0 < support <= 1) or not 0 < cosine < 1:
        raise ValueError(
            "consensus: wanted support in (0, 1], a share of the dictionaries, and "
            f"cosine in (0, 1), got {support} and {cosine}"
        )


def _group_rows(
    agreement: Agreement, tables: GradientTables, dictionaries: Sequence[ArrayLike]
) -> tuple[Agreement, np.ndarray]:
    """Put subspaces in the place of directions inside; return the mechanism of rows."""
    num_single = len(agreement.rows) - len(tables.planes)
    white = agreement.rows[:num_single] @ tables.coordinates.whiten
    white = white / np.linalg.norm(white, axis=1, keepdims=True)
    spaces = find_subspaces(white, tables.stacks)
    left = np.append(~spaces.inside, np.zeros(len(tables.planes), bool))
    circles = np.arange(num_single, len(agreement.rows))
    rows = tables.coordinates.directions(spaces.rows)
    supports = subspace_supports(dictionaries, spaces.rows, spaces.group)

    # Directions, then subspaces, then the two rows of every circle.
    groups = [np.arange(left.sum()), spaces.group, np.arange(len(circles)) // 2]
    starts = np.cumsum([0] + [group.max(initial=-1) + 1 for group in groups[:-1]])
    return Agreement(
        rows=np.concatenate([agreement.rows[left], rows, agreement.rows[circles]]),
        supports=np.concatenate(
            [agreement.supports[left], supports, agreement.supports[circles]]
        ),
        explain=agreement.explain,
        clear=agreement.clear,
    ), np.concatenate([g + start for g, start in zip(groups, starts, strict=True)])


def _vote(
    dictionaries: Sequence[ArrayLike],
    *,
    tables: GradientTables,
    per_readout: int,
    support: float | None,
    cosine: float,
    tell: bool,
) -> Agreement:
    """Let dictionaries vote, with a share of them as the support that is wanted.

    Of every level there are ``per_readout`` of the squared norm, then as many others.
    """
    num = len(dictionaries)
    agreement = agree_and_refine(
        dictionaries,
        tables,
        of_norm=np.arange(num) // per_readout % 2 == 0 if support is None else None,
        support=None if support is None else max(1, round(support * num)),
        cosine=cosine,
    )
    if tell:
        explained = "explain" if agreement.explain else "do not explain"
        print(
            f"consensus: {num} dictionaries share {len(agreement.rows)} directions, "
            f"which {explained} the gradients",
            file=sys.stderr,
            flush=True,
        )
    return agreement


def _train_level(
    key: Array, tables: GradientTables, config: ConsensusConfig, latents_per_dim: int
) -> list[np.ndarray]:
    """Train dictionaries of both readouts with some number of latents."""
    norm_key, random_key = jax.random.split(key)
    train = partial(
        train_dictionaries,
        ks=config.ks,
        starts=config.starts,
        latents_per_dim=latents_per_dim,
        max_latents=config.max_latents,
        steps=config.steps,
        batch_size=config.batch_size,
    )
    # Codes of the first have one sign, which tells a direction from its opposite;
    # random directions have none (docs/research.md, section 5).
    of_norm = train(norm_key, tables.norm_grads, signed=False)
    return of_norm + train(random_key, tables.direction_grads, signed=True)
