"""Check that SAELens reads the files of ``save_saelens`` with the same result.

    python benchmarks/peers/saelens_reads.py write out/sae       # where toyfeat is
    benchmarks/peers/.venv/bin/python benchmarks/peers/saelens_reads.py read out/sae

``write`` saves a small dictionary of every architecture and its codes and
reconstructions of random activations; ``read`` loads them by SAELens and prints the
largest differences, and fails if one of them is above 1e-5.
"""

import sys
from pathlib import Path

import numpy as np

D, M, K, N = 6, 16, 3, 50


def write(folder):
    """By toyfeat: dictionaries, and what they do."""
    import jax
    import jax.numpy as jnp

    import toyfeat as ft

    cases = {
        "standard": ft.dictionaries.standard(D, M),
        "topk": ft.dictionaries.topk(D, M, K),
        "topk_plain": ft.dictionaries.topk(D, M, K, rescale_acts_by_decoder_norm=False),
        "abstopk": ft.dictionaries.topk(D, M, K, signed=True),
        "gradient_topk": ft.dictionaries.gradient_topk(D, M, K, weight=2.5),
        "batchtopk": ft.dictionaries.batch_topk(D, M, K),
        "matryoshka": ft.dictionaries.matryoshka(D, M, K, widths=(4, M)),
        "jumprelu": ft.dictionaries.jump_relu(D, M),
        "gated": ft.dictionaries.gated(D, M),
        "transcoder": ft.dictionaries.standard(D, M, target_dim=4),
        "jumprelu_transcoder": ft.dictionaries.jump_relu(D, M, target_dim=4),
        "paired": ft.dictionaries.paired(D, M, K),
    }
    rng = np.random.default_rng(0)
    for name, sae in cases.items():
        start = sae.init(jax.random.key(0))
        noise = {k: 0.4 * rng.normal(size=x.shape) for k, x in start.items()}
        params = {k: x + jnp.asarray(noise[k], x.dtype) for k, x in start.items()}
        for key in {"threshold", "topk_threshold"} & set(params):
            params[key] = jnp.abs(params[key])
        if "gradient" in name or name == "paired":
            params["grad_scale"] = jnp.array([1e-3, 2.0])
        ft.interop.save_saelens(f"{folder}/{name}", sae, params)
        acts = rng.normal(size=(N, D)).astype(np.float32)
        codes = sae.encode(params, jnp.asarray(acts))
        out = sae.decode(params, codes)
        if name == "paired":  # to SAELens they are in units of what they add
            codes = codes * jnp.linalg.norm(params["W_dec"], axis=1)[None, :]
        np.savez(f"{folder}/{name}/run.npz", acts=acts, codes=codes, out=out)


def read(folder):
    """By SAELens: the same."""
    import torch
    from sae_lens import SAE

    worst = 0.0
    for path in sorted(Path(folder).iterdir()):
        sae, run = SAE.load_from_disk(str(path)), np.load(path / "run.npz")
        with torch.no_grad():
            codes = sae.encode(torch.tensor(run["acts"]))
            out = sae.decode(codes)
        pairs = (codes, run["codes"]), (out, run["out"])
        off = [float(np.abs(a.numpy() - b).max()) for a, b in pairs]
        kind, was = sae.cfg.architecture(), sae.cfg.metadata.training_architecture
        print(f"{path.name}: read as {kind}, was {was}, off by {off}")
        worst = max(worst, *off)
    sys.exit(worst > 1e-5)


if __name__ == "__main__":
    {"write": write, "read": read}[sys.argv[1]](sys.argv[2])
