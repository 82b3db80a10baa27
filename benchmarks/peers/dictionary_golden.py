"""Writes the folders dictionary_learning, sparsify and torch of tests/golden.

    pip install -r benchmarks/peers/requirements.txt   # in an environment of its own
    pip install --no-deps dictionary-learning==0.1.0 nnsight==0.3.7 eai-sparsify==1.3.3
    python benchmarks/peers/dictionary_golden.py tests/golden

For every class a small dictionary with random weights, saved as its library saves it,
and the codes and reconstructions that its library then computes; and a file of
tensors that are views of storages in every way that torch saves them.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from dictionary_learning.dictionary import AutoEncoderNew
from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
from dictionary_learning.trainers.gdm import GatedSAETrainer
from dictionary_learning.trainers.jumprelu import JumpReluTrainer
from dictionary_learning.trainers.matryoshka_batch_top_k import (
    MatryoshkaBatchTopKTrainer,
)
from dictionary_learning.trainers.standard import StandardTrainer
from dictionary_learning.trainers.top_k import TopKTrainer
from dictionary_learning.utils import load_dictionary
from sparsify import SparseCoder, SparseCoderConfig

D, M, K, N = 6, 10, 3, 20
SIZES = {
    "steps": 5000,
    "activation_dim": D,
    "dict_size": M,
    "layer": 0,
    "lm_name": "toy",
    "device": "cpu",
}
GROUPS = {"group_fractions": [0.2, 0.3, 0.5]}
TRAINERS = {
    "standard": (StandardTrainer, {}),
    "topk": (TopKTrainer, {"k": K}),
    "topk_bfloat16": (TopKTrainer, {"k": K}),
    "batchtopk": (BatchTopKTrainer, {"k": K}),
    "batchtopk_untrained": (BatchTopKTrainer, {"k": K}),
    "matryoshka": (MatryoshkaBatchTopKTrainer, {"k": K, **GROUPS}),
    "jumprelu": (JumpReluTrainer, {}),
    "gated": (GatedSAETrainer, {}),
}
SPARSE = {
    "topk": {"num_latents": M},
    "topk_bfloat16": {"num_latents": M},
    "topk_by_factor": {"expansion_factor": 2, "normalize_decoder": False},
    "transcoder": {"num_latents": M, "transcode": True},
    "multi_topk": {"expansion_factor": 4, "multi_topk": True},  # 4 k must be there
}


@torch.no_grad()
def shaken(name, model):
    """The model with noise on every weight and a threshold that cuts."""
    for key, value in model.named_parameters():
        value += 0.4 * torch.randn_like(value)
        if key == "threshold":
            value.abs_()
    if hasattr(model, "k") and name != "batchtopk_untrained":
        model.threshold.fill_(0.6)
    return model


def dictionary_learning(folder):
    """Trainers' dictionaries and configurations, and the class that has none."""
    made = {
        name: (shaken(name, trainer.ae), trainer.config)
        for name, (kind, options) in TRAINERS.items()
        for trainer in [kind(**SIZES, **options)]
    }
    made["new"] = shaken("new", AutoEncoderNew(D, M)), {"dict_class": "AutoEncoderNew"}
    for name, (model, config) in made.items():
        path = folder / name
        path.mkdir(parents=True, exist_ok=True)
        state = {key: value.cpu() for key, value in model.state_dict().items()}
        if name.endswith("bfloat16"):
            state = {k: v.bfloat16() if v.ndim else v for k, v in state.items()}
        torch.save(state, path / "ae.pt")
        text = json.dumps({"trainer": config}, indent=1)
        (path / "config.json").write_text(text + "\n")
        ready, _ = load_dictionary(str(path), device="cpu")
        acts = torch.randn(N, D)
        codes = ready.encode(acts)
        written(path, acts, codes, ready.decode(codes))


def sparsify(folder):
    """Sparse coders as ``save_to_disk`` writes them; run in float32."""
    for name, options in SPARSE.items():
        model = shaken(name, SparseCoder(D, SparseCoderConfig(k=K, **options)))
        if name.endswith("bfloat16"):
            model = model.bfloat16()
        model.save_to_disk(folder / name)
        ready = SparseCoder.load_from_disk(folder / name).float()
        acts = torch.randn(N, D)
        values, index, _ = ready.encode(acts)
        codes = torch.zeros(N, ready.num_latents).scatter_(1, index, values)
        written(folder / name, acts, codes, ready.decode(values, index))


def tensors(folder):
    """Make tensors: every dtype, transposed, sliced, shared, empty, no axes."""
    folder.mkdir(parents=True, exist_ok=True)
    base = torch.arange(24.0).reshape(4, 6)
    kinds = "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool"
    state = {kind: base.to(getattr(torch, kind)) for kind in kinds.split()}
    state |= {"whole": base, "transposed": base.T, "rows": base[1:3]}
    state |= {"columns": base[:, 1::2], "one": base[2, 3], "none": base[:0]}
    state |= {"axes": base.reshape(2, 3, 4).permute(2, 0, 1)}
    torch.save(state, folder / "views.pt")
    arrays = {k: v.float() if k == "bfloat16" else v for k, v in state.items()}
    np.savez(folder / "views.npz", **{k: v.numpy() for k, v in arrays.items()})
    model = torch.nn.Linear(2, 3)
    torch.save(model.state_dict(), folder / "module.pt")
    torch.save(base, folder / "tensor.pt")
    torch.save(model, folder / "object.pt")
    torch.save(state, folder / "legacy.pt", _use_new_zipfile_serialization=False)


def written(path, acts, codes, out):
    """Return what was computed, beside what was saved."""
    arrays = {"acts": acts, "codes": codes, "out": out}
    np.savez(path / "run.npz", **{k: v.detach().numpy() for k, v in arrays.items()})


if __name__ == "__main__":
    torch.manual_seed(0)
    dictionary_learning(Path(sys.argv[1]) / "dictionary_learning")
    sparsify(Path(sys.argv[1]) / "sparsify")
    tensors(Path(sys.argv[1]) / "torch")
