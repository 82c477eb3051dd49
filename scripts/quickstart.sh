#!/usr/bin/env bash
# From nothing to a policy that solves tasks it was not shown like this: demonstrations, all stages, rollout, report.
#   scripts/quickstart.sh               the play table, in a scene it has never seen: a quarter of an hour on two CPU cores
#   scripts/quickstart.sh world=simpler SIMPLER's WidowX, from the official starts: an hour; fetches its assets, once
#   scripts/quickstart.sh size=long     the same with more of everything
#   scripts/quickstart.sh size=smoke    two minutes: does everything run? (learns nothing)
#   scripts/quickstart.sh output=DIR    elsewhere than outputs/quickstart
#   scripts/quickstart.sh world=simpler simpler_root=DIR   a clone of SimplerEnv elsewhere than data/SimplerEnv
# What a killed run has finished is kept: the same command continues from there. To start over, delete the folder.
. "$(dirname "$0")/setup.sh"

world=table size=short output= simpler_root=data/SimplerEnv
clone=$simpler_root commit=4ab7178e83e84ee06894034ec6dbf9e7aad1e882 # its submodule's follows
for setting in "$@"; do
    case $setting in
        world=table | world=simpler) world=${setting#world=} ;;
        size=short | size=long | size=smoke) size=${setting#size=} ;;
        output=*) output=${setting#output=} ;;
        simpler_root=*) simpler_root=${setting#simpler_root=} ;;
        *) echo "error: $setting: unknown; settings are world=table, world=simpler, size=short, size=long, size=smoke, output=DIR," \
            "simpler_root=DIR" >&2; exit 2 ;;
    esac
done
if [ $world = simpler ] && [ "$simpler_root" != "$clone" ] && [ ! -d "$simpler_root" ]; then
    echo "error: simpler_root=$simpler_root: no such folder; leave it out, then its assets are fetched to $clone, or" \
        "git clone --recurse-submodules https://github.com/simpler-env/SimplerEnv $simpler_root" >&2
    exit 2
fi
run=$([ $world = table ] && echo $size || echo $world-$size)
output=${output:-outputs/quickstart$([ $world = table ] || echo -$world)$([ $size = short ] || echo -$size)}
data=$output/data ckpts=$output/ckpts
cores=$(python -c 'import os; print(len(os.sched_getaffinity(0)))')

# What differs between the worlds: the data, how far apart its frames are, and the evaluation.
case $world in
    table)
        case $size in
            smoke) demos=1 vae=2 gfdm=2 gidm=4 steps=4 chains=2 ;;
            short) demos=60 vae=300 gfdm=150 gidm=400 steps=1000 chains=60 ;;
            long) demos=150 vae=500 gfdm=600 gidm=1000 steps=3500 chains=100 ;;
        esac
        tasks=open_drawer,close_drawer,move_slider_left,move_slider_right
        tasks+=,turn_on_lightbulb,turn_off_lightbulb,turn_on_led,turn_off_led
        shown="scenes A, B and C" tried="starts in the unseen scene D"
        collect=(defi.sim.collect static_size=128)
        data_of=(data.root=$data) latents=(data.every=5) model=() pairs=()
        samples=(data.min_remaining=9 data.stride=3) policy=()
        rollout=(chains=$chains "tasks=[$tasks]" max_steps=[120,240] sim.static_size=128)
        ;;
    simpler)
        case $size in
            smoke) demos=2 vae=2 gfdm=2 gidm=4 steps=4 starts=1 ;;
            short) demos=150 vae=300 gfdm=200 gidm=400 steps=4000 starts=null ;;
            long) demos=500 vae=500 gfdm=600 gidm=1000 steps=15000 starts=null ;;
        esac
        tasks=widowx_put_eggplant_in_basket,widowx_spoon_on_towel
        shown="random starts" tried="the official starts"
        collect=(defi.benchmarks.simpler.collect simpler_root=$simpler_root image_size=[96,96])
        # Five steps per second: neighbouring frames are as far apart as six of the table's.
        data_of=(data=lerobot data.root=$data data.split=train data.held_out=val) latents=() model=(gfdm.frame_step=1 gfdm.image_size=96)
        pairs=(data.distance=[3,3]) samples=(policy.chunk=6 data.stride=2)
        # Without the state a small policy learns much more slowly where the hand is and whether it holds something.
        policy=(policy.chunk=6 policy.robot.executed=3 policy.state=true policy.merge=12)
        rollout=(benchmark=simpler_widowx simpler_root=$simpler_root "tasks=[$tasks]" starts=$starts repeats=1)
        ;;
esac

mkdir -p "$output/done"
if [ "$(cat "$output/size" 2>/dev/null || echo $run)" != $run ]; then
    held=$(sed 's/^simpler-/world=simpler size=/; t; s/^/size=/' "$output/size")
    echo "error: $output: holds a quickstart of $held; choose another output=, or delete it" >&2
    exit 2
fi
echo $run > "$output/size"
if [ $world = simpler ]; then
    if [ ! -d "$simpler_root" ]; then # moved when complete, so what is there is whole
        rm -rf "$clone.part"
        git clone --quiet --no-checkout https://github.com/simpler-env/SimplerEnv "$clone.part"
        git -C "$clone.part" checkout --quiet $commit
        git -C "$clone.part" submodule --quiet update --init --recursive
        mv "$clone.part" "$clone"
    fi
    can_draw_simpler || { python -m defi.doctor "simpler_root=$simpler_root"; exit 1; }
fi
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

step 01_collect "Demonstrations in $shown" \
    python -m "${collect[@]}" output=$data "tasks=[$tasks]" demos_per_task=$demos workers=$cores $(again $data)
step 02_vae "Stage 1: train the video autoencoder" \
    python -m Step1_GFDM.train_vae "${data_of[@]}" output=$ckpts/vae "${model[@]}" trainer.max_steps=$vae $(train_again $ckpts/vae)
step 03_latents "Stage 1: demonstrations to latents" \
    python -m Step1_GFDM.prepare "${data_of[@]}" "${latents[@]}" vae=$ckpts/vae output=$output/latents $(again $output/latents)
step 04_gfdm "Stage 1: train the forward dynamics model (GFDM)" \
    python -m Step1_GFDM.train data.root=$output/latents vae=$ckpts/vae output=$ckpts/gfdm "${model[@]}" trainer.max_steps=$gfdm \
    trainer.preview_every=0 $(train_again $ckpts/gfdm)
step 05_imagine "Stage 1: imagine what was held out" \
    python -m Step1_GFDM.eval checkpoint=$ckpts/gfdm data.root=$output/latents output=$output/imagined overwrite=true
step 06_gidm "Stage 2: train the inverse dynamics model (GIDM), without looking at actions" \
    python -m Step2_GIDM.train "${data_of[@]}" "${pairs[@]}" output=$ckpts/gidm trainer.max_steps=$gidm $(train_again $ckpts/gidm)
step 07_codes "Stage 2: which latent action moves what" \
    python -m Step2_GIDM.health checkpoint=$ckpts/gidm "${data_of[@]}" output=$output/codes overwrite=true
step 08_features "Stage 3: features of the imagined future" \
    python -m Step3_DeFI.prepare "${data_of[@]}" "${samples[@]}" output=$output/features gfdm_checkpoint=$ckpts/gfdm $(again $output/features)
step 09_policy "Stage 3: train the policy (DeFI)" \
    python -m Step3_DeFI.train data.store=$output/features "${policy[@]}" output=$ckpts/policy gfdm_checkpoint=$ckpts/gfdm \
    gidm_checkpoint=$ckpts/gidm trainer.max_steps=$steps $(train_again $ckpts/policy)
step 10_rollout "Rollout from $tried" \
    python -m Step3_DeFI.rollout checkpoint=$ckpts/policy "${rollout[@]}" baseline=random output=$output/rollout $(again $output/rollout)
python -m Step3_DeFI.quickstart output=$output
