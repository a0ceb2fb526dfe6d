#!/usr/bin/env bash
# Lint, types and tests, in .venv: bash scripts/test.sh [pytest arguments], such as --cov, or -m fault for all faults
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
use_environment dev

echo "== ruff"
"$python" -m ruff format --check .
"$python" -m ruff check .
echo "== mypy"
"$python" -m mypy
echo "== pytest"
if [ $# -gt 0 ]; then
    "$python" -m pytest "$@"
else
    "$python" -m pytest --numprocesses=2 --dist=loadfile
fi
