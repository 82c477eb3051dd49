#!/usr/bin/env bash
# From nothing to a policy that solves tasks in a scene it has never seen: demonstrations, all stages, rollout, report.
#   scripts/quickstart.sh              about a quarter of an hour on two CPU cores
#   scripts/quickstart.sh size=long    the same with more of everything
#   scripts/quickstart.sh size=smoke   two minutes: does everything run? (learns nothing)
#   scripts/quickstart.sh output=DIR   elsewhere than outputs/quickstart
# What a killed run has finished is kept: the same command continues from there. To start over, delete the folder.
. "$(dirname "$0")/setup.sh"

size=short output=
for setting in "$@"; do
    case $setting in
        size=short | size=long | size=smoke) size=${setting#size=} ;;
        output=*) output=${setting#output=} ;;
        *) echo "error: $setting: unknown; settings are size=short, size=long, size=smoke, output=DIR" >&2; exit 2 ;;
    esac
done
output=${output:-outputs/quickstart$([ $size = short ] || echo -$size)}

tasks=open_drawer,close_drawer,move_slider_left,move_slider_right
tasks+=,turn_on_lightbulb,turn_off_lightbulb,turn_on_led,turn_off_led
case $size in
    smoke) demos=1 vae=2 gfdm=2 gidm=4 policy=4 chains=2 ;;
    short) demos=60 vae=300 gfdm=150 gidm=400 policy=1000 chains=60 ;;
    long) demos=150 vae=500 gfdm=600 gidm=1000 policy=3500 chains=100 ;;
esac
cores=$(python -c 'import os; print(len(os.sched_getaffinity(0)))')

mkdir -p "$output/done"
if [ "$(cat "$output/size" 2>/dev/null || echo $size)" != $size ]; then
    echo "error: $output: holds a quickstart of size=$(cat "$output/size"); choose another output=, or delete it" >&2
    exit 2
fi
echo $size > "$output/size"
step() { # name, what it does, command …: runs once, its time goes to done/<name>
    local name=$1 title=$2 start=$SECONDS
    shift 2
    [ -e "$output/done/$name" ] && return
    printf '\n── %s\n' "$title"
    "$@" || { echo "error: the step '$name' failed; fix it and run the same command again" >&2; exit 1; }
    printf '%s\t%s\t%s\n' "$((SECONDS - start))" "$title" "$*" > "$output/done/$name"
}
again() { [ -d "$1" ] && echo resume=true || echo resume=false; } # continue what a killed step left
train_again() { compgen -G "$1/checkpoints/step_*" > /dev/null && echo resume=true || echo overwrite=true; }

data=$output/data ckpts=$output/ckpts
step 01_collect "Demonstrations in scenes A, B, C" \
    python -m defi.sim.collect output=$data "tasks=[$tasks]" demos_per_task=$demos static_size=128 \
    workers=$cores $(again $data)
step 02_vae "Stage 1: train the video autoencoder" \
    python -m Step1_GFDM.train_vae data.root=$data output=$ckpts/vae trainer.max_steps=$vae $(train_again $ckpts/vae)
step 03_latents "Stage 1: demonstrations to latents" \
    python -m Step1_GFDM.prepare data.root=$data data.every=5 vae=$ckpts/vae output=$output/latents $(again $output/latents)
step 04_gfdm "Stage 1: train the forward dynamics model (GFDM)" \
    python -m Step1_GFDM.train data.root=$output/latents vae=$ckpts/vae output=$ckpts/gfdm trainer.max_steps=$gfdm trainer.preview_every=0 \
    $(train_again $ckpts/gfdm)
step 05_imagine "Stage 1: imagine scene D" \
    python -m Step1_GFDM.eval checkpoint=$ckpts/gfdm data.root=$output/latents output=$output/imagined overwrite=true
step 06_gidm "Stage 2: train the inverse dynamics model (GIDM), without looking at actions" \
    python -m Step2_GIDM.train data.root=$data output=$ckpts/gidm trainer.max_steps=$gidm \
    $(train_again $ckpts/gidm)
step 07_codes "Stage 2: which latent action moves what" \
    python -m Step2_GIDM.health checkpoint=$ckpts/gidm data.root=$data output=$output/codes overwrite=true
step 08_features "Stage 3: features of the imagined future" \
    python -m Step3_DeFI.prepare data.root=$data output=$output/features gfdm_checkpoint=$ckpts/gfdm data.min_remaining=9 data.stride=3 \
    $(again $output/features)
step 09_policy "Stage 3: train the policy (DeFI)" \
    python -m Step3_DeFI.train data.store=$output/features output=$ckpts/policy gfdm_checkpoint=$ckpts/gfdm \
    gidm_checkpoint=$ckpts/gidm trainer.max_steps=$policy $(train_again $ckpts/policy)
step 10_rollout "Rollout in the unseen scene D" \
    python -m Step3_DeFI.rollout checkpoint=$ckpts/policy chains=$chains "tasks=[$tasks]" max_steps=[120,240] baseline=random sim.static_size=128 \
    output=$output/rollout $(again $output/rollout)
python -m Step3_DeFI.quickstart output=$output
