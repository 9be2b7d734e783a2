#!/bin/sh
# Says so, and fails, where the browser that the report's pages are tested in is not installed.
for name in chromium chromium-browser google-chrome; do
    if command -v "$name" >/dev/null && command -v chromedriver >/dev/null; then exit 0; fi
done
echo "no Chromium with its driver here: tests of the report's pages in a browser are skipped" \
    "(Debian: apt-get install chromium chromium-driver)"
exit 1
