#!/usr/bin/env bash
# A Vulkan driver that draws on the CPU (Mesa 25's lavapipe), for SIMPLER's pictures where there is no GPU. Debian 12's
# own Mesa is too old for SAPIEN 3: this unpacks a newer one into a folder of its own and leaves the system as it is
# (installed, it would also replace the GL drivers). Needs no root. DEBIAN_MIRROR names a mirror; else those that apt is
# set up with are tried, then Debian's own. Done before, it only prints:
#
#   eval "$(scripts/vulkan_cpu.sh)"           # or scripts/vulkan_cpu.sh FOLDER; default ~/.cache/defi/vulkan
set -euo pipefail

prefix=$(realpath -m "${1:-${XDG_CACHE_HOME:-$HOME/.cache}/defi/vulkan}")
libraries=$prefix/usr/lib/$(uname -m)-linux-gnu
driver=$prefix/lavapipe.json
packages=(
    mesa-vulkan-drivers/bookworm-backports libdrm2/bookworm-backports libdrm-amdgpu1/bookworm-backports libvulkan1
    libllvm15 libedit2 libbsd0 libmd0 libxml2 libz3-4 libicu72 libx11-xcb1 libxcb1 libx11-6 libxau6 libxdmcp6
    libxcb-dri3-0 libxcb-present0 libxcb-randr0 libxcb-shm0 libxcb-sync1 libxcb-xfixes0 libxshmfence1 libxcb-keysyms1
    libwayland-client0 libffi8 libexpat1 libzstd1 zlib1g libelf1 libtinfo6
)

if [ ! -e "$driver" ]; then
    if ! grep -q '^VERSION_CODENAME=bookworm' /etc/os-release; then
        echo "vulkan_cpu.sh is for Debian 12. Elsewhere: install mesa-vulkan-drivers (25 or newer) and libvulkan1." >&2
        exit 1
    fi
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    mkdir -p "$work/lists/partial" "$work/archives/partial" "$prefix"
    apt=(apt-get -q -o Dir::Etc::SourceList="$work/sources.list" -o Dir::Etc::SourceParts=/dev/null
        -o Dir::State::Lists="$work/lists" -o Dir::Cache="$work/cache" -o Dir::Cache::Archives="$work/archives"
        -o APT::Sandbox::User="$(id -un)" -o Debug::NoLocking=1 -o APT::Update::Error-Mode=any
        -o Acquire::http::Timeout=20 -o Acquire::https::Timeout=20)
    own=$(apt-get indextargets --format '$(REPO_URI) $(RELEASE) $(COMPONENT)' | awk '/ bookworm main$/ { print $1 }')
    for mirror in $(printf '%s\n' ${DEBIAN_MIRROR:-$own http://deb.debian.org/debian/} | awk '!seen[$1]++') ""; do
        if [ -z "$mirror" ]; then
            echo "vulkan_cpu.sh: no mirror has bookworm-backports; DEBIAN_MIRROR=… names another" >&2
            exit 1
        fi
        for suite in bookworm bookworm-backports; do
            echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $suite main"
        done > "$work/sources.list"
        "${apt[@]}" update >&2 && break
    done
    (cd "$work/archives" && "${apt[@]}" download "${packages[@]}" >&2)
    for package in "$work"/archives/*.deb; do
        dpkg -x "$package" "$prefix"
    done
    # libicu and libllvm are most of it; headers, locales and documents are not needed.
    rm -rf "$prefix/usr/share/doc" "$prefix/usr/share/man"
    printf '{"file_format_version": "1.0.1", "ICD": {"api_version": "1.4.305", "library_path": "%s"}}\n' \
        "$libraries/libvulkan_lvp.so" > "$driver.new"
    missing=$(LD_LIBRARY_PATH=$libraries:$prefix/lib/$(uname -m)-linux-gnu ldd "$libraries/libvulkan_lvp.so" | grep 'not found' || true)
    if [ -n "$missing" ]; then
        echo "vulkan_cpu.sh: the driver misses libraries: $missing" >&2
        exit 1
    fi
    mv "$driver.new" "$driver"
fi
echo "export VK_ICD_FILENAMES=$driver"
echo "export LD_LIBRARY_PATH=$libraries:$prefix/lib/$(uname -m)-linux-gnu\${LD_LIBRARY_PATH:+:\$LD_LIBRARY_PATH}"
