#!/usr/bin/env bash
# Installs the Firezone gateway as a systemd service of this host, or upgrades what an earlier run installed:
#
#   FIREZONE_ID=... FIREZONE_TOKEN=... bash <(curl -fsSL URL-OF-THIS-FILE)
#
# Variables: FIREZONE_ID and FIREZONE_TOKEN (kept from the last run if not given), FIREZONE_NAME, FIREZONE_API_URL,
# FIREZONE_LOG_FORMAT, RUST_LOG, HEALTH_CHECK_ADDR; SERVICE_FILE and TOKEN_FILE are paths.
# `make installer` fills in version, checksums and address; as it lies in the sources this file installs nothing.
set -euo pipefail

service_file=${SERVICE_FILE:-/etc/systemd/system/firezone-gateway.service}
token_file=${TOKEN_FILE:-/etc/firezone/gateway-token}
init_script=/usr/local/bin/firezone-gateway-init
oldest_systemd=247 # the first that knows credentials
kept_settings="FIREZONE_NAME FIREZONE_API_URL FIREZONE_LOG_FORMAT RUST_LOG HEALTH_CHECK_ADDR"

fail() {
    echo "$*" >&2
    exit 1
}

as_root() {
    if [ "$(id -u)" -eq 0 ]; then "$@"; else sudo "$@"; fi
}

# A setting of the unit that an earlier run, or the original's installer, wrote.
from_old_unit() {
    as_root test -f "$service_file" || return 0
    as_root sed -n -e "s/^Environment=\"$1=\(.*\)\"\$/\1/p" -e "s/^Environment=$1=\([^ ]*\)\$/\1/p" "$service_file" |
        tail -n 1 | sed -e 's/%%/%/g' -e 's/\\\([\\"]\)/\1/g'
}

check_systemd() {
    command -v systemctl >/dev/null 2>&1 || fail "This host has no systemctl: the installer needs systemd $oldest_systemd or newer."
    local version
    version=$(systemctl --version 2>/dev/null | sed -n '1s/^systemd \([0-9][0-9]*\).*/\1/p')
    [ -n "$version" ] || fail "The version of systemd cannot be told from: systemctl --version"
    [ "$version" -ge "$oldest_systemd" ] ||
        fail "systemd $version is too old: $oldest_systemd or newer is needed, for credentials. Nothing was changed."
}

# Standard input becomes the file $2 with mode $1, owned by root, at once or not at all.
write_file() {
    # shellcheck disable=SC2016 # it is the inner shell that expands
    as_root sh -c '
        set -eu
        umask 077
        new=$(mktemp "$2.XXXXXX")
        trap "rm -f \"\$new\"" EXIT
        cat >"$new"
        chown root:root "$new"
        chmod "$1" "$new"
        mv -f "$new" "$2"
        trap - EXIT
    ' sh "$1" "$2"
}

# Environment="NAME=value" as systemd.exec(5) wants it.
environment_line() {
    case $2 in *$'\n'*) fail "$1 must be one line" ;; esac
    printf 'Environment="%s=%s"\n' "$1" "$(printf '%s' "$2" | sed -e 's/[\\"]/\\&/g' -e 's/%/%%/g')"
}

settings() {
    local name value
    environment_line FIREZONE_ID "$id"
    for name in $kept_settings; do
        value=${!name:-$(from_old_unit "$name")}
        case $name in
        FIREZONE_NAME) value=${value:-$(uname -n)} ;;
        RUST_LOG) value=${value:-info} ;;
        esac
        [ -z "$value" ] || environment_line "$name" "$value"
    done
}

unit() {
    local line
    while IFS= read -r line; do
        case $line in
        "@SETTINGS@") printf '%s\n' "$written_settings" ;;
        LoadCredential=*) echo "LoadCredential=FIREZONE_TOKEN:$token_file" ;;
        *) printf '%s\n' "$line" ;;
        esac
    done <<'UNIT'
@UNIT@
UNIT
}

init_script() {
    cat <<'INIT'
@INIT@
INIT
}

main() {
    local id token written_settings
    id=${FIREZONE_ID:-$(from_old_unit FIREZONE_ID)}
    token=${FIREZONE_TOKEN:-$(from_old_unit FIREZONE_TOKEN)}
    [ -n "$id" ] || fail "FIREZONE_ID is required: FIREZONE_ID=... FIREZONE_TOKEN=... bash <(curl ...)" \
        "A new one, for this host alone: head -c 32 /dev/urandom | sha256sum | cut -c 1-64"
    [ -n "$token" ] || as_root test -s "$token_file" ||
        fail "FIREZONE_TOKEN is required: $token_file has none either. The portal shows one when a gateway is added to a site."
    written_settings=$(settings)
    check_systemd

    getent group firezone >/dev/null || as_root groupadd --system firezone
    getent passwd firezone >/dev/null ||
        as_root useradd --system --gid firezone --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin firezone
    [ -d "$(dirname "$token_file")" ] || as_root install -d -m 0755 -o root -g root "$(dirname "$token_file")"
    if [ -n "$token" ]; then
        printf '%s\n' "$token" | write_file 0400 "$token_file"
    fi

    # The program first: an installation that works is left alone if the new one cannot be had.
    as_root install -d -m 0755 "$(dirname "$init_script")"
    init_script | write_file 0755 "$init_script.new"
    as_root "$init_script.new" || {
        as_root rm -f "$init_script.new"
        fail "The program could not be installed; what was installed before is unchanged."
    }
    as_root mv -f "$init_script.new" "$init_script"
    unit | write_file 0644 "$service_file"
    as_root systemctl daemon-reload
    as_root systemctl enable firezone-gateway.service
    as_root systemctl restart firezone-gateway.service ||
        fail "The gateway is installed but did not start; why: journalctl -u firezone-gateway -n 20"
    echo "The Firezone gateway $(sed -n 's/^version=//p' "$init_script") is installed and has joined the portal."
    echo "How it is: sudo /opt/firezone/bin/firezone-gateway status; its log: journalctl -u firezone-gateway"
}

main "$@"
