"""Samples SAELens' synthetic worlds, on orders from the benchmark.

One JSON object per line on standard input, one answer per line on standard output:
``load`` a world, ``prepare`` a batch size, ``run`` it for about so many seconds
(processor seconds, seconds, samples), ``rates`` of firing.
"""

import json
import sys
import time

import torch
from sae_lens.synthetic import SyntheticModel


def main():
    """Answer until the input ends."""
    torch.set_num_threads(1)
    model, batch = None, 0
    for line in sys.stdin:
        order = json.loads(line)
        answer = {}
        if order["op"] == "load":
            model = SyntheticModel.load_from_disk(order["path"])
        elif order["op"] == "prepare":
            batch = order["batch"]
            model.sample(batch)
        elif order["op"] == "run":
            cpu, start, samples = time.process_time(), time.perf_counter(), 0
            while time.perf_counter() - start < order["seconds"]:
                model.sample(batch)
                samples += batch
            answer = {
                "cpu_s": time.process_time() - cpu,
                "seconds": time.perf_counter() - start,
                "samples": samples,
            }
        elif order["op"] == "rates":
            counts = 0
            for _ in range(order["batches"]):
                counts = counts + (model.sample_with_features(batch)[1] > 0).sum(0)
            answer["rates"] = (counts / (order["batches"] * batch)).tolist()
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
