#!/usr/bin/env bash
# The paper's choices on real data at small scale, three seeds each: hourglass ratio against patch size, one
# direction against two, DiffuSSM against DiT at equal compute; on digits of 16x16 and crops of photographs of 32x32.
#
#   bash scripts/ablations.sh             on 2 CPU cores, after installation: an hour, by estimate from single steps
#   bash scripts/ablations.sh digits16    one of digits16, photographs
#
# Run it again: it continues what was interrupted and only reports what is finished.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

use_environment digits,photographs,sweep
export OMP_NUM_THREADS=1
two=(hydra/launcher=joblib hydra.launcher.n_jobs=2)

ablate() {  # NAME, and the size of the DiT that computes as much: operations of dense layers, attention and SSM
    local name=$1 dit=$2 chosen
    for chosen in sweep=hourglass "sweep=direction model.bidirectional=choice(false)" \
        "model=choice(dit_tiny) model.patch_size=2 $dit seed=0,1,2"; do
        # shellcheck disable=SC2086
        "$diffussm" train -m "experiment=$name" "name=${name}_ablation" $chosen "${two[@]}"
    done
}

measure() {  # NAME, what to measure: all its runs, each in its own results.json
    local name=$1 runs
    runs=$(printf ',%s' "runs/${name}_ablation"/*/)
    "$diffussm" evaluate -m "checkpoint=${runs:1}" "${@:2}" "${two[@]}"
    "$python" scripts/summarize_sweep.py "runs/${name}_ablation"
}

if [ "${1:-digits16}" = digits16 ]; then
    reference=runs/digits16_reference.npz
    [ -e $reference ] || "$diffussm" stats data=digits16 evaluation=digits16 to=$reference
    ablate digits16 "model.hidden_size=56 model.input_size=16"
    measure digits16 evaluation=digits16 evaluation.reference=$reference evaluation.num_samples=500 \
        data.split=held_out "metrics=[fid,class_agreement,loss]"
fi
if [ "${1:-photographs}" = photographs ]; then
    [ -d runs/photographs/held_out ] || "$python" scripts/photograph_crops.py runs/photographs
    ablate photographs "model.hidden_size=48 model.input_size=32"
    measure photographs data.path=runs/photographs/held_out "metrics=[loss]"
fi
