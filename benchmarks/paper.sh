#!/usr/bin/env bash
# Compute the paper's tables on a GPU, or go on with them, many runs at a time:
#
#     benchmarks/paper.sh OUT [TABLE…]
#
# TABLE is a name that `became reproduce` lists; without one they are published, methods, ablation, gains and epochs.
# The environment says the rest: WORKERS (12) runs at a time on DEVICE (cuda), with SEEDS ("0 1 2"), OPTIONS of every
# run (steps as one CUDA graph, and a run saved at most once a minute), and BECAME, the command (became).
# Give the data's folder as BECAME_DATA_DIR. A run that fails is shown, and the others go on; the same command goes on
# with what is left. At the end OUT/small.tar.gz has everything but the checkpoints.
set -uo pipefail

out=$1
shift
[ $# -gt 0 ] || set -- published methods ablation gains epochs
read -ra seeds <<< "${SEEDS:-0 1 2}"
read -ra options <<< "${OPTIONS:---compile --dropout-masks framework --save-every 60}"
read -ra became <<< "${BECAME:-became}"
status=0

for table in "$@"; do
    where=(--backend torch --device "${DEVICE:-cuda}" --workers "${WORKERS:-12}")
    commands=$("${became[@]}" reproduce "$table" --out "$out" --seeds "${seeds[@]}" "${where[@]}" --dry-run) || exit
    while read -r line; do
        [ "${line#became run }" != "$line" ] || continue
        eval "words=($line)" # the command prints its words as a shell reads them
        "${became[@]}" "${words[@]:1}" "${options[@]}" --quiet < /dev/null || status=1
    done <<< "$commands"
done

(cd "$out" && find . -name checkpoints -prune -o -type f ! -name small.tar.gz -print0 |
    tar --create --gzip --null --files-from=- --file=small.tar.gz)
exit "$status"
