#!/usr/bin/env bash
# The wheel as a user has it: no repository, a folder of nothing, a configuration that the command
# prints. Takes the environment's folder, in which the wheel and its dependencies alone are.
set -euo pipefail
bin=$(realpath "$1")/bin
cd "$(mktemp -d)"
echo "a red handwritten seven on a blue background" >prompts.txt
"$bin/lit-distill" generate --model.pretrained_model_name_or_path tiny-digits --prompts prompts.txt \
  --out data --seeds_per_prompt 4 --height 32 --width 32 --trainer.accelerator cpu
"$bin/lit-distill" fit --model.pretrained_model_name_or_path tiny-digits --model.lora '{r: 4}' \
  --data.metadata_path data/metadata.csv --data.batch_size 4 --trainer.accelerator cpu \
  --trainer.max_steps 5 --print_config >mine.yaml
"$bin/lit-distill" fit --config mine.yaml
"$bin/lit-distill" init --model tiny --metadata_path data/metadata.csv --out from-init.yaml
"$bin/lit-distill" fit --config from-init.yaml --print_config >/dev/null
find . -name '*.ckpt' | grep . # a run without a checkpoint fails
