#!/bin/bash
# The table of newer methods: each switch alone against `latents-32`. Start it as often as there are cores or cards.
set -euo pipefail

transfuse study since --run runs/since --size s --positions 1e6 --seeds 0 1 2 "$@"
