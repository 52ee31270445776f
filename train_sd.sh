#!/usr/bin/env bash
# Trains Stable Diffusion 1.5, with its original VAE and CLIP, from caches.
# This file is the configuration of a run: copy it within this directory, then edit and run the copy. A copy of it is
# also kept in the output directory.
# Environment variables override the values below, and flags override both: LR=2e-5 ./train_sd.sh --seed 1
#   ./train_sd.sh checkpoint    makes the running process save a checkpoint after its current step
#   ./train_sd.sh resume        resumes the run from its newest intact checkpoint
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

MODEL=${MODEL:-stable-diffusion-v1-5/stable-diffusion-v1-5}
DATADIR=${DATADIR:-/data}               # directories with caches: "/data/a /data/b:2.5" (b 2.5 times an epoch); if
                                        # names have spaces, one per line, or an array: DATADIR=("/my a" /data/b:2.5)
IMGCACHE=${IMGCACHE:-.img_sdvae}        # made by cache/create_img_sdvae.py
TXTCACHE=${TXTCACHE:-.txt_clipl}        # made by cache/create_clipl.py

# Presets for GPUs of 12, 24, 48 and 80 GB, at 512x512: always 64 samples a step. BATCH, if set, replaces the preset.
CARD=${CARD:-24}
case ${BATCH:+no}$CARD in # BATCH ACCUM CHECKPOINT PRECISION
    12) preset=(            8     8     1          bf16_pure) ;;
    24) preset=(            4     16    0) ;;
    48) preset=(            16    4     0) ;;
    80) preset=(            32    2     0) ;;
    no*) preset=(           "$BATCH" 1  0) ;;
    *) echo "$0: CARD: expected 12, 24, 48 or 80, got $CARD" >&2 && exit 2 ;;
esac
BATCH=${preset[0]}                      # samples per backward pass and GPU
ACCUM=${ACCUM:-${preset[1]}}            # backward passes per step
CHECKPOINT=${CHECKPOINT:-${preset[2]}}  # 1: --gradient_checkpointing: less memory, a third more computation
PRECISION=${PRECISION:-${preset[3]:-}}  # bf16, bf16_pure, fp32, fp16; empty: bf16 on a GPU, fp32 on a CPU
STEPS=${STEPS:-10000}                   # optimizer steps, or epochs like 2e
OPTIMIZER=${OPTIMIZER:-adamw}           # adamw, lion, stableadamw, muon, adafactor, adamw8, prodigy
LR=${LR:-1e-5}                          # peak; lion needs 3 to 10 times less than adamw, prodigy needs 1
SCHED=${SCHED:-cosine}                  # constant(_with_warmup), linear, cosine(_with_min_lr), polynomial, rex
GAMMA=${GAMMA:-}                        # Min-SNR gamma; empty: 5, but off for flow matching; 0: off
OBJECTIVE=${OBJECTIVE:-}                # epsilon, v_prediction, flow; empty: that of the model
DROPOUT=${DROPOUT:-0.04}                # share of captions replaced by the empty caption, for guidance
EMA=${EMA:-0}                           # decay of the moving average of the weights, like 0.9999; 0: off

SAMPLE_PROMPTS=${SAMPLE_PROMPTS:-}      # a file of prompts, .txt or .json; empty: no samples
SAMPLE_STEPS=${SAMPLE_STEPS:-250}       # optimizer steps between samples
VAL_SPLIT=${VAL_SPLIT:-0}               # share of the pairs held out for val/loss; 0: none
SAVE_STEPS=${SAVE_STEPS:-1000}          # optimizer steps between checkpoints, or epochs like 1e
GPUS=${GPUS:-1}                         # GPUs of this machine to train on

NAME=${NAME:-sd_${OPTIMIZER}_lr${LR}_b${BATCH}x${ACCUM}_${SCHED}_g${GAMMA:-5}_s${STEPS}}
[[ " $* " != *" --overfit"[\ =]* ]] || NAME+=_overfit # a trial run does not take the place of the real one
OUTPUT=${OUTPUT:-output/$NAME}
LOGDIR=${LOGDIR:-tensorboard}

refuse() { # refuse MESSAGE: what the trainer cannot check
    echo "$0: $1" >&2
    exit 2
}
is_zero() { [[ $1 =~ ^0+(\.0*)?$ ]]; }

[ -e "$HERE/train_from_cached.py" ] || refuse "no train_from_cached.py beside it; copy it to cachetrain's directory"
[[ $GPUS =~ ^[1-9][0-9]*$ ]] || refuse "GPUS: expected a whole number from 1, got $GPUS"

export PYTHONSAFEPATH=1 # no file of the current directory takes the place of a Python package
# The active environment, if this checkout is installed there; else the checkout's own.
PYTHON=python3
is_installed='import sys, os, cachetrain as c; sys.exit(not os.path.samefile(c.__path__[0], sys.argv[1]))'
[ ! -x "$HERE/.venv/bin/python" ] || { [ -n "${VIRTUAL_ENV:-}" ] && python3 -c "$is_installed" "$HERE/cachetrain"; } \
    >/dev/null 2>&1 || PYTHON=$HERE/.venv/bin/python

if [ "${1:-}" = checkpoint ]; then
    is_locked='import sys; from cachetrain.atomic import is_locked; print(is_locked(sys.argv[1]))'
    case $([ ! -e "$OUTPUT/args.json" ] && echo False || "$PYTHON" -c "$is_locked" "$OUTPUT" 2>/dev/null) in
        True) ;;
        False) refuse "$OUTPUT: no run in progress; check OUTPUT and NAME" ;;
        *) refuse "$PYTHON cannot run cachetrain; deactivate that environment, or \`source .venv/bin/activate\`" ;;
    esac
    touch "$OUTPUT/trigger.checkpoint"
    echo "$OUTPUT: a checkpoint will be written after the current step"
    exit
elif [ "${1:-}" = resume ]; then
    for other in "${OUTPUT%_s*}"_s*/args.json; do # the name of a run contains its STEPS
        [ -e "$OUTPUT/args.json" ] || [ ! -e "$other" ] || [[ $other = *_overfit/args.json ]] ||
            refuse "$OUTPUT: no run; to resume that of other STEPS, OUTPUT=$(printf %q "${other%/args.json}") $0 resume"
    done
    set -- --resume latest "${@:2}"
fi

read -r -a imgcache <<< "$IMGCACHE" # several: see docs/data.md#several-sizes-and-crops
args=(--model "$MODEL" --imgcache_suffix "${imgcache[@]}" --txtcache_suffix "$TXTCACHE"
      --batch_size "$BATCH" --gradient_accum "$ACCUM" --max_steps "$STEPS"
      --optimizer "$OPTIMIZER" --lr "$LR" --scheduler "$SCHED"
      --cond_dropout "$DROPOUT" --ema_decay "$EMA"
      --output_dir "$OUTPUT" --logdir "$LOGDIR" --save_steps "$SAVE_STEPS" --copy_config "${BASH_SOURCE[0]}")
if [ -z "$GAMMA" ]; then
    args+=(--use_snr auto)
elif ! is_zero "$GAMMA"; then
    args+=(--use_snr --noise_gamma "$GAMMA")
fi
[ -z "$PRECISION" ] || args+=(--precision "$PRECISION")
is_zero "$CHECKPOINT" || args+=(--gradient_checkpointing)
[ -z "$OBJECTIVE" ] || args+=(--objective "$OBJECTIVE")
[ -z "$SAMPLE_PROMPTS" ] || args+=(--sample_prompts "$SAMPLE_PROMPTS" --sample_every "$SAMPLE_STEPS")
is_zero "$VAL_SPLIT" || args+=(--val_split "$VAL_SPLIT")

launch=("$PYTHON")
[ "$GPUS" = 1 ] || launch+=(-m torch.distributed.run --standalone --nproc_per_node "$GPUS")
data=("${DATADIR[@]}") # the name of a single directory may have spaces
if [ "${#data[@]}" = 1 ] && [ ! -d "$DATADIR" ] && [ ! -d "${DATADIR%:*}" ]; then # several
    [[ $DATADIR != *$'\n'* ]] || separator=$'\n'
    IFS=${separator:-$' \t\n'} read -r -d '' -a data <<< "$DATADIR" || true
fi
command=("${launch[@]}" "$HERE/train_from_cached.py" --train_data_dir "${data[@]}" "${args[@]}" "$@")
[ "$GPUS" != 1 ] || exec "${command[@]}"

# torchrun ends with exit code 1 after any signal; pass the signal's own on, as with one GPU.
torchrun='' code=''
stop() { code=$1 && kill -TERM $torchrun 2>/dev/null || true; } # a background process ignores SIGINT
trap 'stop 130' INT
trap 'stop 143' TERM
trap 'stop 129' HUP
"${command[@]}" &
torchrun=$!
[ -z "$code" ] || stop $code
while ended=0; wait $torchrun || ended=$?; kill -0 $torchrun 2>/dev/null; do :; done # a signal ends `wait` early
exit ${code:-$ended}
