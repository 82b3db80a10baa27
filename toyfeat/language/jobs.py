"""What is done with a language model, from its text to the report: one file."""

import argparse
import dataclasses
import math
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
BASES = "pca", "gradient pca", "joint pca", "lib", "random"
_DTYPES = ("float32", "bfloat16")
_ONE_OF = {
    "dtype": _DTYPES,
    "compute": _DTYPES,
    "weights": _DTYPES,
    "source": ("store", "model"),
    "penalty": ("geman_mcclure", "log", "l1"),
    "form": ("positive", "signed"),
    "bases": BASES,
}


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
class Decompose:
    """Which bases are made, and what is kept of them.

    Attributes:
      bases: ``"pca"``, ``"gradient pca"``, ``"joint pca"``, ``"lib"`` (the local
        interaction basis towards the logits, from the model in any case) and
        ``"random"``.
      ranks: numbers of directions that are kept.
      sources: random directions of the logits of a window that stand for all of them,
        of ``"lib"``.
    """

    bases: tuple[str, ...] = ("pca", "gradient pca", "joint pca", "random")
    ranks: tuple[int, ...] = (1, 4, 16, 64, 256)
    sources: int = 4


@dataclass(frozen=True)
class Attribution:
    """A four-term attribution loss, :func:`toyfeat.attribution_objective`.

    Activations and gradients are in units of their root mean square there.

    Attributes:
      name: of the dictionaries that are trained with it.
      attribution_sparsity: coefficient of the penalty on attributions.
      unexplained: coefficient of the first-order effect that no latent has.
      penalty: ``"geman_mcclure"`` and ``"log"`` are bounded or nearly so, ``"l1"`` is
        the published form.
      form: ``"positive"``, or the published ``"signed"``.
    """

    name: str = "attribution"
    attribution_sparsity: float = 0.1
    unexplained: float = 0.1
    penalty: str = "geman_mcclure"
    form: str = "positive"


@dataclass(frozen=True)
class Train:
    """Which dictionaries are trained, each with all numbers of codes and seeds.

    Attributes:
      site: where; the first one of what is collected by default.
      kinds: ``"acts"`` (TopK), ``"attribution"`` (TopK with every loss of
        ``attribution``), ``"gradients"`` (signed TopK of gradients), ``"paired"``.
      codes: ``k``.
      seeds: of starts and orders.
      latents: of a dictionary.
      steps: of training.
      batch: tokens per step.
      learning_rate: of Adam.
      population: train all codes and seeds of a kind side by side in one program; they
        see the same batches then.
      attribution: losses, as many as are wanted.
    """

    site: str = ""
    kinds: tuple[str, ...] = ("acts", "attribution", "gradients", "paired")
    codes: tuple[int, ...] = (8, 16, 32)
    seeds: tuple[int, ...] = (0,)
    latents: int = 2304
    steps: int = 2000
    batch: int = 1024
    learning_rate: float = 1e-3
    population: bool = False
    attribution: tuple[Attribution, ...] = (Attribution(),)


@dataclass(frozen=True)
class Evaluate:
    """What dictionaries are judged by.

    Attributes:
      windows: of held-out text.
      batch: windows at a time.
      uniform: pairs of a token and a latent that is active there, drawn evenly.
      largest: pairs with the largest attributions; with neither, attributions are
        not checked.
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
      model: a folder, a ``.gguf`` file or a name that ``scripts/fetch.py`` knows,
        ``hub:owner/name`` among them.
      text: a folder of ``.txt`` files, of which some are held out, or a name that
        ``scripts/fetch.py`` knows.
      out: folder of everything that is made.
      weights: dtype of the model's parameters in memory, ``"float32"`` or
        ``"bfloat16"``.
      source: ``"store"``, what ``scripts/collect.py`` wrote, or ``"model"``:
        activations and gradients are made when they are wanted and never stored.
      collect: what is looked at.
      decompose: which bases are made.
      train: which dictionaries.
      evaluate: how they are judged.
    """

    model: str = "smollm2"
    text: str = "sotu"
    out: str = "out/smollm2"
    weights: str = "float32"
    source: str = "store"
    collect: Collect = field(default_factory=Collect)
    decompose: Decompose = field(default_factory=Decompose)
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
    """Run a script on the job that the command line names; its errors are one line."""
    parser = argparse.ArgumentParser(
        description=sys.modules[main.__module__].__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("job", help="a file of settings, examples/smollm2.toml")
    options = parser.parse_args()
    try:
        main(read_job(options.job))
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
        place = f"{where}, {name}"
        values[name] = _checked(types_[name], value, place)
        _check_range(name, values[name], place)
    return kind(**values)


def _checked(wanted: Any, value: Any, where: str) -> Any:
    if isinstance(wanted, types.GenericAlias):  # tuple[X, ...]
        if not isinstance(value, list):
            raise ValueError(f"read_job: {where} must be a list, got {value!r}")
        if not value:
            raise ValueError(f"read_job: {where} must not be empty")
        return tuple(_checked(wanted.__args__[0], x, where) for x in value)
    if dataclasses.is_dataclass(wanted) and isinstance(value, dict):
        return _made(wanted, value, where)
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
        if type(x) is float:
            _check_float(name, x, where)
        if type(x) is int and x < least:
            raise ValueError(f"read_job: {where} must be at least {least}, got {x}")
        if name in _ONE_OF and x not in _ONE_OF[name]:
            raise ValueError(
                f"read_job: {where} must be {' or '.join(_ONE_OF[name])}, got {x!r}"
            )


def _check_float(name: str, value: float, where: str) -> None:
    endless = name == "massive" and value == math.inf
    if not (endless or math.isfinite(value)):
        raise ValueError(f"read_job: {where} must be finite, got {value}")
    if name in ("attribution_sparsity", "unexplained"):
        if value < 0:
            raise ValueError(f"read_job: {where} must be at least 0, got {value}")
    elif value <= 0:
        raise ValueError(f"read_job: {where} must be above 0, got {value}")
