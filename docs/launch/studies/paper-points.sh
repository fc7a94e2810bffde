#!/bin/bash
# The ratios of Table 3, from the points that the paper printed.
set -euo pipefail

transfuse study scaling --paper "$@"
