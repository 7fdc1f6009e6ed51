#!/usr/bin/env bash
# Build the documentation into .site, strictly: a broken link or anchor fails it. Nothing comes from the network.
#
#   bash scripts/docs.sh [serve]     with serve, look at it while it is written
source "$(dirname "${BASH_SOURCE[0]}")/env.sh" docs
export NO_MKDOCS_2_WARNING=1 DISABLE_MKDOCS_2_WARNING=true
if [[ ${1:-} == serve ]]; then
    exec mkdocs serve
fi
exec mkdocs build --strict --quiet
