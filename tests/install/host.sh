#!/usr/bin/env bash
# The first process of one host of tests/install/run.sh: run.sh starts it in new namespaces. Makes what is private to the host,
# says that it is ready, and stays until it is killed, with everything that runs on the host.
#
# Usage: host.sh DIR NAME READY
set -euo pipefail

dir=$1 name=$2 ready=$3

# What is installed stays in DIR; what is below /etc, /usr and /var is read from the real host.
for folder in etc usr var; do
    mount -t overlay overlay -o "lowerdir=/$folder,upperdir=$dir/$folder/upper,workdir=$dir/$folder/work" "/$folder"
done
# No systemd here, and no pid file of the real host.
mount -t tmpfs -o mode=0755 run /run

hostname "$name"
printf '127.0.0.1 localhost\n' >/etc/hosts
for number in 1 2 3; do
    printf '10.231.77.%s h%s\n' "$number" "$number" >>/etc/hosts
done
# A real host may have the user, and even a node, already.
rm -rf /var/lib/twistlock /var/lib/twistlock-backup /etc/twistlock /usr/local/bin/twistlockd /usr/local/bin/twistcli
if id twistlock >/dev/null 2>&1; then
    userdel twistlock
fi

: >"$ready"
# Collects the processes whose parents are gone, as a first process must.
sleep infinity &
wait
