#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Trains a LLaMA by a recipe: on a laptop, on a node with GPUs, or as one node of many.
#
#     DATA=data/corpus examples/llama/train.sh RECIPE [MEGATRON FLAGS...]
#
# Flags that are given come last, and a later value of a flag wins. Variables:
#     DATA             prefix of a dataset that tools/prepare_data.py has made with a validation
#                      part; not needed with --mock-data
#     SAVE             folder of checkpoints, from which a stopped job goes on
#                      (default: checkpoints/RECIPE)
#     PLAIN            1: plain Megatron, to compare with: the recipe without its --mapl-* flags
#     PYTHON           default: .venv/bin/python of this checkout if it is there, else python3
#     NPROC_PER_NODE   processes (default: one a GPU; without GPUs, as many as the stages need)
#     NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT
#                      of many nodes, which node this is, and where node 0 listens
#                      (default: one node; under srun the first two are known)
#     NETWORK_INTERFACE
#                      the network that stages talk over, such as eth0 (default: NCCL's and gloo's
#                      own choice)
#
# SIGTERM or SIGUSR1 to this script: the job saves after its current step and ends with status 0.
set -euo pipefail

# shellcheck source=examples/llama/recipe.sh
source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
root=$(cd "$llama/../.." && pwd)

usage() {
    sed -n '/^# Trains/,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    echo "Recipes: $(recipe_names | xargs)"
}

gpus_here() {
    if [[ -n ${SLURM_GPUS_ON_NODE-} ]]; then
        echo "$SLURM_GPUS_ON_NODE"
    elif [[ -v CUDA_VISIBLE_DEVICES ]]; then
        tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c . || true
    elif command -v nvidia-smi >/dev/null; then
        nvidia-smi --list-gpus | grep -c '^GPU' || true
    else
        echo 0
    fi
}

# The array `processes`: torchrun's flags for this node.
choose_processes() {
    local nodes=${NNODES:-${SLURM_NNODES:-1}} rank=${NODE_RANK:-${SLURM_NODEID-}}
    local here pipeline tensor
    pipeline=$(flag_value --pipeline-model-parallel-size 1 "$@")
    tensor=$(flag_value --tensor-model-parallel-size 1 "$@")
    here=${NPROC_PER_NODE:-$(gpus_here)}
    ((here)) || here=$(((pipeline * tensor + nodes - 1) / nodes))
    ((nodes * here % (pipeline * tensor) == 0)) ||
        die "$nodes nodes × $here processes cannot hold replicas of $pipeline stages ×" \
            "$tensor tensor-parallel ranks; change the number of nodes, NPROC_PER_NODE," \
            "--pipeline-model-parallel-size or --tensor-model-parallel-size"
    processes=(--nproc-per-node "$here")
    if ((nodes == 1)); then
        processes+=(--standalone)
        return
    fi
    [[ $rank =~ ^[0-9]+$ && $rank -lt $nodes ]] ||
        die "NODE_RANK='$rank' must be from 0 to $((nodes - 1)), another one on each of" \
            "NNODES=$nodes nodes; srun sets SLURM_NODEID, which is taken too"
    [[ -n ${MASTER_ADDR-} ]] ||
        die "NNODES=$nodes needs MASTER_ADDR, a name or address of node 0 that all nodes reach"
    # Fixed ranks: a stage stays on its node, next to its neighbours, whichever node comes first.
    processes+=(--nnodes "$nodes" --node-rank "$rank"
        --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}")
}

choose_network() {
    [[ -n ${NETWORK_INTERFACE-} ]] || return 0
    [[ -e /sys/class/net/$NETWORK_INTERFACE ]] ||
        die "NETWORK_INTERFACE=$NETWORK_INTERFACE is not on $(hostname); there are:" \
            "$(basename -a /sys/class/net/* | xargs)"
    export NCCL_SOCKET_IFNAME="=$NETWORK_INTERFACE" GLOO_SOCKET_IFNAME="$NETWORK_INTERFACE"
}

# The array `data_flags`.
choose_data() {
    local vocabulary found
    vocabulary=$(flag_value --vocab-size "" "$@")
    if has_flag --mock-data "$@"; then
        data_flags=(--tokenizer-type NullTokenizer)
        return
    fi
    [[ -n ${DATA-} ]] ||
        die "DATA is not set; make a dataset with tools/prepare_data.py --vocab-size $vocabulary" \
            "--valid-fraction 0.01 --output-prefix PREFIX and set DATA=PREFIX, or add --mock-data"
    found=$("$python" "$root/tools/data_flags.py" "$DATA" --vocab-size "$vocabulary" "$@") || exit
    mapfile -t data_flags <<<"$found"
}

# torchrun gives its processes 30 s after a SIGTERM, and a large checkpoint takes longer. So
# torchrun ignores it and they get it from here. SIGUSR1 means the same, and is what SLURM is asked
# to send: it goes to all processes of a job, of which all but this one ignore it.
supervise() {
    local torchrun status interrupted asking=
    set -m # groups of their own, so that Ctrl-C comes once, from here
    (
        trap '' TERM USR1
        exec "$python" -m torch.distributed.run --signals-to-handle SIGINT,SIGHUP,SIGQUIT "$@"
    ) &
    torchrun=$!
    trap 'interrupted=1; if [[ -z $asking ]]; then ask_to_end "$torchrun" & asking=$!; fi' TERM USR1
    trap 'interrupted=1; kill -INT "$torchrun" || true' INT HUP
    while true; do # for `wait` returns at each trap
        interrupted=0 status=0
        wait "$torchrun" || status=$?
        ((interrupted)) || break
    done
    [[ -z $asking ]] || kill -KILL -- "-$asking" 2>/dev/null || true # it may have ended
    return "$status"
}

# ask_to_end TORCHRUN: sends SIGTERM once to each of its processes, as soon as Megatron handles it.
ask_to_end() {
    local process children caught
    local -A asked=()
    trap '' TERM USR1
    while kill -0 "$1" 2>/dev/null; do
        read -ra children < <(cat "/proc/$1/task"/*/children 2>/dev/null) || true # it has ended
        for process in "${children[@]}"; do
            caught=$(awk '$1 == "SigCgt:" {print $2}' "/proc/$process/status" 2>/dev/null) ||
                continue
            if [[ -n $caught && -z ${asked[$process]-} ]] && ((0x$caught & 1 << 14)); then
                kill -TERM "$process" && asked[$process]=1
            fi
        done
        sleep 1
    done
}

if (($# == 0)) || [[ $1 == -h || $1 == --help ]]; then
    usage
    exit $(($# == 0 ? 2 : 0))
fi
recipe=$1
shift
read_recipe "$recipe"
python=${PYTHON:-$root/.venv/bin/python}
[[ -n ${PYTHON-} || -x $python ]] || python=python3
save=$(save_folder "$recipe" "$@")
choose_processes "${recipe_flags[@]}" "$@"
choose_network
choose_data "${recipe_flags[@]}" "$@"
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
supervise "${processes[@]}" "$root/pretrain_gpt.py" "${recipe_flags[@]}" "${data_flags[@]}" \
    --save "$save" --load "$save" "$@"
