#!/bin/bash
# The race of docs/leaderboard.md on one GPU: the recipe of the bundled model from nothing, the median of three seeds.
set -euo pipefail

transfuse study race --run runs/race-gpu --preset small-64 --every 120 --seeds 0 1 2 "$@"
