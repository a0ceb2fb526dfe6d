#!/usr/bin/env bash
# From a folder of images to a report, with tiny models: look at the data, encode it, train DiffuSSM and DiT (of
# which one is killed on the way and continued), measure, compare. In the environment in which it is run:
#
#   bash scripts/images_to_report.sh IMAGES VAE OUT evaluation=NAME [other overrides of the evaluation]
#   bash scripts/images_to_report.sh images stabilityai/sd-vae-ft-ema out evaluation=fid5k evaluation.num_samples=500
#
# IMAGES has a folder per class; VAE is an AutoencoderKL with 4 channels and a factor of 8, a directory or a name on the
# hub; OUT is made. RESOLUTION=64 and IMAGES_SEEN=20k in the environment are the side of the images and the length of
# each training. Run it again: every command continues where it was, or only reports.
set -euo pipefail
[ $# -ge 4 ] || { sed -n '5,10s/^# \{0,1\}//p' "$0" >&2; exit 2; }
images=$1 out=$3
vae=(autoencoder=kl "autoencoder.pretrained=$2")
data=(data=image_folder "data.path=$images" "data.resolution=${RESOLUTION:-64}" "data.max_bad_fraction=0.2")
measure=("${@:4}")
classes=$(find -L "$images" -mindepth 1 -maxdepth 1 -type d | wc -l)
mkdir -p "$out"

echo "== look"
diffussm inspect "${data[@]}" "${vae[@]}" "out=$out/inspected"

echo "== encode, on two processes"
python -m torch.distributed.run --standalone --nproc_per_node=2 -m diffussm \
    encode "${data[@]}" "${vae[@]}" "to=$out/latents" shard_size=64 num_workers=1

echo "== measure the images, which samples are compared with"
reference=$out/reference.npz
[ -e "$reference" ] || diffussm stats "${data[@]}" "to=$reference" "${measure[@]}"

train() {  # NAME MODEL [overrides]
    diffussm train "name=$1" "run_dir=$out/runs/$1" "model=$2" model.in_channels=4 "model.num_classes=$classes" \
        data=latents "data.path=$out/latents" "${vae[@]}" sampler=ddim sampler.num_steps=25 optimizer.lr=0.002 \
        trainer.num_processes=2 trainer.batch_size=32 "trainer.total_images=${IMAGES_SEEN:-20k}" \
        trainer.save_every_images=2k trainer.log_every_images=500 trainer.sample_every_images=10k \
        'trainer.ema_decays=[0.99]' trainer.precision=fp32 trainer.num_workers=1 "${@:3}"
}

if [ ! -e "$out/killed" ]; then
    echo "== train DiffuSSM on two processes, and kill them after the first checkpoint"
    train diffussm diffussm_tiny &
    while kill -0 $! 2>/dev/null && ! compgen -G "$out/runs/diffussm/checkpoints/step-*" >/dev/null; do sleep 0.2; done
    pkill -KILL -P $! || true
    kill -KILL $! || true
    wait $! || true
    touch "$out/killed"
fi
echo "== train DiffuSSM: the same command continues it"
train diffussm diffussm_tiny
echo "== train DiT"
side=$((${RESOLUTION:-64} / 8))
train dit dit_tiny "model.input_size=$side"

echo "== measure the samples"
for name in diffussm dit; do
    diffussm evaluate "checkpoint=$out/runs/$name" "${measure[@]}" "evaluation.reference=$reference" num_processes=2
done

echo "== compare and report"
diffussm compare "$out/runs/diffussm" "$out/runs/dit" match=images "out=$out/compare"
diffussm report "$out/runs/diffussm" "$out/runs/dit" "out=$out/report"
