"""Trains SAELens' dictionaries on a world of known features, and scores them.

    python saelens_synthetic.py --make FOLDER --seed 42   # world, by SAELens itself
    python saelens_synthetic.py FOLDER --seed 0 [--only topk] [--warm-up 500]

The folder holds ``pool.npy`` [N, D], ``eval.npy`` [E, D], ``features.npy`` [R, D], and
optionally ``eval_codes.npy`` [E, R] (for F1) and ``order.npy`` [steps, batch] (rows of
the pool, so that others can train on the same batches). One JSON line an architecture;
``--save`` keeps the parameters of the start and of the end under SAELens' names.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

os.environ["TQDM_DISABLE"] = "1"

import numpy as np
import torch
from sae_lens import SAE
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.evals import ExplainedVarianceCalculator
from sae_lens.registry import get_sae_training_class
from sae_lens.synthetic import (
    FoldedNormalMagnitudeConfig,
    HierarchyConfig,
    LinearMagnitudeConfig,
    LowRankCorrelationConfig,
    OrthogonalizationConfig,
    SyntheticModel,
    SyntheticModelConfig,
    ZipfianFiringProbabilityConfig,
)
from sae_lens.synthetic.evals import (
    compute_classification_metrics,
    feature_uniqueness,
    mean_correlation_coefficient,
)
from sae_lens.training.sae_trainer import SAETrainer

WIDTH, STEPS, BATCH, LR = 128, 1500, 1024, 1e-3
MATRYOSHKA = {"k": 4, "matryoshka_widths": [16, 64, WIDTH]}
JUMPRELU = {
    "l0_coefficient": 1.0,
    "jumprelu_bandwidth": 1.0,
    "jumprelu_init_threshold": 1.0,
    "jumprelu_sparsity_loss_mode": "step",
    "decoder_init_norm": 0.5,  # at 0.1 most latents stay under the threshold
}
SCALED = {"normalize_activations": "expected_average_only_in"}
CASES = {
    "topk": ("topk", {"k": 4}),
    "batchtopk": ("batchtopk", {"k": 4}),
    "matryoshka": ("matryoshka_batchtopk", MATRYOSHKA),
    "matryoshka_aux": (
        "matryoshka_batchtopk",
        {**MATRYOSHKA, "use_matryoshka_aux_loss": True},
    ),
    "standard_l1_2": ("standard", {"l1_coefficient": 2.0}),
    "standard_l1_5": ("standard", {"l1_coefficient": 5.0}),
    "gated_l1_2": ("gated", {"l1_coefficient": 2.0}),
    "jumprelu": ("jumprelu", JUMPRELU),
    "jumprelu_scaled": ("jumprelu", {**JUMPRELU, **SCALED}),
}


def world(seed):
    """SynthSAEBench's recipe at 512 features in 64 dimensions."""
    return SyntheticModelConfig(
        num_features=512,
        hidden_dim=64,
        firing_probability=ZipfianFiringProbabilityConfig(
            exponent=0.5, max_prob=0.4, min_prob=5e-4
        ),
        hierarchy=HierarchyConfig(
            total_root_nodes=4,
            branching_factor=4,
            max_depth=3,
            mutually_exclusive_portion=1.0,
            compensate_probabilities=True,
            scale_children_by_parent=True,
        ),
        orthogonalization=OrthogonalizationConfig(num_steps=100, lr=3e-4),
        correlation=LowRankCorrelationConfig(rank=25, correlation_scale=0.1),
        std_firing_magnitudes=FoldedNormalMagnitudeConfig(mean=0.5, std=0.5),
        mean_firing_magnitudes=LinearMagnitudeConfig(start=5.0, end=4.0),
        bias=0.5,
        seed=seed,
    )


def make(folder, seed, n=200_000, n_eval=40_000, chunk=20_000):
    """Write a world and its samples."""
    folder.mkdir(parents=True, exist_ok=True)
    model = SyntheticModel(world(seed))
    torch.manual_seed(seed)
    pool = torch.cat([model.sample(chunk) for _ in range(n // chunk)])
    parts = [model.sample_with_features(chunk) for _ in range(n_eval // chunk)]
    acts, codes = (torch.cat(part) for part in zip(*parts, strict=True))
    order = np.random.default_rng(seed).integers(0, n, (STEPS, BATCH), dtype=np.int32)
    np.save(folder / "pool.npy", pool.numpy())
    np.save(folder / "eval.npy", acts.numpy())
    np.save(folder / "eval_codes.npy", codes.numpy())
    np.save(folder / "features.npy", model.feature_dict.feature_vectors.detach())
    np.save(folder / "order.npy", order)
    model.save(folder / "model")
    fires = codes > 0
    return {
        "true_l0": fires.sum(1).float().mean().item(),
        "true_l0_top_128": fires[:, :WIDTH].sum(1).float().mean().item(),
    }


def trainer_of(sae, provider, steps, batch):
    """SAELens' trainer, settings of its own synthetic runs but for the rate."""
    config = SAETrainerConfig(
        total_training_samples=steps * batch,
        train_batch_size_samples=batch,
        lr=LR,
        lr_end=LR,
        lr_scheduler_name="constant",
        lr_warm_up_steps=0,
        lr_decay_steps=0,
        adam_beta1=0.9,
        adam_beta2=0.999,
        dead_feature_window=1000,
        feature_sampling_window=2000,
        logger=LoggingConfig(log_to_wandb=False),
    )
    return SAETrainer(cfg=config, sae=sae, data_provider=provider)


def train(architecture, options, data, seed, warm_up=0):
    """A trained dictionary, its start, its settings, (seconds, seconds of CPU)."""
    kind, config = get_sae_training_class(architecture)
    for name in {"l1_warm_up_steps", "l0_warm_up_steps"} & set(config.__annotations__):
        options = {**options, name: warm_up}
    torch.manual_seed(seed)
    sae = kind(config(d_in=data["pool"].shape[1], d_sae=WIDTH, **options))
    start = arrays(sae)
    pool, order = data["pool"], data["order"]
    trainer = trainer_of(sae, (pool[rows] for rows in order), *order.shape)
    if sae.cfg.normalize_activations == "expected_average_only_in":
        trainer.activation_scaler.estimate_scaling_factor(
            d_in=pool.shape[1],
            data_provider=iter([pool]),
            n_batches_for_norm_estimate=1,
        )
    scale = trainer.activation_scaler.scaling_factor
    wall, cpu = time.perf_counter(), time.process_time()
    trainer.fit()
    seconds = time.perf_counter() - wall, time.process_time() - cpu
    settings = {
        "sae": {k: v for k, v in asdict(sae.cfg).items() if k != "metadata"},
        "trainer": {k: v for k, v in asdict(trainer.cfg).items() if k != "logger"},
        "init": "kaiming uniform rows of norm decoder_init_norm, W_enc = W_dec^T, 0",
        "clip_grad_norm": 1.0,
        "adam_eps": 1e-8,
        "activation_scale": scale,
    }
    return sae, start, settings, seconds


def arrays(sae):
    """Parameters as arrays of their own."""
    return {k: v.numpy().copy() for k, v in sae.state_dict().items()}


def codes_metrics(sae, data):
    """Metrics of codes and reconstructions of the evaluation's activations."""
    x = data["eval"]
    codes = sae.encode(x)
    variance = ExplainedVarianceCalculator()
    variance.add_batch(sae.decode(codes), x)
    answer = {
        "ev": variance.compute(),
        "l0": (codes != 0).sum(1).float().mean().item(),
        "dead": int((~(codes != 0).any(0)).sum()),
    }
    if "eval_codes" in data:
        scores = compute_classification_metrics(
            codes, data["eval_codes"], sae.W_dec, data["features"]
        )
        answer.update(f1=scores.f1_score, precision=scores.precision)
        answer["recall"] = scores.recall
    return answer


@torch.no_grad()
def metrics(sae, data):
    """Scores in training form, and as saved for inference where that differs."""
    sae.eval()
    answer = {
        "mcc": mean_correlation_coefficient(sae.W_dec, data["features"]),
        "uniqueness": feature_uniqueness(sae.W_dec, data["features"]),
        **codes_metrics(sae, data),
    }
    if hasattr(sae, "topk_threshold"):
        with tempfile.TemporaryDirectory() as folder:
            sae.save_inference_model(folder)
            answer["inference"] = codes_metrics(SAE.load_from_disk(folder), data)
    return answer


def load(folder, order, seed):
    """The arrays of a world; batches drawn by the seed without an order."""
    names = "pool", "eval", "features", "eval_codes"
    files = {name: folder / f"{name}.npy" for name in names}
    data = {k: torch.from_numpy(np.load(f)) for k, f in files.items() if f.exists()}
    path = order or folder / "order.npy"
    if path.exists():
        rows = np.load(path)
    else:
        draw = np.random.default_rng(seed)
        rows = draw.integers(0, len(data["pool"]), (STEPS, BATCH))
    data["order"] = torch.from_numpy(rows.astype(np.int64))
    return data


def main():
    """Make a world, or train and score on one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--make", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--order", type=Path)
    parser.add_argument("--only", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--save", type=Path)
    parser.add_argument("--warm-up", type=int, default=0, help="steps of coefficients")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    answers, sys.stdout = sys.stdout, sys.stderr
    torch.set_num_threads(args.threads)
    if args.make:
        print(json.dumps(make(args.folder, args.seed)), file=answers)
        return
    data = load(args.folder, args.order, args.seed)
    for name in args.only:
        sae, start, settings, (wall, cpu) = train(
            *CASES[name], data, args.seed, args.warm_up
        )
        answer = {"name": name, "seed": args.seed, **metrics(sae, data)}
        answer.update(seconds=wall, cpu_seconds=cpu, threads=args.threads)
        answer["samples_per_cpu_second"] = data["order"].numel() / cpu
        print(json.dumps({**answer, "settings": settings}), file=answers, flush=True)
        if args.save:
            args.save.mkdir(parents=True, exist_ok=True)
            for part, params in {"start": start, "end": arrays(sae)}.items():
                np.savez(args.save / f"{name}_{args.seed}_{part}.npz", **params)


if __name__ == "__main__":
    main()
