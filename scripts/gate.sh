#!/usr/bin/env bash
# Does this code still learn to draw digits? Trains experiment=digits_gate anew and holds its metrics to the committed
# baseline: exit code 0, or 1 if one of them is worse than the spread over seeds allows.
#
#   bash scripts/gate.sh                        verdicts in runs/digits_gate/gate.xml (JUnit) and gate.md
#   bash scripts/gate.sh gate.summary=FILE      or any other override of `diffussm evaluate`
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
use_environment digits

run=runs/digits_gate
rm -rf "$run" # of other code, perhaps
"$diffussm" train experiment=digits_gate run_dir="$run"
# So much tolerance that the slowest of the six seeds would pass by the five others; what is broken is far beyond it.
"$diffussm" evaluate checkpoint="$run" gate.relative_to=diffussm:evaluation/digits_baseline.json \
    gate.is_tolerance=1.5 gate.precision_tolerance=0.2 gate.recall_tolerance=0.1 gate.density_tolerance=0.25 \
    gate.coverage_tolerance=0.15 gate.class_agreement_tolerance=0.2 \
    gate.junit="$run/gate.xml" gate.summary="$run/gate.md" "$@"
