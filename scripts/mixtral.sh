#!/usr/bin/env bash
# The reference run: mistralai/Mixtral-8x7B-Instruct-v0.1, 93 GB in bf16, by the recipe of the published laser model.
#
#   bash scripts/mixtral.sh [OUT]
#
# It needs 93 GB of disk for the model and 93 GB for the result, about 2 GB of memory beside Python and, on a GPU, about
# as much of GPU memory: one matrix is worked on at a time, whatever the size of the model.
#
# On a box with an NVIDIA GPU install torch with CUDA first (the constraints pin a version, not a build). `--device auto`
# takes it; products and eigenproblems run there in float64. On a Mac, `--device auto` takes the Apple GPU for the
# products in float32 and leaves the eigenproblems to the CPU, since no eigensolver exists there; `--device cpu` gives
# float64 throughout. Anywhere else the CPU does all of it.
source "$(dirname "${BASH_SOURCE[0]}")/env.sh" demo
model=mistralai/Mixtral-8x7B-Instruct-v0.1
out=${1:-mixtral-8x7b-instruct-laser}

# 1. The weights, once, into the Hub's cache. Where the Hub asks who you are: `hf auth login` first. The second
#    format of the same weights (consolidated.*) is not fetched.
HF_HUB_OFFLINE=0 hf download "$model" --exclude "consolidated*"

# 2. What will be done here, by what, how long it may take: headers only.
laser devices
laser run "$model" -o "$out" --recipe laser-rmt --dry-run

# 3. Scan 896 matrices, take the 15 of lowest signal-to-noise ratio, reduce them, write 19 shards. Killed at any moment,
#    the same line goes on where it was.
laser run "$model" -o "$out" --recipe laser-rmt --resume

# 3b. The other way, with every edit measured: each of the 15 is tried and kept only if the loss on a calibration text
#     gets better, layer by layer from disk, and the six tasks of the leaderboard are run on source and result. This is
#     hours on a GPU and days without; it needs `pip install -e ".[eval]"` and the Hub for the tasks' rows.
#
#     HF_HUB_OFFLINE=0 laser run "$model" -o "$out-searched" --recipe laser-rmt --search --stream --resume

# 4. Measured on the files: every untouched tensor bit-identical, every touched one of its rank and distance.
laser verify "$model" "$out"
