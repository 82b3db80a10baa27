# Sourced by the other scripts: makes a virtual environment with the package and the
# extras named in $extras, and sets $python to its interpreter.
#
#   PYTHON=python3.12   the interpreter to use (default: python3, or a newer one)
#
# The environment is .venv, or .venv-3.12 if .venv belongs to another version than the
# one asked for. It is made once and brought up to date when pyproject.toml changes.

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

version_of() {
  "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null
}

usable() {
  "$1" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

base=${PYTHON:-}
if [ -z "$base" ]; then
  for candidate in .venv/bin/python python3 python3.13 python3.12 python3.11; do
    if usable "$candidate"; then base=$candidate && break; fi
  done
fi
if [ -z "$base" ] || ! usable "$base"; then
  echo "toyfeat needs Python 3.11 or newer with the venv module; found" \
    "'${base:-none}' $(version_of "${base:-python3}"). Set PYTHON=/path/to/python." >&2
  exit 1
fi

venv=.venv
if [ -x .venv/bin/python ] && [ "$(version_of .venv/bin/python)" != "$(version_of "$base")" ]; then
  venv=.venv-$(version_of "$base")
fi
python=$venv/bin/python

if ! usable "$python"; then
  echo "Making $venv with Python $(version_of "$base") ..." >&2
  rm -rf "$venv"
  if command -v uv >/dev/null 2>&1; then
    uv venv --quiet --python "$(command -v "$base")" "$venv" || exit 1
  else
    "$base" -m venv "$venv" || exit 1
  fi
fi

wanted="$extras $(cksum < pyproject.toml)"
if [ "$(cat "$venv/installed-$extras" 2>/dev/null)" != "$wanted" ]; then
  echo "Installing toyfeat[$extras] into $venv (minutes the first time) ..." >&2
  if command -v uv >/dev/null 2>&1; then
    uv pip install --quiet --python "$python" -e ".[$extras]" || exit 1
  else
    "$python" -m pip install --quiet --disable-pip-version-check -e ".[$extras]" || exit 1
  fi
  echo "$wanted" > "$venv/installed-$extras"
fi
