#!/bin/bash
# Figure 5: parity FLOP ratios below 1. Start it as often as there are cores or cards.
set -euo pipefail

transfuse study scaling --run runs/scaling --sizes xs s m l --budgets 1e6 2e6 4e6 "$@"
