#!/usr/bin/env bash
# From raw images to a table row: queues encode.sbatch, train.sbatch and evaluate.sbatch, each to start when the one
# before it has ended well. A job that is queued again keeps its number, so that the next goes on waiting for it; when
# one fails for good, those after it are taken out of the queue. Leave out the stages that are done:
#
#   bash scripts/slurm/chain.sh \
#       encode data=imagenet data.path=DIR to=latents/imagenet256 \
#       train --nodes=2 experiment=imagenet256_diffussm_xl \
#       evaluate checkpoint=runs/imagenet256_diffussm_xl evaluation=fid50k evaluation.reference=FILE
#
# Words that begin with -- are options of sbatch for their stage, but for --config-dir=DIR, which is diffussm's. Prints
# the number of every job.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

fail() {
    echo "chain.sh: $*" >&2
    exit 2
}

stages=()
declare -A options overrides # of each stage, quoted for the shell
for word in "$@"; do
    case $word in
        encode | train | evaluate)
            [ -z "${overrides[$word]+given}" ] || fail "$word: comes twice: name each stage once"
            case "${stages[*]:-} $word" in
                *train*encode* | *evaluate*encode* | *evaluate*train*)
                    fail "$word: comes too late: the order is encode, train, evaluate" ;;
            esac
            stages+=("$word")
            options[$word]="" overrides[$word]=""
            ;;
        *)
            [ "${#stages[@]}" -gt 0 ] || fail "$word: belongs to no stage: begin with encode, train or evaluate"
            stage=${stages[-1]}
            case $word in
                --config-dir) fail "--config-dir: write --config-dir=DIR" ;;
                --config-dir=*) overrides[$stage]+=" $(printf %q "$word")" ;;
                --*) options[$stage]+=" $(printf %q "$word")" ;;
                *) overrides[$stage]+=" $(printf %q "$word")" ;;
            esac
            ;;
    esac
done
[ "${#stages[@]}" -gt 0 ] || fail "nothing to do: name encode, train or evaluate, with what they need"

# What cannot be composed fails here and not in the queue, a week from now. (evaluate needs the checkpoint for that.)
for stage in "${stages[@]}"; do
    if [ "$stage" != evaluate ]; then
        eval "diffussm $stage --print-config ${overrides[$stage]}" >/dev/null
    fi
done

before=()
for stage in "${stages[@]}"; do
    job=$(eval "sbatch --parsable \"\${before[@]}\" ${options[$stage]} \"\$here/$stage.sbatch\" ${overrides[$stage]}")
    job=${job%%;*} # of several clusters, the name follows
    echo "$stage $job"
    before=(--dependency="afterok:$job" --kill-on-invalid-dep=yes)
done
