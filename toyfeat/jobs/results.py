"""The folder of a job: its dictionaries, stores and settings, and rows of results."""

import contextlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from toyfeat.files.atomic import write_whole
from toyfeat.files.json import read_json, read_json_lines
from toyfeat.jobs.config import BASES, Attribution, Job, Train
from toyfeat.jobs.kinds import KINDS
from toyfeat.lm.windows import site_folder

# Entries that may be other in a folder that has results already: what extends them, and
# where they are computed.
_FREE = {
    "train": ("kinds", "ks", "seeds", "latent_devices"),
    "decompose": ("bases", "ranks"),
}

# Values of entries that older folders do not have.
_FORMER_TRAIN_DEFAULTS = {
    "train.population": False,
    "train.source": "store",
    "train.attribution.attribution": asdict(Attribution()),
}

# Values that older folders of lenses do not have.
_FORMER_LENS_DEFAULTS = {"lens.layer_step": 1}

_FORMER_DEFAULTS = {"weights": "float32"}

_OTHER_FOLDER = "give another folder as out, or move it away"
_RESULTS = ("stores", "train", "decompose.jsonl", "evaluation.jsonl")
_DELETE_LINE = "delete that line, and its result is computed again"


class Run(NamedTuple):
    """One dictionary of a job.

    Attributes:
      kind: of :data:`toyfeat.jobs.kinds.KINDS`.
      k: active latents per token.
      seed: of the initial parameters and the order of the tokens.
      loss: of the kind ``"attribution"``.
    """

    kind: str
    k: int
    seed: int
    loss: Attribution | None = None

    @property
    def label(self) -> str:
        """The kind, or the name of the attribution loss."""
        return self.loss.name if self.loss else self.kind

    @property
    def name(self) -> str:
        """Name of the folder of the run."""
        return f"{self.label}-k{self.k}-s{self.seed}"


def list_runs(train: Train) -> list[Run]:
    """List all dictionaries of a job: every kind with every ``k`` and seed.

    Raises:
      ValueError: for an unknown kind, or losses whose names cannot be told apart.
    """
    if unknown := [kind for kind in train.kinds if kind not in KINDS]:
        raise ValueError(
            f"train: kinds must be of {', '.join(KINDS)}, got {unknown[0]!r}"
        )
    _check_losses(train)
    losses: dict[str, Sequence[Attribution | None]] = dict.fromkeys(KINDS, (None,))
    losses["attribution"] = train.attribution
    return [
        Run(kind, k, seed, loss)
        for seed in train.seeds
        for k in train.ks
        for kind in train.kinds
        for loss in losses[kind]
    ]


def _check_losses(train: Train) -> None:
    """Refuse names that cannot be folders or methods of their own, and unused losses.

    Rows of results and folders are found by name, so that a loss must not be called
    like a basis or like a way in which another kind is evaluated ("paired alone").
    """
    names = [loss.name for loss in train.attribution]
    for name in names:
        taken = name in BASES or name.split(" ")[0] in {*KINDS} - {"attribution"}
        plain = name.replace(" ", "").replace("_", "").isalnum()
        if taken or not plain or names.count(name) > 1:
            raise ValueError(
                "train: losses want names of their own, of letters, digits, spaces and "
                "underscores, that do not begin as other kinds and are no bases', got "
                f"{name!r}"
            )
    if train.attribution != (Attribution(),) and "attribution" not in train.kinds:
        raise ValueError(
            f"train: there are losses ({', '.join(names)}), but kinds has no "
            "'attribution'; add it, or leave the losses out"
        )


def finished_runs(train: Train, folder: Path) -> Iterator[tuple[Run, Path]]:
    """Iterate over the trained dictionaries of a job.

    Args:
      train: settings.
      folder: that has a folder for each run.

    Yields:
      A run and the folder of its features, in SAELens' format.
    """
    for run in list_runs(train):
        if is_finished(folder, run):
            yield run, folder / run.name / "features"


def is_finished(folder: Path, run: Run) -> bool:
    """Check whether the features of a run were saved."""
    return (folder / run.name / "features" / "cfg.json").exists()


def store_path(job: Job, site: str) -> Path:
    """Folder of the store of a site."""
    return Path(job.out) / "stores" / site_folder(site)


def moments_path(job: Job, site: str) -> Path:
    """File of the second moments of a site."""
    folder = "moments" if job.source == "store" else "moments of the model"
    return Path(job.out) / folder / site_folder(site)


def require_collected(job: Job, site: str) -> None:
    """Refuse a step that comes before collecting.

    Raises:
      FileNotFoundError: if nothing was collected, of a job with a store.
    """
    missing = not moments_path(job, site).exists() or not store_path(job, site).exists()
    if job.source == "store" and missing:
        raise FileNotFoundError(
            f"job: {job.out} has nothing of {site!r} yet; run toyfeat collect first"
        )


def require_store(job: Job) -> None:
    """Refuse to collect for a job without a store.

    Raises:
      ValueError: for a job without a store.
    """
    if job.source != "store":
        raise ValueError(
            f"job: source is {job.source!r}, so that nothing is stored; leave this "
            'step out, or set source = "store"'
        )


def claim_folder(job: Job, *parts: str) -> Path:
    """Make the folder of a job and keep the settings of its results in ``job.json``.

    Args:
      job: settings.
      parts: of the job that the results depend on, ``"collect"`` and so on.

    Returns:
      The folder.

    Raises:
      ValueError: if it has results of other settings; says what differs.
    """
    folder = Path(job.out)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "job.json"
    saved = read_json(path, "job", advice=_OTHER_FOLDER) if path.exists() else {}
    results = [name for name in _RESULTS if (folder / name).exists()]
    if results and not saved:
        raise ValueError(
            f"job: {folder} must have job.json, which says of which settings its "
            f"results are, got {', '.join(results)} without it; {_OTHER_FOLDER}"
        )
    # Folders of before an entry existed have its value of then.
    if saved:
        saved = _FORMER_DEFAULTS | saved
    if "train.steps" in saved:
        saved = _FORMER_TRAIN_DEFAULTS | saved
    if "lens.kind" in saved:
        saved = _FORMER_LENS_DEFAULTS | saved
    # Refuse other settings, add those of steps that were not taken before.
    settings = _flat_settings(job, parts)
    for name in sorted(saved.keys() & settings.keys()):
        if saved[name] != settings[name]:
            raise ValueError(
                f"job: {folder} has work with {name} = {saved[name]!r}, not "
                f"{settings[name]!r}; {_OTHER_FOLDER}"
            )
    if settings.keys() - saved.keys():
        write_whole(path, json.dumps(saved | settings, indent=1) + "\n")
    return folder


def _flat_settings(job: Job, parts: Iterable[str]) -> dict[str, Any]:
    """Flatten the settings that results depend on, ``"part.entry"`` to value."""
    settings = asdict(job)
    for part, names in _FREE.items():
        settings[part] = {n: x for n, x in settings[part].items() if n not in names}
    settings["train"]["site"] = job.site
    settings["train"]["source"] = job.source
    for loss in settings["train"].pop("attribution"):  # losses may be added, by name
        settings["train"][f"attribution.{loss['name']}"] = loss
    flat = {name: settings[name] for name in ("model", "text", "weights")}
    for part in parts:
        flat |= {f"{part}.{name}": value for name, value in settings[part].items()}
    return json.loads(json.dumps(flat))  # turns tuples into lists, as in the file


def check_gradients(job: Job) -> None:
    """Refuse dictionaries that need gradients in a job that collects none.

    Raises:
      ValueError: if there are such.
    """
    needing = [kind for kind in job.train.kinds if KINDS[kind].needs_gradients]
    if job.collect.readout == "none" and needing:
        free = [kind for kind in KINDS if not KINDS[kind].needs_gradients]
        raise ValueError(
            f"job: train.kinds must be of {free} where collect.readout is 'none', got "
            f"{needing[0]!r}, which needs gradients; name the kinds, or collect with "
            "another readout"
        )


class Rows:
    """Results in a file of JSON lines, each result once.

    A last line that a kill cut off is dropped when the file is opened; another broken
    line is an error that names it.  A number that is not finite is ``null`` in the
    file and ``None`` here.
    """

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path, self.rows = path, []
        if not path.exists():
            return
        self.rows = read_json_lines(path, "job", advice=_DELETE_LINE)
        # Cut off what is after the last whole line, so that new rows begin one.
        size = path.read_bytes().rfind(b"\n") + 1
        if size < path.stat().st_size:
            os.truncate(path, size)

    def has(self, key: dict[str, Any]) -> bool:
        """Check whether a row has these entries."""
        return any(key.items() <= row.items() for row in self._hashable_entries())

    def add(self, key: dict[str, Any], values: dict[str, Any]) -> bool:
        """Write a row, unless one has the entries of ``key`` already."""
        if self.has(key):
            return False
        row = {**key, **{name: _finite_or_none(x) for name, x in values.items()}}
        line = json.dumps(row, allow_nan=False) + "\n"
        size = self._path.stat().st_size if self._path.exists() else 0
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):  # no part of a line stays
                os.truncate(self._path, size)
            raise OSError(
                error.errno,
                f"job: could not write {self._path}: {error.strerror}; make room and "
                "run the same again, which goes on here",
            ) from error
        self.rows.append(row)
        return True

    def _hashable_entries(self) -> Iterator[dict[str, Any]]:
        for row in self.rows:
            yield {k: v for k, v in row.items() if isinstance(v, str | int)}


def _finite_or_none(value: Any) -> Any:
    """Replace numbers that JSON does not have by ``None``, in lists too."""
    if isinstance(value, list | tuple):
        return [_finite_or_none(entry) for entry in value]
    is_bad = isinstance(value, float) and not math.isfinite(value)
    return None if is_bad else value
