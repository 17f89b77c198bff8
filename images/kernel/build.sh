#!/bin/bash
# Builds the guest kernel: Debian's linux-source-6.12, the mshare series, our
# configuration. Equal inputs give byte-identical outputs in any directory.
#
# usage: build.sh [default|ablation|debug|kasan|kcsan|vanilla]
#   default    the series; also the selftests it brings
#   ablation   the series and ablation/*.patch: boot parameter mshare_ablate=N
#              removes one safety element at a time (for tests only)
#   debug      the series with lock, page-table and lifetime checks, NUMA,
#              fault injection and the preempt= boot parameter; and with
#              mshare_ablate=N, for elements that only its checks show
#   kasan      the series with KASAN
#   kcsan      the series with KCSAN, in mm/mshare*.c only
#   vanilla    the tree without the series; also its own mm selftests and the
#              benchmark of the hooks
# What a flavour configures beyond "config" is in config-FLAVOUR.
#
# environment: MSHARE_CACHE         where results are kept
#                                   (default ~/.cache/mshare)
#              MSHARE_LINUX_SOURCE  the source tarball
#                                   (default /usr/src/linux-source-6.12.tar.xz)
#
# The result is $MSHARE_CACHE/kernel/HASH/{bzImage,vmlinux,.config}; static
# programs are beside them in selftests/, mm/ and bench/. The last line printed
# is "bzImage=PATH".
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
flavour=${1:-default}
tarball=${MSHARE_LINUX_SOURCE:-/usr/src/linux-source-6.12.tar.xz}
cache=${MSHARE_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/mshare}/kernel
patches=("$here"/patches/*.patch)
[ -z "${MSHARE_PATCHES:-}" ] || patches=("${patches[@]:0:MSHARE_PATCHES}")
# Compiler steps of one full build, only to show a percentage.
steps=1650

# Of the tree's mm selftests, those that are built: static, no libraries but the
# C library's. tests/src/hooks/mm.rs says how each is run and why others are not
# here.
mm_programs=(cow droppable madv_populate map_fixed_noreplace
	map_populate mdwe_test mkdirty mlock2-tests mrelease_test
	mremap_dontunmap mremap_test mseal_test transhuge-stress uffd-stress
	uffd-unit-tests virtual_address_range)

say() { printf 'kernel: %s\n' "$*"; }
die() { printf 'kernel: error: %s\n' "$*" >&2; exit 1; }

case $flavour in
default | ablation | debug | kasan | kcsan | vanilla) ;;
*) die "unknown flavour '$flavour': use default, ablation, debug, kasan, kcsan or vanilla" ;;
esac

install_missing() {
	local missing=() tool
	declare -A package=([flex]=flex [bison]=bison [bc]=bc [gcc]=gcc
		[make]=make [patch]=patch [xz]=xz-utils [zstd]=zstd
		[perl]=perl [flock]=util-linux)

	for tool in "${!package[@]}"; do
		command -v "$tool" >/dev/null || missing+=("${package[$tool]}")
	done
	[ -e /usr/include/libelf.h ] || missing+=(libelf-dev)
	[ -e "$tarball" ] || [ -n "${MSHARE_LINUX_SOURCE:-}" ] ||
		missing+=(linux-source-6.12)
	if [ ${#missing[@]} -gt 0 ]; then
		[ "$(id -u)" = 0 ] && command -v apt-get >/dev/null ||
			die "missing packages: ${missing[*]} (install them, or run as root on Debian)"
		say "installing ${missing[*]}"
		DEBIAN_FRONTEND=noninteractive apt-get install -y -qq \
			--no-install-recommends "${missing[@]}" >/dev/null
	fi
	[ -e "$tarball" ] || die "no source tarball $tarball"
}

# Hash of everything that a flavour's result depends on. Hashing the tarball
# takes a second, so its hash is remembered with its size and time.
input_hash() {
	local stamp id
	id=$(stat -c '%n %s %Y' "$tarball")
	stamp=$cache/tarball.sha256
	if [ "$(head -n1 "$stamp" 2>/dev/null)" != "$id" ]; then
		{ echo "$id"; sha256sum <"$tarball"; } >"$stamp.$$"
		mv "$stamp.$$" "$stamp"
	fi
	{
		echo "$1"
		tail -n1 "$stamp"
		gcc -dumpfullversion
		ld --version | head -n1
		cd "$here"
		sha256sum build.sh config
		[ ! -e "config-$1" ] || sha256sum "config-$1"
		# Selftests and documentation change no kernel, and only the
		# default flavour has the selftests beside it.
		case $1 in
		vanilla) ;;
		default) sha256sum "${patches[@]#"$here"/}" ;;
		*) printf '%s\n' "${patches[@]#"$here"/}" |
			grep -vE '/[0-9]+-(selftests|Documentation)-' |
			xargs sha256sum ;;
		esac
		[[ $1 != @(ablation|debug) ]] || sha256sum ablation/*.patch
		case $1 in
		vanilla) sha256sum bench/* "$libc" ;;
		default) sha256sum "$libc" ;;
		esac
	} | sha256sum | cut -c1-16
}

apply() {
	local p
	for p in "$@"; do
		patch -d "$work" -p1 --fuzz=0 --no-backup-if-mismatch -s <"$p" ||
			die "$(basename "$p") does not apply"
	done
}

# Names of the files that the series touches; with "old", of those that are in
# the tarball.
touched() {
	local new='^[-]{3} /dev/null'
	if [ "${1:-}" = old ]; then
		comm -23 <(touched) <(cat "${patches[@]}" |
			grep -A1 -E "$new" | sed -n 's,^+++ b/,,p' | sort -u)
	else
		cat "${patches[@]}" | sed -n 's,^+++ b/,,p' | sort -u
	fi
}

remember() {
	touched >"$work/.touched"
	touched old >"$work/.originals"
	echo "$base" >"$work/.base"
}

# What no configuration of ours compiles is not unpacked; of the selftests,
# those of mm and the headers that all share are.
unpack() {
	local dir skip=("--exclude=linux-source-6.12/Documentation/devicetree/*")
	for dir in alpha arc arm arm64 csky hexagon loongarch m68k microblaze \
		mips nios2 openrisc parisc powerpc riscv s390 sh sparc um xtensa; do
		skip+=("--exclude=linux-source-6.12/arch/$dir/*.[chS]"
			"--exclude=linux-source-6.12/arch/$dir/boot/dts/*")
	done
	for dir in drivers/gpu drivers/media sound drivers/net/ethernet \
		drivers/net/wireless drivers/scsi drivers/infiniband \
		drivers/staging drivers/iio drivers/usb tools/perf \
		'tools/testing/[!s]*' 'tools/testing/selftests/[!m]*'; do
		skip+=("--exclude=linux-source-6.12/$dir/*.[chS]")
	done
	rm -rf "$work"
	mkdir -p "$work"
	say "unpacking $(basename "$tarball")"
	tar -C "$work" --strip-components=1 --wildcards "${skip[@]}" -xf "$tarball"
	[ "$flavour" != vanilla ] || return 0
	say "applying ${#patches[@]} patches"
	apply "${patches[@]}"
	remember
}

# Turns the tree of an earlier series into the present one. A file that comes
# out as it was keeps its time, so that make leaves alone what used it.
update() {
	local old=$1 saved=$cache/.saved f
	say "updating the tree of an earlier series"
	rm -rf "$work" "$saved"
	cp -a --reflink=auto "$old" "$work"
	touched | sort -u - "$work/.touched" >"$cache/.files"
	while read -r f; do
		[ -e "$work/$f" ] || continue
		mkdir -p "$saved/$(dirname "$f")"
		mv "$work/$f" "$saved/$f"
	done <"$cache/.files"
	{ touched old; cat "$work/.originals"; } | sort -u |
		sed 's,^,linux-source-6.12/,' >"$cache/.members"
	tar -C "$work" --strip-components=1 -xf "$tarball" -T "$cache/.members"
	apply "${patches[@]}"
	while read -r f; do
		if cmp -s "$saved/$f" "$work/$f"; then
			mv -f "$saved/$f" "$work/$f"
		elif [ -e "$work/$f" ]; then
			touch "$work/$f"
		fi
	done <"$cache/.files"
	rm -rf "$saved"
	remember
}

configure() {
	local fragments=("$here/config") line
	[ ! -e "$here/config-$flavour" ] ||
		fragments+=("$here/config-$flavour")
	# The last word on a symbol is the only one.
	cat "${fragments[@]}" | tac |
		awk 'match($0, /CONFIG_[A-Z0-9_]+/) {
			if (seen[substr($0, RSTART, RLENGTH)]++) next } 1' |
		tac >"$work/.fragment"
	kmake -s KCONFIG_ALLCONFIG=.fragment allnoconfig >/dev/null
	# A symbol that lost its dependencies would vanish in silence. Those of
	# the series come with some patch of it.
	while read -r line; do
		[[ -z ${MSHARE_PATCHES:-} || $line != *MSHARE=y ]] || continue
		grep -qxF -- "$line" "$work/.config" ||
			die "the configuration lost $line"
	done < <(grep '^CONFIG_.*=y' "$work/.fragment")
}

kmake() {
	make "${makeargs[@]}" "$@"
}

progress() {
	local pid=$1 log=$2 n percent last=-1 start=$SECONDS
	while kill -0 "$pid" 2>/dev/null; do
		sleep 3
		n=$(grep -cE '^  (CC|AS|AR|LD) ' "$log" || true)
		percent=$((n * 100 / steps))
		[ $percent -lt 99 ] || percent=99
		if [ -t 1 ]; then
			printf '\rkernel: %s %3d%%  %d files, %d s ' \
				"$flavour" $percent "$n" $((SECONDS - start))
		elif [ $percent -ge $((last + 5)) ] && [ "$n" -gt 0 ]; then
			say "$flavour $percent% ($n files, $((SECONDS - start)) s)"
			last=$percent
		fi
	done
	[ ! -t 1 ] || printf '\r\033[K'
}

compile() {
	local log=$cache/build-$flavour.log pid
	# Without a shell in between: make stops its children when it is told to.
	make "${makeargs[@]}" bzImage >"$log" 2>&1 &
	pid=$!
	trap 'kill $pid 2>/dev/null || true; wait $pid || true; exit 130' INT TERM
	progress $pid "$log"
	trap - INT TERM
	wait $pid || {
		grep -E 'error|Error|warning' "$log" | head -n 20 >&2 || true
		die "compilation failed, see $log"
	}
	! grep -E 'warning:' "$log" >&2 || die "the compiler warned, see $log"
}

# Static programs, made with the headers of the tree. $OUTPUT is given because
# a make above this script, which counts levels, would have it empty.
selftests() {
	local log=$cache/build-programs.log out=$work/.programs flags
	flags=(ARCH=x86_64 -j"$(nproc)"
		USERLDFLAGS="-static -Wl,--build-id=none")
	mkdir -p "$out"
	case $flavour in
	default)
		[ -e "$work/tools/testing/selftests/mshare/Makefile" ] || return 0
		mkdir "$out/selftests"
		say "building the selftests"
		kmake -s headers >"$log" 2>&1 &&
			make -C "$work/tools/testing/selftests/mshare" \
				"${flags[@]}" USERCFLAGS=-Werror \
				OUTPUT="$out/selftests" all >>"$log" 2>&1 ||
			die "the selftests do not compile, see $log"
		! grep 'warning:' "$log" >&2 ||
			die "the compiler warned, see $log"
		# Debug information has the names of folders in it.
		strip --strip-debug "$out"/selftests/*
		;;
	vanilla)
		mkdir "$out/mm" "$out/bench"
		say "building the tree's mm selftests"
		# Not what check_config.sh finds out about this machine.
		: >"$work/tools/testing/selftests/mm/local_config.h"
		: >"$work/tools/testing/selftests/mm/local_config.mk"
		kmake -s headers >"$log" 2>&1 &&
			make -C "$work/tools/testing/selftests/mm" \
				"${flags[@]}" OUTPUT="$out/mm" \
				"${mm_programs[@]/#/$out/mm/}" >>"$log" 2>&1 ||
			die "the mm selftests do not compile, see $log"
		gcc -O2 -Wall -Wextra -Werror -static -Wl,--build-id=none \
			-o "$out/bench/hooks" "$here/bench/hooks.c"
		;;
	esac
}

# Results appear under their final name only when they are complete, and only
# if they are made of what the name says.
publish() {
	local out=$cache/$1 tmp=$cache/.new-$1
	[ "$(input_hash "$flavour")" = "$1" ] ||
		die "the series or the configuration was changed during the build: run it again"
	rm -rf "$tmp"
	mkdir -p "$tmp"
	cp "$work/arch/x86/boot/bzImage" "$work/vmlinux" "$work/.config" "$tmp/"
	cp -r "$work/.programs/." "$tmp/"
	rm -rf "$work/.programs"
	mv -T "$tmp" "$out"
}

mkdir -p "$cache"
install_missing
libc=$(gcc -print-file-name=libc.a)
[ -e "$libc" ] || die "no static C library (Debian package libc6-dev)"
hash=$(input_hash "$flavour")
out=$cache/$hash
if [ ! -d "$out" ]; then
	exec 9>"$cache/lock"
	flock -n 9 || { say "another build is running, waiting"; flock 9; }
fi
if [ -d "$out" ]; then
	say "up to date ($hash)"
	echo "bzImage=$out/bzImage"
	exit 0
fi

# All flavours are compiled in one place, so that the finished tree of the
# default flavour, put back there, is up to date for make.
work=$cache/work
makeargs=(-C "$work" "-j$(nproc)" ARCH=x86_64 KBUILD_BUILD_VERSION=1
	KBUILD_BUILD_USER=mshare KBUILD_BUILD_HOST=mshare
	"KBUILD_BUILD_TIMESTAMP=2026-01-01 00:00:00 UTC")
tree=$cache/tree-$(input_hash default)
# The number is that of the choice made in unpack().
base="$(tail -n1 "$cache/tarball.sha256") $(gcc -dumpfullversion) 2"
earlier=$(find "$cache" -maxdepth 1 -name 'tree-*' | head -n1)
if [ "$flavour" = vanilla ]; then
	unpack
elif [ "$flavour" != default ] && [ -d "$tree" ]; then
	say "starting from the default flavour's tree"
	rm -rf "$work"
	cp -a --reflink=auto "$tree" "$work"
elif [ "$flavour" = default ] && [ -n "$earlier" ] &&
	[ "$(cat "$earlier/.base")" = "$base" ]; then
	update "$earlier"
else
	unpack
fi
[[ $flavour != @(ablation|debug) ]] || apply "$here"/ablation/*.patch
if [ "$flavour" = kcsan ]; then
	# scripts/Makefile.lib puts a file's word before the general one and
	# looks at the first letter.
	makeargs+=(KCSAN_SANITIZE=n)
	while read -r name; do
		makeargs+=("KCSAN_SANITIZE_$name.o=y")
	done < <(touched | sed -n 's,^mm/\(mshare[a-z_]*\)\.c$,\1,p')
fi
configure
compile
selftests
publish "$hash"
if [ "$flavour" = default ]; then
	rm -rf "$cache"/tree-*
	mv -T "$work" "$tree"
else
	rm -rf "$work"
fi
say "built $flavour ($hash) in $SECONDS s"
echo "bzImage=$out/bzImage"
