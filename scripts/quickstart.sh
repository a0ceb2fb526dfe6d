#!/usr/bin/env bash
# From nothing to measured samples: trains DiffuSSM on real handwritten digits, samples, evaluates.
#
#   bash scripts/quickstart.sh            4 to 7 minutes on 2 CPU cores, after installation
#   bash scripts/quickstart.sh --short    about a minute: everything runs, the digits are not good yet
#
# Run it again: it continues what was interrupted and only reports what is finished.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

experiment=(experiment=digits)
measure=()
run=runs/digits
case "${1:-}" in
    "") ;;
    --short)
        run=runs/digits_short
        experiment+=(name=digits_short trainer.total_images=6400 trainer.decay_images=3200
            trainer.log_every_images=1600 "trainer.ema_decays=[0.95]")
        measure+=(evaluation.num_samples=200)
        ;;
    *) fail "unknown argument $1: only --short is known" ;;
esac

use_environment digits
echo "== training (Ctrl-C is safe: the same command continues)"
"$diffussm" train "${experiment[@]}"
echo "== sampling"
samples=$("$diffussm" sample "checkpoint=$run")
echo "== evaluating"
"$diffussm" evaluate "checkpoint=$run" ${measure[@]+"${measure[@]}"}
echo "samples      $samples"
echo "metrics      $run/metrics.jsonl"
