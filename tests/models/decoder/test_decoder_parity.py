"""Parity with transformers and torch, which run in an environment of their own."""

import os
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import toyfeat as ft
from toyfeat.models.decoder import Decoder, load_decoder

pytest.importorskip("safetensors")
pytestmark = pytest.mark.slow  # importing transformers takes half of a minute

ROOT = Path(__file__).parents[3]
PEERS = os.environ.get("TOYFEAT_PEER_PYTHON") or str(
    ROOT / "benchmarks" / "peers" / ".venv" / "bin" / "python"
)
NAMES = [
    "gpt2",
    "gpt2-wide",
    "neox",
    "neox-sequential",
    "neox-unbiased",
    "llama",
    "llama-biased-tied",
    "llama-linear",
    "llama3",
]
START = 1

# The child writes <folder>/<name>/ as transformers saves it and <folder>/<name>.npz.
CHILD = """
import sys

import numpy as np
import torch
import transformers as tr

torch.manual_seed(0)
neox = dict(
    vocab_size=29, hidden_size=16, num_hidden_layers=3, num_attention_heads=2,
    intermediate_size=24, max_position_embeddings=16, rotary_pct=0.5,
    rotary_emb_base=100, bos_token_id=0, eos_token_id=0,
)
llama = dict(
    vocab_size=29, hidden_size=16, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, intermediate_size=24, max_position_embeddings=16,
    bos_token_id=0, eos_token_id=0,
)
gpt2 = dict(
    vocab_size=29, n_embd=16, n_layer=3, n_head=4, n_positions=16, bos_token_id=0,
    eos_token_id=0,
)
models = {
    "gpt2": (tr.GPT2LMHeadModel, tr.GPT2Config(**gpt2)),
    "gpt2-wide": (
        tr.GPT2LMHeadModel,
        tr.GPT2Config(
            **gpt2, n_inner=24, activation_function="relu", tie_word_embeddings=False
        ),
    ),
    "neox": (tr.GPTNeoXForCausalLM, tr.GPTNeoXConfig(**neox)),
    "neox-sequential": (
        tr.GPTNeoXForCausalLM,
        tr.GPTNeoXConfig(**neox, use_parallel_residual=False),
    ),
    "neox-unbiased": (
        tr.GPTNeoXForCausalLM,
        tr.GPTNeoXConfig(**neox, attention_bias=False, tie_word_embeddings=True),
    ),
    "llama": (tr.LlamaForCausalLM, tr.LlamaConfig(**llama)),
    "llama-biased-tied": (
        tr.LlamaForCausalLM,
        tr.LlamaConfig(
            **llama, head_dim=6, attention_bias=True, mlp_bias=True,
            tie_word_embeddings=True, rope_theta=100.0,
        ),
    ),
    "llama-linear": (
        tr.LlamaForCausalLM,
        tr.LlamaConfig(
            **llama, rope_theta=100.0, rope_scaling=dict(rope_type="linear", factor=2.5)
        ),
    ),
    "llama3": (
        tr.LlamaForCausalLM,
        tr.LlamaConfig(
            **llama, head_dim=8, rope_theta=100.0, rope_scaling=dict(
                rope_type="llama3", factor=4.0, low_freq_factor=1.0,
                high_freq_factor=3.0, original_max_position_embeddings=40,
            ),
        ),
    ),
}
folder, start = sys.argv[1], int(sys.argv[2])
for name, (kind, config) in models.items():
    model = kind(config).eval()
    with torch.no_grad():  # what is trained is neither small nor 0 and 1
        for parameter in model.parameters():
            scale = 0.4 if parameter.ndim > 1 else 0.2
            parameter.add_(scale * torch.randn_like(parameter))
    inner = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model
    blocks = inner.h if hasattr(inner, "h") else inner.layers
    kept = {}

    def keep(module, args, kwargs):
        kept["resid"] = args[0] if args else kwargs["hidden_states"]
        kept["resid"].retain_grad()

    blocks[start].register_forward_pre_hook(keep, with_kwargs=True)
    tokens = torch.randint(29, (2, 10))
    logits = model(tokens).logits
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, 29), tokens[:, 1:].reshape(-1), reduction="sum"
    )
    loss.backward()
    np.savez(
        f"{folder}/{name}.npz", tokens=tokens.numpy(), logits=logits.detach().numpy(),
        resid=kept["resid"].detach().numpy(), grads=kept["resid"].grad.numpy(),
    )
    model.save_pretrained(f"{folder}/{name}")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    if not Path(PEERS).is_file():
        pytest.skip(
            f"there is no {PEERS}; bash benchmarks/peers/setup.sh makes it, or "
            "TOYFEAT_PEER_PYTHON names another python with torch and transformers"
        )
    folder = tmp_path_factory.mktemp("peers")
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder), "PYTHONPATH": ""}
    done = subprocess.run(
        [PEERS, "-c", CHILD, str(folder), str(START)],
        env={**os.environ, **offline},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert not done.returncode, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_logits_and_gradients_are_those_of_transformers(folder, name):
    theirs = np.load(folder / f"{name}.npz")
    loaded = load_decoder(folder / name)
    tokens = jnp.asarray(theirs["tokens"], jnp.int32)
    site = f"blocks_{START}/resid_pre"
    model = ft.from_linen(Decoder(loaded.config))

    @jax.jit
    def ours(params, tokens, readout):
        logits = Decoder(loaded.config).apply(params, tokens)
        found = ft.tap(model, params, tokens, sites=site, readout=readout)
        return logits, found[site]

    logits, taps = ours(loaded.params, tokens, ft.readouts.next_token_loss(tokens))
    ours_of = {"logits": logits, "resid": taps.acts, "grads": taps.grads}
    for what, found in ours_of.items():
        wanted, tol = theirs[what], 1e-4 * np.abs(theirs[what]).max()
        np.testing.assert_allclose(
            found.reshape(wanted.shape), wanted, rtol=0, atol=tol, err_msg=what
        )
    assert theirs["logits"].std() > 0.5
    assert theirs["grads"].std() > 1e-3


def test_models_are_of_the_kinds_that_they_are_called(folder):
    configs = {name: load_decoder(folder / name).config for name in NAMES}
    assert [configs[n].tied for n in NAMES] == [1, 0, 0, 0, 1, 0, 1, 0, 0]
    assert [configs[n].parallel for n in NAMES] == [0, 0, 1, 0, 1, 0, 0, 0, 0]
    assert [configs[n].qkv_bias for n in NAMES] == [1, 1, 1, 1, 0, 0, 1, 0, 0]
    assert configs["neox"].rotary_dim == 4
    assert configs["llama"].kv_heads == 2
    assert configs["llama-biased-tied"].head_dim == 6
    assert configs["llama-biased-tied"].rotary_base == 100.0
    assert configs["llama-linear"].rotary_divisors == (2.5, 2.5)
    slower = configs["llama3"].rotary_divisors
    assert slower[0] == 1 < slower[1] < slower[-1] == 4
