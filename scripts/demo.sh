#!/usr/bin/env bash
# Sets up .venv on the first call, then runs the x² example. Options go to
# scripts/demo.py: bash scripts/demo.sh --seeds 16 --out out/demo
set -u
extras=plot,scripts
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
exec "$python" scripts/demo.py "$@"
