import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import toyfeat as ft
from examples import encoder as enc
from toyfeat.jobs import cache_folder, locate

safetensors = pytest.importorskip("safetensors.numpy")
tokenizers = pytest.importorskip("tokenizers")

VOCAB, LAYERS, DIM, HEADS, HIDDEN, CONTEXT = 11, 2, 8, 2, 12, 9
CONFIG = {
    "model_type": "bert",
    "vocab_size": VOCAB,
    "num_hidden_layers": LAYERS,
    "hidden_size": DIM,
    "num_attention_heads": HEADS,
    "intermediate_size": HIDDEN,
    "max_position_embeddings": CONTEXT,
    "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
}


def tensors():
    rng = np.random.default_rng(0)
    shapes = {
        "embeddings.word_embeddings.weight": (VOCAB, DIM),
        "embeddings.position_embeddings.weight": (CONTEXT, DIM),
        "embeddings.token_type_embeddings.weight": (2, DIM),
    }
    norms = ["embeddings.LayerNorm"]
    for i in range(LAYERS):
        base = f"encoder.layer.{i}"
        norms += [f"{base}.attention.output.LayerNorm", f"{base}.output.LayerNorm"]
        for name, shape in (
            ("attention.self.query", (DIM, DIM)),
            ("attention.self.key", (DIM, DIM)),
            ("attention.self.value", (DIM, DIM)),
            ("attention.output.dense", (DIM, DIM)),
            ("intermediate.dense", (HIDDEN, DIM)),
            ("output.dense", (DIM, HIDDEN)),
        ):
            shapes[f"{base}.{name}.weight"] = shape
            shapes[f"{base}.{name}.bias"] = shape[:1]
    for name in norms:
        shapes |= {f"{name}.weight": (DIM,), f"{name}.bias": (DIM,)}
    return {n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()}


def write(folder, weights, config=CONFIG):
    safetensors.save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    words = {f"w{i}": i for i in range(VOCAB)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "w0"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    extra = {
        "embeddings.position_ids": np.arange(CONTEXT)[None],
        "pooler.dense.weight": np.zeros((DIM, DIM), np.float32),
    }
    weights = {f"bert.{n}": x for n, x in (tensors() | extra).items()}
    return write(tmp_path_factory.mktemp("bert"), weights)


def test_a_tokenizer_with_other_tokens_is_refused(tmp_path):
    write(tmp_path, tensors())
    words = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    words.add_tokens(["more"])
    words.save(str(tmp_path / "tokenizer.json"))
    message = f"load_encoder: the tokenizer has {VOCAB + 1} tokens, the model {VOCAB};"
    with pytest.raises(ValueError, match=message):
        enc.load_encoder(tmp_path)


@pytest.fixture(scope="module")
def model(folder):
    return enc.load_encoder(folder)


def by_hand(tokens):
    """One sentence without padding, in float64."""
    w = {name: x.astype(np.float64) for name, x in tensors().items()}

    def norm(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-12)
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def dense(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    erf = np.vectorize(math.erf)
    x = w["embeddings.word_embeddings.weight"][tokens]
    x = x + w["embeddings.position_embeddings.weight"][: len(tokens)]
    x = norm(
        x + w["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm"
    )
    for i in range(LAYERS):
        base, heads = f"encoder.layer.{i}", []
        q, k, v = (
            dense(x, f"{base}.attention.self.{n}") for n in ("query", "key", "value")
        )
        for part in np.split(np.arange(DIM), HEADS):
            scores = q[:, part] @ k[:, part].T / np.sqrt(DIM / HEADS)
            chances = np.exp(scores - scores.max(1, keepdims=True))
            heads.append(chances / chances.sum(1, keepdims=True) @ v[:, part])
        mixed = dense(np.concatenate(heads, 1), f"{base}.attention.output.dense")
        x = norm(x + mixed, f"{base}.attention.output.LayerNorm")
        up = dense(x, f"{base}.intermediate.dense")
        hidden = up * (1 + erf(up / np.sqrt(2))) / 2
        x = norm(x + dense(hidden, f"{base}.output.dense"), f"{base}.output.LayerNorm")
    return x, x.mean(0) / np.linalg.norm(x.mean(0))


@pytest.mark.slow
def test_vectors_are_those_of_every_sentence_alone_in_float64(model):
    texts = ["w1 w2 w3 w4", "w5", "w6 w7 w8 w9 w10 w1"]
    sentences = enc.sentences_from_texts(model, texts, length=7)
    probed = ft.from_linen(enc.Encoder(model.config))
    vectors, acts = probed(model.params, (sentences,), {})
    for i, text in enumerate(texts):
        tokens = [int(word[1:]) for word in text.split()]
        last, wanted = by_hand(tokens)
        np.testing.assert_allclose(vectors[i], wanted, atol=2e-5)
        found = acts[f"blocks_{LAYERS - 1}/resid_post"][i, : len(tokens)]
        np.testing.assert_allclose(found, last, atol=1e-4)


@pytest.mark.slow
def test_gradients_at_a_site_are_those_of_a_sentence_alone(model):
    sentences = enc.sentences_from_texts(model, ["w1 w2 w3", "w4 w5"], length=4)
    probed, site = ft.from_linen(enc.Encoder(model.config)), "blocks_0/mlp_out"
    readout = ft.readouts.scalar(lambda y: y[0], mask=sentences.mask)
    taps = ft.tap(probed, model.params, (sentences,), sites=site, readout=readout)[site]
    assert taps.weights.tolist() == [1, 1, 1, 0, 1, 1, 0, 0]

    def alone(delta):
        one = jax.tree.map(lambda x: x[1:], sentences)
        return probed(model.params, (one,), {site: delta[None]})[0][0, 0]

    wanted = jax.grad(alone)(jnp.zeros((4, DIM)))
    np.testing.assert_allclose(taps.grads[4:, 0], wanted, atol=1e-6)


def test_long_texts_are_cut_and_keep_their_last_token(model):
    sentences = enc.sentences_from_texts(model, ["w1 w2 w3 w4 w5 w6"], length=4)
    assert sentences.tokens.tolist() == [[1, 2, 3, 6]]


@pytest.mark.parametrize(
    ("texts", "length", "message"),
    [([], 5, "some texts"), ("w1", 5, "some texts"), (["w1"], 99, "in 3 .. 9, got 99")],
)
def test_bad_texts_are_refused(model, texts, length, message):
    with pytest.raises(ValueError, match=f"sentences_from_texts: .*{message}"):
        enc.sentences_from_texts(model, texts, length)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "type 'bert', got 'gpt2'"),
        ({"hidden_act": "relu"}, "hidden_act = 'relu' is not covered"),
        ({"hidden_size": 9}, "fit each other"),
        ({"vocab_size": "11"}, "must be whole"),
        ({"vocab_size": 12}, r"word_embeddings.weight is \(11, 8\), wanted \(12, 8\)"),
        ({"num_hidden_layers": 3}, "misses the tensors encoder.layer.2"),
        ({"num_hidden_layers": 1}, "does not have: encoder.layer.1"),
    ],
)
def test_files_that_do_not_fit_are_refused(tmp_path, change, message):
    write(tmp_path, tensors(), CONFIG | change)
    with pytest.raises(ValueError, match=f"load_encoder: .*{message}"):
        enc.load_encoder(tmp_path)


def test_a_missing_entry_and_too_many_tokens_are_named(tmp_path, model):
    config = {name: x for name, x in CONFIG.items() if name != "hidden_size"}
    write(tmp_path, tensors(), config)
    with pytest.raises(ValueError, match="no entry 'hidden_size'"):
        enc.load_encoder(tmp_path)
    tokens = jnp.zeros((1, 10), jnp.int32)
    with pytest.raises(ValueError, match="T at most 9"):
        enc.Encoder(model.config).apply(
            model.params, enc.Sentences(tokens, jnp.ones((1, 10)))
        )


@pytest.mark.slow
def test_the_released_encoder_puts_paraphrases_together():
    if not (cache_folder() / "minilm").exists():
        pytest.skip("needs: python scripts/fetch.py minilm")
    model = enc.load_encoder(locate("minilm"))
    texts = [
        "A man is eating food.",
        "Someone eats a meal.",
        "The stock market fell sharply.",
        "Share prices dropped a lot.",
    ]
    sentences = enc.sentences_from_texts(model, texts, length=16)
    vectors = jax.jit(enc.Encoder(model.config).apply)(model.params, sentences)
    cosines = np.asarray(vectors @ vectors.T)
    assert cosines[0, 1] > 0.6
    assert cosines[2, 3] > 0.6
    assert np.abs(cosines[:2, 2:]).max() < 0.15
