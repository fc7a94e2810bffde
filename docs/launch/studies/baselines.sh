#!/bin/bash
# Table 3 at one size: Transfusion draws, captions and writes better than Chameleon at equal 6 N D.
set -euo pipefail

transfuse study baselines --run runs/baselines --flops 2e14 "$@"
