#!/bin/sh
# The report page is tested in a real browser. Where none is found it is installed if that needs no questions;
# elsewhere those tests are skipped and say so.
command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null && exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "installing Chromium for the tests of the report page"
    (apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium chromium-driver) >/dev/null 2>&1 && exit 0
fi
echo "no Chromium here: the tests of the report page in a browser will be skipped"
