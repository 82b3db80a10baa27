#!/usr/bin/env bash
# Measures everything that is worth a figure on one GPU, in under ten minutes.
#
#   bash benchmarks/run_gpu.sh [--tiny] [FOLDER]
#
# Each part has a time limit of its own, and writes its rows to FOLDER/NAME.jsonl
# (benchmarks/results/gpu). A part that fails or misses a bar is named at the end, and the
# others go on. --tiny runs all of it at small sizes, on any device.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
tiny=()
if [ "${1:-}" = --tiny ]; then tiny=(--tiny) && shift; fi
folder=${1:-benchmarks/results/gpu}
python=${PYTHON:-python}
mkdir -p "$folder"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

failed=()
part() { # NAME SECONDS COMMAND...
  local name=$1 limit=$2 start=$SECONDS status
  shift 2
  timeout --kill-after=10 "$limit" "$python" "$@" ${tiny[@]+"${tiny[@]}"} \
    --json "$folder/$name.jsonl" > "$folder/$name.log" 2>&1
  status=$?
  if [ $status -ne 0 ]; then failed+=("$name ($status, see $folder/$name.log)"); fi
  echo "$name: $((SECONDS - start)) s, status $status"
}

part precision 120 benchmarks/accelerator.py --only precision
part cached 90 benchmarks/accelerator.py --only cached
part populations 90 benchmarks/accelerator.py --only populations
part linalg 90 benchmarks/linalg.py
part tap 60 benchmarks/tap.py
part lens 120 benchmarks/lens.py

if [ ${#failed[@]} -gt 0 ]; then
  echo "failed or missed a bar (124: out of time):"
  printf '  %s\n' "${failed[@]}"
  exit 1
fi
