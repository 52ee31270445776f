#!/usr/bin/env bash
# Runs a cache script as an array of Slurm jobs, each with a GPU. Of sixteen:
#   sbatch --array=0-15 docs/cluster/slurm_array.sh cachetrain-cache-img-sdxl --model models/t5_sd15 \
#       --data_root s3://bucket/raw --out s3://bucket/set
#SBATCH --job-name=cachetrain
#SBATCH --gpus=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=32G
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=cachetrain-%A-%a.log
# --requeue: when a job is preempted or its node fails, Slurm starts it again, and it makes the shards still missing.
set -euo pipefail
export RANK=$((SLURM_ARRAY_TASK_ID - SLURM_ARRAY_TASK_MIN)) WORLD_SIZE=$SLURM_ARRAY_TASK_COUNT
exec "$@"
