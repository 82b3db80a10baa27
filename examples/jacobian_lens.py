"""What does the middle of a language model say?  A Jacobian lens, with its error.

    python examples/jacobian_lens.py

A small decoder with random weights, so that it runs anywhere in seconds; load_decoder
reads released weights.  docs/lens.md has the lenses of SmolLM2.
"""

# %% A decoder
import jax
import numpy as np

import toyfeat as ft
from toyfeat.models.decoder import Decoder, llama

config = llama(vocab=60, layers=4, dim=16, heads=2, hidden=32)
prompts = np.random.default_rng(0).integers(0, config.vocab, (12, 24))
params = Decoder(config).init(jax.random.key(0), prompts)

# %% Fit: the mean derivative of the final stream by each block's output
model = ft.lenses.from_decoder(config)
jacobian = ft.lenses.mean_jacobian(model, config.dim)
batches = [(prompts[:6], None), (prompts[6:], None)]  # tokens, mask
fitted = jacobian.finish(ft.lenses.fit(model, jacobian, params, batches))

# %% How sure is it?
for site, error in fitted.relative_error.items():
    print(f"{site}: relative error {error:.3f}, halves {fitted.refit_cosine[site]:.3f}")

# %% Read a prompt at every layer, beside the logit lens
lenses = {
    "Jacobian": ft.lenses.jacobian_lens(model, params, fitted),
    "logit": ft.lenses.logit_lens(model, params),
}
logits, acts = model.probed(params, prompts, {})
agree = {}
for name, lens in lenses.items():
    agree[name] = [
        float((lens.read(site, acts[site]).argmax(-1) == logits.argmax(-1)).mean())
        for site in model.sites
    ]
    print(name, "says the final token at each block:", np.round(agree[name], 2))
