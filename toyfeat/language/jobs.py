"""What is done with a language model, from its text to the report: one file."""

import dataclasses
import sys
import tomllib
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SITE = "blocks_15/resid_post"
_LEAST = {"start": -1} | dict.fromkeys(
    ("held_out", "seed", "seeds", "uniform", "largest"), 0
)  # of whole numbers; 1 for all others
_DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Collect:
    """What is stored.

    Attributes:
      sites: of the decoder.
      readout: ``"loss"``, the cross-entropy of the next token summed over a window, or
        ``"sampled"``, the same with tokens drawn from the model's own prediction.
      draws: of ``"sampled"``.
      tokens: for training.
      held_out: tokens of other texts, for evaluation.
      length: tokens per window.
      start: token in front of every window, or -1 for none.
      batch: windows at a time.
      dtype: of the store, ``"float32"`` or ``"bfloat16"``.
      compute: dtype of the model's products.
      rows_per_shard: tokens of a shard.
      massive: tokens longer than so many median ones of their window do not count.
      every: one text of so many is held out.
      seed: of the order of windows.
    """

    sites: tuple[str, ...] = (SITE,)
    readout: str = "loss"
    draws: int = 1
    tokens: int = 50_000
    held_out: int = 8192
    length: int = 128
    start: int = -1
    batch: int = 8
    dtype: str = "float32"
    compute: str = "float32"
    rows_per_shard: int = 8192
    massive: float = 10.0
    every: int = 10
    seed: int = 0


@dataclass(frozen=True)
class Train:
    """Which dictionaries are trained, each with all numbers of codes and seeds.

    Attributes:
      site: where; the first one of what is stored by default.
      kinds: ``"acts"`` (TopK), ``"attribution"`` (TopK with the attribution terms),
        ``"gradients"`` (signed TopK of gradients), ``"paired"``.
      codes: ``k``.
      seeds: of starts and orders.
      latents: of a dictionary.
      steps: of training.
      batch: tokens per step.
      learning_rate: of Adam.
    """

    site: str = ""
    kinds: tuple[str, ...] = ("acts", "attribution", "gradients", "paired")
    codes: tuple[int, ...] = (8, 16, 32)
    seeds: tuple[int, ...] = (0,)
    latents: int = 2304
    steps: int = 2000
    batch: int = 1024
    learning_rate: float = 1e-3


@dataclass(frozen=True)
class Evaluate:
    """What dictionaries are judged by.

    Attributes:
      windows: of held-out text.
      batch: windows at a time.
      uniform: pairs of a token and a latent that is active there, drawn evenly.
      largest: pairs with the largest attributions.
      pair_batch: pairs at a time.
      seed: of the draws.
    """

    windows: int = 64
    batch: int = 8
    uniform: int = 2000
    largest: int = 500
    pair_batch: int = 16
    seed: int = 0


@dataclass(frozen=True)
class Job:
    """A model, a text, and what is done with them.

    Attributes:
      model: a folder, a ``.gguf`` file or a name that ``scripts/fetch.py`` knows.
      text: a folder of ``.txt`` files, of which some are held out, or such a name.
      out: folder of everything that is made.
      collect: what is stored.
      train: which dictionaries.
      evaluate: how they are judged.
    """

    model: str = "smollm2"
    text: str = "sotu"
    out: str = "out/smollm2"
    collect: Collect = field(default_factory=Collect)
    train: Train = field(default_factory=Train)
    evaluate: Evaluate = field(default_factory=Evaluate)

    @property
    def site(self) -> str:
        """Where dictionaries are trained."""
        return self.train.site or self.collect.sites[0]


def read_job(path: str | Path) -> Job:
    """A job from a TOML file; what it leaves out is as in :class:`Job`.

    Args:
      path: of the file.

    Returns:
      The job.

    Raises:
      FileNotFoundError: if there is no file.
      ValueError: for text that is not TOML, an entry that does not exist, or a value
        of another type or out of its range.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"read_job: there is no {path}")
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"read_job: {path} is not TOML ({error})") from None
    return _made(Job, content, str(path))


def command(main: Callable[[Job], None]) -> None:
    """Run a script on the job that the command line names; errors are one line."""
    if len(sys.argv) != 2:
        raise SystemExit("name a job: examples/smollm2.toml")
    try:
        main(read_job(sys.argv[1]))
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        raise SystemExit(str(error)) from None


def _made(kind: Any, content: dict[str, Any], where: str) -> Any:
    types_ = typing.get_type_hints(kind)
    if unknown := [name for name in content if name not in types_]:
        raise ValueError(
            f"read_job: {where} has no entry {unknown[0]!r}; there are "
            f"{', '.join(types_)}"
        )
    values = {}
    for name, value in content.items():
        wanted, place = types_[name], f"{where}, {name}"
        if dataclasses.is_dataclass(wanted) and isinstance(value, dict):
            values[name] = _made(wanted, value, place)
        else:
            values[name] = _checked(wanted, value, place)
            _check_range(name, values[name], place)
    return kind(**values)


def _checked(wanted: Any, value: Any, where: str) -> Any:
    if isinstance(wanted, types.GenericAlias):  # tuple[X, ...]
        if not isinstance(value, list):
            raise ValueError(f"read_job: {where} must be a list, got {value!r}")
        if not value:
            raise ValueError(f"read_job: {where} must not be empty")
        return tuple(_checked(wanted.__args__[0], x, where) for x in value)
    if wanted is float and type(value) is int:
        return float(value)
    if type(value) is not wanted:
        table = f"a table, [{where.rpartition(', ')[2]}]"
        name = table if dataclasses.is_dataclass(wanted) else wanted.__name__
        raise ValueError(f"read_job: {where} must be {name}, got {value!r}")
    return value


def _check_range(name: str, value: Any, where: str) -> None:
    least = _LEAST.get(name, 1)
    for x in value if isinstance(value, tuple) else (value,):
        if type(x) is int and x < least:
            raise ValueError(f"read_job: {where} must be at least {least}, got {x}")
    if name in ("dtype", "compute") and value not in _DTYPES:
        raise ValueError(
            f"read_job: {where} must be {' or '.join(_DTYPES)}, got {value!r}"
        )
