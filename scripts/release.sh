#!/usr/bin/env bash
# Sets up .venv on the first call, then builds sdist and wheel, installs each bare and
# checks them. Options go to scripts/release.py: bash scripts/release.sh --out dist
set -u
extras=release
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
exec "$python" scripts/release.py "$@"
