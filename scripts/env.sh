# Sourced by the other scripts: a virtual environment with the project and the extras named in $1, and quiet threads.
# Only Python 3.11 or newer has to be there. Nothing outside the project's directory is changed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
for candidate in "${PYTHON:-python3}" python3.13 python3.12 python3.11; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        python=$candidate
        break
    fi
done
: "${python:?needs Python 3.11 or newer; set PYTHON to one}"
[ -x .venv/bin/python ] || "$python" -m venv .venv
# Installed again only when what is to be installed has changed.
stamp=".venv/.installed-$1"
if [ ! -e "$stamp" ] || [ pyproject.toml -nt "$stamp" ] || [ constraints.txt -nt "$stamp" ]; then
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[$1]"
    touch "$stamp"
fi
export PATH="$PWD/.venv/bin:$PATH"
# Threads that wait by spinning made contended runs up to 8 times slower.
export OMP_WAIT_POLICY=passive GOMP_SPINCOUNT=0 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
