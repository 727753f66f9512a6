#!/bin/bash
# Makes the guest's Debian packages out of the static programs and prints their paths, the agent's
# first. ../README.md has the whole story.
#
#   packaging/deb/build.sh [PROGRAMS] [OUTPUT]     defaults: cargo's static release build, target/deb
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
top=$(cd "$here/../.." && pwd)
target=${CARGO_TARGET_DIR:-$top/target}
programs=${1:-$target/x86_64-unknown-linux-gnu/release}
output=${2:-$target/deb}
architecture=$(dpkg --print-architecture)
version=$(sed -n '/^\[workspace.package\]/,/^\[/s/^version = "\(.*\)"/\1/p' "$top/Cargo.toml")
# The commit's date, so that two builds of one commit are the same; without git, the script's own.
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git -C "$top" log -1 --format=%ct 2>/dev/null || stat -c %Y "$0")}
export SOURCE_DATE_EPOCH
umask 022

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$output"

put_program() { # put_program DIRECTORY NAME
    # Whoever installs this has no other libraries than his own.
    if readelf -d "$programs/$2" | grep -q NEEDED; then
        echo "deb: $programs/$2 is not static" >&2
        exit 1
    fi
    mkdir -p "$root/$1"
    strip --remove-section=.comment --remove-section=.note -o "$root/$1/$2" "$programs/$2"
    chmod 755 "$root/$1/$2"
}

put_manual() { # put_manual NAME.SECTION
    mkdir -p "$root/usr/share/man/man${1##*.}"
    gzip -9nc "$here/$1" >"$root/usr/share/man/man${1##*.}/$1.gz"
}

put_unit() { # put_unit FILE
    install -D -m 644 -t "$root/lib/systemd/system" "$1"
}

put_conffile() { # put_conffile FILE PATH
    install -D -m 644 "$1" "$root$2"
    echo "$2" >>"$root/DEBIAN/conffiles"
}

begin() { # begin PACKAGE
    name=$1
    root=$work/$name
    doc=$root/usr/share/doc/$name
    mkdir -p "$root/DEBIAN" "$root/usr/share/lintian/overrides" "$doc"
    chmod 755 "$root"
}

# The rest is the same for all: papers, scripts, sums. The scripts are told the unit they care for.
finish() { # finish CONTROL UNIT POSTINST
    sed "s/@PACKAGE@/$name/g" "$here/lintian-overrides" >"$root/usr/share/lintian/overrides/$name"
    chmod 644 "$root/usr/share/lintian/overrides/$name"
    install -m 644 "$here/copyright" "$doc/copyright"
    # A package without a source package of Debian's: one entry, by the version.
    gzip -9nc >"$doc/changelog.gz" <<END
$name ($version) unstable; urgency=medium

  * Version $version; the project's CHANGELOG.md tells what is new.

 -- vmshadow <vmshadow@vmshadow.invalid>  $(date -u -R -d "@$SOURCE_DATE_EPOCH")
END
    local script
    sed "s/@UNIT@/$2/g" "$here/$3" >"$root/DEBIAN/postinst"
    for script in prerm postrm; do
        sed "s/@UNIT@/$2/g" "$here/$script" >"$root/DEBIAN/$script"
    done
    (cd "$root" && find . -type f ! -path './DEBIAN/*' -printf '%P\n' | LC_ALL=C sort | xargs md5sum) >"$root/DEBIAN/md5sums"
    local size
    size=$(du -sk --apparent-size --exclude=DEBIAN "$root" | cut -f 1)
    sed -e "s/@VERSION@/$version/" -e "s/@ARCHITECTURE@/$architecture/" -e "s/@SIZE@/$size/" "$1" >"$root/DEBIAN/control"
    chmod 644 "$root"/DEBIAN/{control,conffiles,md5sums}
    chmod 755 "$root"/DEBIAN/{postinst,prerm,postrm}
    find "$root" -depth -exec touch -h -d "@$SOURCE_DATE_EPOCH" {} +
    dpkg-deb --root-owner-group -Zxz --build "$root" "$output/${name}_${version}_$architecture.deb" >&2
    echo "$output/${name}_${version}_$architecture.deb"
}

# The agent, and the writers that need no server.
begin vmshadow-guest-agent
put_program usr/sbin guest-agent
put_program usr/bin vmshadow-writer
put_program usr/bin sqlite-writer
put_program usr/libexec/vmshadow unit-writer
put_unit "$top/guest-agent/systemd/vmshadow-guest-agent.service"
put_unit "$top/guest-agent/writers/systemd/vmshadow-sqlite-writer@.service"
put_unit "$top/guest-agent/writers/systemd/vmshadow-unit-writer@.service"
put_conffile "$here/default" /etc/default/vmshadow-guest-agent
mkdir -p "$root"/etc/vmshadow/{writers,writers.d}
for manual in guest-agent.8 vmshadow-writer.1 sqlite-writer.1 unit-writer.8; do
    put_manual "$manual"
done
gzip -9nc "$top/guest-agent/PROTOCOL.md" >"$doc/PROTOCOL.md.gz"
gzip -9nc "$top/packaging/SELINUX.md" >"$doc/SELINUX.md.gz"
install -m 644 "$top/packaging/selinux/vmshadow.cil" "$doc/vmshadow.cil"
finish "$here/control" vmshadow-guest-agent.service postinst

# One package for each server: a guest has the one that it needs.
writer() { # writer SERVER USER TITLE
    begin "vmshadow-writer-$1"
    put_program usr/libexec/vmshadow "$1-writer"
    put_unit "$top/guest-agent/writers/systemd/vmshadow-$1-writer.service"
    sed "s/@SERVER@/$1/g" "$here/default-writer" >"$work/default"
    put_conffile "$work/default" "/etc/default/vmshadow-$1-writer"
    printf '# Who may be a writer of class "%s" beside root: a user of this machine, by name or number.\n%s = %s\n' \
        "$1" "$1" "$2" >"$work/allow"
    put_conffile "$work/allow" "/etc/vmshadow/writers.d/$1.conf"
    put_manual "$1-writer.8"
    sed -e "s/@SERVER@/$1/g" -e "s/@TITLE@/$3/g" "$here/control-writer" >"$work/control"
    finish "$work/control" "vmshadow-$1-writer.service" postinst-writer
}
writer postgresql postgres PostgreSQL
writer mariadb mysql MariaDB
writer mysql mysql MySQL
writer redis redis Redis
writer etcd etcd etcd
