#!/bin/bash
# The race of docs/leaderboard.md on two cores: seconds of training from nothing to its aims, the median of three seeds.
# Start it at the root of the repository, where its settings file is.
set -euo pipefail

transfuse study race --run runs/race-cpu --config experiments/race-cpu.toml --every 1800 --seeds 0 1 2 "$@"
