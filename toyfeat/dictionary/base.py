r"""Architectures as records, and the parts that all dictionaries share.

Every dictionary reads ``pre = (acts - b_dec) @ W_enc + b_enc`` and writes ``codes @
W_dec + b_dec``.  What differs between architectures is in an :class:`Architecture`;
:func:`make_dictionary` makes the functions of a dictionary from it.  Parameters are a
dict of tensors with the names of SAELens, rows of ``W_dec`` are the features.

References:
  Bloom et al., SAELens 6, for the tensors and conventions; the paper of each
  architecture is cited at its function.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from toyfeat.checks import MAX_SIZE, check_flag, check_int, check_number
from toyfeat.dictionary.gather import affine, decode_dense, scatter, weighted_rows
from toyfeat.dictionary.shards import Split
from toyfeat.dictionary.tensors import init_params
from toyfeat.dictionary.types import (
    Architecture,
    Codes,
    Config,
    Dictionary,
    Inputs,
    Output,
    RuleInputs,
)
from toyfeat.types import Array, Params

DECODER_NORM = 0.1
"""Length of the rows of ``W_dec`` at the start: SAELens' ``decoder_init_norm``."""


def make_dictionary(
    architecture: Architecture,
    config: Config,
    *,
    decoder_norm: float = DECODER_NORM,
    **start: Any,
) -> Dictionary:
    """Make a dictionary from an architecture and settings.

    Args:
      architecture: the record.
      config: settings; ``config.architecture`` is the name of the record.
      decoder_norm: length of the rows of ``W_dec`` at the start.
      start: keywords of ``architecture.tensors``.

    Returns:
      :class:`Dictionary`.

    Raises:
      ValueError: if the sizes do not fit or the configuration is of another
        architecture.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> soft = Architecture(
      ...     name="soft", rule=lambda config, params, batch: Codes(
      ...         jax.nn.softplus(batch.pre)
      ...     )
      ... )
      >>> sae = make_dictionary(soft, Config("soft", d_in=4, d_sae=16))
      >>> sae.encode(sae.init(jax.random.key(0)), jnp.ones((2, 4))).shape
      (2, 16)
    """
    _check(architecture, config)
    check_number(architecture.name, "decoder_norm", decoder_norm, above=0)
    config = _with_ints(config)
    return Dictionary(
        init=partial(init_params, architecture, config, decoder_norm, start),
        encode=partial(_encode, architecture, config),
        decode=partial(_decode, architecture, config),
        forward=partial(_forward, architecture, config),
        config=config,
        architecture=architecture,
    )


def factory_config(
    architecture: Architecture,
    dim: int,
    latents: int,
    target_dim: int | None = None,
    **settings: Any,
) -> Config:
    """Configuration from the arguments of a factory; a transcoder has no ``b_dec``."""
    return Config(
        architecture=architecture.name,
        d_in=dim,
        d_sae=latents,
        d_out=target_dim,
        apply_b_dec_to_input=target_dim is None,
        **settings,
    )


def required_k(config: Config) -> int:
    """Return ``config.k``.

    Raises:
      ValueError: if it is ``None``.
    """
    if config.k is None:
        raise ValueError(f"{config.architecture}: k must be set, got None")
    return config.k


def required_grads(inputs: Inputs) -> Array:
    """Return ``inputs.grads``.

    Raises:
      ValueError: if it is ``None``.
    """
    if inputs.grads is None:
        raise ValueError("losses: this needs taps with gradients, got none")
    return inputs.grads


def weighted_mean(inputs: Inputs, values: Array) -> Array:
    """Mean of ``values [N]`` over the examples, by their weights."""
    return jnp.sum(inputs.weights * values)


def origin(config: Config, params: Params) -> Array:
    """Vector that is subtracted from the input, ``[D]``."""
    if config.apply_b_dec_to_input:
        return params["b_dec"]
    return jnp.zeros(config.d_in, params["b_dec"].dtype)


def code_units(config: Config, params: Params) -> Array:
    """Codes of a value of 1 in units of the rows of ``W_dec``, ``[M]``."""
    if config.rescale_acts_by_decoder_norm:
        return lengths(params["W_dec"])
    return jnp.ones(config.d_sae, params["W_dec"].dtype)


def lengths(rows: Array) -> Array:
    """Euclidean lengths of rows of any scale; 1 where a row is zero."""
    # Squares of the relative entries neither overflow nor underflow.
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(rows), axis=1))
    largest = jnp.where(largest > 0, largest, jnp.ones_like(largest))
    squares = jnp.sum((rows / largest[:, None]) ** 2, axis=1)
    return largest * jnp.sqrt(jnp.where(squares > 0, squares, jnp.ones_like(squares)))


def normalized_grads(params: Params, grads: Array) -> Array:
    """Divide gradients ``[N, K, D]`` by ``params["grad_scale"]``, if it is there.

    Raises:
      ValueError: if the scales are of another number of readouts.
    """
    scale = params.get("grad_scale")
    if scale is None:
        return grads
    if grads.ndim != 3 or scale.shape not in ((1,), (grads.shape[1],)):
        raise ValueError(
            f"encode: the parameters hold grad_scale {scale.shape}, one per readout, "
            f"and gradients are {grads.shape}; set grad_scale to the root mean square "
            "of each of these readouts, [K] or [1]"
        )
    return grads / scale[None, :, None]


def _check(architecture: Architecture, config: Config) -> None:
    """Check that settings are in their ranges and fit the architecture."""
    name, latents = architecture.name, config.d_sae
    if config.architecture != name:
        raise ValueError(
            f"make_dictionary: the architecture is {name!r}, the configuration is of "
            f"{config.architecture!r}"
        )
    # Sizes; a ValueError whatever they are, because files hold them too.
    sizes = {"dim": config.d_in, "latents": latents, "target_dim": config.d_out}
    limits: Any = {"most": MAX_SIZE, "about": ", what an axis has", "error": ValueError}
    for argument, size in sizes.items():
        if size is not None or argument != "target_dim":
            check_int(name, argument, size, **limits)
    if architecture.selects != "all":
        limits |= {"most": latents, "about": ", the latents"}
        check_int(name, "k", config.k, **limits)
    check_flag(
        name, "rescale_acts_by_decoder_norm", config.rescale_acts_by_decoder_norm
    )
    for setting in ("bandwidth", "gradient_weight"):
        check_number(name, setting, getattr(config, setting), least=0)
    # What holds for transcoders, which write another activation than they read.
    if config.d_out is None:
        return
    if config.apply_b_dec_to_input:
        raise ValueError(
            f"{name}: a transcoder has no b_dec to subtract from its input; set "
            "apply_b_dec_to_input=False"
        )
    if not architecture.transcodes:
        raise ValueError(
            f"{name}: there are no transcoders of this architecture; leave target_dim "
            "out"
        )


def _with_ints(config: Config) -> Config:
    """Convert the sizes of a configuration, which may be ints of NumPy, to ints."""
    sizes = {name: getattr(config, name) for name in ("d_in", "d_sae", "d_out", "k")}
    sizes = {name: int(size) for name, size in sizes.items() if size is not None}
    widths = tuple(int(width) for width in config.matryoshka_widths)
    return config._replace(**sizes, matryoshka_widths=widths)


def _pre(
    architecture: Architecture, config: Config, params: Params, acts: Array
) -> Array:
    """Compute pre-activations ``[N, M]``, the affine map or the architecture's own."""
    if acts.ndim != 2 or acts.shape[1] != config.d_in:
        raise ValueError(
            f"encode: wanted acts [N, {config.d_in}], got shape {acts.shape}"
        )
    if architecture.read is not None:
        return architecture.read(config, params, acts)
    bias = params.get("b_enc", jnp.zeros(config.d_sae, acts.dtype))
    return affine(acts, origin(config, params), params["W_enc"], bias)


def _encode(
    architecture: Architecture,
    config: Config,
    params: Params,
    acts: Array,
    *,
    grads: Array | None = None,
    train: bool = False,
    k: Array | None = None,
    split: Split | None = None,
) -> Array:
    """Encode activations as ``[N, M]`` codes, by the rule of training or after it."""
    pre = _pre(architecture, config, params, acts)
    batch = RuleInputs(acts, pre, grads, k, split=split)
    # Some rules of training look at a whole batch; after it each example is alone.
    rule = architecture.rule
    if not train and architecture.rule_after_training is not None:
        rule = architecture.rule_after_training
    codes = _checked(architecture, config, batch, rule(config, params, batch))
    return _all_codes(config, params, codes)


def _forward(
    architecture: Architecture,
    config: Config,
    params: Params,
    acts: Array,
    *,
    grads: Array | None = None,
    k: Array | None = None,
    weights: Array | None = None,
    split: Split | None = None,
) -> Output:
    """Encode and decode together by the rule of training, with all on the way."""
    pre = _pre(architecture, config, params, acts)
    batch = RuleInputs(acts, pre, grads, k, weights, split)
    codes = architecture.rule(config, params, batch)
    codes = _checked(architecture, config, batch, codes)
    return Output(
        codes=_all_codes(config, params, codes),
        hidden_pre=pre if codes.hidden_pre is None else codes.hidden_pre,
        recon=_with_skip(params, _recon(architecture, params, codes), acts),
        values=codes.values,
        index=codes.index,
        grad_recon=codes.grad_recon,
    )


def _checked(
    architecture: Architecture, config: Config, batch: RuleInputs, codes: Codes
) -> Codes:
    """Return the result of a rule if it has the type and the shape of codes."""
    if not isinstance(codes, Codes):
        raise TypeError(
            f"{architecture.name}: a rule returns Codes, got {type(codes).__name__}"
        )
    wanted = (len(batch.acts), config.d_sae)
    if codes.index is not None:
        wanted = codes.index.shape
    if codes.values.shape != wanted:
        raise ValueError(
            f"{architecture.name}: the values of the rule's Codes must be {wanted}, "
            f"got shape {codes.values.shape}"
        )
    return codes


def _recon(architecture: Architecture, params: Params, codes: Codes) -> Array:
    """Reconstruct from values in units of the rows of ``W_dec``, ``[N, D]``."""
    rows, bias = params["W_dec"], params["b_dec"]
    # A few codes of each example: only their rows are read.
    if codes.index is not None:
        return weighted_rows(codes.values, codes.index, rows) + bias[None, :]
    if architecture.write is not None:
        return architecture.write(params, codes.values)
    return decode_dense(codes.values, rows) + bias[None, :]


def _with_skip(params: Params, recon: Array, acts: Array | None) -> Array:
    """Add the linear path beside the codes, ``acts @ W_skip``, if there is one."""
    if "W_skip" not in params:
        return recon
    if acts is None:
        raise ValueError(
            "decode: wanted acts, got none: the parameters hold W_skip, a linear path "
            "beside the codes; pass acts=, or call forward"
        )
    return recon + acts @ params["W_skip"]


def _all_codes(config: Config, params: Params, codes: Codes) -> Array:
    """Codes ``[N, M]`` in the units of the configuration."""
    # Values are in units of the rows of W_dec; a few of each example are spread out.
    units = code_units(config, params)
    if codes.index is None:
        return codes.values * units[None, :]
    return scatter(codes.values * units[codes.index], codes.index, config.d_sae)


def _decode(
    architecture: Architecture,
    config: Config,
    params: Params,
    codes: Array,
    *,
    acts: Array | None = None,
) -> Array:
    """Decode codes in the units of the configuration."""
    if codes.ndim != 2 or codes.shape[1] != config.d_sae:
        raise ValueError(
            f"decode: wanted codes [N, {config.d_sae}], got shape {codes.shape}"
        )
    # Back to units of the rows of W_dec.
    values = codes
    if config.rescale_acts_by_decoder_norm:
        values = codes / code_units(config, params)[None, :]
    if architecture.write is not None:
        return architecture.write(params, values)
    recon = values @ params["W_dec"] + params["b_dec"][None, :]
    return _with_skip(params, recon, acts)
