#!/usr/bin/env bash
# The first process of one host of tests/install/hosts.sh, which starts it in new namespaces. Makes what is private to the host,
# then stays until it is killed, with everything that runs on the host. Must never change anything of the real host: all that
# could be written is a copy, a file system of its own, or read-only.
#
# Usage: host.sh DIR NAME HOSTS plain|systemd; HOSTS is a file for /etc/hosts
set -euo pipefail

dir=$1 name=$2 hosts=$3 kind=$4

mount --make-rprivate /
# What is installed stays in DIR; what is below /etc, /usr and /var is read from the real host.
for folder in etc usr var; do
    mount -t overlay overlay -o "lowerdir=/$folder,upperdir=$dir/$folder/upper,workdir=$dir/$folder/work" "/$folder"
done
mount -t tmpfs -o mode=0755 srv /srv
# Neither the systemd nor the pid files of the real host.
mount -t tmpfs -o mode=0755 run /run

hostname "$name"
echo "$name" >/etc/hostname
cat "$hosts" >/etc/hosts
# A real host may have the user, and even a node, already.
rm -rf /var/lib/twistlock* /var/log/twistlock /etc/twistlock /usr/local/bin/{twistlockd,twistcli,defender}
rm -rf /etc/systemd/system/{twistlockd,defender}.service* /etc/systemd/system/*.wants/{twistlockd,defender}.service
if id twistlock >/dev/null 2>&1; then
    userdel twistlock
fi

if [ "$kind" = plain ]; then
    : >"$dir/ready"
    # Collects the processes whose parents are gone, as a first process must.
    sleep infinity &
    wait
    exit
fi

# systemd, as in a container: settings of the kernel are read-only, control groups begin at this host's own.
mount -t sysfs -o ro sysfs /sys
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount --bind /proc/sys /proc/sys
mount -o remount,ro,bind /proc/sys
mkdir "$dir/dev"
for node in null zero full random urandom tty; do
    : >"$dir/dev/$node"
    mount --bind "/dev/$node" "$dir/dev/$node"
done
mount -t tmpfs -o mode=0755 dev /dev
for node in null zero full random urandom tty; do
    : >"/dev/$node"
    mount --bind "$dir/dev/$node" "/dev/$node"
done
ln -s /proc/self/fd /dev/fd
mkdir /dev/shm /dev/pts
mount -t tmpfs shm /dev/shm
mount -t devpts -o newinstance,ptmxmode=0666 devpts /dev/pts
ln -s pts/ptmx /dev/ptmx
: >/etc/fstab
# Nothing starts but the journal and what the test asks for.
mkdir /run/nothing
for folder in /usr/lib/systemd/system/*.target.wants /etc/systemd/system/*.target.wants; do
    [ "$folder" = /etc/systemd/system/multi-user.target.wants ] || mount --bind /run/nothing "$folder"
done
rm -f /etc/systemd/system/multi-user.target.wants/*
ln -s /dev/null /etc/systemd/system/systemd-remount-fs.service
mkdir -p /etc/systemd/system/basic.target.d
printf '[Unit]\nWants=systemd-journald.service\n' >/etc/systemd/system/basic.target.d/journal.conf
: >"$dir/ready"
exec env -i container=lxc PATH=/usr/sbin:/usr/bin:/sbin:/bin \
    /lib/systemd/systemd --system --unit=basic.target --show-status=no </dev/null >"$dir/systemd.log" 2>&1
