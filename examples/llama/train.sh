#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Trains a LLaMA by a recipe: on a laptop, on a node with GPUs, or as one node of many.
#
#     DATA=data/corpus examples/llama/train.sh RECIPE [MEGATRON FLAGS...]
#
# Flags that are given come last, and a later value of a flag wins. Variables:
#     DATA             prefix of a dataset that tools/prepare_data.py has made with a validation
#                      part; not needed with --mock-data or Megatron's own flags for data
#     SAVE             folder of checkpoints, from which a stopped job goes on, and of what
#                      TensorBoard and tools/report.py show (default: checkpoints/RECIPE)
#     PLAIN            1: plain Megatron, to compare with: the recipe without its --mapl-* flags
#     PYTHON           default: .venv/bin/python of this checkout, which make setup makes
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
trap 'early=1' TERM USR1 # until there are processes to ask
early=

# shellcheck source=examples/llama/recipe.sh
source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
# shellcheck source=examples/llama/supervise.sh
source "$llama/supervise.sh"
root=$(cd "$llama/../.." && pwd)

usage() {
    sed -n '/^# Trains/,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    echo "Recipes: $(recipe_names | xargs)"
}

gpus_here() {
    if [[ -n ${SLURM_GPUS_ON_NODE-} ]]; then
        echo "$SLURM_GPUS_ON_NODE"
    elif [[ -v CUDA_VISIBLE_DEVICES ]]; then
        # CUDA sees none from the first -1 on.
        tr -d ' ' <<<"$CUDA_VISIBLE_DEVICES" | tr ',' '\n' | sed '/^-1$/,$d' | grep -c . || true
    elif command -v nvidia-smi >/dev/null; then
        nvidia-smi --list-gpus | grep -c '^GPU' || true
    else
        echo 0
    fi
}

# check_count NAME VALUE REMEDY...
check_count() {
    local name=$1 value=$2
    shift 2
    [[ $value =~ ^[1-9][0-9]*$ ]] || die "$name='$value' is no number from 1; $*"
}

# The array `processes`: torchrun's flags for this node.
choose_processes() {
    local nodes=${NNODES:-${SLURM_NNODES:-1}} rank=${NODE_RANK:-${SLURM_NODEID-}}
    local here pipeline tensor
    check_count NNODES "$nodes" "set NNODES to the number of nodes, or leave it out for one"
    pipeline=$(flag_value --pipeline-model-parallel-size 1 "$@")
    check_count --pipeline-model-parallel-size "$pipeline" "give it the number of stages"
    tensor=$(flag_value --tensor-model-parallel-size 1 "$@")
    check_count --tensor-model-parallel-size "$tensor" "give it the number of ranks in a stage"
    here=${NPROC_PER_NODE-}
    if [[ -n $here ]]; then
        check_count NPROC_PER_NODE "$here" "set it to the number of processes on this node, or" \
            "leave it out for one a GPU"
    else
        here=$(trap '' TERM USR1 && gpus_here) # asking the driver may take seconds
    fi
    ((here)) || here=$(((pipeline * tensor + nodes - 1) / nodes))
    ((nodes * here % (pipeline * tensor) == 0)) ||
        die "$nodes nodes × $here processes cannot hold replicas of $pipeline stages ×" \
            "$tensor tensor-parallel ranks; change the number of nodes, NPROC_PER_NODE," \
            "--pipeline-model-parallel-size or --tensor-model-parallel-size, or let processes" \
            "share a GPU: NPROC_PER_NODE=$(((pipeline * tensor + nodes - 1) / nodes)) and" \
            "--distributed-backend gloo"
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
    local vocabulary found flag
    vocabulary=$(flag_value --vocab-size "" "$@")
    for flag in --data-path --train-data-path --data-args-path --per-split-data-args-path; do
        if has_flag "$flag" "$@"; then
            data_flags=() # Megatron's own, with a tokenizer's
            return
        fi
    done
    if has_flag --mock-data "$@"; then
        data_flags=(--tokenizer-type NullTokenizer)
        return
    fi
    [[ -n ${DATA-} ]] ||
        die "DATA is not set; make a dataset with tools/prepare_data.py --vocab-size $vocabulary" \
            "--valid-fraction 0.01 --output-prefix PREFIX and set DATA=PREFIX, or add" \
            "--mock-data, or Megatron's own --data-path, --train-data-path, --data-args-path or" \
            "--per-split-data-args-path, and --tokenizer-type"
    found=$(
        trap '' TERM USR1
        exec "$python" "$root/tools/data_flags.py" "$DATA" --vocab-size "$vocabulary" "$@"
    ) || exit
    mapfile -t data_flags <<<"$found"
}

if (($# == 0)) || [[ $1 == -h || $1 == --help ]]; then
    usage
    exit $(($# == 0 ? 2 : 0))
fi
recipe=$1
shift
read_recipe "$recipe"
python=${PYTHON:-$root/.venv/bin/python}
[[ -n ${PYTHON-} || -x $python ]] ||
    die "there is no $python; run make setup, or set PYTHON to a Python with what" \
        "requirements.lock lists"
save=$(save_folder "$recipe" "$@")
choose_processes "${recipe_flags[@]}" "$@"
choose_network
interval=$(flag_value --save-interval "" "${recipe_flags[@]}" "$@")
check_count --save-interval "$interval" "give it the steps from one checkpoint to the next"
choose_data "${recipe_flags[@]}" "$@"
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
supervise "$python" -m torch.distributed.run --signals-to-handle SIGINT,SIGHUP,SIGQUIT \
    "${processes[@]}" "$root/pretrain_gpt.py" "${recipe_flags[@]}" "${data_flags[@]}" \
    --save "$save" --load "$save" --save-retain-interval $((10 * interval)) \
    --tensorboard-dir "$save" "$@"
