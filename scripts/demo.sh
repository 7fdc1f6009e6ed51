#!/usr/bin/env bash
# The whole flow on real weights, from a bare Python: build a Mixtral checkpoint, reduce it by the published recipe,
# verify it, load source and result with transformers and compare; then search: the same 15 candidates, each kept only
# if the measured loss gets better. Under 10 minutes on 2 cores, installing included.
#
#   bash scripts/demo.sh [DIRECTORY]      (default: .demo in the project)
source "$(dirname "${BASH_SOURCE[0]}")/env.sh" demo
work=${1:-.demo}
mkdir -p "$work"
[ -e "$work/mixtral/model.safetensors.index.json" ] || python scripts/make_demo_model.py "$work/mixtral"
echo
echo "== laser run: the 15 matrices of lowest signal-to-noise ratio, reduced to LaserRMT's rank"
laser run "$work/mixtral" -o "$work/reduced" --recipe laser-rmt --force
echo
echo "== laser verify: measured on the files"
laser verify "$work/mixtral" "$work/reduced"
echo
echo "== source against result, with transformers"
python scripts/demo.py "$work/mixtral" "$work/reduced"

echo
echo "== laser search: the same candidates, accepted or rejected by the measured loss; held out is what counts"
mkdir -p "$work/search"
laser search "$work/mixtral" -o "$work/search/plan.json" --spectra "$work/reduced/laser/spectra.safetensors" \
    --rules laser-rmt --lowest-snr 15 --window 256 --windows 8 --held-out-windows 8 --force
