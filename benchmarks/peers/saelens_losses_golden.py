"""Writes the losses in tests/golden/saelens_losses, by SAELens itself.

    pip install torch sae-lens==6.54.12   # in an environment of its own
    python benchmarks/peers/saelens_losses_golden.py tests/golden/saelens_losses

For every architecture fixed random parameters and batches; each of SAELens' training
losses on the first batch, with some latents taken for dead, and its gradient; and the
parameters after a few steps of SAELens' own trainer from the same start.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.saes import (
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    GatedTrainingSAE,
    GatedTrainingSAEConfig,
    JumpReLUTrainingSAE,
    JumpReLUTrainingSAEConfig,
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
    StandardTrainingSAE,
    StandardTrainingSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)
from sae_lens.saes.sae import TrainStepInput
from sae_lens.training.sae_trainer import SAETrainer

D, M, K, N, STEPS, RATE = 6, 16, 3, 20, 5, 1e-2
TOPK, BATCH = (
    (TopKTrainingSAE, TopKTrainingSAEConfig),
    (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig),
)
JUMP = (JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig)
NESTED = (MatryoshkaBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAEConfig)
PLAIN = (StandardTrainingSAE, StandardTrainingSAEConfig)
GATED = (GatedTrainingSAE, GatedTrainingSAEConfig)
WIDE = {"jumprelu_bandwidth": 1.0, "l0_coefficient": 0.3}
SQUARE = {"jumprelu_sparsity_loss_mode": "quadratic", "target_l0": 4.0}
CASES = {  # and how many latents are taken for dead
    "standard": (*PLAIN, {"l1_coefficient": 0.7, "l1_warm_up_steps": 3}, 0),
    "topk": (*TOPK, {"k": K, "aux_loss_coefficient": 0.5}, 5),
    "topk_plain": (*TOPK, {"k": K, "rescale_acts_by_decoder_norm": False}, 2),
    "batchtopk": (*BATCH, {"k": K}, 2),
    "matryoshka": (*NESTED, {"k": K, "matryoshka_widths": [3, 8, M]}, 5),
    "gated": (*GATED, {"l1_coefficient": 0.7}, 0),
    "jumprelu": (*JUMP, WIDE, 0),
    "jumprelu_quadratic": (*JUMP, {**WIDE, **SQUARE}, 0),
}


def main(folder):
    """Make, differentiate, train."""
    torch.manual_seed(0)
    for name, (kind, config, options, num_dead) in CASES.items():
        sae = kind(config(d_in=D, d_sae=M, **options))
        with torch.no_grad():
            for key, value in sae.named_parameters():
                value += 0.4 * torch.randn_like(value)
                if "threshold" in key:
                    value.abs_()
        batches = torch.randn(STEPS, N, D)
        dead = torch.zeros(M, dtype=torch.bool)
        dead[torch.randperm(M)[:num_dead]] = True
        kept = {"batches": batches, "dead": dead}
        kept |= {f"start/{n}": x.clone() for n, x in sae.named_parameters()}
        settings = SAETrainerConfig(
            N * STEPS, N, lr=RATE, lr_end=RATE, dead_feature_window=1
        )
        trainer = SAETrainer(settings, sae, iter(batches))
        final = {n: s.final_value for n, s in trainer.coefficient_schedulers.items()}
        losses = sae.training_forward_pass(
            TrainStepInput(batches[0], final, dead, 0, False)
        ).losses
        for loss, value in losses.items():
            kept[f"loss/{loss}"] = value
            for key, parameter in sae.named_parameters():
                if not value.requires_grad:
                    continue
                (slope,) = torch.autograd.grad(
                    value, parameter, retain_graph=True, allow_unused=True
                )
                kept[f"slope/{loss}/{key}"] = (
                    torch.zeros_like(parameter) if slope is None else slope
                )
        if hasattr(sae, "topk_threshold"):
            sae.topk_threshold.zero_()
        steps = []
        for batch in batches:
            steps.append(trainer.step(batch).loss)
            trainer.n_training_steps += 1
        kept["steps"] = torch.stack(steps)
        kept |= {f"end/{n}": x for n, x in sae.named_parameters()}
        kept |= {f"end/{n}": x for n, x in sae.named_buffers()}
        arrays = {n: np.asarray(x.detach()) for n, x in kept.items()}
        Path(folder).mkdir(parents=True, exist_ok=True)
        np.savez_compressed(Path(folder) / f"{name}.npz", **arrays)


if __name__ == "__main__":
    main(sys.argv[1])
