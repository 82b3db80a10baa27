"""Names of sites in the words of TransformerLens, and back."""

import pytest

from toyfeat.interop import hook_name, site_name
from toyfeat.interop.hooks import HOOKS


def test_names_of_sites_and_hooks_are_one_to_one():
    for site, hook in HOOKS.items():
        assert hook_name(f"blocks_3/{site}") == f"blocks.3.{hook}"
        assert site_name(f"blocks.3.{hook}") == f"blocks_3/{site}"
    assert site_name(hook_name("embed")) == "embed"
    with pytest.raises(ValueError, match="hook_name: site must be embed or blocks_<i>"):
        hook_name("layers_0")
    with pytest.raises(ValueError, match="site_name: hook must be hook_embed"):
        site_name("blocks.3.hook_mlp_in")
