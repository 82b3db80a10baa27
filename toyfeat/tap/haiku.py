"""Probed models from haiku transforms."""

import inspect
from collections.abc import Mapping
from typing import Any

from toyfeat.checks import check_key
from toyfeat.tap.extras import import_extra
from toyfeat.tap.marks import mark, run_marked
from toyfeat.tap.probes import infer_batch_size, split_inputs
from toyfeat.types import Acts, Inputs, Outputs, Params, Probe, Probed


def from_haiku(transformed: Any, *, rng: Any = None, **apply_kwargs: Any) -> Probed:
    """Make a probed model of a haiku transform, as it is.

    Every call of a public method of a module is a site, named after the module:
    ``"mlp/linear_0"`` for ``__call__``, ``"embed.attend"`` for another method,
    ``"shared#1"`` for a second call; the outputs are ``"__call__"``.  ``hk.remat``,
    ``hk.scan``, ``hk.vmap`` and ``hk.layer_stack`` work as they are; what runs in a
    scan are the sites ``"mlp@2"``, one per layer or time step.

    Args:
      transformed: what ``hk.transform``, ``hk.without_apply_rng`` or
        ``hk.transform_with_state`` returned, of a function that takes a batch.
      rng: key of the call, for dropout and the like.
      **apply_kwargs: keyword arguments of the call (``is_training=False``).

    Returns:
      ``probed(params, inputs, probes) -> (outputs, acts)``, where ``params`` is what
      ``transformed.init`` returned: with a state the pair of both.  The new state is
      dropped.  ``inputs`` that are a tuple are passed as positional arguments.

    Raises:
      ImportError: without the ``haiku`` extra.
      TypeError: if ``transformed`` is no transform.
      ValueError: when called, if a probe names a site that does not exist, if a
        function is given for one layer of a scan, if two values have one name, or if
        ``params`` are not what ``init`` returned.

    Example:
      >>> import haiku as hk, jax, jax.numpy as jnp
      >>> model = hk.transform(lambda x: hk.nets.MLP([4, 1])(x))
      >>> params = model.init(jax.random.key(0), jnp.ones((3, 2)))
      >>> outputs, acts = from_haiku(model)(params, jnp.ones((3, 2)), {})
      >>> list(acts)
      ['mlp/linear_0', 'mlp/linear_1', 'mlp', '__call__']
    """
    hk = import_extra("from_haiku", "haiku")
    if not isinstance(transformed, (hk.Transformed, hk.TransformedWithState)):
        raise TypeError(
            "from_haiku: wanted what hk.transform returned, got "
            f"{type(transformed).__name__}; give hk.transform(function)"
        )
    if rng is not None:
        check_key("from_haiku", rng)
    has_state = isinstance(transformed, hk.TransformedWithState)
    takes_rng = "rng" in inspect.signature(transformed.apply).parameters

    def intercept(next_function: Any, args: Any, kwargs: Any, context: Any) -> Any:
        value, name = next_function(*args, **kwargs), context.method_name
        # What hk.lift returns, as in a layer stack, are parameters.
        is_lift = type(context.module).__module__ == hk.lift.__module__
        if is_lift or (name.startswith("_") and name != "__call__"):
            return value
        # Modules that were made in __init__ are at "parent/~/child".
        path = context.module.module_name.replace("/~/", "/")
        return mark(path if name == "__call__" else f"{path}.{name}", value)

    def call(params: Params, inputs: Inputs) -> Outputs:
        args, kwargs = split_inputs("from_haiku", _one_argument, inputs, {})
        before = (*(params if has_state else (params,)), *((rng,) if takes_rng else ()))
        with hk.intercept_methods(intercept):
            outputs = transformed.apply(*before, *args, **apply_kwargs, **kwargs)
        return mark("__call__", outputs[0] if has_state else outputs)

    def probed(
        params: Params, inputs: Inputs, probes: Mapping[str, Probe]
    ) -> tuple[Outputs, Acts]:
        _check_params(params, has_state)
        options = {"batch": infer_batch_size(inputs), "batched": True}
        try:
            return run_marked("from_haiku", call, params, inputs, probes, **options)
        except Exception as error:
            if type(error).__name__ == "MissingRNGError":  # of haiku, not public
                error.add_note(
                    "from_haiku: the model draws random numbers; give "
                    "from_haiku(transformed, rng=key), or have it draw none"
                )
            raise

    return probed


def _check_params(params: Params, has_state: bool) -> None:
    """Refuse what ``init`` cannot have returned."""
    pair = isinstance(params, tuple) and len(params) == 2
    if (has_state and not pair) or not (has_state or isinstance(params, Mapping)):
        wanted = "the pair of parameters and state" if has_state else "the parameters"
        raise ValueError(
            f"from_haiku: params must be {wanted} that transformed.init returned, got "
            f"{type(params).__name__}; give params = transformed.init(key, inputs)"
        )


def _one_argument(module: Any, inputs: Any) -> None:
    """Have the signature of a model that is given one argument or a tuple of them."""
