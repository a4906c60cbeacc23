#!/usr/bin/env bash
# bash run.sh setup                                 environment in .venv (does nothing if it is up to date)
# bash run.sh demo                                  built-in data through all five stages, metrics and pictures
# bash run.sh test                                  style checks and test suite
# bash run.sh diffusion|classifier DATASET          train on all classes; GPUS=0,1 uses both together
# bash run.sh sample|realnet DATASET [CLASS...]     one class after the other; GPUS=0,1 queues them on both
# bash run.sh evaluate DATASET [CLASS...]           all classes in one report; GPUS=0,1 uses both together
# bash run.sh tensorboard DATASET                   training curves and pictures in a browser; PORT=6006
# SET="trainer.max_epoch=10 dataset.workers=2"      settings to override in training, sampling and evaluation
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

VENV=.venv
PYTHON=$VENV/bin/python

usage() {
    sed -n '2,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
    exit 2
}

# ---- environment -----------------------------------------------------------------------------------------------------

setup() {
    local wanted
    wanted=$(cat requirements*.txt | cksum)
    if [[ -x $PYTHON && -f $VENV/installed && $(cat "$VENV/installed") == "$wanted" ]]; then
        return
    fi
    local base=${BASE_PYTHON:-python3}
    if ! "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
        echo "error: $base is older than Python 3.10; name another one with BASE_PYTHON=..." >&2
        exit 2
    fi
    [[ -x $PYTHON ]] || "$base" -m venv "$VENV"
    echo "installing into $VENV (takes some minutes, as PyTorch is large)"
    "$PYTHON" -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
    echo "$wanted" > "$VENV/installed"
}

# ---- demo and tests --------------------------------------------------------------------------------------------------

demo() {
    setup
    local start=$SECONDS
    stage() {
        echo
        echo "== $*"
        "$PYTHON" "$@"
    }
    stage -m preparation.demo
    stage train_diffusion.py --dataset demo
    stage train_classifier.py --dataset demo
    stage sample.py --dataset demo --preview
    stage sample.py --dataset demo --overwrite
    stage train_realnet.py --dataset demo --class_name all
    stage evaluation_realnet.py --dataset demo --class_name all
    echo
    echo "The report is experiments/demo/realnet_results/report.html: open it in a browser. Pictures to look at:"
    echo "  experiments/demo/sample_vis/<class>.png                     SDAS images over the strength s"
    echo "  experiments/demo/realnet_vis/<class>/training_samples.png   synthetic anomalies and their masks"
    echo "  experiments/demo/realnet_vis/<class>/<defect>/*.png         test image, ground truth, anomaly map"
    echo "Done in $(((SECONDS - start) / 60)) min $(((SECONDS - start) % 60)) s."
}

run_tests() {
    setup
    "$PYTHON" -m ruff check .
    "$PYTHON" -m ruff format --check .
    # Two test files at a time; the scripts under test use further cores.
    OMP_NUM_THREADS=1 "$PYTHON" -m pytest -n 2 --dist loadfile "$@"
}

# ---- batches over classes and GPUs -----------------------------------------------------------------------------------

declare -A SCRIPTS=(
    [diffusion]=train_diffusion.py [classifier]=train_classifier.py [sample]=sample.py
    [realnet]=train_realnet.py [evaluate]=evaluation_realnet.py
)

overrides() {
    local pair
    for pair in ${SET:-}; do
        printf -- '--set\n%s\n' "$pair"
    done
}

# Runs a script with one process per GPU; further arguments go to the script.
run_together() {
    local stage=$1 dataset=$2 count=1
    shift 2
    mapfile -t extra < <(overrides)
    extra+=("$@")
    if [[ -n ${GPUS:-} ]]; then
        export CUDA_VISIBLE_DEVICES=$GPUS
        count=$(awk -F, '{print NF}' <<< "$GPUS")
    fi
    if ((count > 1)); then
        "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node="$count" \
            "${SCRIPTS[$stage]}" --dataset "$dataset" "${extra[@]}"
    else
        "$PYTHON" "${SCRIPTS[$stage]}" --dataset "$dataset" "${extra[@]}"
    fi
}

# Runs unclaimed classes until none is left. mkdir claims a class: it succeeds for one worker only.
work_on_queue() {
    local gpu=$1 stage=$2 dataset=$3 name i
    [[ $gpu == default ]] || export CUDA_VISIBLE_DEVICES=$gpu
    for i in "${!classes[@]}"; do
        mkdir "$state/$i" 2> /dev/null || continue
        name=${classes[$i]}
        local arguments=(--dataset "$dataset" --class_name "$name" "${extra[@]}")
        if ! "$PYTHON" "${SCRIPTS[$stage]}" "${arguments[@]}" 2>&1 | sed -u "s|^|[$name] |"; then
            echo "$name" >> "$state/failed"
        fi
    done
}

queue_classes() {
    local stage=$1 dataset=$2
    shift 2
    mapfile -t extra < <(overrides)
    classes=("$@")
    if ((${#classes[@]} == 0)); then
        local listed
        listed=$("$PYTHON" -m datasets.lists "experiments/$dataset/$([[ $stage == sample ]] && echo diffusion || echo realnet).yaml")
        mapfile -t classes <<< "$listed"
    fi
    state=$(mktemp -d)
    trap 'rm -rf "$state"' EXIT
    trap 'trap - INT TERM; kill 0' INT TERM
    local gpus=(default) gpu
    [[ -z ${GPUS:-} ]] || IFS=, read -ra gpus <<< "$GPUS"
    for gpu in "${gpus[@]}"; do
        work_on_queue "$gpu" "$stage" "$dataset" &
    done
    wait
    if [[ -f $state/failed ]]; then
        echo "failed: $(sort "$state/failed" | paste -sd' ')" >&2
        exit 1
    fi
}

# ---- verbs -----------------------------------------------------------------------------------------------------------

main() {
    local verb=${1:-}
    [[ -n $verb ]] && shift
    case $verb in
        setup) setup ;;
        demo) demo ;;
        test) run_tests "$@" ;;
        diffusion | classifier)
            (($# == 1)) || usage
            setup
            run_together "$verb" "$@"
            ;;
        sample | realnet)
            (($# >= 1)) || usage
            setup
            queue_classes "$verb" "$@"
            ;;
        evaluate)
            (($# >= 1)) || usage
            setup
            local dataset=$1
            shift
            run_together evaluate "$dataset" --class_name "$(IFS=,; echo "${*:-all}")"
            ;;
        tensorboard)
            (($# == 1)) || usage
            setup
            exec "$PYTHON" -m tensorboard.main --logdir "experiments/$1" --port "${PORT:-6006}"
            ;;
        *) usage ;;
    esac
}

# `exit` is on the same line, because bash reads a script as it runs it, and this one may be edited meanwhile.
main "$@"; exit
