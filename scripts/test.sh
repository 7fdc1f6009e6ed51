#!/usr/bin/env bash
# Everything that has to hold: format, lint, types, help pages, tests. Installs what it needs into .venv first.
#
#   bash scripts/test.sh [PYTEST ARGUMENTS]         all of it; the tests alone take under ten minutes on two cores
#   bash scripts/test.sh fast [AREA] [ARGUMENTS]    the tests that are not marked slow, in under a minute on two cores:
#                                                   of every area, or of tests/AREA and tests/test_AREA*.py
#   bash scripts/test.sh coverage [ARGUMENTS]       all tests, and which lines of laser/ none of them reached: a report,
#                                                   not a gate; with -m "not slow" that of the fast lane
source "$(dirname "${BASH_SOURCE[0]}")/env.sh" test
case "${1:-}" in
fast)
    shift
    paths=()
    if [[ $# -gt 0 && $1 != -* ]]; then
        for path in "tests/$1" tests/test_"$1"*.py; do
            [ -e "$path" ] && paths+=("$path")
        done
        [ ${#paths[@]} -gt 0 ] || { echo "no tests/$1 and no tests/test_$1*.py; areas: $(cd tests && ls -d */)" >&2; exit 2; }
        shift
    fi
    exec python -m pytest -m "not slow" -n auto --dist loadfile "${paths[@]}" "$@"
    ;;
coverage)
    shift
    exec python -m pytest -n auto --dist loadfile --cov laser --cov-report term-missing:skip-covered "$@"
    ;;
esac
ruff format --check .
ruff check .
lint-imports
pyright
python scripts/render_docs.py --check
python scripts/words.py
# A file at a time on each of two cores, since one file's tests may share a cluster or a cache; in the order of
# tests/conftest.py, long files first.
python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
