#!/usr/bin/env bash
# Makes .venv in the project's folder, or brings it up to date, with the versions of constraints.txt; with --oldest, makes
# .venv-oldest, where each dependency of pyproject.toml has the lowest version allowed there.
#   bash launch/setup.sh [--oldest] [EXTRA]      e.g. bash launch/setup.sh test
# PYTHON=python3.12 chooses the interpreter (3.11 or newer) of a new environment.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
venv=.venv versions=(--constraint constraints.txt)
if [[ ${1:-} == --oldest ]]; then
  venv=.venv-oldest versions=(--resolution lowest-direct)
  shift
fi

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "setup: gandist needs Python 3.11 or newer and '$python' is $("$python" --version 2>&1); set PYTHON to another" >&2
  exit 1
}
if command -v uv >/dev/null; then
  uv=uv
  [ -x "$venv/bin/python" ] || uv venv --quiet --python "$python" "$venv"
else
  uv=$venv/bin/uv
  [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
  [ -x "$uv" ] || "$venv/bin/python" -m pip install --quiet --disable-pip-version-check uv
fi
"$uv" pip install --quiet --python "$venv/bin/python" "${versions[@]}" --editable ".${1:+[$1]}"
