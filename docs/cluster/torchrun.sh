#!/usr/bin/env bash
# Runs a cache script on several machines, with a process for each GPU. On each of two machines, with NODE=0 and NODE=1:
#   HEAD=10.0.0.1 NODE=0 NODES=2 docs/cluster/torchrun.sh cachetrain-cache-img-sdxl --model models/t5_sd15 \
#       --data_root s3://bucket/raw --out s3://bucket/set
# GPUS: processes on each machine. HEAD: address of machine 0, at which the launchers meet.
set -euo pipefail
exec torchrun --nnodes "$NODES" --node_rank "$NODE" --nproc_per_node "${GPUS:-8}" \
    --master_addr "$HEAD" --master_port "${PORT:-29500}" --no_python "$@"
