#!/bin/bash
# The bundled model learns on from its own weights: conversations above all, which it has seen too few of. Two quiet cores
# of a Xeon with AMX take a step in about three seconds. The same command resumes.
set -euo pipefail
run=${1:-runs/small-64}
transfuse train small-64 --run "$run" --start small-64 --data.batch-size 32 \
    --data.sources world edits,weight=0.3 dialogues glosses --data.text-share 0.05 \
    --optimizer.learning-rate 7e-4 --optimizer.final-learning-rate 1e-6 --optimizer.warmup 50 \
    --loop.steps 10000 --loop.sample-every 500 --loop.checkpoint-every 100 --loop.keep 1
transfuse evaluate --model "$run/export" --suite composition dialogues --count 60 --out "$run/evaluation"
