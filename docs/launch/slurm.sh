#!/bin/bash
#SBATCH --job-name=transfuse
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=04:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

# Trains on whole nodes, and queues itself again until the run is exported:   sbatch docs/launch/slurm.sh
# Change the lines above, RUN, and what is trained. RUN must lie where all nodes see it.
set -euo pipefail

RUN=runs/mine
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export OMP_NUM_THREADS=8

latest() {
    cat "$RUN/checkpoints/latest" 2> /dev/null || true
}

before=$(latest)
# 120 s before the time is over SLURM signals torchrun on every node. It hands SIGUSR1 on only because it is told to, and
# leaves its processes 110 s to save. Its exit code does not tell a stop from a failure; what is there afterwards does.
srun --kill-on-bad-exit=1 torchrun \
    --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node 8 --max-restarts 3 \
    --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$HEAD:29500" \
    --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --shutdown-timeout 110 \
    -m transfuse -- train demo --run "$RUN" || true

if [ -e "$RUN/export" ]; then
    echo "$RUN/export: done"
elif [ "$(latest)" = "$before" ]; then
    echo "$RUN: no new checkpoint, not queued again; see above" >&2
    exit 1
else
    scontrol requeue "$SLURM_JOB_ID"
fi
