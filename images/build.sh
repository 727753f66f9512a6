#!/bin/bash
# Builds our programs and the guest images the tests and the demo boot, and prints the directory
# they are in: vmlinux (an ELF kernel for PVH), initramfs, manifest. Needs no root, no loop
# device, no network when nothing has changed. README.md beside this file has the whole story.
#
#   images/build.sh             all of the small guest; the last line of the output is the directory
#   images/build.sh databases   and the databases' guest, which is the small one with a disk of Debian's
#                               programs on /usr; its directory has a file `usr` more
#   images/build.sh debian      and a Debian with its own systemd: the small one's kernel and initramfs, and a file `root` (needs root)
#   images/build.sh selinux     that Debian with SELinux, the distribution's policy and labels on every file
#   images/build.sh programs    only the programs
#   images/build.sh mysql       only MySQL, which the databases' guest has too: from Debian's unstable, for Debian 12 has none
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
top=$(dirname "$here")
recipe=$here/small
databases=$here/databases
debian=$here/debian
target=${CARGO_TARGET_DIR:-$top/target}
cache=$target/images
mysql=$target/mysql
triple=x86_64-unknown-linux-gnu
programs=$target/$triple/release
guest_programs=(guest-agent vmshadow-writer sqlite-writer guest-shell guest-load guest-writers)
# What the databases' guest has besides.
database_programs=(postgresql-writer mariadb-writer mysql-writer redis-writer etcd-writer unit-writer guest-database-load)

say() { echo "images: $*" >&2; }

# One static build serves the host and the guest (the agent must run in any Linux guest, and a
# second, dynamic build of the same crates would double the time).
build_programs() {
    cd "$top"
    # A build inside `cargo test` must not inherit what cargo told that run.
    env -u CARGO_ENCODED_RUSTFLAGS RUSTFLAGS="-C target-feature=+crt-static" \
        cargo build --quiet --locked --release --target "$triple" --bins \
        -p vhost-blk -p vhost-blk-store -p guest-agent -p sqlite-writer -p postgresql-writer -p mariadb-writer -p mysql-writer -p redis-writer -p etcd-writer -p unit-writer -p qmp-bridge -p vmshadow-tests --features vmshadow-tests/guest >&2
}

# The words of a list without its comments.
list() { sed 's/#.*//' "$1"; }

# "name version sha256" of each package of a list, from apt's signed index. The kernel's package
# only stands for the one it depends on.
resolve_packages() { # resolve_packages LIST
    local kernel names
    kernel=$(apt-cache depends linux-image-cloud-amd64 |
        awk '$1 == "Depends:" && $2 ~ /^linux-image-/ {print $2; exit}')
    names=$(list "$1" | sed "s/^linux-image-cloud-amd64$/$kernel/")
    # One call for all: apt takes half a second to read its index.
    apt-cache show --no-all-versions $names | awk -v names="$names" '
        $1 == "Package:" {name = $2}
        $1 == "Version:" {version[name] = $2}
        $1 == "SHA256:" {sha256[name] = $2}
        END {
            count = split(names, wanted)
            for (i = 1; i <= count; i++) {
                if (sha256[wanted[i]] == "") exit 1
                print wanted[i], version[wanted[i]], sha256[wanted[i]]
            }
        }' || { say "apt does not know every package: run 'make deps' (apt-get update)"; return 1; }
}

# Downloads into the current directory; apt checks each file against its signed index, and so do we.
fetch_packages() {
    local name version sha256
    while read -r name version sha256; do
        apt-get -qq -o APT::Sandbox::User=root download "$name=$version"
        echo "$sha256  $(ls "${name}"_*.deb)"
    done <"$1" | sha256sum --check --quiet
}

# The ELF kernel inside a bzImage: setup_sects is at 0x1f1, payload_offset and payload_length are
# at 0x248 and 0x24c, relative to the code after the setup sectors (Linux's boot protocol).
unpack_kernel() {
    local sectors offset length magic
    sectors=$(od -An -t u1 -j $((0x1f1)) -N 1 "$1" | tr -d ' ')
    read -r offset length < <(od -An -t u4 -j $((0x248)) -N 8 "$1")
    offset=$((offset + (sectors + 1) * 512))
    magic=$(od -An -t x1 -j "$offset" -N 4 "$1" | tr -d ' ')
    # The last four bytes are the unpacked size; unpackers complain about them after their work.
    dd if="$1" bs=1M iflag=skip_bytes,count_bytes skip="$offset" count=$((length - 4)) status=none | case $magic in
    02214c18) lz4 -dc ;;
    28b52ffd) zstd -dc ;;
    fd377a58) xz -dc ;;
    1f8b*) gzip -dc ;;
    *) say "unknown kernel compression $magic"; return 1 ;;
    esac >"$2"
    [ "$(head -c 4 "$2" | tail -c 3)" = ELF ]
}

pack() { # pack DIRECTORY FILE: an uncompressed cpio (unpacking costs the guest time)
    (cd "$1" && find . -mindepth 1 | LC_ALL=C sort | cpio --quiet --reproducible -o -H newc -R 0:0) >"$2"
}

# Kernel, modules, busybox, sqlite3 and its libraries: depends on the packages and lists alone.
build_base() { # build_base OUTPUT MANIFEST
    local work=$1.work root module class link
    rm -rf "$work" && mkdir -p "$work/debs" "$work/root" "$work/out"
    say "fetching $(wc -l <"$2") packages"
    (cd "$work/debs" && fetch_packages "$2")
    local deb
    for deb in "$work"/debs/*.deb; do dpkg-deb -x "$deb" "$work/files"; done

    say "unpacking the kernel"
    unpack_kernel "$work"/files/boot/vmlinuz-* "$work/out/vmlinux"

    root=$work/root
    mkdir -p "$root"/{bin,sbin,etc,proc,sys,dev,run,tmp,mnt,lib/modules,lib64,usr}
    cp "$work/files/bin/busybox" "$root/bin/busybox"
    for link in $("$root/bin/busybox" --list); do
        [ "$link" = busybox ] || ln -s busybox "$root/bin/$link"
    done
    cp "$work/files/usr/bin/sqlite3" "$root/bin/sqlite3"
    local name
    for name in libsqlite3.so.0 libreadline.so.8 libtinfo.so.6 libz.so.1 libc.so.6 libm.so.6; do
        cp -L "$(find "$work/files" -name "$name" | head -n 1)" "$root/lib/$name"
    done
    cp -L "$(find "$work/files" -name ld-linux-x86-64.so.2 | head -n 1)" "$root/lib64/"
    list "$recipe/modules" | grep . | while read -r class module; do
        objcopy --strip-debug "$work"/files/lib/modules/*/kernel/"$module.ko" "$root/lib/modules/${module##*/}.ko"
        echo "$class $module" >>"$root/lib/modules/list"
    done
    pack "$root" "$work/out/base.cpio"
    cp "$2" "$work/out/packages"
    rm -rf "$1" && mv "$work/out" "$1" && rm -rf "$work"
}

# Where this machine has its packages from, with another release of them.
sources_of() { # sources_of RELEASE DIRECTORY: writes files there, prints their names
    local ours
    ours=$(. /etc/os-release && echo "$VERSION_CODENAME")
    if [ -s /etc/apt/sources.list.d/debian.sources ]; then
        sed -E "/^Suites:(.* )?$ours( .*)?\$/s/:.*/: $1/" /etc/apt/sources.list.d/debian.sources |
            awk -v RS= -v ORS='\n\n' -v wanted="Suites: $1" 'index($0, wanted)' >"$2/debian.sources"
        echo "$2/debian.sources"
    fi
    if [ -s /etc/apt/sources.list ]; then
        sed -nE "s/^(deb .*) $ours /\1 $1 /p" /etc/apt/sources.list >"$2/sources.list"
        echo "$2/sources.list"
    fi
}

# MySQL's server and clients with every library they load, and the loader that goes with them: its programs run anywhere below
# $mysql by that. Which version is the release's own affair, so it is fetched once and stays until it is removed.
fetch_mysql() {
    [ ! -e "$mysql/packages" ] || return 0
    local work=$mysql.work sources
    rm -rf "$mysql" "$work" && mkdir -p "$work/root" "$work/out"
    mapfile -t sources < <(sources_of unstable "$work")
    say "fetching MySQL from Debian's unstable: half a minute"
    # A mirror that stands still has an index of yesterday; nothing here is trusted with more than a test's data.
    mmdebstrap --quiet --variant=extract --include=mysql-server-core,mysql-client-core \
        --aptopt='Acquire::Check-Valid-Until "false"' unstable "$work/root.tar" "${sources[@]}" >&2 </dev/null || return 1
    tar -C "$work/root" --exclude='./dev/*' -xf "$work/root.tar"
    mkdir -p "$work/out"/{bin,share}
    mv "$work"/root/usr/sbin/mysqld "$work"/root/usr/bin/{mysql,mysqladmin,mysqlcheck} "$work/out/bin/"
    mv "$work"/root/usr/lib/x86_64-linux-gnu "$work/out/lib"
    mv "$work"/root/usr/lib/mysql/plugin "$work/out/plugin"
    mv "$work"/root/usr/share/mysql "$work/out/share/"
    (cd "$work/out/lib" && rm -rf perl* gconv ldscripts)
    {
        "$work/out/lib/ld-linux-x86-64.so.2" --library-path "$work/out/lib" "$work/out/bin/mysqld" --version | sed 's,^[^ ]*/,,'
        (cd "$work/out" && sha256sum bin/*)
    } >"$work/out/packages" || return 1
    rm -rf "$mysql" && mv "$work/out" "$mysql" && rm -rf "$work"
}

# Our own files come as a second archive behind the base: the kernel unpacks both.
build_image() { # build_image OUTPUT BASE
    local work=$1.work program
    rm -rf "$work" && mkdir -p "$work/root/bin" "$work/root/etc/vmshadow" "$work/out"
    cp "$recipe/init" "$work/root/init"
    cp "$recipe/start-agent" "$work/root/bin/"
    for program in "${guest_programs[@]}"; do
        strip -o "$work/root/bin/$program" "$programs/$program"
    done
    pack "$work/root" "$work/out/own.cpio"
    cat "$2/base.cpio" "$work/out/own.cpio" >"$work/out/initramfs"
    rm "$work/out/own.cpio"
    ln "$2/vmlinux" "$work/out/vmlinux"
    {
        cat "$2/packages"
        (cd "$work/out" && sha256sum vmlinux initramfs)
    } >"$work/out/manifest"
    rm -rf "$1" && mv "$work/out" "$1" && rm -rf "$work"
}

# The /usr of a Debian on a disk that no machine writes to, so that all of them share the one file.
# No maintainer script runs: what they would have made is in `databases/database`.
build_usr() { # build_usr OUTPUT MANIFEST
    local work=$1.work root deb name
    rm -rf "$work" && mkdir -p "$work/debs" "$work/out"
    say "fetching $(wc -l <"$2") packages"
    (cd "$work/debs" && fetch_packages "$2")
    root=$work/root
    # Packages say /bin and mean /usr/bin: Debian's installer makes these links before it unpacks any.
    for name in bin sbin lib lib64; do
        mkdir -p "$root/usr/$name"
        ln -s "usr/$name" "$root/$name"
    done
    for deb in "$work"/debs/*.deb; do
        dpkg-deb --fsys-tarfile "$deb" | tar -C "$root" --no-same-owner --keep-directory-symlink -x
    done
    [ ! -e "$mysql/packages" ] || cp -a "$mysql" "$root/usr/mysql"
    (cd "$root/usr" && rm -rf share/{doc,man,locale,lintian,bug} lib/postgresql/*/lib/{bitcode,llvmjit*})
    say "making the disk"
    # Without a journal: it is never mounted but for reading.
    mke2fs -q -t ext4 -O ^has_journal -m 0 -L usr -d "$root/usr" "$work/out/usr" \
        $(($(du -sm "$root/usr" | cut -f 1) * 5 / 4 + 16))M >&2
    cp "$2" "$work/out/packages"
    rm -rf "$1" && mv "$work/out" "$1" && rm -rf "$work"
}

# The small guest, with the programs and accounts of the databases in a third archive.
build_databases() { # build_databases OUTPUT SMALL USR
    local work=$1.work program
    rm -rf "$work" && mkdir -p "$work/root/bin" "$work/root/etc/vmshadow/writers.d" "$work/out"
    cp "$databases"/{database,start-systemd} "$work/root/bin/"
    mkdir -p "$work/root/etc/systemd/system"
    local unit
    for unit in "$top"/guest-agent/writers/systemd/*.service; do
        # A guest's packages would put the programs there; its /usr is not ours to write to.
        sed 's,/usr/libexec/vmshadow/,/bin/,' "$unit" >"$work/root/etc/systemd/system/${unit##*/}"
    done
    cp "$databases"/{passwd,group} "$work/root/etc/"
    # These writers are no root: their servers ask who they are.
    # Nobody else may write to them, whatever the checkout allows.
    install -m 644 "$databases"/writers.d/*.conf "$work/root/etc/vmshadow/writers.d/"
    for program in "${database_programs[@]}"; do
        strip -o "$work/root/bin/$program" "$programs/$program"
    done
    pack "$work/root" "$work/out/databases.cpio"
    cat "$2/initramfs" "$work/out/databases.cpio" >"$work/out/initramfs"
    rm "$work/out/databases.cpio"
    ln "$2/vmlinux" "$work/out/vmlinux"
    ln "$3/usr" "$work/out/usr"
    {
        cat "$2/manifest" "$3/packages"
        [ ! -e "$mysql/packages" ] || cat "$mysql/packages"
        (cd "$work/out" && sha256sum initramfs usr)
    } >"$work/out/manifest"
    rm -rf "$1" && mv "$work/out" "$1" && rm -rf "$work"
}

# A Debian as its installer leaves it, on a disk that machines only write beside. Its packages are installed, with all of their
# scripts, from where this machine has its own.
build_root() { # build_root OUTPUT MANIFEST LIST
    local work=$1.work root sources include unit release
    [ "$(id -u)" = 0 ] || { say "a Debian's files belong to many: needs root"; return 1; }
    rm -rf "$work" && mkdir -p "$work/debs" "$work/root" "$work/out"
    root=$work/root
    sources=()
    for include in /etc/apt/sources.list.d/debian.sources /etc/apt/sources.list; do
        [ ! -s "$include" ] || sources+=("$include")
    done
    include=$(list "$3" | grep -v linux-image | grep . | paste -s -d ,)
    say "installing a Debian: a minute"
    mmdebstrap --quiet --variant=minbase --include="$include" --dpkgopt='path-exclude=/usr/share/man/*' \
        --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
        bookworm "$work/root.tar" "${sources[@]}" >&2
    # Nodes of devices are the guest's own to make.
    tar -C "$root" --exclude='./dev/*' -xf "$work/root.tar" && rm "$work/root.tar"
    (cd "$work/debs" && grep ^linux-image "$2" >kernel && fetch_packages kernel)
    dpkg-deb -x "$work"/debs/*.deb "$work/files"
    release=$(ls "$work/files/lib/modules")
    mkdir -p "$root/usr/lib/modules" && mv "$work/files/lib/modules/$release" "$root/usr/lib/modules/"
    chroot "$root" depmod "$release"
    for unit in $(list "$debian/masked"); do ln -sfn /dev/null "$root/etc/systemd/system/$unit"; done
    echo debian >"$root/etc/hostname"
    # With a name it was here before, and has no first things to do.
    echo 00000000000000000000000000000001 >"$root/etc/machine-id"
    chroot "$root" dpkg-query -W -f '${Package} ${Version} ${Architecture}\n' >"$work/out/packages"
    grep ^linux-image "$2" >>"$work/out/packages"
    # Labelled here: there the first boot would be spent on it. Nothing knows of labels on this machine, so they are attributes like others.
    [ ! -e "$root/etc/selinux/config" ] || unshare --mount sh -c 'mount --bind /proc "$0/proc" &&
        exec chroot "$0" setfiles -F -e /proc /etc/selinux/default/contexts/files/file_contexts /' "$root"
    say "making the disk"
    mke2fs -q -t ext4 -m 0 -L root -E lazy_itable_init=0,lazy_journal_init=0 -d "$root" "$work/out/root" \
        $(($(du -sm "$root" | cut -f 1) * 5 / 4 + 256))M >&2
    rm -rf "$1" && mv "$work/out" "$1" && rm -rf "$work"
}

# The small guest, and that disk.
build_debian() { # build_debian OUTPUT SMALL ROOT
    local work=$1.work
    rm -rf "$work" && mkdir -p "$work"
    ln "$2"/{vmlinux,initramfs} "$3/root" "$work/"
    {
        cat "$2/manifest" "$3/packages"
        (cd "$work" && sha256sum root)
    } >"$work/manifest"
    rm -rf "$1" && mv "$work" "$1"
}

if [ "${1:-}" = mysql ]; then
    mkdir -p "$target"
    exec 9>"$target/.mysql.lock"
    flock 9
    fetch_mysql || say "MySQL: SKIPPED, for Debian's unstable could not be had"
    exit 0
fi
build_programs
[ "${1:-}" != programs ] || exit 0

mkdir -p "$cache"
exec 9>"$cache/.lock"
flock 9

resolve_packages "$recipe/packages" >"$cache/packages.new"
base=$cache/base-$(cat "$cache/packages.new" "$recipe/packages" "$recipe/modules" "$here/build.sh" | sha256sum | head -c 16)
if [ ! -d "$base" ]; then
    build_base "$base" "$cache/packages.new"
fi
image=$cache/small-$({ echo "$base"; cat "$recipe/init" "$recipe/start-agent" "${guest_programs[@]/#/$programs/}"; } | sha256sum | head -c 16)
if [ ! -d "$image" ]; then
    say "packing $(basename "$image")"
    build_image "$image" "$base"
fi
# Older images are of no use to anybody once a new one is there, but a running test may still boot one.
find "$cache" -maxdepth 1 -name 'small-*' -type d -mmin +600 ! -path "$image" -exec rm -rf {} +
if [ "${1:-}" = debian ] || [ "${1:-}" = selinux ]; then
    wanted=$cache/$1.list
    cat "$debian/packages" >"$wanted"
    [ "$1" = debian ] || cat "$debian/selinux" >>"$wanted"
    resolve_packages "$wanted" >"$cache/root.new"
    root=$cache/root-$1-$({ cat "$cache/root.new" "$wanted" "$debian/masked"; declare -f build_root; } | sha256sum | head -c 16)
    if [ ! -d "$root" ]; then
        build_root "$root" "$cache/root.new" "$wanted"
    fi
    guest=$cache/$1-$(echo "$image" "$root" | sha256sum | head -c 16)
    if [ ! -d "$guest" ]; then
        say "packing $(basename "$guest")"
        build_debian "$guest" "$image" "$root"
    fi
    find "$cache" -maxdepth 1 \( -name "$1-*" -o -name "root-$1-*" \) -type d -mmin +600 ! -path "$guest" ! -path "$root" -exec rm -rf {} +
    echo "$guest"
    exit 0
fi
if [ "${1:-}" != databases ]; then
    echo "$image"
    exit 0
fi

resolve_packages "$databases/packages" >"$cache/usr.new"
"$here/build.sh" mysql
usr=$cache/usr-$(cat "$cache/usr.new" "$databases/packages" "$here/build.sh" $([ ! -e "$mysql/packages" ] || echo "$mysql/packages") | sha256sum | head -c 16)
if [ ! -d "$usr" ]; then
    build_usr "$usr" "$cache/usr.new"
fi
guest=$cache/databases-$({ echo "$image" "$usr"; cat "$databases"/{database,start-systemd,passwd,group,writers.d/*} "$top"/guest-agent/writers/systemd/*.service "${database_programs[@]/#/$programs/}"; } | sha256sum | head -c 16)
if [ ! -d "$guest" ]; then
    say "packing $(basename "$guest")"
    build_databases "$guest" "$image" "$usr"
fi
find "$cache" -maxdepth 1 \( -name 'databases-*' -o -name 'usr-*' \) -type d -mmin +600 ! -path "$guest" ! -path "$usr" -exec rm -rf {} +
echo "$guest"
