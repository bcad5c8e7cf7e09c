"""The native module as it is built and found: what happens when parts are missing, and what a source archive holds."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch

import rep_fast
from rep_fast import errors, ops
from rep_fast.ops import native
from rep_fast.ops.backend import OPS

ROOT = Path(__file__).resolve().parents[1]


def _tool(name: str) -> str | None:
    return shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)


@pytest.fixture
def module() -> Any:
    found = native.find().module
    if found is None:
        pytest.skip("rep_fast._C is not built on this machine")
    return found


def test_every_op_names_its_backend_and_the_reason() -> None:
    told = rep_fast.backend()
    assert tuple(told) == OPS
    assert all(name == "reference" or name.startswith("native-") for name, _ in told.values())
    assert all(reason for _, reason in told.values())


@pytest.mark.parametrize(("cap", "name"), [("portable", "native-portable"), ("avx2", "native-avx2")])
def test_isa_caps_the_level(module: Any, monkeypatch: pytest.MonkeyPatch, cap: str, name: str) -> None:
    if module.level_name(module.machine_level()) == "portable":
        pytest.skip("this processor has no AVX2")
    monkeypatch.setenv("REP_FAST_ISA", cap)
    assert ops.backend()["whitened_topk"][0] == name


def test_a_cap_above_the_machine_lowers_nothing(module: Any) -> None:
    assert module.resolve_level("avx512_bf16") == module.machine_level() == module.resolve_level("")


def test_an_unknown_isa_fails_when_an_op_is_called(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REP_FAST_ISA", "sse9")
    with pytest.raises(errors.BackendError, match="'sse9' is unknown; use portable, avx2, avx512 or avx512_bf16"):
        ops.whitened_topk(torch.ones(2, 3), torch.ones(1, 3), 1)


def test_without_the_module_everything_imports_and_says_why() -> None:
    code = (
        "import sys; sys.modules['rep_fast._C'] = None\n"
        "import rep_fast, torch\n"
        "assert {name for name, _ in rep_fast.backend().values()} == {'reference'}\n"
        "print(rep_fast.backend()['whitened_topk'][1])\n"
        "from rep_fast.ops import whitened_topk\n"
        "assert whitened_topk(torch.eye(3), torch.eye(3), 1).ids.flatten().tolist() == [0, 1, 2]\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "cannot be imported" in done.stdout
    assert done.stderr.count("the plain torch body serves") == 1


class WithoutDLPack:
    """A tensor as an older torch shows it: no exchange table, only Python attributes."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.device, self.dtype, self.shape = tensor.device, tensor.dtype, tensor.shape
        self.data_ptr, self.stride = tensor.data_ptr, tensor.stride


def test_tensors_cross_without_the_exchange_table(module: Any) -> None:
    def scan(wrap: Any) -> tuple[torch.Tensor, torch.Tensor]:
        scores, ids = torch.full((3, 4), -torch.inf, dtype=torch.float64), torch.full((3, 4), -1)
        padded = torch.randn(11, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
        tensors = {
            "keys": padded[:, 1:7],
            "queries": torch.ones(3, 6),
            "scores": scores,
            "ids": ids,
            "query_dropped": torch.zeros(3, dtype=torch.bool),
        }
        empty = dict.fromkeys(("token_ids", "sequence_starts", "last_tokens", "lookback", "indptr", "subjects"))
        rest = {
            "first_id": 0,
            "window": 0,
            "precision": "fp32",
            "delta": 1e-9,
            "seed": 0,
            "packings": None,
            "level": 0,
            "n_threads": 1,
        }
        module.whitened_topk(**{name: wrap(tensor) for name, tensor in tensors.items()}, **empty, **rest)
        return scores, ids

    for direct, by_attributes in zip(scan(lambda tensor: tensor), scan(WithoutDLPack), strict=True):
        assert torch.equal(direct, by_attributes)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (torch.ones(2, 3, dtype=torch.float64), "keys must be float32, bfloat16 or float16, got float64"),
        (torch.ones(2, 3, dtype=torch.int16), "keys has a dtype .* no kernel takes"),
        (torch.ones(3), "keys must have 2 dimensions, got 1"),
        (torch.ones(3, 2).T, "keys must have contiguous columns, got column stride 2"),
        (WithoutDLPack(torch.ones(2, 3, dtype=torch.int16)), "keys has dtype torch.int16, which no kernel takes"),
        (WithoutDLPack(torch.ones(2, 3, device="meta")), "keys lies on meta; pass a CPU tensor"),
    ],
)
def test_the_border_names_what_it_cannot_take(module: Any, keys: Any, message: str) -> None:
    names = ("queries", "scores", "ids", "query_dropped", "token_ids", "sequence_starts", "last_tokens", "lookback")
    rest = dict.fromkeys((*names, "indptr", "subjects"))
    with pytest.raises(ValueError, match=message):
        module.whitened_topk(
            keys=keys,
            **rest,
            first_id=0,
            window=0,
            precision="fp32",
            delta=1e-9,
            seed=0,
            packings=None,
            level=0,
            n_threads=1,
        )


def _configure(tmp_path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    cmake, ninja, compiler = _tool("cmake"), _tool("ninja"), _tool("c++")
    if cmake is None or ninja is None or compiler is None:
        pytest.skip("cmake, ninja and a C++ compiler are not all installed")
    version = subprocess.run([cmake, "--version"], capture_output=True, text=True, check=True).stdout.split()[2]
    if tuple(map(int, version.split(".")[:2])) < (3, 26):
        pytest.skip(f"cmake {version} is older than 3.26")
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_HOME"}
    command = [cmake, "-S", str(ROOT), "-B", str(tmp_path), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    command += [f"-DCMAKE_CXX_COMPILER={compiler}", "-DREP_FAST_PYTHON=OFF", *options]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_cuda_asked_for_without_nvcc_says_so(tmp_path: Path) -> None:
    # nvcc may be installed: look neither on PATH nor in the system's own directories
    nowhere = ("-DCMAKE_FIND_USE_SYSTEM_ENVIRONMENT_PATH=OFF", "-DCMAKE_FIND_USE_CMAKE_SYSTEM_PATH=OFF")
    done = _configure(tmp_path, "-DREP_FAST_CUDA=ON", *nowhere)
    assert done.returncode != 0
    assert "REP_FAST_CUDA=ON, but nvcc was not found" in " ".join(done.stderr.split())


def test_cuda_asked_for_with_an_nvcc_that_does_not_work_says_so(tmp_path: Path) -> None:
    done = _configure(tmp_path, "-DREP_FAST_CUDA=ON", "-DREP_FAST_NVCC=/bin/false")
    assert done.returncode != 0
    assert "REP_FAST_CUDA=ON, but /bin/false compiles no program here" in " ".join(done.stderr.split())


def test_an_nvcc_that_does_not_work_leaves_the_cuda_kernels_out(tmp_path: Path) -> None:
    done = _configure(tmp_path, "-DREP_FAST_CUDA=AUTO", "-DREP_FAST_NVCC=/bin/false")
    assert done.returncode == 0, done.stderr
    assert "CUDA kernels are left out: /bin/false compiles no program here" in done.stdout


def test_an_nvcc_that_was_mended_is_found_in_the_same_build_directory(tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not installed")
    mended, compiler = tmp_path / "mended", tmp_path / "nvcc"
    compiler.write_text(f'#!/bin/sh\n[ -f "{mended}" ] || exit 1\nexec "{Path(nvcc).resolve()}" "$@"\n')
    compiler.chmod(0o755)
    options = ("-DREP_FAST_CUDA=AUTO", f"-DREP_FAST_NVCC={compiler}")
    assert "compiles no program here" in _configure(tmp_path / "build", *options).stdout
    mended.touch()
    assert "CUDA kernels: nvcc" in _configure(tmp_path / "build", *options).stdout


def test_the_cuda_module_imports_without_a_driver(module: Any) -> None:
    found = native.find_cuda()
    if found.module is None:
        pytest.skip(found.reason)
    assert "whitened_topk" in found.module.bodies
    with pytest.raises(ValueError, match="keys lies on device type 1; pass a CUDA tensor"):
        found.module.measure_keys(keys=torch.ones(2, 3), first_id=0, norms=None, counters=None, stream=0)


def test_a_checkout_that_built_the_cuda_module_has_it() -> None:
    """setuptools copies only the extensions it knows of into an editable install."""
    built = list((ROOT / "build" / f"cmake-{sysconfig.get_config_var('SOABI')}").glob("_C_cuda.*.so"))
    if not built or Path(rep_fast.__file__).parents[1] != ROOT:
        pytest.skip("no CUDA module was built in this checkout")
    assert native.find_cuda().module is not None, native.find_cuda().reason


def test_an_unknown_cuda_setting_is_refused(tmp_path: Path) -> None:
    done = _configure(tmp_path, "-DREP_FAST_CUDA=MAYBE")
    assert done.returncode != 0
    assert "REP_FAST_CUDA=MAYBE is unknown; use AUTO, ON or OFF" in " ".join(done.stderr.split())


@pytest.mark.skipif(importlib.util.find_spec("setuptools") is None, reason="setuptools is not installed")
def test_a_source_archive_holds_what_the_build_reads(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    names = ["setup.py", "pyproject.toml", "MANIFEST.in", "CMakeLists.txt", "LICENSE", "csrc", "python_bindings"]
    tree.mkdir()
    for name in names:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tree / name)
    shutil.copytree(ROOT / "rep_fast", tree / "rep_fast", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "sdist", "--dist-dir", str(tmp_path / "dist"), "--formats", "gztar"],
        cwd=tree,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (archive,) = (tmp_path / "dist").iterdir()
    listed = subprocess.run(["tar", "tzf", str(archive)], capture_output=True, text=True, check=True).stdout
    held = {line.partition("/")[2] for line in listed.splitlines()}
    for name in ("CMakeLists.txt", "setup.py", "csrc", "python_bindings"):
        source = ROOT / name
        files = [source] if source.is_file() else [path for path in source.rglob("*") if path.is_file()]
        assert {str(path.relative_to(ROOT)) for path in files} <= held
