#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# How train.sh passes signals on to the processes that train. To be sourced.

# torchrun gives its processes 30 s after a SIGTERM, and a large checkpoint takes longer. So
# torchrun ignores it and they get it from here. SIGUSR1 means the same, and is what SLURM is asked
# to send: it goes to all processes of a job, of which all but this one ignore it.
# supervise TORCHRUN...: runs it to its end. The caller has set `early` if a signal has come before.
supervise() {
    local torchrun status interrupted asking=
    set -m # groups of their own, so that Ctrl-C comes once, from here
    trap '' TERM USR1 # before the fork, so that there is no moment in which they end it
    "$@" &
    torchrun=$!
    trap 'interrupted=1; ask_once' TERM USR1
    trap 'interrupted=1; kill -INT "$torchrun" || true' INT HUP
    [[ -z ${early-} ]] || ask_once
    while true; do # for `wait` returns at each trap
        interrupted=0 status=0
        wait "$torchrun" || status=$?
        ((interrupted)) || break
    done
    [[ -z $asking ]] || kill -KILL -- "-$asking" 2>/dev/null || true # it may have ended
    return "$status"
}

# For `supervise`, whose variables it sets.
ask_once() {
    [[ -z $asking ]] || return 0
    ask_to_end "$torchrun" &
    asking=$!
}

# children_of PROCESS. Not every kernel has these files (CONFIG_PROC_CHILDREN).
children_of() {
    cat "/proc/$1/task"/*/children 2>/dev/null || ps -o pid= --ppid "$1" || true # it has ended
}

# ask_to_end TORCHRUN: sends SIGTERM once to each of its processes, as soon as Megatron handles it.
ask_to_end() {
    local process children caught
    local -A asked=()
    trap '' TERM USR1
    while kill -0 "$1" 2>/dev/null; do
        read -rd '' -a children < <(children_of "$1") || true # it has ended
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
