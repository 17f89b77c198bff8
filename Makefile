# The words a person types. The work is done by the runner (tests/src/runner).

# rustup's default place, for shells that have not read its profile yet.
export PATH := $(PATH):$(HOME)/.cargo/bin

cache := $(or $(MSHARE_CACHE),$(or $(XDG_CACHE_HOME),$(HOME)/.cache)/mshare)
# Not quiet: on a fresh machine this compiles the workspace, which takes minutes.
runner := cargo run -p mshare-tests --bin runner --

.DEFAULT_GOAL := help
.PHONY: help build demo test test-quick selftests matrix bisect hooks check-series doctor clean \
	clean-cache prepare

help:
	@echo 'make demo         build what is missing and show guests that share page tables'
	@echo 'make test         all checks and tests; ends with "N passed, N failed"'
	@echo 'make test-quick   the same without those that start machines'
	@echo 'make selftests    the kernel series'"'"'s own tests only'
	@echo 'make matrix       the same on kernels with checks, in many machines (hours);'
	@echo '                  ARGS=--short for those of make test, ARGS=--list to see them'
	@echo 'make bisect       build and boot the kernel after each patch of the series'
	@echo 'make hooks        what the series costs those who do not use it;'
	@echo '                  ARGS=--mm compares results of the tree'"'"'s mm selftests'
	@echo 'make check-series each patch under checkpatch --strict, sparse and W=1'
	@echo 'make build        guest kernel, programs and initramfs; prints where they are'
	@echo 'make doctor       what this machine can do'
	@echo 'make clean        remove what cargo built'
	@echo 'make clean-cache  remove kernels and initramfs: $(cache)'
	@echo
	@echo 'MSHARE_LAB=1      run guests in the lab even where this machine could'
	@echo 'MSHARE_CACHE=DIR  keep kernels and initramfs there'

# Debian packages and cargo.
prepare:
	@images/install.sh
	@command -v cargo >/dev/null || { \
		echo 'cargo is missing: install Rust 1.95 or newer, see https://rustup.rs'; exit 1; }

build demo test: prepare
	@$(runner) $@

selftests matrix bisect hooks: prepare
	@$(runner) $@ $(ARGS)

check-series:
	@images/install.sh sparse
	@images/kernel/check.sh

test-quick: prepare
	@$(runner) test --quick

doctor: prepare
	@cargo run -q -p vmm --bin vmm -- doctor

clean:
	cargo clean

clean-cache:
	rm -rf '$(cache)'
