"""Runs the peers' dictionary training steps, on activations and orders from outside.

One JSON object per line on standard input, one answer per line on standard output:

``settings``  threads, precision (of torch's float32 products; "highest" without)
``load``      path of activations [N, d_in]
``prepare``   library, architecture, d_in, d_sae, lr, batch, and optionally k, l1, seed,
              members, device, options (more of SAELens' configuration), order (npy of
              rows [steps, batch]; consecutive rows without), init ({"W_dec": npy, ...}
              under SAELens' names, with an axis of members in front or not), dead
              (share of latents that start as dead), clip (sparsify only)
``run``       steps; answers seconds, seconds of CPU
``save``      path of an npz with every parameter under SAELens' names

Every library takes the step its own trainer takes, all of them with Adam(0.9, 0.999),
warm-ups and logging off. SAELens, ``april``, ``topk`` and ``batchtopk`` of
dictionary_learning clip gradients at 1; its ``standard`` and sparsify do not clip.
Decoder rows start random with norm 0.1, or with norm 1 where the library keeps them
there from its first step (topk, batchtopk, sparsify), the encoder as the decoder's
transpose, biases at 0; topk and batchtopk of dictionary_learning then set b_dec to the
first batch's geometric median, sparsify to its mean.
"""

import itertools
import json
import os
import sys
import time

os.environ["TQDM_DISABLE"] = "1"

import numpy as np
import torch

NAMES = {
    "W_enc": ("W_enc", "encoder.weight"),
    "b_enc": ("b_enc", "encoder.bias"),
    "W_dec": ("W_dec", "decoder.weight"),
    "b_dec": ("b_dec", "bias"),
}
FOREVER = 10**9


def placed(module, name):
    """A library's tensor under SAELens' name and orientation, or None."""
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    own = next((key for key in NAMES[name] if key in tensors), None)
    if own is None:
        return None
    tensor = tensors[own].data
    return tensor.T if own.endswith(("encoder.weight", "decoder.weight")) else tensor


def initial(order, member, norm):
    """Starting values under SAELens' names; rows at the norm, where there is one."""
    given = {k: np.load(path) for k, path in order.get("init", {}).items()}
    dims = {"W_enc": 2, "W_dec": 2, "b_enc": 1, "b_dec": 1}
    given = {k: v[member] if v.ndim > dims[k] else v for k, v in given.items()}
    given = {k: torch.from_numpy(v) for k, v in given.items()}
    draw = torch.Generator().manual_seed(order.get("seed", 0) + member)
    rows = torch.randn(order["d_sae"], order["d_in"], generator=draw)
    rows = given.pop("W_dec", rows / rows.norm(dim=1, keepdim=True) * 0.1)
    if norm:
        rows = rows / rows.norm(dim=1, keepdim=True) * norm
    zeros = {"b_enc": torch.zeros(len(rows)), "b_dec": torch.zeros(order["d_in"])}
    return {"W_enc": rows.T, "W_dec": rows, **zeros, **given}


def fill(module, order, member=0, norm=None):
    """Copy the starting values into a library's module."""
    for name, value in initial(order, member, norm).items():
        tensor = placed(module, name)
        if tensor is not None:
            tensor.copy_(value)


def sae_lens(order, batches):
    """SAELens' SAETrainer, or its MultiSAETrainer of several."""
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.registry import get_sae_training_class
    from sae_lens.training.multi_sae_trainer import MultiSAETrainer
    from sae_lens.training.sae_trainer import SAETrainer

    kind, config = get_sae_training_class(order["architecture"])
    options = {"k": order.get("k"), "l1_coefficient": order.get("l1")}
    options = {k: v for k, v in options.items() if k in config.__dataclass_fields__}
    options |= order.get("options", {})
    size = {"d_in": order["d_in"], "d_sae": order["d_sae"], "device": order["device"]}
    saes = [kind(config(**size, **options)) for _ in range(order["members"])]
    for member, sae in enumerate(saes):
        fill(sae, order, member)
    settings = SAETrainerConfig(
        total_training_samples=0,
        train_batch_size_samples=order["batch"],
        lr=order["lr"],
        lr_end=order["lr"],
        device=order["device"],
        logger=LoggingConfig(log_to_wandb=False),
    )
    if len(saes) == 1:
        trainer = SAETrainer(cfg=settings, sae=saes[0], data_provider=batches)
        trainers = [trainer]
    else:
        names = [f"sae{i}" for i in range(len(saes))]
        trainer = MultiSAETrainer(
            cfg=settings,
            saes=dict(zip(names, saes, strict=True)),
            hook_names=dict.fromkeys(names, "acts"),
            data_provider=({"acts": batch} for batch in batches),
        )
        trainers = list(trainer.trainers.values())
    for one in trainers:
        one.n_forward_passes_since_fired[: order["n_dead"]] = FOREVER

    def run(steps):
        settings.total_training_samples += steps * order["batch"]
        trainer.fit()

    return saes, run


def dictionary_learning(order, batches):
    """dictionary_learning's trainers, in the loop of its ``trainSAE``."""
    from dictionary_learning.trainers import batch_top_k, standard, top_k

    kind, norm, sparsity = {
        "standard": (standard.StandardTrainer, None, True),
        "april": (standard.StandardTrainerAprilUpdate, None, True),
        "topk": (top_k.TopKTrainer, 1.0, False),
        "batchtopk": (batch_top_k.BatchTopKTrainer, 1.0, False),
    }[order["architecture"]]
    own = (
        {"l1_penalty": order.get("l1"), "sparsity_warmup_steps": None}
        if sparsity
        else {"k": order.get("k")}
    )
    trainers = [
        kind(
            steps=FOREVER,
            activation_dim=order["d_in"],
            dict_size=order["d_sae"],
            layer=0,
            lm_name="none",
            lr=order["lr"],
            warmup_steps=0,
            device=order["device"],
            **own,
        )
        for _ in range(order["members"])
    ]
    for member, trainer in enumerate(trainers):
        fill(trainer.ae, order, member, norm)
        if not sparsity:
            trainer.num_tokens_since_fired[: order["n_dead"]] = FOREVER
    count = itertools.count()

    def run(steps):
        for step, batch in itertools.islice(zip(count, batches, strict=False), steps):
            for trainer in trainers:
                trainer.update(step, batch)

    return [trainer.ae for trainer in trainers], run


def sparse_coders(order):
    """Make sparsify's dictionaries, with the starting values of the members."""
    from sparsify import SparseCoder, SparseCoderConfig

    if order["architecture"] != "topk":
        raise ValueError(f"sparsify has no {order['architecture']}, only topk")
    config = SparseCoderConfig(num_latents=order["d_sae"], k=order["k"])
    coders = [
        SparseCoder(order["d_in"], config, order["device"])
        for _ in range(order["members"])
    ]
    for member, coder in enumerate(coders):
        fill(coder, order, member, 1.0)
    return coders


def sparsify(order, batches):
    """The step of sparsify's trainer on its SparseCoder, with Adam."""
    coders = sparse_coders(order)
    clip, dead = order.get("clip"), order["n_dead"] > 0
    adams = [torch.optim.Adam(coder.parameters(), lr=order["lr"]) for coder in coders]
    counters = [torch.zeros(order["d_sae"], dtype=torch.long) for _ in coders]
    counters = [counter.to(order["device"]) for counter in counters]
    for counter in counters:
        counter[: order["n_dead"]] = FOREVER
    first, fvu = [True] * len(coders), [0.0] * len(coders)

    def step(i, batch):
        coder, adam, counter = coders[i], adams[i], counters[i]
        if first[i]:
            coder.b_dec.data = batch.mean(0)
            first[i] = False
        coder.set_decoder_norm_to_unit_norm()
        mask = counter > 10_000_000 if dead else None
        out = coder(x=batch, dead_mask=mask)
        fired = torch.zeros_like(counter, dtype=torch.bool)
        fired[out.latent_indices.flatten()] = True
        fvu[i] += float(out.fvu.detach())
        (out.fvu + out.auxk_loss / 32).backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        if clip:
            torch.nn.utils.clip_grad_norm_(coder.parameters(), clip)
        adam.step()
        adam.zero_grad()
        counter += len(batch)
        counter[fired] = 0

    def run(steps):
        for batch in itertools.islice(batches, steps):
            for i in range(len(coders)):
                step(i, batch)

    return coders, run


LIBRARIES = {
    "sae_lens": sae_lens,
    "dictionary_learning": dictionary_learning,
    "sparsify": sparsify,
}


def batches_of(acts, order):
    """Batches without end: rows of an order, or consecutive rows."""
    acts = acts.to(order["device"])
    if "order" in order:
        rows = torch.from_numpy(np.load(order["order"]).astype(np.int64))
        yield from (acts[row.to(acts.device)] for row in itertools.cycle(rows))
    parts = acts.split(order["batch"])
    yield from itertools.cycle(part for part in parts if len(part) == order["batch"])


def prepare(acts, order):
    """A library's modules and its loop."""
    order = {"device": "cpu", "members": 1, **order}
    if "order" in order:
        order["batch"] = np.load(order["order"], mmap_mode="r").shape[1]
    order["n_dead"] = round(order.get("dead", 0) * order["d_sae"])
    modules, run = LIBRARIES[order["library"]](order, batches_of(acts, order))
    for module in modules:
        if order["n_dead"]:
            placed(module, "b_enc")[: order["n_dead"]] = -10.0

    def timed(steps):
        wall, cpu = time.perf_counter(), time.process_time()
        run(steps)
        if order["device"] != "cpu":
            torch.cuda.synchronize()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        return {"seconds": wall, "cpu_seconds": cpu}

    return modules, timed


def save(path, modules):
    """Parameters, with an axis of members in front where there are several."""
    every = []
    for module in modules:
        tensors = dict(module.named_parameters()) | dict(module.named_buffers())
        one = {name: placed(module, name) for name in NAMES}
        one = {name: tensor for name, tensor in one.items() if tensor is not None}
        others = ("topk_threshold", "threshold", "b_gate", "b_mag", "r_mag")
        one |= {name: tensors[name].data for name in others if name in tensors}
        every.append({k: v.cpu().numpy() for k, v in one.items()})
    single = len(every) == 1
    stacked = {k: np.stack([one[k] for one in every]) for k in every[0]}
    np.savez(path, **(every[0] if single else stacked))


def main():
    """Answer until the input ends."""
    answers, sys.stdout = sys.stdout, sys.stderr
    acts, modules, timed = torch.zeros(0, 0), [], None
    for line in sys.stdin:
        order = json.loads(line)
        op, answer = order.pop("op"), {}
        if op == "settings":
            torch.set_num_threads(order.get("threads", torch.get_num_threads()))
            torch.set_float32_matmul_precision(order.get("precision", "highest"))
            answer["threads"] = torch.get_num_threads()
        elif op == "load":
            acts = torch.from_numpy(np.load(order["path"]))
            answer["shape"] = list(acts.shape)
        elif op == "prepare":
            modules, timed = prepare(acts, order)
        elif op == "run":
            answer = timed(order["steps"])
        elif op == "save":
            save(order["path"], modules)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
