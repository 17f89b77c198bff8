#!/bin/bash
# Installs the Debian packages that building and testing need, and those that
# are named: only missing ones, so that a second run changes nothing and needs no
# rights.
set -euo pipefail

packages=(
	# Rust's linker and the kernel's compiler
	gcc libc6-dev make binutils
	# the guest kernel
	linux-source-6.12 flex bison bc libelf-dev patch perl xz-utils zstd
	# the lab and plain emulated boots
	qemu-system-x86
	"$@"
)

say() { printf 'packages: %s\n' "$*"; }
die() { printf 'packages: error: %s\n' "$*" >&2; exit 1; }

command -v dpkg-query >/dev/null ||
	die "this is no Debian. Install the equivalents of: ${packages[*]}"

missing=()
for package in "${packages[@]}"; do
	status=$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null || true)
	[ "$status" = installed ] || missing+=("$package")
done
if [ ${#missing[@]} = 0 ]; then
	say "up to date"
	exit 0
fi

root=()
if [ "$(id -u)" != 0 ]; then
	command -v sudo >/dev/null ||
		die "as root: apt-get install ${missing[*]}"
	root=(sudo)
fi
log=$(mktemp)
trap 'rm -f "$log"' EXIT
apt() {
	"${root[@]}" env DEBIAN_FRONTEND=noninteractive \
		apt-get -y -qq -o Dpkg::Use-Pty=0 "$@" >"$log" 2>&1
}

say "installing ${missing[*]}"
# The package lists may be missing or old: then once more with new ones.
if ! apt install --no-install-recommends "${missing[@]}"; then
	say "updating the package lists"
	apt update || { cat "$log" >&2; die "apt-get update failed"; }
	apt install --no-install-recommends "${missing[@]}" || {
		cat "$log" >&2
		die "apt-get install failed (linux-source-6.12 is in bookworm-security and in trixie)"
	}
fi
say "installed"
