#!/bin/sh
# Make sure that the loopback SLURM of the tests can run: sh tools/setup_slurm.sh [none|dbd]. `make test-slurm` calls it.
# dbd: with accounting too (slurmdbd and MariaDB, 200 MB).
# As root on Debian or Ubuntu it installs what is missing; elsewhere it prints the line to run and exits 1.
set -eu
commands="slurmctld slurmd sbatch munged"
packages="slurmctld slurmd slurm-client munge"
case ${1:-none} in
none) ;;
dbd) commands="$commands slurmdbd mariadbd" packages="$packages slurmdbd mariadb-server" ;;
*) echo "cossl setup: accounting is none or dbd, not $1" >&2 && exit 2 ;;
esac
PATH="$PATH:/usr/sbin:/sbin"

missing=""
for command in $commands; do
    command -v "$command" >/dev/null 2>&1 || missing="$missing $command"
done
[ -n "$missing" ] || exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null 2>&1; then
    echo "cossl setup: the SLURM tests need root and$missing. Run:" >&2
    echo "    sudo apt-get install --no-install-recommends $packages && sudo make test-slurm ACCOUNTING=${1:-none}" >&2
    exit 1
fi
echo "cossl setup: installing $packages"
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $packages >/dev/null
