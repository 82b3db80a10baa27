"""Names of sites in the words of TransformerLens, which SAELens and Neuronpedia use."""

import re

# Only values that are the same number in both; blocks_3/X and blocks.3.Y.
HOOKS = {
    "resid_pre": "hook_resid_pre",
    "resid_mid": "hook_resid_mid",
    "resid_post": "hook_resid_post",
    "attn_out": "hook_attn_out",
    "mlp_out": "hook_mlp_out",
    "mlp_hidden": "mlp.hook_post",
    "attn/q": "attn.hook_q",
    "attn/k": "attn.hook_k",
    "attn/v": "attn.hook_v",
    "attn/z": "attn.hook_z",
    "attn/pattern": "attn.hook_pattern",
}
"""Sites of a block of a decoder, and their hooks in TransformerLens."""

_SITES = {hook: site for site, hook in HOOKS.items()}


def hook_name(site: str) -> str:
    """Name a site of a decoder as TransformerLens does.

    Args:
      site: such as ``"blocks_3/resid_post"``.

    Returns:
      Such as ``"blocks.3.hook_resid_post"``.  ``"embed"`` is ``"hook_embed"``; of
      Gemma the latter is ``sqrt(D)`` times as large, as TransformerLens multiplies the
      weights by it.

    Raises:
      ValueError: if TransformerLens has no hook of the same value.

    Example:
      >>> hook_name("blocks_3/resid_post"), site_name("blocks.3.attn.hook_z")
      ('blocks.3.hook_resid_post', 'blocks_3/attn/z')
    """
    match = re.fullmatch(r"blocks_(\d+)/(.+)", site)
    if site == "embed":
        return "hook_embed"
    if match is None or match[2] not in HOOKS:
        raise ValueError(
            f"hook_name: site must be embed or blocks_<i>/ one of {', '.join(HOOKS)}, "
            f"got {site!r}; give the name of the hook yourself"
        )
    return f"blocks.{match[1]}.{HOOKS[match[2]]}"


def site_name(hook: str) -> str:
    """Name a hook of TransformerLens as a site of a decoder.

    Args:
      hook: such as ``"blocks.3.hook_resid_post"``.

    Returns:
      Such as ``"blocks_3/resid_post"``; those of heads need ``Decoder(heads=True)``.

    Raises:
      ValueError: if no site has the same value.
    """
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", hook)
    if hook == "hook_embed":
        return "embed"
    if match is None or match[2] not in _SITES:
        raise ValueError(
            f"site_name: hook must be hook_embed or blocks.<i>. one of "
            f"{', '.join(_SITES)}, got {hook!r}; give the name of the site yourself"
        )
    return f"blocks_{match[1]}/{_SITES[match[2]]}"


def in_their_words(name: str) -> str:
    """Name a site as TransformerLens does, where it has it."""
    try:
        return hook_name(name)
    except ValueError:
        return name
