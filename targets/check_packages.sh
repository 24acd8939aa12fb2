#!/usr/bin/env bash
# Checks what is in targets/packages with the tools there are, and lives a package's life in a
# chroot: installed, started, upgraded, removed, purged.
#
#   targets/check_packages.sh BINARY
#
# BINARY must run on this machine and have the gateway in it.
set -euo pipefail

[ $# -eq 1 ] || {
    sed -n '2,7s/^# \{0,1\}//p' "$0" >&2
    exit 64
}
binary=$(realpath "$1")
here=$(cd "$(dirname "$0")" && pwd)
root=$(dirname "$here")
files=$here/packages

say() { printf -- '-- %s\n' "$*"; }
fail() {
    printf 'FAILED: %s\n' "$*" >&2
    [ ! -f "$work/agent.log" ] || cat "$work/agent.log" >&2
    exit 1
}

work=$(mktemp -d)
gateway=
chroot=$work/root
clean_up() {
    [ -z "$gateway" ] || kill "$gateway" 2>/dev/null || true
    if [ -d "$chroot" ]; then
        chroot "$chroot" /etc/init.d/hostlink-edge stop >/dev/null 2>&1 || true
        umount -l "$chroot/proc" 2>/dev/null || true
    fi
    rm -rf "$work"
}
trap clean_up EXIT

say 'scripts'
shellcheck "$here"/*.sh "$files"/sysv/hostlink-edge "$files"/debian/p*
sh -n "$files/openwrt/hostlink-edge/files/hostlink-edge.init"
shellcheck -s sh -e SC1008 "$files"/openwrt/hostlink-edge/files/*

say 'systemd'
# The unit names the installed binary.
mkdir -p "$work/units"
sed "s#^ExecStart=/usr/bin/hostlink-edge#ExecStart=$binary#" \
    "$files/systemd/hostlink-edge.service" >"$work/units/hostlink-edge.service"
systemd-analyze verify --man=no "$work/units/hostlink-edge.service"
mkdir "$work/units/hostlink-edge.service.d"
cp "$files/systemd/sandbox.conf" "$work/units/hostlink-edge.service.d/"
systemd-analyze verify --man=no "$work/units/hostlink-edge.service"

say 'recipe'
recipe=$files/yocto/recipes-core/hostlink-edge/hostlink-edge.bb
version=$(sed -n 's/^version = "\(.*\)"/\1/p' "$root/Cargo.toml" | head -n 1)
grep -qx "PV = \"$version\"" "$recipe" || fail "the recipe is not of version $version"
for licence in LICENSE-MIT LICENSE-APACHE; do
    sum=$(md5sum <"$root/$licence" | cut -d ' ' -f 1)
    grep -q "$licence;md5=$sum" "$recipe" || fail "the recipe has another sum of $licence"
done

say 'make files of OpenWrt and Buildroot, read with stubs for the build systems'
stub=$work/stub
mkdir -p "$stub/feeds/packages/lang/rust"
touch "$stub/rules.mk" "$stub/package.mk"
# What would be installed is printed, so that its paths can be looked at.
cat >"$stub/feeds/packages/lang/rust/rust-package.mk" <<'EOF'
define BuildPackage
$(info $(PKG_VERSION) $(call Package/$(1)/install,ROOT))
show: ;
endef
EOF
shown=$(make -s -C "$files/openwrt/hostlink-edge" TOPDIR="$stub" INCLUDE_DIR="$stub" show | tr '\n' ' ')
[ "${shown%% *}" = "$version" ] || fail "OpenWrt's version is ${shown%% *}, not $version"
sources=$(printf '%s' "$shown" | tr -s '[:space:]' '\n' | grep -e '^\./files/' -e '/targets/')
[ "$(printf '%s\n' "$sources" | wc -l)" -eq 2 ] || fail "OpenWrt installs $sources"
for path in $sources; do
    (cd "$files/openwrt/hostlink-edge" && [ -f "$path" ]) || fail "OpenWrt installs $path, which is not there"
done
cat >"$stub/buildroot.mk" <<'EOF'
cargo-package =
include $(BR2_EXTERNAL_HOSTLINK_PATH)/external.mk
# The directory of the build, $(@D), is empty here.
$(info $(HOSTLINK_EDGE_VERSION) $(HOSTLINK_EDGE_INSTALL_SETTINGS) $(HOSTLINK_EDGE_INSTALL_INIT_SYSV) $(HOSTLINK_EDGE_INSTALL_INIT_SYSTEMD))
show: ;
EOF
shown=$(make -s -f "$stub/buildroot.mk" BR2_EXTERNAL_HOSTLINK_PATH="$files/buildroot" show | tr '\n' ' ')
[ "${shown%% *}" = "$version" ] || fail "Buildroot's version is ${shown%% *}, not $version"
sources=$(printf '%s' "$shown" | tr -s '[:space:]' '\n' | grep "^/targets/")
[ "$(printf '%s\n' "$sources" | wc -l)" -eq 3 ] || fail "Buildroot installs $sources"
for path in $sources; do
    [ -f "$root$path" ] || fail "Buildroot installs $path, which is not there"
done

say 'cross.toml'
python3 - "$root" <<'EOF' || fail 'cross.toml'
import re, sys, tomllib

root = sys.argv[1]
with open(f"{root}/cross.toml", "rb") as file:
    settings = tomllib.load(file)
with open(f"{root}/targets/build.sh") as file:
    known = set(re.findall(r"[a-z0-9_]+-unknown-linux-musl[a-z]*", file.read()))
unknown = set(settings["target"]) - known
assert not unknown, f"targets/build.sh does not know {unknown}"
for part in [settings["build"], *settings["target"].values()]:
    assert set(part) <= {"env", "pre-build"}, part
    assert set(part.get("env", {})) <= {"passthrough", "volumes"}, part
EOF

say 'packages'
arch=$(dpkg --print-architecture)
export SOURCE_DATE_EPOCH=1795392000
deb=$("$here/package.sh" deb "$binary" "$arch" "$work/first")
again=$("$here/package.sh" deb "$binary" "$arch" "$work/second")
cmp "$deb" "$again" || fail 'two packages of one binary differ'
ipk=$("$here/package.sh" ipk "$binary" "$arch" "$work/first")
again=$("$here/package.sh" ipk "$binary" "$arch" "$work/second")
cmp "$ipk" "$again" || fail 'two packages of one binary differ'
tar -xzOf "$ipk" ./data.tar.gz | tar -tzf - | grep -q '^./etc/init.d/hostlink-edge$' ||
    fail 'the ipk has no init script'
# The binary for this machine may want shared libraries; those for devices do not.
lintian --allow-root --fail-on warning --suppress-tags undeclared-elf-prerequisites,unstripped-binary-or-object "$deb"
upgrade=$(HOSTLINK_PACKAGE_VERSION=$version+1 "$here/package.sh" deb "$binary" "$arch" "$work")

if [ "$(id -u)" -ne 0 ] || ! unshare --mount true 2>/dev/null; then
    say 'SKIPPED: run as root, with CAP_SYS_ADMIN, to install the package in a chroot'
    exit 0
fi

say 'chroot'
# shellcheck source=/dev/null
codename=$(. /etc/os-release && echo "$VERSION_CODENAME")
# shellcheck disable=SC2016 # apt's own variables
mirror=$(apt-get indextargets --format '$(SITE)' 'Created-By: Packages' | head -n 1)
debootstrap --variant=minbase "$codename" "$chroot" "$mirror" >"$work/debootstrap.log" ||
    fail "debootstrap: $(tail -n 5 "$work/debootstrap.log")"
mount -t proc proc "$chroot/proc"
# A chroot has no init; this says that services may be started all the same.
printf '#!/bin/sh\nexit 0\n' >"$chroot/usr/sbin/policy-rc.d"
chmod +x "$chroot/usr/sbin/policy-rc.d"
# A binary of this machine brings its shared libraries.
for library in $(ldd "$binary" | grep -o '/[^ ]*' || true); do
    [ -e "$chroot$library" ] || install -D "$library" "$chroot$library"
done

"$binary" gateway --listen 127.0.0.1:0 --state "$work/gateway" --token id:key \
    >"$work/gateway.out" 2>"$work/gateway.log" &
gateway=$!
until url=$(sed -n 's#^listening on #http://#p' "$work/gateway.out") && [ -n "$url" ]; do
    kill -0 "$gateway" || fail "the gateway has ended: $(cat "$work/gateway.log")"
    sleep 0.1
done

in_chroot() { chroot "$chroot" "$@"; }
agent_pid() { in_chroot cat /var/run/hostlink-edge.pid; }
install_package() {
    cp "$1" "$chroot/package.deb"
    in_chroot dpkg -i /package.deb >"$work/dpkg.log" 2>&1 || fail "dpkg: $(cat "$work/dpkg.log")"
}
# The gateway waits until the agent has come.
run_task() {
    local answer tries=0
    until answer=$("$binary" submit --gateway "$url" "$1" 2>"$work/submit.log"); do
        tries=$((tries + 1))
        [ "$tries" -lt 100 ] || fail "no agent came: $(cat "$work/submit.log")"
        sleep 0.2
    done
    printf '%s' "$answer"
}

say 'installed without settings: it does not start, and says what is missing'
install_package "$deb"
grep -q 'complete /etc/hostlink/hostlink.env' "$work/dpkg.log" || fail "$(cat "$work/dpkg.log")"
[ "$(stat -c %a "$chroot/etc/hostlink/hostlink.env")" = 600 ] || fail 'anybody may read the token'

say 'started'
cat >>"$chroot/etc/hostlink/hostlink.env" <<EOF
SH_CONTROL_PLANE_URL=$url
HOSTLINK_TOKEN_ID=id
HOSTLINK_TOKEN_KEY=key
HOSTLINK_SET_CLOCK=false
EOF
in_chroot /etc/init.d/hostlink-edge start
[ "$(run_task 'cat /proc/1/comm >/dev/null; echo from the package')" = 'from the package' ] ||
    fail 'the task said something else'
first=$(agent_pid)

say 'upgraded'
install_package "$upgrade"
[ "$(agent_pid)" != "$first" ] || fail "the old version still runs: $(cat "$work/dpkg.log")"
grep -q '^SH_CONTROL_PLANE_URL=' "$chroot/etc/hostlink/hostlink.env" || fail 'settings are lost'
[ "$(run_task 'echo after the upgrade')" = 'after the upgrade' ] || fail 'another text'
agents=$("$binary" agents --gateway "$url" --json | grep -o '"id"' | wc -l)
[ "$agents" -eq 1 ] || fail "the upgrade has registered again: $agents agents"

say 'removed and purged'
pid=$(agent_pid)
in_chroot dpkg -r hostlink-edge >"$work/dpkg.log" 2>&1 || fail "dpkg: $(cat "$work/dpkg.log")"
[ -z "$(tr -d '\0' <"/proc/$pid/cmdline" 2>/dev/null)" ] || fail 'the agent still runs'
[ -d "$chroot/var/lib/hostlink" ] || fail 'removing took what was not delivered'
in_chroot dpkg -P hostlink-edge >"$work/dpkg.log" 2>&1 || fail "dpkg: $(cat "$work/dpkg.log")"
left=$(find "$chroot" -xdev -path "$chroot/proc" -prune -o -name '*hostlink*' -print)
[ -z "$left" ] || fail "left behind: $left"
say 'all is well'
