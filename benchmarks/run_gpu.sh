#!/usr/bin/env bash
# Measures everything that is worth a figure on one GPU, in under ten minutes.
#
#   bash benchmarks/run_gpu.sh [--tiny] [FOLDER]
#
# Each part has a time limit of its own, and writes its rows to FOLDER/NAME.jsonl
# (benchmarks/results/gpu). A part that fails or misses a bar is named at the end, and the
# others go on. --tiny runs all of it at small sizes, on any device, and gives each part
# six times as long, as that device may be a busy CPU.
#
# Not here, as it takes longer: SynthSAEBench-16k beside the published table, which is
# scripts/synth_sae_bench.py (its world is sampled here).
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
tiny=() times=1
if [ "${1:-}" = --tiny ]; then tiny=(--tiny) times=6 && shift; fi
folder=${1:-benchmarks/results/gpu}
python=${PYTHON:-python}
mkdir -p "$folder"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

failed=()
part() { # NAME SECONDS COMMAND...
  local name=$1 limit=$(($2 * times)) start=$SECONDS status
  shift 2
  timeout --kill-after=10 "$limit" "$python" "$@" ${tiny[@]+"${tiny[@]}"} \
    --json "$folder/$name.jsonl" > "$folder/$name.log" 2>&1
  status=$?
  if [ $status -ne 0 ]; then failed+=("$name ($status, see $folder/$name.log)"); fi
  echo "$name: $((SECONDS - start)) s, status $status"
}

# torch runs on the same device, beside JAX.
export XLA_PYTHON_CLIENT_PREALLOCATE=${XLA_PYTHON_CLIENT_PREALLOCATE:-false}

part precision 70 benchmarks/accelerator.py --only precision
part cached 50 benchmarks/accelerator.py --only cached
part ways 30 benchmarks/accelerator.py --only ways
part populations 70 benchmarks/accelerator.py --only populations
part svd 40 benchmarks/accelerator_svd.py
part linalg 60 benchmarks/linalg.py
part tap 50 benchmarks/tap.py
part lens 80 benchmarks/lens.py
part partition 70 benchmarks/partition.py --speed
part world 30 benchmarks/world.py
part collect 50 benchmarks/collect.py

if [ ${#failed[@]} -gt 0 ]; then
  echo "failed or missed a bar (124: out of time):"
  printf '  %s\n' "${failed[@]}"
  exit 1
fi
