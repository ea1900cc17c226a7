#!/bin/sh
# A job for the judge of oracle.py, 1 ms instead of Python's 15:
#   job.sh FOLDER ID [SECONDS [STATUS]]
# The same lines and the same files as `oracle.py job`, which explains them; it does not fsync.
# Held up by a lock on FOLDER/gate-ID for as long as a test holds that.
set -u
folder=$1 id=$2 seconds=${3-0} status=${4-0}
running=$folder/running-$id

now() { read -r now _ </proc/uptime; }

# True while the process is there and is not a zombie.
lives() { read -r _ _ state _ 2>/dev/null <"/proc/$1/stat" && [ "$state" != Z ]; }

now
if ! (set -C && echo $$ >"$running") 2>/dev/null; then
    read -r other <"$running"
    if [ -n "$other" ] && lives "$other"; then
        echo "overlap $id $$ $now" >>"$folder/journal"
    fi
    echo $$ >"$running"
fi
echo "start $id $$ $now" >>"$folder/journal"
[ "$seconds" = 0 ] || sleep "$seconds"
[ ! -e "$folder/gate-$id" ] || flock --shared "$folder/gate-$id" true
now
echo "finish $id $$ $now $status" >>"$folder/journal"
rm -f "$running"
exit "$status"
