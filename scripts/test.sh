#!/usr/bin/env bash
# Everything that has to hold: format, lint, types, tests. Installs what it needs into .venv first.
#
#   bash scripts/test.sh [PYTEST ARGUMENTS]
source "$(dirname "${BASH_SOURCE[0]}")/env.sh" test
ruff format --check .
ruff check .
pyright
python scripts/render_docs.py --check
# A file at a time on each of two cores: one file's tests may share a cluster or a cache.
python -m pytest -n 2 --dist loadfile "$@"
