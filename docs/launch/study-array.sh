#!/bin/bash
#SBATCH --job-name=transfuse-study
#SBATCH --array=0-47
#SBATCH --gpus=1
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --output=%x-%A-%a.log

# Each job of the array does every 48th run of a study, all in one folder that every node sees:
#   sbatch docs/launch/study-array.sh
# A job that is cut off resumes from its checkpoint when it is started again.
set -euo pipefail

transfuse study scaling --run runs/scaling --index "$SLURM_ARRAY_TASK_ID" --of 48
