#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# What train.sh and the batch scripts know of a recipe. To be sourced.
#
# A recipe is a file of Megatron flags, recipes/NAME.flags, without quotes; # begins a comment.

llama=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

# Prints one line to stderr and ends the script.
die() {
    echo "$(basename "$0"): error: $*" >&2
    exit 2
}

recipe_names() {
    local file
    for file in "$llama"/recipes/*.flags; do
        [[ $file == */common.flags ]] || basename "$file" .flags
    done
}

# read_recipe NAME: the flags, those common to all first, as the array `recipe_flags`.
# With PLAIN=1 without those of MAPL.
read_recipe() {
    local name=$1 file line words
    [[ -f $llama/recipes/$name.flags && $name != common ]] ||
        die "there is no recipe '$name'; choose one of: $(recipe_names | xargs)"
    [[ ${PLAIN-} =~ ^1?$ ]] ||
        die "PLAIN=$PLAIN is neither 1, for Megatron without boundaries, nor empty"
    recipe_flags=()
    for file in "$llama/recipes/common.flags" "$llama/recipes/$name.flags"; do
        while read -r line || [[ -n $line ]]; do
            line=${line%%#*}
            [[ ${PLAIN-} == 1 && $line == --mapl-* ]] && continue
            read -ra words <<<"$line"
            recipe_flags+=("${words[@]}")
        done <"$file"
    done
}

# flag_value FLAG DEFAULT WORDS...: the last value of FLAG, which is the one that argparse takes.
flag_value() {
    local flag=$1 value=$2
    shift 2
    while (($#)); do
        case $1 in
            "$flag") value=${2-} ;;
            "$flag"=*) value=${1#*=} ;;
        esac
        shift
    done
    echo "$value"
}

# has_flag FLAG WORDS...
has_flag() {
    local flag=$1 word
    shift
    for word; do
        [[ $word == "$flag" || $word == "$flag"=* ]] && return 0
    done
    return 1
}

# save_folder RECIPE FLAGS...: where checkpoints go.
save_folder() {
    local recipe=$1
    shift
    flag_value --save "${SAVE:-checkpoints/$recipe}" "$@"
}
