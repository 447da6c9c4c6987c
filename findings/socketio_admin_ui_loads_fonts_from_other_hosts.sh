#!/bin/sh
# @socket.io/admin-ui 0.5.1: its page loads a font and all icons from two other hosts.
#
# Expected: who hosts the page serves all of it, since operators log in there, often in networks without the Internet.
# Seen: two style sheets by https from hosts for content delivery. One is that of the icons, "latest" instead of a version and without a
# hash; without it, the page's buttons have no signs.
# Ends with 0 as long as this is so.
set -eu
folder=$(mktemp -d)
trap 'rm -r "$folder"' EXIT
cd "$folder"
npm pack --silent @socket.io/admin-ui@0.5.1 >/dev/null
tar -xzf socket.io-admin-ui-0.5.1.tgz
grep -o '<link[^>]*href="https://[^"]*"[^>]*>' package/ui/dist/index.html > elsewhere
echo "style sheets from elsewhere: $(wc -l < elsewhere), of these of the newest version: $(grep -c '@latest/' elsewhere), with a hash: $(grep -c integrity= elsewhere || true)"
test "$(wc -l < elsewhere)" = 2 && test "$(grep -c '@latest/' elsewhere)" = 1 && ! grep -q integrity= elsewhere
