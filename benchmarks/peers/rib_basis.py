"""Interaction bases of an MLP by rib (github.com/ApolloResearch/rib).

Its sources are where TOYFEAT_RIB says.  One JSON object per line on standard input, one
answer per line on standard output: ``load`` weights and data, ``run`` at a precision
and a batch size (seconds), ``save`` the last result.  rib's options are those of its
own examples of MLPs: the Jacobian's basis from plain gradients, centred, the output's
basis as it is.
"""

import json
import os
import sys
import time

import numpy as np

os.environ.setdefault("TQDM_DISABLE", "1")  # its bars cost time
STATE = {}


def load(path):
    """Build the MLP at both precisions, with its biases folded in as rib wants them."""
    import torch
    from rib.hook_manager import HookedModel
    from rib.models import MLP, MLPConfig
    from torch.utils.data import TensorDataset

    arrays = np.load(path)
    weights = [arrays[f"w{i}"] for i in range(len(arrays.files) // 2)]
    biases = [arrays[f"b{i}"] for i in range(len(weights))]
    for name, dtype in (("float32", torch.float32), ("float64", torch.float64)):
        config = MLPConfig(
            hidden_sizes=[w.shape[1] for w in weights[:-1]],
            input_size=weights[0].shape[0],
            output_size=weights[-1].shape[1],
            dtype=dtype,
        )
        model = MLP(config)
        for layer, w, b in zip(model.layers, weights, biases, strict=True):
            layer.W.data = torch.from_numpy(w).to(dtype)
            layer.b.data = torch.from_numpy(b).to(dtype)
        model.fold_bias()
        model.eval().requires_grad_(False)
        x = torch.from_numpy(arrays["x"]).to(dtype)
        data = TensorDataset(x, torch.zeros(len(x)))
        STATE[name] = HookedModel(model), data, dtype, len(weights)


def run(precision, batch):
    """Means, second moments and rotations, from the data on."""
    import torch
    from rib.data_accumulator import collect_dataset_means, collect_gram_matrices
    from rib.interaction_algos import calculate_interaction_rotations
    from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

    model, data, dtype, depth = STATE[precision]
    # Whole batches at a time: row by row, the loader would take longer than rib.
    sampler = BatchSampler(SequentialSampler(data), batch, drop_last=False)
    common = {
        "hooked_model": model,
        "data_loader": DataLoader(data, batch_size=None, sampler=sampler),
        "dtype": dtype,
        "device": "cpu",
    }
    sites = [f"layers.{i}" for i in range(depth)]
    names = {"module_names": sites, "hook_names": sites}
    means = collect_dataset_means(collect_output_dataset_means=False, **names, **common)
    grams = collect_gram_matrices(
        collect_output_gram=False, means=means, **names, **common
    )
    rotations = calculate_interaction_rotations(
        gram_matrices=grams,
        section_names=sites,
        node_layers=[*sites, "output"],
        n_intervals=0,
        integration_methods=["gradient"] * (depth + 1),
        M_dtype=torch.float32 if precision == "float32" else torch.float64,
        truncation_threshold=1e-15,
        rotate_final_node_layer=False,
        basis_formula="jacobian",
        center=True,
        means=means,
        **common,
    )
    STATE["result"] = rotations[:-1]


def save(path):
    """Values, readers and writers of every site, without the constant direction.

    It is the first of each; biases are the last coordinate.
    """
    arrays = {}
    for rotation in STATE["result"]:
        kept = rotation.C.shape[1] - 1
        values = rotation.Lambda[1:].sort(descending=True).values[:kept]
        arrays[f"{rotation.node_layer}/values"] = values.numpy()
        arrays[f"{rotation.node_layer}/readers"] = rotation.C[:-1, 1:].numpy()
        arrays[f"{rotation.node_layer}/writers"] = rotation.C_pinv[1:, :-1].numpy()
    np.savez(path, **arrays)


def main():
    """Answer until the input ends."""
    sys.path.insert(0, os.environ["TOYFEAT_RIB"])
    for line in sys.stdin:
        order = json.loads(line)
        what = order.pop("what")
        answer = {}
        if what == "load":
            try:
                load(**order)
            except ImportError as error:
                answer["missing"] = str(error)
        elif what == "run":
            start = time.perf_counter()
            run(**order)
            answer["seconds"] = time.perf_counter() - start
        elif what == "save":
            save(**order)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
