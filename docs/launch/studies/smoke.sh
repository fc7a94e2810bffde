#!/bin/bash
# Everything works, in about two minutes on one core. Its numbers mean nothing.
set -euo pipefail

transfuse study scaling --run runs/smoke --sizes xxs --budgets 5e3 1e4 2e4 --pictures 8 --definitions 8 --recogniser-steps 3 "$@"
