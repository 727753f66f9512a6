#!/bin/bash
# Makes the guest's Debian package out of the static programs and prints its path. ../README.md has
# the whole story.
#
#   packaging/deb/build.sh [PROGRAMS] [OUTPUT]     defaults: cargo's static release build, target/deb
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
top=$(cd "$here/../.." && pwd)
target=${CARGO_TARGET_DIR:-$top/target}
programs=${1:-$target/x86_64-unknown-linux-gnu/release}
output=${2:-$target/deb}
name=vmshadow-guest-agent
architecture=$(dpkg --print-architecture)
version=$(sed -n '/^\[workspace.package\]/,/^\[/s/^version = "\(.*\)"/\1/p' "$top/Cargo.toml")
# The commit's date, so that two builds of one commit are the same; without git, the script's own.
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git -C "$top" log -1 --format=%ct 2>/dev/null || stat -c %Y "$0")}
export SOURCE_DATE_EPOCH
umask 022

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
root=$work/root
doc=$root/usr/share/doc/$name
mkdir -p "$root"/{DEBIAN,etc/default,etc/vmshadow/writers,etc/vmshadow/writers.d,lib/systemd/system} \
    "$root"/usr/{sbin,bin} "$root"/usr/share/man/man{1,8} "$root/usr/share/lintian/overrides" "$doc"
chmod 755 "$root"

for program in sbin/guest-agent bin/sqlite-writer; do
    file=$programs/${program#*/}
    # Whoever installs this has no other libraries than his own.
    if readelf -d "$file" | grep -q NEEDED; then
        echo "deb: $file is not static" >&2
        exit 1
    fi
    strip --remove-section=.comment --remove-section=.note -o "$root/usr/$program" "$file"
    chmod 755 "$root/usr/$program"
done
install -m 644 "$top/guest-agent/systemd/$name.service" "$root/lib/systemd/system/"
install -m 644 "$here/default" "$root/etc/default/$name"
install -m 644 "$here/lintian-overrides" "$root/usr/share/lintian/overrides/$name"
gzip -9nc "$here/guest-agent.8" >"$root/usr/share/man/man8/guest-agent.8.gz"
gzip -9nc "$here/sqlite-writer.1" >"$root/usr/share/man/man1/sqlite-writer.1.gz"
install -m 644 "$here/copyright" "$doc/copyright"
gzip -9nc "$top/guest-agent/PROTOCOL.md" >"$doc/PROTOCOL.md.gz"
gzip -9nc "$top/packaging/SELINUX.md" >"$doc/SELINUX.md.gz"
# A package without a source package of Debian's: one entry, by the version.
gzip -9nc >"$doc/changelog.gz" <<END
$name ($version) unstable; urgency=medium

  * Version $version; the project's CHANGELOG.md tells what is new.

 -- vmshadow <vmshadow@vmshadow.invalid>  $(date -u -R -d "@$SOURCE_DATE_EPOCH")
END

install -m 755 "$here"/{postinst,prerm,postrm} "$root/DEBIAN/"
echo "/etc/default/$name" >"$root/DEBIAN/conffiles"
(cd "$root" && find . -type f ! -path './DEBIAN/*' -printf '%P\n' | LC_ALL=C sort | xargs md5sum) >"$root/DEBIAN/md5sums"
size=$(du -sk --apparent-size --exclude=DEBIAN "$root" | cut -f 1)
sed -e "s/@VERSION@/$version/" -e "s/@ARCHITECTURE@/$architecture/" -e "s/@SIZE@/$size/" "$here/control" >"$root/DEBIAN/control"
chmod 644 "$root"/DEBIAN/{control,conffiles,md5sums}
find "$root" -depth -exec touch -h -d "@$SOURCE_DATE_EPOCH" {} +

mkdir -p "$output"
dpkg-deb --root-owner-group -Zxz --build "$root" "$output/${name}_${version}_$architecture.deb" >&2
echo "$output/${name}_${version}_$architecture.deb"
