#!/bin/bash
# Checks the kernel series: every patch says what it is, applies without fuzz,
# leaves nothing to do, is clean under checkpatch --strict, and leaves a tree
# whose changed files compile without a warning, for sparse too. Builds the
# default flavour first if there is none.
#
# usage: check.sh
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
tarball=${MSHARE_LINUX_SOURCE:-/usr/src/linux-source-6.12.tar.xz}
cache=${MSHARE_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/mshare}/kernel
work=$cache/check
objects='^(mm|kernel|drivers)/.*\.c$'
failed=0

say() { printf 'check: %s\n' "$*"; }
fail() { printf 'check: FAILED: %s\n' "$*" >&2; failed=1; }

"$here/build.sh"
tree=$(find "$cache" -maxdepth 1 -name 'tree-*' | head -n1)

say "preparing a tree without the series"
rm -rf "$work"
cp -a --reflink=auto "$tree" "$work"
(cd "$work" && xargs rm -f <.touched)
sed 's,^,linux-source-6.12/,' "$work/.originals" >"$cache/.members"
tar -C "$work" --strip-components=1 -xf "$tarball" -T "$cache/.members"

command -v sparse >/dev/null || {
	say "sparse is missing (Debian package sparse)"
	exit 1
}

# With users of MMU notifiers, NUMA and HMM, which our configuration lacks.
{
	cat "$here/config"
	printf 'CONFIG_%s=y\n' NUMA VIRTUALIZATION KVM \
		DEVICE_PRIVATE DEBUG_KERNEL RUNTIME_TESTING_MENU TEST_HMM
} >"$work/.fragment"

configure() {
	make -C "$work" -s ARCH=x86_64 KCONFIG_ALLCONFIG=.fragment \
		allnoconfig >/dev/null
}

# What compiler and sparse say about an object, without line numbers.
complaints() {
	make -C "$work" -s -k -j"$(nproc)" ARCH=x86_64 W=1 C=2 \
		"$@" 2>&1 | grep -E 'warning|error|\*\*\*' |
		sed -E 's/:[0-9]+:[0-9]+: /: /' | sort -u || true
}

say "what the base complains about"
configure
mapfile -t existing < <(grep -E "$objects" "$work/.originals" |
	sed 's/\.c$/.o/')
complaints "${existing[@]}" >"$cache/.complaints"

number=0
for p in "$here"/patches/*.patch; do
	name=$(basename "$p")
	number=$((number + 1))
	[[ $name == $(printf '%04d' $number)-* ]] || fail "$name is number $number"
	for line in '^From: .*<.*>$' '^Subject: \[PATCH\] .*: ' '^Signed-off-by: .*<.*>$'; do
		grep -q "$line" "$p" || fail "$name has no line '$line'"
	done
	! grep -nE '^\+.*\b(TODO|FIXME|XXX)\b' "$p" || fail "$name leaves something to do"
	if ! patch -d "$work" -p1 --fuzz=0 -s <"$p"; then
		fail "$name does not apply"
		break
	fi
	# Programs may spin on volatile words, name ENOSYS and use ELF's types, and
	# have no BIT().
	rules=(--strict)
	[[ $name != *-selftests-* ]] ||
		rules+=(--ignore VOLATILE,ENOSYS,CAMELCASE,LONG_LINE_STRING,EMBEDDED_FUNCTION_NAME,BIT_MACRO)
	(cd "$work" && perl scripts/checkpatch.pl "${rules[@]}" --terse \
		--no-summary "$p") || fail "$name: checkpatch"

	# A header's users are those that the series brings.
	files=$(sed -n 's,^+++ b/,,p' "$p")
	case $files in
	*.h*) files+=$'\n'$(cd "$work" &&
		ls mm/mshare*.c drivers/virtio/virtio_mshare*.c 2>/dev/null ||
		true) ;;
	esac
	mapfile -t targets < <(sort -u <<<"$files" | grep -E "$objects" |
		sed 's/\.c$/.o/')
	if [ ${#targets[@]} -gt 0 ]; then
		configure
		new=$(complaints "${targets[@]}" |
			comm -23 - "$cache/.complaints")
		[ -z "$new" ] || fail "$name: $new"
	fi
	# W=1 looks at the comments of .c files only.
	mapfile -t headers < <(sort -u <<<"$files" |
		grep -E '^include/.*mshare.*\.h$')
	[ ${#headers[@]} -eq 0 ] ||
		(cd "$work" && scripts/kernel-doc -none -Wall -Werror "${headers[@]}") ||
		fail "$name: kernel-doc"
	say "$name"
done
rm -rf "$work"
[ $failed = 0 ] || exit 1
say "all $(ls "$here"/patches/*.patch | wc -l) patches are clean"
