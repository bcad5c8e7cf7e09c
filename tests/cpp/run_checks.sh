#!/usr/bin/env bash
# Checks of the native library that pytest cannot make: symbols of the objects built for wide instruction sets, the
# test program under emulated processors, and under the sanitizers, the CUDA kernels through nvcc.
#
#   tests/cpp/run_checks.sh [build directory, default build/checks]
#
# Needs cmake >= 3.26, ninja and nm (binutils); runs on emulated processors where qemu-x86_64 is (Debian: qemu-user),
# compiles the CUDA kernels where nvcc is, and looks at their machine code where cuobjdump and nvdisasm are, too.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
build=${1:-$root/build/checks}
for tool in cmake ninja nm; do
    command -v "$tool" >/dev/null || { echo "run_checks.sh: $tool is not installed" >&2; exit 1; }
done

configure() { # directory, options…
    local directory=$1
    shift
    cmake -S "$root" -B "$directory" -G Ninja -DCMAKE_MAKE_PROGRAM="$(command -v ninja)" \
        -DREP_FAST_PYTHON=OFF -DREP_FAST_CUDA=OFF -DREP_FAST_TESTS=ON "$@" >/dev/null
    cmake --build "$directory"
}

# An object compiled for a wide set may define only its entry points: a weak symbol (an inline function, a template)
# could be the copy the linker keeps for every level, an illegal instruction on other machines. DW.ref.* is the
# compiler's pointer to the exception handler: data, the same at every level.
check_symbols() { # directory
    local failed=0 object level foreign
    for object in $(find "$1" -name '*_avx2.cpp.o' -o -name '*_avx512.cpp.o' -o -name '*_avx512_bf16.cpp.o'); do
        level=$(basename "$object" .cpp.o | sed -E 's/.*_(avx2|avx512|avx512_bf16)$/\1/')
        foreign=$(nm -C --defined-only "$object" | grep -E '^[0-9a-f]* [A-TV-Zuvw] ' |
            grep -vE "^[0-9a-f]* ([TRD] rep_fast::$level::|V DW\.ref\.__gxx_personality_v0$)" || true)
        if [ -n "$foreign" ]; then
            echo "$(basename "$object") defines symbols other levels could pick up:" >&2
            echo "$foreign" >&2
            failed=1
        fi
    done
    return $failed
}

configure "$build/release"
configure "$build/debug" -DCMAKE_BUILD_TYPE=Debug # without optimisation nothing is inlined by luck
check_symbols "$build/release"
check_symbols "$build/debug"
echo "symbols: passed"

"$build/release/rep_fast_tests"
for kind in release debug; do # optimised or not, fibers must meet at the same barriers
    "$build/$kind/rep_fast_cuda_on_cpu_tests"
    if ("$build/$kind/rep_fast_cuda_on_cpu_tests" past-the-end) 2>/dev/null; then
        echo "a kernel wrote past the end of shared memory and nothing stopped it" >&2
        exit 1
    fi
done
if command -v qemu-x86_64 >/dev/null; then
    echo "-- as Haswell"
    qemu-x86_64 -cpu Haswell "$build/release/rep_fast_tests" avx2
    echo "-- as a processor without AVX"
    qemu-x86_64 -cpu qemu64 "$build/release/rep_fast_tests" portable
else
    echo "-- not run on emulated processors: qemu-x86_64 is not installed"
fi

# Every kernel for every architecture, once each; warnings are errors. A kernel that spills registers works, but at a
# fraction of its speed: what spills lies on its stack.
check_cuda() { # directory
    local object found failed=0
    cmake -S "$root" -B "$1" -G Ninja -DCMAKE_MAKE_PROGRAM="$(command -v ninja)" -DREP_FAST_PYTHON=OFF \
        -DREP_FAST_CUDA=ON "-DCMAKE_CUDA_ARCHITECTURES=80-real;90-real;90a-real" >/dev/null
    cmake --build "$1" --target rep_fast_cuda
    echo "cuda: compiled for sm_80, sm_90 and sm_90a"
    if ! command -v cuobjdump >/dev/null; then
        echo "-- machine code of the CUDA kernels not looked at: cuobjdump is not installed"
        return 0
    fi
    while IFS= read -r object; do
        found=$(cuobjdump -res-usage "$object" |
            awk '/^ Function / { name = $2 } / (STACK|LOCAL):[1-9]/ { print name }' | sort -u)
        if [ -n "$found" ]; then
            echo "$(basename "$object") uses local memory in: $found" >&2
            failed=1
        fi
    done < <(find "$1" -name '*.cu.o')
    [ $failed = 0 ] || return 1
    echo "cuda: no kernel uses local memory"
    check_hopper_code "$(find "$1" -name 'fused_scan.cu.o')" fused_scan_kernel
    check_hopper_code "$(find "$1" -name 'accumulate_moment_sm90a.cu.o')" moment_sm90a_kernel
}

# What is written for sm_90a: products are wgmma's, tiles come by the copy engine.
check_hopper_code() { # object, kernel
    if ! command -v nvdisasm >/dev/null; then
        echo "-- instructions of $2 not looked at: nvdisasm is not installed"
        return 0
    fi
    local missing
    missing=$(cuobjdump -sass -arch sm_90a "$1" | awk -v kernel="$2" '
        /Function :/ { name = $3; if (name ~ kernel) { wanted[name] = 1; n += 1 } }
        /HGMMA|IGMMA/ { has_product[name] = 1 }
        /UTMALDG/ { has_copy[name] = 1 }
        END { if (n == 0) print "any"; for (name in wanted) if (!(has_product[name] && has_copy[name])) print name }')
    if [ -n "$missing" ]; then
        echo "HGMMA (IGMMA for int8) or UTMALDG are missing in the sm_90a code of $2: $missing" >&2
        return 1
    fi
    echo "cuda: $2 multiplies by HGMMA or IGMMA and copies by UTMALDG"
}

if command -v nvcc >/dev/null; then
    check_cuda "$build/cuda"
else
    echo "-- CUDA kernels not compiled: nvcc is not installed"
fi

echo "-- with sanitizers"
configure "$build/sanitize" -DREP_FAST_SANITIZE=ON
"$build/sanitize/rep_fast_tests"
