#!/bin/bash
# Section 4.4: what 8,000 edits teach, before and after.
set -euo pipefail

transfuse study editing --run runs/editing --start small-64 --triples 8000 "$@"
