"""Effects of a dictionary's latents on tasks, for circuits."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from toyfeat.dictionary.types import Dictionary
from toyfeat.lm.split import SplitDecoder, precise, split_at
from toyfeat.models.decoder import DecoderConfig
from toyfeat.types import Array, Params


class Prompts(NamedTuple):
    """Prompts of a task with a right and a wrong next token.

    Attributes:
      tokens: ``[P, T]``, filled up at the end with any token.
      last: ``[P]``, the position of the last token of each.
      right: ``[P]``.
      wrong: ``[P]``.
    """

    tokens: np.ndarray
    last: np.ndarray
    right: np.ndarray
    wrong: np.ndarray


class TaskData(NamedTuple):
    """Prompts of a task as :func:`task_differences` needs them, data of an effect.

    Attributes:
      model: parameters of the decoder.
      tensors: of the dictionary.
      baseline: ``[M]``, codes of latents that are left out.
      entry: ``[P, T, D]``.
      acts: ``[P, T, E]``.
      codes: ``[P, T, M]``.
      last: ``[P]``.
      answers: ``[P, 2]``, the right and the wrong token.
    """

    model: Params
    tensors: Params
    baseline: Array
    entry: Array
    acts: Array
    codes: Array
    last: Array
    answers: Array


def encode_prompts(
    rows: Sequence[dict[str, str]], tokenizer: Any, start: Any
) -> Prompts:
    """Cut prompts into tokens.

    Args:
      rows: each with ``prompt``, ``right`` and ``wrong``, the latter two with the space
        that they begin with, if any.
      tokenizer: with ``encode(text, add_special_tokens=False).ids``.
      start: token in front of every prompt.

    Returns:
      :class:`Prompts`; answers that are several tokens count by their first.

    Raises:
      ValueError: for a prompt whose two answers begin with the same token.
    """

    def ids(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    texts = [[start, *ids(row["prompt"])] for row in rows]
    answers = np.array([[ids(row[x])[0] for x in ("right", "wrong")] for row in rows])
    for row, (right, wrong) in zip(rows, answers, strict=True):
        if right == wrong:
            raise ValueError(
                f"encode_prompts: {row['right']!r} and {row['wrong']!r} of "
                f"{row['prompt']!r} begin with the same token {right}; give answers "
                "that differ in the first"
            )
    last = np.array([len(text) - 1 for text in texts])
    tokens = np.zeros((len(texts), last.max() + 1), np.int32)
    for line, text in zip(tokens, texts, strict=True):
        line[: len(text)] = text
    return Prompts(tokens, last, answers[:, 0], answers[:, 1])


@precise
def tap_task(
    split: SplitDecoder,
    params: Params,
    prompts: Prompts,
    dictionary: Dictionary,
    tensors: Params,
    baseline: Array,
) -> TaskData:
    """Tap the prompts of a task at the site, and encode them.

    Args:
      split: the decoder split at the site.
      params: of the decoder.
      prompts: of the task.
      dictionary: of the site.
      tensors: its parameters, for activations in their own units.
      baseline: ``[M]``, codes of latents that are left out, such as their means over
        other text.

    Returns:
      :class:`TaskData`.
    """
    _, acts = jax.jit(lambda p, x: split.model(p, x, {}))(params, prompts.tokens)
    at_site = acts[split.site]
    codes = dictionary.encode(tensors, at_site.reshape(-1, at_site.shape[2]))
    answers = np.stack([prompts.right, prompts.wrong], axis=1)
    return TaskData(
        model=params,
        tensors=tensors,
        baseline=baseline,
        entry=acts[split.entry],
        acts=at_site,
        codes=codes.reshape(*at_site.shape[:2], -1),
        last=jnp.asarray(prompts.last),
        answers=jnp.asarray(answers),
    )


Differences = Callable[[TaskData, Array | None], Array]
"""``(data, mask [M] or None) -> [P]``, the differences of the prompts."""


def task_effect(differences: Differences) -> Callable[[TaskData, Array], Array]:
    """Make the effect of a mask for :func:`toyfeat.discover.circuits.find_circuit`.

    Args:
      differences: from :func:`task_differences`.

    Returns:
      ``(TaskData, mask [M]) -> []``, mean over the prompts.
    """
    return lambda data, mask: jnp.mean(differences(data, mask))


def task_differences(
    config: DecoderConfig, site: str, dictionary: Dictionary, *, error: bool = False
) -> Differences:
    """Make the logit differences of the prompts of a task under a mask over latents.

    At every position but the first the activation is what the dictionary writes, with
    latent ``j`` at ``m_j`` of its own code and ``1 - m_j`` of the baseline's.

    Args:
      config: of the decoder.
      site: of the dictionary.
      dictionary: of the site.
      error: whether the reconstruction error of each activation is added.

    Returns:
      ``(TaskData, mask) -> [P]``, right minus wrong; with ``None`` as the mask the site
      keeps its activations, which is what the model itself does.
    """
    split, top = split_at(config, site), f"blocks_{config.layers - 1}/resid_post"
    head = split_at(config, top)

    def differences(data: TaskData, mask: Array | None) -> Array:
        value = data.acts
        if mask is not None:
            value = replace(data, mask)
            is_first = (jnp.arange(value.shape[1]) == 0)[None, :, None]
            value = jnp.where(is_first, data.acts, value)
        if site != top:
            value = split.run_acts(data.model, data.entry, value)[top]
        # The logits of one position of each prompt: most of a vocabulary is not needed.
        value = jnp.take_along_axis(value, data.last[:, None, None], axis=1)
        logits = head.run(data.model, value, value)[:, 0]
        pair = jnp.take_along_axis(logits, data.answers, axis=1)
        return pair[:, 0] - pair[:, 1]

    def replace(data: TaskData, mask: Array) -> Array:
        flat = data.codes.reshape(-1, data.codes.shape[2])
        codes = mask[None, :] * flat + ((1 - mask) * data.baseline)[None, :]
        value = dictionary.decode(data.tensors, codes)
        if error:
            unmasked = dictionary.decode(data.tensors, flat)
            value = value + data.acts.reshape(unmasked.shape) - unmasked
        return value.reshape(data.acts.shape)

    return differences
