#!/usr/bin/env bash
# The paper's choices on real data at small scale, three seeds each: hourglass ratio against patch size, one
# direction against two, DiffuSSM against DiT at equal compute; on digits of 16x16 and crops of photographs of 32x32.
#
#   bash scripts/ablations.sh             57 minutes on 2 CPU cores, after installation (results: ablations/results.md)
#   bash scripts/ablations.sh digits16    one of digits16, photographs
#
# Run it again: it continues what was interrupted and only reports what is finished.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

case ${1:-digits16} in
    digits16 | photographs) ;;
    *) fail "$1: choose digits16 or photographs, or neither for both" ;;
esac
use_environment digits,photographs,sweep
export OMP_NUM_THREADS=1
two=(hydra/launcher=joblib hydra.launcher.n_jobs=2)

ablate() {  # NAME, DiffuSSM's own settings, and the DiT that computes as much: dense layers, attention and SSM
    local name=$1 ssm=$2 dit=$3 chosen
    for chosen in "sweep=hourglass $ssm" "sweep=direction model.bidirectional=choice(false) $ssm" \
        "model=choice(dit_tiny) model.patch_size=2 $dit seed=0,1,2"; do
        # shellcheck disable=SC2086
        "$diffussm" train -m "experiment=$name" "name=${name}_ablation" $chosen "${two[@]}"
    done
}

measure() {  # NAME, what to measure: all its runs, each in its own results.json
    local name=$1 runs
    runs=$(printf ',%s' "runs/${name}_ablation"/*__seed-*)
    "$diffussm" evaluate -m "checkpoint=${runs:1}" "${@:2}" "${two[@]}"
    "$diffussm" compare "runs/${name}_ablation"  # seeds.csv and report.html there, in compare/
}

if [ "${1:-digits16}" = digits16 ]; then
    reference=runs/digits16_reference.npz
    [ -e $reference ] || "$diffussm" stats data=digits16 evaluation=digits16 to=$reference
    ablate digits16 "model.dt_min=0.0025 optimizer.lr=0.008" \
        "model.hidden_size=88 model.depth=3 model.input_size=16 optimizer.lr=0.004"
    measure digits16 evaluation=digits16 evaluation.reference=$reference evaluation.num_samples=500 \
        data.split=held_out "metrics=[fid,class_agreement,loss]"
fi
if [ "${1:-photographs}" = photographs ]; then
    crops=runs/photograph_crops
    if ! [ -d $crops ]; then # whole, or not at all: a kill leaves no half of them
        rm -rf $crops.part
        "$python" scripts/photograph_crops.py $crops.part
        mv $crops.part $crops
    fi
    ablate photographs "model.dt_min=0.000625 optimizer.lr=0.008" \
        "model.hidden_size=48 model.input_size=32 optimizer.lr=0.008"
    measure photographs data.path=$crops/held_out "metrics=[loss]"
fi
