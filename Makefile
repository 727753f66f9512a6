# Every command of the project. Each installs what it lacks (Debian packages; root or sudo), prints
# what it does, and is quick when there is nothing to do. `make` alone lists them.
SHELL := /bin/bash
.ONESHELL:
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules

# What the commands need besides a Rust toolchain.
PACKAGES := gcc libc6-dev binutils cpio lz4 zstd xz-utils e2fsprogs xfsprogs \
            qemu-system-x86 qemu-utils qemu-system-common
# For the tests and measurements only: a person who runs the demo need not have them.
debian-image test test-quick test-machines kernel-cuts kills selinux nightly: PACKAGES += btrfs-progs libvirt-daemon-system libvirt-daemon-driver-qemu libvirt-clients mmdebstrap lintian
# The servers that the databases' writers are tested beside, outside of any machine.
test test-quick nightly: PACKAGES += postgresql-15 mariadb-server-core mariadb-client-core redis-server redis-tools etcd-server etcd-client openssl
# QEMU's own agent and its hook, which bridge and agent are tried with outside of any machine, too; what shows the helper's system calls.
test test-quick nightly: PACKAGES += qemu-guest-agent strace
# MySQL is fetched by it, from another release of Debian.
mysql database-images database-proofs writer-figures: PACKAGES += mmdebstrap
bench nightly: PACKAGES += fio qemu-system-common linux-perf
TRIPLE := x86_64-unknown-linux-gnu
PROGRAMS := target/$(TRIPLE)/release
# Machines are emulated on as many processors as the host has; two at once is what two carry.
MACHINES := 2

.PHONY: help deps images mysql database-images debian-image demo test test-quick test-machines tools bench bench-figures window-figures database-proofs writer-figures shutdowns crash-images kernel-cuts kills selinux fuzz nightly fmt lint doc

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 18

deps: ## install the Debian packages the other commands need
	@missing=()
	for package in $(PACKAGES); do
	    [ "$$(dpkg-query -W -f '$${Status}' "$$package" 2>/dev/null)" = "install ok installed" ] || missing+=("$$package")
	done
	# The image's packages are looked up in apt's index, which a bare machine may not have.
	if [ $${#missing[@]} -eq 0 ] && apt-cache show linux-image-cloud-amd64 >/dev/null 2>&1; then exit 0; fi
	sudo=; [ "$$(id -u)" = 0 ] || sudo=sudo
	echo "deps: apt-get update"
	$$sudo apt-get update -qq </dev/null
	if [ $${#missing[@]} -gt 0 ]; then
	    echo "deps: installing $${missing[*]}"
	    $$sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$${missing[@]}" </dev/null >/dev/null
	fi
	command -v cargo >/dev/null || { echo "deps: no cargo: install Rust from https://rustup.rs"; exit 1; }

images: deps ## build the programs and the small guest's image
	@echo "images: building the programs and the guest"
	images/build.sh

mysql: deps ## MySQL from Debian's unstable, in target/mysql, for the tests of its writer
	@images/build.sh mysql

database-images: images ## and the guest with PostgreSQL, MariaDB, MySQL, Redis, etcd, SQLite and the stock guest agent
	@echo "images: the databases' guest"
	images/build.sh databases

debian-image: images ## and the guest that is a whole Debian, with its own systemd (root; mmdebstrap)
	@[ "$$(id -u)" = 0 ] || { echo "images: SKIPPED the Debian guest, whose files belong to many: needs root"; exit 0; }
	echo "images: the Debian guest"
	images/build.sh debian

deb: deps ## the guest's Debian packages, in target/deb: the agent, a writer for each server
	@images/build.sh programs
	packaging/deb/build.sh

demo: images ## the main job on a real machine, narrated; writes target/demo/report.json
	@$(PROGRAMS)/demo

test: test-quick test-machines ## every test, quick ones first

test-quick: deps mysql ## the tests that start no machine
	@echo "test: rooms and rules"
	cargo test --locked --workspace --exclude vmshadow-tests
	cargo test --locked -p vmshadow-tests --lib --bins --test tidy

tools: ## programs of others that those tests need
	@[ -x target/tools/bin/vhost-device-vsock ] && exit 0
	echo "tools: building vhost-device-vsock"
	# Not optimised: that builds in 20 s.
	CARGO_PROFILE_DEV_DEBUG=0 cargo install --quiet --debug --locked --root target/tools --version 0.3.0 vhost-device-vsock

test-machines: database-images debian-image tools ## the tests that start real machines
	@echo "test: real machines"
	tests=()
	for file in tests/tests/*.rs; do
	    name=$$(basename "$$file" .rs)
	    [ "$$name" = tidy ] || tests+=(--test "$$name")
	done
	cargo test --locked -p vmshadow-tests "$${tests[@]}" -- --test-threads=$(MACHINES)

bench: images ## the disk beside its peers: tables, target/bench/report.json and drawings (root: files in RAM)
	@$(PROGRAMS)/bench

bench-figures: ## keep the drawings of the last `make bench` where the documents show them
	@mkdir -p tests/figures
	cp target/bench/*.svg tests/figures/

database-proofs: database-images ## 100 sets of each database, and of units, under load, each copy started and checked in a second machine
	VMSHADOW_DATABASE_SETS=$${VMSHADOW_DATABASE_SETS:-100} cargo test --locked -p vmshadow-tests --test databases_postgresql \
	    --test databases_mariadb --test databases_mysql --test databases_redis --test databases_etcd --test databases_sqlite --test units_stand_still -- --test-threads=$(MACHINES) --nocapture

writer-figures: database-images ## what a database's clients see of a set: with our writer, with none, with qemu-ga, without a set
	@$(PROGRAMS)/writer-figures

window-figures: images ## boot, freeze to thaw, hold and each step, over 50 sets under load
	@$(PROGRAMS)/window-figures

crash-images: ## a few hundred thousand crash images of the store; a seed that fails is printed, with the way to see it again
	cargo test --locked -p vhost-blk-store --test crash_consistency nightly_crash_images -- --ignored --nocapture

kills: images ## kill -9 under full load: 1,000 times on raw rings, 100 times under a real machine
	@echo "kills: a thousand on raw rings"
	VHOST_BLK_LOG=error VMSHADOW_KILLS=$${VMSHADOW_KILLS:-1000} cargo test --locked -p vhost-blk --test daemon kills:: -- --nocapture
	echo "kills: a hundred under a machine"
	VMSHADOW_QEMU_KILLS=$${VMSHADOW_QEMU_KILLS:-100} cargo test --locked -p vmshadow-tests --test a_daemon_dies_often -- --nocapture

shutdowns: debian-image ## a whole Debian switched off, halted and started again by QEMU's own agent and by ours
	VMSHADOW_ALL_SHUTDOWNS=1 cargo test --locked -p vmshadow-tests --test the_package_in_a_debian_machine it_goes -- --nocapture

kernel-cuts: deps ## power cuts of a disk under real file systems with the store on them
	VMSHADOW_KERNEL_CUTS=400 cargo test --locked -p vhost-blk-store --test kernel_cut -- --nocapture

selinux: images ## the agent in a Debian that enforces a policy: the distribution's, ours, and one that denies freezing (root)
	@[ "$$(id -u)" = 0 ] || { echo "selinux: SKIPPED: a Debian of its own needs root"; exit 0; }
	images/build.sh selinux
	cargo test --locked -p vmshadow-tests --test selinux_in_a_debian_machine -- --ignored --nocapture

fuzz: deps ## two minutes of libFuzzer on each part of the store's metadata, behind the checksums, and on what guest and host say to each other
	vhost-blk/store/fuzz/run 120
	qmp-bridge/fuzz/run 120

nightly: test crash-images kernel-cuts kills selinux fuzz bench window-figures database-proofs writer-figures shutdowns ## everything that takes long

fmt: ## format the code
	@cargo fmt

lint: deps ## formatting and clippy, warnings are errors
	@echo "lint: formatting"
	cargo fmt --check
	echo "lint: clippy"
	cargo clippy --locked --workspace --all-targets -- -D warnings
	# The guest's programs, with the flags they are built with.
	RUSTFLAGS="-C target-feature=+crt-static" cargo clippy --locked --release --target $(TRIPLE) \
	    -p vmshadow-tests --features guest --bins -- -D warnings

doc: ## the rooms' documentation, warnings are errors
	@RUSTDOCFLAGS="-D warnings" cargo doc --locked --workspace --no-deps
