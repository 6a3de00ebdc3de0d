#!/bin/sh
# Recovery against use under DEL's stochastic quantization, with and without its projection: trains a
# projection for each noise and attacks them one after the other. From the repository's root:
#
#     benchmarks/redteam_del.sh ../shared/assets benchmarks/results/DATE-redteam-del
#
# The last run takes the rows of the earlier ones into its report.
set -eu
model=$1/models/stories260K
stories=$1/data/tinystories
out=$2
# The 99 % quantile of public coordinates behind one block, as `fedsea privacy calibrate` says.
clip=2.36
mechanism=stochastic-quantization:bits=4
mkdir -p build

attack() {
    fedsea redteam --model "$model" --bottom 1 --text "$stories/valid_cased.txt" \
        --texts 6 --tokens 65 --threads 1 "$@"
}

attack --mechanism "$mechanism,clip=$clip,mu=200" --mechanism "$mechanism,clip=$clip,mu=60" \
    --mechanism "$mechanism,clip=$clip,mu=20" --mechanism "$mechanism,clip=$clip,mu=8" \
    --json build/wide.json
added="--add build/wide.json"
for mu in 200 60 20 8; do
    narrow=$mechanism,clip=0.05,mu=$mu
    pair=build/narrow-mu$mu.safetensors
    fedsea privacy train-projection "$model" --text "$stories/train_first_cased.txt" --width 16 \
        --mechanism "$narrow" --steps 200 --threads 1 --out "$pair"
    report="--json build/narrow-mu$mu.json"
    if [ $mu = 8 ]; then
        report="--json $out.json --markdown $out.md"
    fi
    # shellcheck disable=SC2086 - options, each a word of its own
    attack --projection "$pair" --mechanism "$narrow" $added $report
    added="--add build/narrow-mu$mu.json"
done
