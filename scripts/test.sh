#!/usr/bin/env bash
# Sets up .venv on the first call, then checks style and types and runs the tests.
# Options go to pytest: bash scripts/test.sh -k taps; --slow adds the slow tests.
set -u
extras=plot,lm,scripts,docs,test
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
set -e
"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m pyright --pythonpath "$python"
exec "$python" -m pytest --numprocesses=2 --dist=loadfile "$@"
