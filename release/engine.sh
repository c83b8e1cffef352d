#!/usr/bin/env bash
# A Docker engine and a base image on a bare Debian machine, for tests that build and run the real container.
#   release/engine.sh start   install what is missing (root only), start dockerd, provide the base image; nothing twice
#   release/engine.sh client  print the Docker client that reaches an engine; 1 where none does
#   release/engine.sh stop    stop the dockerd that `start` started, and only that one
# Where an engine already answers it is used as it is. Where the image registry cannot be reached, a Debian bookworm
# made by debootstrap from apt's own mirror takes the base image's tag: the same Python minor version, the same libc.
set -euo pipefail

base=${BASE_IMAGE:-python:3.11-slim-bookworm}
state=${ENGINE_STATE:-/var/tmp/midog-lora-engine}
ca=${SSL_CERT_FILE:-/etc/ssl/certs/ca-certificates.crt}

say() { echo "engine: $*"; }

# Debian's client first: it matches Debian's engine and needs no buildx plugin.
client() {
    local candidate
    for candidate in ${DOCKER:-/usr/bin/docker docker}; do
        if command -v "$candidate" >/dev/null && timeout 20 "$candidate" info >/dev/null 2>&1; then
            echo "$candidate"
            return
        fi
    done
    return 1
}

install_missing() {
    local missing=()
    command -v dockerd >/dev/null || missing+=(docker.io)
    command -v debootstrap >/dev/null || missing+=(debootstrap)
    command -v iptables >/dev/null || missing+=(iptables)
    [ ${#missing[@]} -eq 0 ] && return
    say "installing ${missing[*]}"
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq || say "apt-get update reported errors; using the lists that are there"
    local quietly=(-y -qq -o DPkg::Lock::Timeout=300 --no-install-recommends)
    apt-get install "${quietly[@]}" "${missing[@]}" >"$state/apt.log" 2>&1 || {
        tail -n 20 "$state/apt.log" >&2
        return 1
    }
}

start_engine() {
    # pid files that outlived their process (a machine that was stopped): the number may belong to another one by now
    local file
    for file in /var/run/docker.pid /var/run/docker/containerd/containerd.pid; do
        case $(cat "/proc/$(cat "$file" 2>/dev/null || echo none)/comm" 2>/dev/null) in
            dockerd | containerd) ;;
            *) rm -f "$file" ;;
        esac
    done
    say "starting dockerd (log: $state/dockerd.log)"
    # no bridge and no firewall rules: containers get either no network or the host's, and neither needs kernel modules
    setsid nohup dockerd --iptables=false --bridge=none >"$state/dockerd.log" 2>&1 </dev/null &
    echo $! >"$state/dockerd.pid"
    local tries
    for tries in $(seq 60); do
        client >/dev/null && return
        kill -0 "$(cat "$state/dockerd.pid")" 2>/dev/null || break
        sleep 1
    done
    say "dockerd did not come up after $tries s; the last lines of its log:" >&2
    tail -n 15 "$state/dockerd.log" >&2
    return 1
}

mirror() { # the Debian mirror that apt is configured with
    local found
    # shellcheck disable=SC2016  # apt's variables, not the shell's
    found=$(apt-get indextargets --format '$(CREATED_BY) $(ORIGIN) $(SITE) $(RELEASE) $(REPO_URI)' 2>/dev/null |
        awk '$1 == "Packages" && $2 == "Debian" && $0 ~ /bookworm/ && $0 !~ /security/ {print $NF; exit}')
    echo "${found:-http://deb.debian.org/debian}"
}

provide_base() {
    local docker=$1 root=$state/bookworm
    if "$docker" image inspect "$base" >/dev/null 2>&1; then say "$base is there"; return; fi
    if timeout 90 "$docker" pull --quiet "$base" >/dev/null 2>&1; then say "pulled $base"; return; fi
    if ! command -v debootstrap >/dev/null; then
        [ "$(id -u)" = 0 ] || {
            say "$base cannot be pulled, and only root can install debootstrap to make a stand-in" >&2
            return 1
        }
        install_missing
    fi
    say "$base cannot be pulled: a stand-in is made by debootstrap from $(mirror)"
    rm -rf "$root"
    debootstrap --variant=minbase --include=python3,python3-venv,python3-pip,ca-certificates \
        bookworm "$root" "$(mirror)" \
        >"$state/debootstrap.log" 2>&1 || { tail -n 20 "$state/debootstrap.log" >&2; return 1; }
    # a machine behind a proxy of its own trusts more than Debian does, and so must the build
    cp "$ca" "$root/etc/ssl/certs/ca-certificates.crt"
    ln -sf python3 "$root/usr/bin/python"
    rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/*
    tar -C "$root" -c . | "$docker" import --change 'CMD ["python3"]' - "$base" >/dev/null
    rm -rf "$root"
    say "imported $base"
}

case ${1:-} in
    start)
        mkdir -p "$state"
        if ! client >/dev/null; then
            [ "$(id -u)" = 0 ] || { say "no Docker engine answers, and only root can start one here" >&2; exit 1; }
            install_missing
            client >/dev/null || start_engine # with an init system the package has started one itself
        fi
        docker=$(client) # the one that reaches it
        say "engine $("$docker" version --format '{{.Server.Version}}') through $(command -v "$docker")"
        provide_base "$docker"
        ;;
    stop)
        if [ -f "$state/dockerd.pid" ]; then
            pid=$(cat "$state/dockerd.pid")
            if [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = dockerd ]; then
                kill "$pid"
                for _ in $(seq 30); do kill -0 "$pid" 2>/dev/null || break; sleep 1; done
                say "dockerd stopped"
            fi
            rm -f "$state/dockerd.pid"
        fi
        ;;
    client) client ;;
    *) sed -n '2,5p' "$0" >&2; exit 2 ;;
esac
