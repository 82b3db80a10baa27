"""Writes the dictionaries in tests/golden/saelens, by SAELens itself.

    pip install torch sae-lens==6.54.12   # in an environment of its own
    python benchmarks/peers/saelens_golden.py tests/golden/saelens

For every architecture a small dictionary with random weights, saved by SAELens for
inference, and its codes and reconstructions of random activations.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from sae_lens import SAE
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.gated_sae import GatedTrainingSAE, GatedTrainingSAEConfig
from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
from sae_lens.saes.standard_sae import StandardTrainingSAE, StandardTrainingSAEConfig
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig

D, M, K, N = 6, 16, 3, 20
CASES = {
    "standard": (StandardTrainingSAE, StandardTrainingSAEConfig, {}),
    "topk": (TopKTrainingSAE, TopKTrainingSAEConfig, {"k": K}),
    "topk_plain": (
        TopKTrainingSAE,
        TopKTrainingSAEConfig,
        {"k": K, "rescale_acts_by_decoder_norm": False},
    ),
    "batchtopk": (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, {"k": K}),
    "jumprelu": (JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig, {}),
    "gated": (GatedTrainingSAE, GatedTrainingSAEConfig, {}),
}


def main(folder):
    """Make, save, load, run."""
    torch.manual_seed(0)
    for name, (kind, config, options) in CASES.items():
        sae = kind(config(d_in=D, d_sae=M, **options))
        with torch.no_grad():
            for key, value in sae.named_parameters():
                value += 0.4 * torch.randn_like(value)
                if "threshold" in key:
                    value.abs_()
            if hasattr(sae, "topk_threshold"):
                sae.topk_threshold.fill_(0.3)
        path = Path(folder) / name
        sae.save_inference_model(str(path))
        ready = SAE.load_from_disk(str(path))
        x = torch.randn(N, D)
        with torch.no_grad():
            codes = ready.encode(x)
            out = ready.decode(codes)
        np.savez(path / "run.npz", acts=x, codes=codes, out=out)


if __name__ == "__main__":
    main(sys.argv[1])
