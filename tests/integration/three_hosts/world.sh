#!/usr/bin/env bash
# Machines in namespaces. Run as the first process of mount, network, pid and uts namespaces of its own (hosts.py does):
# all it makes (mounts, interfaces, processes) lies in these, so that nothing is left when this process ends, however it ends.
#
#   FOLDER    name=address of the hosts in FOLDER/machines, the arguments of `ray start` for each in FOLDER/offers/NAME,
#             FOLDER/authorized_keys and FOLDER/host_key for sshd, programs that are not installed in FOLDER/tools,
#             FOLDER/visible lists the folders of the Python environment (read-only), FOLDER/shared is /shared on the hosts
#   PROJECT   the clone, which the laptop alone has
#   GATEWAY   address of the laptop, which this process becomes
set -euo pipefail

show() {
  mkdir -p "$files$1"
  mount --bind "$1" "$files$1"
  mount -o remount,bind,ro "$files$1"
}

# A machine's root: a copy-on-write view of the files of this one, with a home, /tmp, /run and /dev/shm of its own.
make_root() {
  local name=$1 base="$FOLDER/roots/$1" inner
  files="$base/files"
  mkdir -p "$base"
  mount -t tmpfs tmpfs "$base"
  mkdir "$base"/{files,upper,work}
  mount -t overlay overlay -o "lowerdir=$FOLDER/tools:/,upperdir=$base/upper,workdir=$base/work" "$files"
  mount -t proc proc "$files/proc"
  mount --rbind /sys "$files/sys"
  mount --rbind /dev "$files/dev"
  for inner in tmp run root dev/shm; do mount -t tmpfs tmpfs "$files/$inner"; done
  chmod 1777 "$files/tmp" "$files/dev/shm"
  chmod 700 "$files/root"
  mkdir -p "$files$PROJECT"
  if [ "$name" = laptop ]; then show "$PROJECT"; else mount -t tmpfs tmpfs "$files$PROJECT"; fi
  while read -r inner; do show "$inner"; done <"$FOLDER/visible"
  cp -r /etc/skel/. "$files/root"
  hostname "$name"
  sed 's/\(.*\)=\(.*\)/\2 \1/' "$FOLDER/machines" >>"$files/etc/hosts"
}

# A host: sshd is its first process and the parent of all that a login leaves running.
become_host() {
  make_root "$1"
  mkdir -p "$files"/{run/sshd,root/.ssh,shared}
  mount --bind "$FOLDER/shared" "$files/shared"
  cp "$FOLDER/authorized_keys" "$files/root/.ssh/"
  cp "$FOLDER/host_key" "$files/run/"
  cp "$FOLDER/offers/$1" "$files/etc/ray_offer"
  grep -q ^sshd: "$files/etc/passwd" || echo 'sshd:x:65533:65534::/run/sshd:/usr/sbin/nologin' >>"$files/etc/passwd"
  sed -i 's/^root:!/root:*/' "$files/etc/shadow"
  exec chroot "$files" /usr/sbin/sshd -D -e -f /dev/null -h /run/host_key -o UsePAM=no
}

start_host() {
  local name=$1 address=$2
  ip netns add "$name"
  ip link add "to-$name" type veth peer name eth0 netns "$name"
  ip link set "to-$name" master switch up
  ip -n "$name" address add "$address/24" dev eth0
  ip -n "$name" link set lo up
  ip -n "$name" link set eth0 up
  ip -n "$name" route add default via "$GATEWAY"
  ip netns exec "$name" unshare --mount --uts --pid --fork --kill-child \
    bash "${BASH_SOURCE[0]}" host "$name" >"$FOLDER/$name.log" 2>&1 &
}

if [ "${1:-}" = host ]; then become_host "$2"; fi
mount -t tmpfs tmpfs /run
# A layer of its own file system, as one overlay may not lie inside another's.
cp -r "$FOLDER/tools" /run/tools
mount -t tmpfs tmpfs "$FOLDER/tools"
cp -r /run/tools/. "$FOLDER/tools"
ip link add switch type bridge
ip address add "$GATEWAY/24" dev switch
ip link set switch up
ip link set lo up
while IFS='=' read -r name address; do
  if [ "$name" != laptop ]; then start_host "$name" "$address"; fi
done <"$FOLDER/machines"
make_root laptop
touch "$FOLDER/ready"
exec chroot "$files" bash -c 'sleep infinity & wait'
