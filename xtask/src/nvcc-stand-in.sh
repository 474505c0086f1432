#!/bin/sh
# A stand-in for nvcc: writes the files that candle's build script waits for, without any code in them.
output= folder= source= archive=no
while [ $# -gt 0 ]; do
    case $1 in
        --version) printf 'a stand-in\n\n\nCuda compilation tools, release 13.0, V13.0.0\n'; exit ;;
        --list-gpu-code) printf 'sm_80\nsm_90\n'; exit ;;
        --lib) archive=yes ;;
        -o) shift; output=$1 ;;
        --output-directory) shift; folder=$1 ;;
        *.cu) source=$1 ;;
    esac
    shift
done
if [ "$archive" = yes ]; then
    printf '!<arch>\n' > "$output"
elif [ -n "$output" ]; then
    : > "$output"
elif [ -n "$folder" ] && [ -n "$source" ]; then
    : > "$folder/$(basename "$source" .cu).ptx"
fi
