#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# What the batch scripts share. To be sourced on the first node of a job, in the checkout.

# shellcheck source=examples/llama/recipe.sh
source examples/llama/recipe.sh

# Exports where node 0 listens. Batch scripts run on the first node of a job, which is node 0.
choose_master() {
    local first
    if [[ -n ${NETWORK_INTERFACE-} ]]; then
        first=$(ip -o -4 addr show dev "$NETWORK_INTERFACE" |
            awk 'NR == 1 {sub("/.*", "", $4); print $4}') || first=""
        [[ -n $first ]] ||
            die "NETWORK_INTERFACE=$NETWORK_INTERFACE has no IPv4 address on $(hostname)"
    else
        read -r first < <(scontrol show hostnames "$SLURM_JOB_NODELIST") ||
            die "scontrol names no host of SLURM_JOB_NODELIST=$SLURM_JOB_NODELIST"
    fi
    export MASTER_ADDR=${MASTER_ADDR:-$first}
    # Below the ports that a kernel hands out, and another one for another job.
    export MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}
}

# saved_step FOLDER: the step of its newest complete checkpoint, or 0.
saved_step() {
    local step=0 file=$1/latest_checkpointed_iteration.txt
    [[ ! -f $file ]] || step=$(<"$file")
    [[ $step =~ ^[0-9]+$ ]] || step=0 # "release": weights to start from
    echo "$step"
}

# read_job RECIPE FLAGS...: the array `recipe_flags`, and the folder of checkpoints as `save`.
read_job() {
    [[ -n ${1-} ]] || die "name a recipe: sbatch [OPTIONS] SCRIPT RECIPE [MEGATRON FLAGS...]"
    read_recipe "$1"
    save=$(save_folder "$@")
}

# choose_mounts RECIPE FLAGS...: what a container has to see, SOURCE:TARGET with commas between, as
# `mounts`. The folder of checkpoints is made, for only what is there can be mounted.
choose_mounts() {
    local path resolved save
    local -a more paths
    read_job "$@"
    paths=("$save")
    [[ -z ${DATA-} ]] || paths+=("$(dirname "$DATA")")
    IFS=, read -ra more <<<"${CONTAINER_MOUNTS-}"
    for path in "${more[@]}"; do
        [[ $path != *:* ]] ||
            die "CONTAINER_MOUNTS=$CONTAINER_MOUNTS mounts at another path, at which neither" \
                "SAVE nor DATA would be found; give PATH[,PATH...], the same path inside"
        [[ $path == /* && -e $path ]] ||
            die "CONTAINER_MOUNTS=$CONTAINER_MOUNTS: '$path' is not the absolute path of" \
                "something on $(hostname); correct it or leave it out"
    done
    mkdir -p "$save" || die "SAVE=$save cannot be made; set SAVE to a folder that can"
    mounts=$PWD:$PWD
    for path in "${paths[@]}" "${more[@]}"; do
        path=$(realpath -ms -- "$path")
        if [[ $path/ == "$PWD"/* ]]; then # the checkout's, unless by a link out of it
            resolved=$(realpath -m -- "$path")
            [[ $resolved/ != "$(realpath -- "$PWD")"/* ]] || continue
            path=$resolved
        fi
        [[ ",$mounts," == *",$path:$path,"* ]] || mounts+=,$path:$path
    done
}

# train_on_all_nodes WORDS... -- RECIPE FLAGS...: runs train.sh on each node, and has SLURM queue
# the job again if it was stopped before its last step. WORDS stand between srun and train.sh:
# options of srun, or what train.sh is to run inside of.
#
# Whether a job is done is read from its checkpoints, not from its status: a job that was told to
# stop ends with 0 too. It is queued again only if it has come further than when it started, so that
# one that always fails at the same place does not come back for ever.
train_on_all_nodes() {
    local words=() recipe save last before after status=0
    while [[ $1 != -- ]]; do
        words+=("$1")
        shift
    done
    shift
    read_job "$@"
    recipe=$1
    last=$(flag_value --train-iters 0 "${recipe_flags[@]}" "$@")
    choose_master
    # srun takes it no longer from sbatch by itself.
    [[ -z ${SLURM_CPUS_PER_TASK-} ]] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK

    before=$(saved_step "$save")
    echo "$(date -Is) job $SLURM_JOB_ID, start ${SLURM_RESTART_COUNT:-0}: $recipe on" \
        "$SLURM_NNODES nodes from step $before of $last, $MASTER_ADDR:$MASTER_PORT"
    # All of them said: else an --ntasks of sbatch, or its variable, wins.
    srun --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 \
        --kill-on-bad-exit=1 "${words[@]}" \
        bash examples/llama/train.sh "$@" || status=$?
    after=$(saved_step "$save")
    echo "$(date -Is) job $SLURM_JOB_ID ended with status $status at step $after of $last"
    if ((after >= last || after <= before)); then
        return "$status"
    fi
    scontrol requeue "$SLURM_JOB_ID"
}
