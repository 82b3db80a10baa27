#!/usr/bin/env bash
# Builds the environment of the libraries that benchmarks compare with, apart from
# the project's own: bash benchmarks/peers/setup.sh [python] [folder]
set -eu
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${1:-python3}
venv=${2:-$here/.venv}
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check)
"${pip[@]}" -r "$here/requirements.txt"
# Their own requirements would replace torch, so they come without them.
"${pip[@]}" --no-deps -r "$here/requirements-nodeps.txt"
# The nnsight that benchmarks trace with: dictionary_learning wants one below 0.4.
"${pip[@]}" --no-deps --upgrade --target "$venv/nnsight" \
    -r "$here/requirements-nnsight.txt"
"$venv/bin/python" - <<'CHECK'
import importlib.metadata as metadata

import dictionary_learning, fbpca, sae_lens, sklearn, sparsify, torch  # noqa: E401, F401

assert torch.__version__.split("+")[0] == "2.13.0", torch.__version__
names = "torch", "scikit-learn", "sae-lens", "dictionary-learning", "eai-sparsify"
print("peers:", ", ".join(f"{name} {metadata.version(name)}" for name in names))
CHECK
