#!/usr/bin/env bash
# The base of the images where no registry can be reached: Debian 12, whose Python is 3.11, made of its packages.
# deploy/image-base.sh [TAG]; needs root, debootstrap (Debian: apt-get install debootstrap) and a Docker engine.
set -euo pipefail
tag=${1:-localhost/penstock-base:bookworm}
folder=$(mktemp -d)
trap 'rm -rf --one-file-system "$folder"' EXIT

# the mirror that this machine itself installs from, if it is a Debian
mirror=$(grep -hoE 'https?://[^ ]+debian/?( |$)' /etc/apt/sources.list /etc/apt/sources.list.d/* 2>/dev/null | head -1 || true)
debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates bookworm "$folder" ${mirror:-}

# certificates that this machine trusts beside Debian's: builds may have to go through a proxy
if compgen -G '/usr/local/share/ca-certificates/*.crt' >/dev/null; then
	cp /usr/local/share/ca-certificates/*.crt "$folder/usr/local/share/ca-certificates/"
	chroot "$folder" update-ca-certificates
fi
rm -rf "$folder"/var/lib/apt/lists/* "$folder"/var/cache/apt/* "$folder"/var/log/* "$folder"/usr/share/{doc,man,locale}/*
tar -C "$folder" -c . | docker import - "$tag"
