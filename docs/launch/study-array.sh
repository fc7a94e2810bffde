#!/bin/bash
#SBATCH --job-name=transfuse-study
#SBATCH --array=0-47
#SBATCH --gpus=1
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --output=%x-%A-%a.log

# One run of a study each, all in one folder that every node sees:   sbatch docs/launch/study-array.sh
# `--list` in place of `--index` shows the numbers. A job that is cut off goes on from its checkpoint when it comes again.
set -euo pipefail

transfuse study scaling --run runs/scaling --index "$SLURM_ARRAY_TASK_ID"
