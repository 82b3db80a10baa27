"""Settings of the lens of a job."""

from dataclasses import dataclass
from typing import Literal

from toyfeat.jobs.limits import Count, CountOrZero, Positive, Seed


@dataclass(frozen=True)
class FitLens:
    """Settings of the fit of a lens.

    Attributes:
      kind: ``"jacobian"``, ``"second moment"`` or ``"tuned"``, which is trained;
        it takes no ``cotangents``, ``chunk``, ``chain``, ``frozen`` or ``seed``.
      prompts: windows of the training text.
      batch: windows at a time.
      checkpoint_every: batches between checkpoints, and between lines of progress,
        which are all that a tuned lens has.
      skip_first: tokens left out at the start of a window.
      skip_last: tokens left out at its end.
      cotangents: directions per window, or 0 for all of them.
      chunk: directions at a time.
      chain: whether to pull back block by block.
      frozen: whether attention patterns and norms are held fixed.
      layer_step: one of so many layers has a lens, from the first on.
      steps: batches that a tuned lens is trained on.
      learning_rate: of Adam, for a tuned lens.
      seed: of the directions.
    """

    kind: Literal["jacobian", "second moment", "tuned"] = "jacobian"
    prompts: Count = 100
    batch: Count = 1
    checkpoint_every: Count = 1
    skip_first: CountOrZero = 16
    skip_last: CountOrZero = 1
    cotangents: CountOrZero = 0
    chunk: Count = 16
    chain: bool = False
    frozen: bool = False
    layer_step: Count = 1
    steps: Count = 200
    learning_rate: Positive = 1e-3
    seed: Seed = 0


@dataclass(frozen=True)
class ReadLens:
    """Text that a lens reads for the page.

    Attributes:
      text: of one prompt; the first held-out window if it is empty.
      top: tokens to show of each position.
    """

    text: str = ""
    top: Count = 5
