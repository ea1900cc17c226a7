#!/bin/bash
# A job that notes how many nanoseconds ago the moment in its input was. bash has a clock built in,
# so that no further program is started for it.
now=$EPOCHREALTIME
read -r sent
echo "$((${now//[!0-9]/}000 - sent))" >>"$BENCHMARK_NOTES"
