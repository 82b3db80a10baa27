"""Download models and dictionaries of the Hugging Face hub into its library's cache."""

import importlib
import re
from pathlib import Path
from typing import Any, NamedTuple

_NAME = re.compile(
    r"hub:(?P<repo>[\w.-]+/[\w.-]+?)(/(?P<file>[\w./-]+(?<!\.bin)))?"
    r"(@(?P<revision>[\w./-]+))?"
)
_FILES = ["config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer.json"]
_DICTIONARY_FILES = ["*.json", "*.yaml", "*.safetensors", "*.npz"]
_CARD = "README.md"


class FetchError(RuntimeError):
    """A download that failed; the message says why."""


class HubName(NamedTuple):
    """A model of the hub.

    Attributes:
      repo: ``owner/name``.
      file: a GGUF file of it, or a folder, such as one of a dictionary; ``None`` for
        the safetensors of a model.
      revision: a branch, a tag or a commit; ``None`` for the newest.
    """

    repo: str
    file: str | None
    revision: str | None


def is_hub(name: str) -> bool:
    """Check whether a name is one of the hub's."""
    return name.startswith("hub:")


def hub_name(name: str) -> HubName:
    """Parse the name of a model of the hub.

    Args:
      name: ``hub:owner/name``, ``hub:owner/name/file.gguf`` or
        ``hub:owner/name/folder``, each with ``@revision`` if it is wanted.

    Returns:
      :class:`HubName`.

    Raises:
      ValueError: for another form.

    Example:
      >>> hub_name("hub:HuggingFaceTB/SmolLM2-135M@main")
      HubName(repo='HuggingFaceTB/SmolLM2-135M', file=None, revision='main')
    """
    match = _NAME.fullmatch(name)
    if not match:
        raise ValueError(
            "hub: wanted hub:owner/name or hub:owner/name/ a file.gguf or a folder, "
            f"with @revision for another than the newest, got {name!r}"
        )
    return HubName(match["repo"], match["file"], match["revision"])


def hub_path(name: str, *, download: bool) -> Path:
    """Find or download a model, or the folder of a dictionary, of the hub.

    Weights are taken from safetensors and GGUF files, or arrays of NumPy, which hold no
    code.

    Args:
      name: see :func:`hub_name`.
      download: whether to fetch what is missing, or is not the newest.

    Returns:
      Where the hub's library keeps it.

    Raises:
      ValueError: for a name of another form.
      FileNotFoundError: if it is missing and not to be downloaded.
      FetchError: if the hub does not have it, does not give it to everyone, or
        cannot be reached.
      ImportError: without the ``lm`` extra.
    """
    repo, file, revision = hub_name(name)
    hub = _library()
    options: dict[str, Any] = {"revision": revision, "local_files_only": not download}
    if file is None:
        options |= {"allow_patterns": [*_FILES, _CARD], "ignore_patterns": "*/*"}
    elif file.endswith(".gguf"):
        options |= {"allow_patterns": [file, _CARD]}
    else:
        patterns = [f"{file}/{pattern}" for pattern in _DICTIONARY_FILES]
        options |= {"allow_patterns": [*patterns, _CARD]}
    try:
        folder = Path(hub.snapshot_download(repo, **options))
    except Exception as error:  # of the library, of the network, of the disk
        if not download:
            raise _not_fetched(name) from None
        message = " ".join(str(error).split()) or type(error).__name__
        message = message[:500]  # of a page of HTML, say
        raise FetchError(f"fetch: {name} cannot be had: {message}") from error
    weights = "model.safetensors"
    wanted = [[file]] if file else [["config.json"], [weights, f"{weights}.index.json"]]
    for names in wanted:
        if not any((folder / file_name).exists() for file_name in names):
            if not download:
                raise _not_fetched(name)
            raise FetchError(f"fetch: {name} cannot be had: {repo} has no {names[0]}")
    return folder / file if file else folder


def hub_commit(name: str, path: Path) -> str:
    """Add the commit that was downloaded to a name.

    Args:
      name: see :func:`hub_name`.
      path: from :func:`hub_path`.

    Returns:
      ``hub:owner/name@commit``.
    """
    repo, file, _ = hub_name(name)
    place = path if file is None else path.parents[file.count("/")]
    return f"hub:{repo}{f'/{file}' if file else ''}@{place.name}"


def hub_licence(path: Path) -> str:
    """Read the licence from the card of a model.

    Args:
      path: from :func:`hub_path`.

    Returns:
      The licence's name, or that there is none.
    """
    cards = [folder / _CARD for folder in (path, *path.parents[:3])]
    card = next((card for card in cards if card.is_file()), None)
    if card is None:
        return "not said"
    try:
        data = _library().ModelCard.load(card, ignore_metadata_errors=True).data
    except Exception:  # whatever people write there
        return "not said"
    return str(data.get("license_name") or data.get("license") or "not said")


def _not_fetched(name: str) -> FileNotFoundError:
    return FileNotFoundError(f"{name}: not fetched yet; run: toyfeat fetch {name}")


def _library() -> Any:
    try:
        return importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise ImportError(
            'hub: huggingface_hub is not installed: pip install "toyfeat[lm]"'
        ) from error
