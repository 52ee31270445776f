#!/usr/bin/env bash
# Runs a cache script on a Ray cluster of several machines. On the first one, whose address is 10.0.0.1:
#   docs/cluster/ray.sh cachetrain-cache-img-sdxl --engine ray --model models/t5_sd15 --data_root s3://bucket/raw \
#       --out s3://bucket/set
# On each of the others, at any time meanwhile; Ctrl-C takes it away again:
#   HEAD=10.0.0.1 docs/cluster/ray.sh
# Both need the same token, which Ray makes on the first machine: copy its ~/.ray/auth_token, or set RAY_AUTH_TOKEN.
# Where there is a Ray cluster already, neither is needed:
#   ray job submit --address http://10.0.0.1:8265 -- cachetrain-cache-img-sdxl --engine ray ...
set -euo pipefail
export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0 PORT=${PORT:-6379}
[ -z "${HEAD:-}" ] || exec ray start --address "$HEAD:$PORT" --block

ray get-auth-token --generate >/dev/null
ray start --head --port "$PORT" --include-dashboard=false --block >/dev/null &
trap 'kill $!; wait' EXIT
until (: </dev/tcp/127.0.0.1/"$PORT") 2>/dev/null; do
    kill -0 $!
    sleep 1
done
RAY_ADDRESS=127.0.0.1:$PORT "$@"
