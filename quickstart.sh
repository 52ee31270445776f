#!/usr/bin/env bash
# Runs the whole workflow on a tiny model, from captioned images to samples that follow their prompts.
#   ./quickstart.sh                  with T5: shapes data set, caches, training, samples, report, score
#   ./quickstart.sh --sd             with CLIP instead of T5
#   ./quickstart.sh --sdxl           with SDXL's UNet and two CLIP encoders
#   ./quickstart.sh --data_root DIR  your own captioned images, at 64x64: caches, short training, samples, report
# Writes everything to quickstart/, with a run for each DIR. A second call skips finished stages; to repeat a stage,
# delete its output.
set -euo pipefail

FLAVOUR=t5
OWN_DATA=
while [ $# -gt 0 ]; do
    case $1 in
        --sd | --sdxl) FLAVOUR=${1#--} ;;
        --data_root)
            OWN_DATA=$(CDPATH='' cd -- "${2:?--data_root needs a directory}" && pwd) || exit 2
            shift
            ;;
        -h | --help) sed -n '2,8s/^# //p' "${BASH_SOURCE[0]}"; exit 0 ;;
        *) echo "quickstart.sh: unknown option $1 (see --help)" >&2; exit 2 ;;
    esac
    shift
done
cd -P "$(dirname "${BASH_SOURCE[0]}")"
export PYTHONSAFEPATH=1 # no file of the current directory takes the place of a Python package

WORK=quickstart
RUN=$FLAVOUR
if [ -n "$OWN_DATA" ]; then # each folder has a run of its own, named after it
    name=${OWN_DATA##*/}
    RUN+=_${name//[^[:alnum:]._-]/_}
fi
MODEL=$WORK/model_$FLAVOUR
DATA=${OWN_DATA:-$WORK/shapes}
OUTPUT=$WORK/output/$RUN
STEPS=3200
[ "$FLAVOUR" = t5 ] || STEPS=2800
VAL_SPLIT=0.02
[ -z "$OWN_DATA" ] || { STEPS=600 && VAL_SPLIT=0; } # a small folder has no pairs to spare

claim_run() { # refuses if the run was trained on another folder of the same name
    local record=$WORK/data_root_$RUN.txt
    if [ -e "$OUTPUT" ] && [ "$(cat "$record" 2>/dev/null)" != "$OWN_DATA" ]; then
        printf 'quickstart.sh: %q is not of %q, but of another folder of this name; rename one, or delete %q\n' \
            "$OUTPUT" "$OWN_DATA" "$OUTPUT" >&2
        exit 2
    fi
    printf '%s\n' "$OWN_DATA" >"$record"
}

stage() { # stage TITLE COMMAND...: runs the command and prints how long it took
    local start=$SECONDS
    printf '\n== %s\n' "$1"
    "${@:2}"
    printf '   %d s\n' $((SECONDS - start))
}

compose() {
    [ ! -d "$MODEL" ] || { echo "$MODEL already exists"; return; }
    local parts=(--vae models/tiny/vae --objective flow --out "$MODEL")
    case $FLAVOUR in
        t5) models/compose_t5_sd.py "${parts[@]}" --unet models/tiny/unet --t5 models/tiny/t5 ;;
        sd) models/compose_sd.py "${parts[@]}" --unet models/tiny/unet --clip models/tiny/clip ;;
        sdxl)
            models/compose_sdxl.py "${parts[@]}" --unet models/tiny/sdxl_unet --clip_l models/tiny/clip \
                --clip_g models/tiny/clip_g
            ;;
    esac
}

draw_data() {
    dataset_scripts/draw_shapes.py --out "$DATA" --num_images 6000 --prompts "$WORK/prompts.txt" --num_prompts 120
    head -n 4 "$WORK/prompts.txt" >"$WORK/sample_prompts_$RUN.txt"
}

make_caches() {
    # Separate suffixes, so that caches of real models in the same folder are not replaced.
    encode cache/create_img_sdxl.py --data_root "$DATA" --model "$MODEL" --target_width 64 --target_height 64 \
        --batch_size 64 --cache_suffix "$IMGCACHE"
    local -A script=([t5]=create_t5cache_768.py [sd]=create_clipl.py [sdxl]=create_sdxl_text.py)
    encode "cache/${script[$FLAVOUR]}" --data_root "$DATA" --model "$MODEL" --batch_size 64 --cache_suffix "$TXTCACHE"
    [ -z "$OWN_DATA" ] || echo "the embedded tokenizers know few words: captions differ only in those they know"
    [ -z "$OWN_DATA" ] || some_captions >"$WORK/sample_prompts_$RUN.txt"
}

encode() { # accepts exit code 1: some images or captions failed and were listed, all others are cached
    "$@" || [ $? = 1 ]
}

some_captions() { # prints the captions of four cached images
    python - "$DATA" "$IMGCACHE" <<'EOF'
import sys

from cachetrain.data.captions import read_caption
from cachetrain.data.sidecar import sidecar_path
from cachetrain.data.walk import find_images

pairs = find_images(sys.argv[1:2], lambda *_: None)
cached = [pair for pair in pairs if sidecar_path(pair.image, sys.argv[2]).exists()]
spread = cached[:: max(1, len(cached) // 4)][:4]
print(*dict.fromkeys(" ".join(read_caption(pair).text.split()) for pair in spread), sep="\n")
EOF
}

train() {
    local last resume=()
    last=$OUTPUT/checkpoint-$(printf %06d "$STEPS")
    [ ! -d "$last" ] || { echo "$last already exists"; return; }
    if [ -e "$OUTPUT/args.json" ]; then
        resume=(resume) # the run was interrupted
    else
        rm -rf "$WORK/tensorboard/$RUN" # left over from a deleted run
    fi
    rm -rf "$WORK/samples_$RUN" "$WORK/samples_$RUN.png"
    MODEL=$MODEL DATADIR=$DATA OUTPUT=$OUTPUT LOGDIR=$WORK/tensorboard IMGCACHE=$IMGCACHE TXTCACHE=$TXTCACHE \
        BATCH=16 ACCUM=1 STEPS=$STEPS OPTIMIZER=adamw LR=2e-3 SCHED=cosine GAMMA=0 DROPOUT=0.1 EMA=0.99 \
        PRECISION=$PRECISION SAMPLE_PROMPTS=$WORK/sample_prompts_$RUN.txt SAMPLE_STEPS=$((STEPS / 4)) \
        SAVE_STEPS=$((STEPS / 2)) VAL_SPLIT=$VAL_SPLIT "./train_$FLAVOUR.sh" "${resume[@]}" --betas 0.9 0.99 \
        --warmup_steps 100 --lr_decay_steps "$STEPS" --sample_cfgs 1 3 7 --cache_in_ram --log_groups {1..15}
}

draw_samples() {
    [ ! -f "$WORK/samples_$RUN.png" ] || { echo "$WORK/samples_$RUN.png already exists"; return; }
    local prompts=$WORK/prompts.txt
    [ -z "$OWN_DATA" ] || prompts=$WORK/sample_prompts_$RUN.txt
    ./sample.py --model "$OUTPUT/checkpoint-$(printf %06d "$STEPS")" --prompts "$prompts" --cfgs 3 --batch_size 60 \
        --out "$WORK/samples_$RUN" --grid "$WORK/samples_$RUN.png"
}

printf 'cachetrain quickstart: %s flavour, %s\n' "$FLAVOUR" "${OWN_DATA:-embedded shapes}"
mkdir -p "$WORK"
[ -z "$OWN_DATA" ] || claim_run
stage "install (.venv)" .ci/make_venv
# shellcheck disable=SC1091
source .venv/bin/activate
if python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    PRECISION=bf16
else
    PRECISION=fp32
    export OMP_NUM_THREADS=1 # the tiny model is fastest on one thread; the data loader uses another core
    # Keep freed memory in the process: returning and requesting it again takes 8% of such short steps.
    export MALLOC_TRIM_THRESHOLD_=1073741824 MALLOC_MMAP_THRESHOLD_=33554432
fi
IMGCACHE=.img_tiny
TXTCACHE=.txt_tiny_$FLAVOUR

stage "model ($MODEL)" compose
[ -n "$OWN_DATA" ] || stage "data set ($DATA)" draw_data
stage "cache" make_caches
stage "train" train
stage "sample" draw_samples
stage "report" ./report.py "$OUTPUT"

printf '\nreport:       %s\nsample grid:  %s\ncheckpoints:  %s\nTensorBoard:  .venv/bin/python launch_tensorboard.py --logdir %s\n' \
    "$OUTPUT/report.html" "$WORK/samples_$RUN.png" "$OUTPUT/" "$WORK/tensorboard"
[ -n "$OWN_DATA" ] || dataset_scripts/score_shapes.py "$WORK/samples_$RUN"
