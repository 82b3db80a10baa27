"""Dictionaries to and from the files of other libraries."""

from toyfeat.interop.dictionary_learning import load_dictionary_learning
from toyfeat.interop.hooks import hook_name, site_name
from toyfeat.interop.loaded import Loaded
from toyfeat.interop.published import load_dictionary
from toyfeat.interop.saelens import load_saelens, saelens_metadata, save_saelens
from toyfeat.interop.sparsify import load_sparsify

__all__ = [
    "Loaded",
    "hook_name",
    "load_dictionary",
    "load_dictionary_learning",
    "load_saelens",
    "load_sparsify",
    "saelens_metadata",
    "save_saelens",
    "site_name",
]
