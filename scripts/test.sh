#!/usr/bin/env bash
# Everything that has to hold: format, lint, types, tests. Installs what it needs into .venv first.
#
#   bash scripts/test.sh [PYTEST ARGUMENTS]
source "$(dirname "${BASH_SOURCE[0]}")/env.sh" test
ruff format --check .
ruff check .
pyright
python scripts/render_docs.py --check
python -m pytest "$@"
