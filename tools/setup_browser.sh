#!/bin/sh
# Make sure that the browser of the tests is there: sh tools/setup_browser.sh. `make test-browser` calls it.
# As root on Debian or Ubuntu it installs Chromium (300 MB); elsewhere it prints what to do and exits 1.
set -eu
for command in chromium chromium-browser google-chrome chrome; do # as in tests/chromium.py
    command -v "$command" >/dev/null 2>&1 && exit 0
done
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null 2>&1; then
    echo "cossl setup: the browser tests need Chromium or Chrome. Run:" >&2
    echo "    sudo apt-get install --no-install-recommends chromium && make test-browser" >&2
    exit 1
fi
echo "cossl setup: installing chromium"
if ! { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium >/dev/null; }; then
    echo "cossl setup: apt-get could not install chromium: install Chromium or Chrome by other means and try again" >&2
    exit 1
fi
