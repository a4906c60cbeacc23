#!/usr/bin/env bash
# bash run.sh setup                                 environment in .venv (does nothing if it is up to date)
# bash run.sh demo                                  built-in data through all five stages, metrics and pictures
# bash run.sh test                                  style checks and test suite
# bash run.sh diffusion|classifier DATASET          train on all classes; GPUS=0,1 uses both together
# bash run.sh sample|realnet DATASET [CLASS...]     one class after the other; GPUS=0,1 queues them on both
# bash run.sh evaluate DATASET [CLASS...]           all classes in one report; GPUS=0,1 uses both together
# bash run.sh tensorboard DATASET                   training curves and pictures in a browser; PORT=6006
# SET="trainer.max_epoch=10 dataset.workers=2"      settings to override in training, sampling and evaluation
# EARLIER=resume|overwrite                          what training does with the checkpoints of an earlier run
#
# Written for bash 3.2, which macOS has: without mapfile and associative arrays, and no array may be empty.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

VENV=.venv
PYTHON=$VENV/bin/python

usage() {
    sed -n '2,10s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
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
    # -qq: without warnings about the user or the cache, which nobody needs to act on.
    "$PYTHON" -m pip install -qq --disable-pip-version-check -r requirements-dev.txt
    echo "$wanted" > "$VENV/installed"
    echo "the environment is ready; \`source $VENV/bin/activate\` makes \`python\` use it in this terminal"
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
    stage train_diffusion.py --dataset demo --overwrite
    stage train_classifier.py --dataset demo --overwrite
    stage sample.py --dataset demo --preview
    stage sample.py --dataset demo --overwrite
    stage train_realnet.py --dataset demo --class_name all --overwrite
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

# Sets `script`: a stage's script with its data set and the overrides of SET.
choose_script() {
    local stage=$1 dataset=$2 pair
    case $stage in
        diffusion | classifier | realnet) script=("train_$stage.py") ;;
        sample) script=(sample.py) ;;
        evaluate) script=(evaluation_realnet.py) ;;
    esac
    script+=(--dataset "$dataset")
    if [[ -n ${EARLIER:-} && $stage != sample && $stage != evaluate ]]; then
        script+=("--$EARLIER")
    fi
    set -f # the words of SET are no file patterns
    for pair in ${SET:-}; do
        script+=(--set "$pair")
    done
    set +f
}

# Runs a script with one process per GPU; further arguments go to the script.
run_together() {
    local count=1
    choose_script "$1" "$2"
    shift 2
    if [[ -n ${GPUS:-} ]]; then
        export CUDA_VISIBLE_DEVICES=$GPUS
        count=$(awk -F, '{print NF}' <<< "$GPUS")
    fi
    if ((count > 1)); then
        "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node="$count" "${script[@]}" "$@"
    else
        "$PYTHON" "${script[@]}" "$@"
    fi
}

# Prints each line with a class in front.
name_lines() {
    local line
    while IFS= read -r line || [[ -n $line ]]; do
        printf '[%s] %s\n' "$1" "$line"
    done
}

# Runs unclaimed classes until none is left. mkdir claims a class: it succeeds for one worker only.
work_on_queue() {
    local gpu=$1 name i
    [[ $gpu == default ]] || export CUDA_VISIBLE_DEVICES=$gpu
    for i in "${!classes[@]}"; do
        mkdir "$state/$i" 2> /dev/null || continue
        name=${classes[$i]}
        if ! "$PYTHON" "${script[@]}" --class_name "$name" 2>&1 | name_lines "$name"; then
            printf '%s\n' "$name" >> "$state/failed"
        fi
    done
}

queue_classes() {
    local stage=$1 dataset=$2 settings=realnet listed name
    choose_script "$stage" "$dataset"
    shift 2
    if (($# == 0)); then
        [[ $stage != sample ]] || settings=diffusion
        listed=$("$PYTHON" -m datasets.lists "experiments/$dataset/$settings.yaml")
        while IFS= read -r name; do
            set -- "$@" "$name"
        done <<< "$listed"
    fi
    classes=("$@")
    state=$(mktemp -d)
    trap 'rm -rf "$state"' EXIT
    trap 'trap - INT TERM; kill 0' INT TERM
    local gpus=(default) gpu
    [[ -z ${GPUS:-} ]] || IFS=, read -ra gpus <<< "$GPUS"
    for gpu in "${gpus[@]}"; do
        work_on_queue "$gpu" &
    done
    wait
    if [[ -f $state/failed ]]; then
        echo "failed: $(sort "$state/failed" | paste -s -d' ' -)" >&2
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
            local dataset=$1 names
            shift
            names=$(IFS=, && printf '%s' "$*")
            run_together evaluate "$dataset" --class_name "${names:-all}"
            ;;
        tensorboard)
            (($# == 1)) || usage
            if [[ ! -d experiments/$1 ]]; then
                echo "error: there is no folder experiments/$1" >&2
                exit 2
            fi
            setup
            exec "$PYTHON" -m tensorboard.main --logdir "experiments/$1" --port "${PORT:-6006}"
            ;;
        *) usage ;;
    esac
}

# `exit` is on the same line, because bash reads a script as it runs it, and this one may be edited meanwhile.
main "$@"; exit
