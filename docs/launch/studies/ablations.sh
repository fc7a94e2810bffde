#!/bin/bash
# Tables 4 to 8: each difference against the paper's, over three seeds. Start it as often as there are cores or cards.
set -euo pipefail

transfuse study ablations --run runs/ablations --size m --positions 2e6 --seeds 0 1 2 "$@"
