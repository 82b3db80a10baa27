"""Import libraries of extras, which may not be installed."""

import importlib
from typing import Any


def import_extra(who: str, name: str) -> Any:
    """Import the library of an extra of the same name.

    Args:
      who: the public function that needs it.
      name: of the extra, and of the module.

    Returns:
      The module.

    Raises:
      ImportError: without the extra, with the line that installs it.

    Example:
      >>> import_extra("from_equinox", "equinox").Module.__name__
      'Module'
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"{who}: wants the library {name}, got {error}; "
            f'pip install "toyfeat[{name}]"'
        ) from error
