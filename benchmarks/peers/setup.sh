#!/usr/bin/env bash
# Builds the environment of the libraries that benchmarks compare with, apart from
# the project's own: bash benchmarks/peers/setup.sh [python]
set -eu
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${1:-python3}
[ -x "$here/.venv/bin/python" ] || "$python" -m venv "$here/.venv"
"$here/.venv/bin/python" -m pip install --quiet --disable-pip-version-check \
  -r "$here/requirements.txt"
"$here/.venv/bin/python" -c "import torch, sklearn, fbpca; print('peers: torch', torch.__version__, 'scikit-learn', sklearn.__version__)"
