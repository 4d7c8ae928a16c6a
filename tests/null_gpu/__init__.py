"""A GPU that is not there: torch's CUDA code runs on it, and nothing is computed.

torch's dispatcher, caching allocator, pinned memory, streams, autocast, DistributedDataParallel, torch.compile, Inductor and
Triton's compiler for sm_90 are the real ones. Kernels, cuBLAS, cuDNN and NVRTC do nothing. NCCL exchanges values between the
processes of one machine. Copies between host and device are real, so a value that was copied to the device can be read back.

It shows what crashes, mixes devices, waits for the device, recompiles, launches too much, disagrees about collectives, or
needs too much memory. Values on the device mean nothing: most are zeros, and a single bool that is copied to the host reads
true. It says nothing about speed.

`python -m tests.null_gpu COMMAND …` runs a command on it.
"""

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

SOURCES = [Path(__file__).parent / name for name in ("null_gpu.h", "memory.c", "runtime.c", "driver.c", "nccl.c")]
HEADERS = ["driver_types.h", "cudnn_version.h"]
LIBRARY = "libnull_gpu.so"
FLAGS = ["-shared", "-fPIC", "-O2", "-w"]

WANTED = re.compile(
    r"(__)?(cuda|cublas|cudnn|cufft|cupti|cusolver|cusparse|nccl|nvml|nvrtc|cu[A-Z])"
)  # functions of CUDA, by their names
CREATES = re.compile(r"cu(blas|dnn|fft|solver|sparse)\w*Create")
COMPUTES = re.compile(r"cu(blas|dnn|fft|solver|sparse)(?!\w*(Destroy|Set|Get|Init|Query|[sS]ize|Version|Final|Algo|Backend))")

# CUDA's wheels have headers that include this one, which they lack.
HOST_DEFINES = """\
#define __host__
#define __device__
#define __device_builtin__
#define __device_builtin_texture_type__
#define __device_builtin_surface_type__
#define __cudart_builtin__
#define __builtin_align__(a) __attribute__((aligned(a)))
#define __align__(n) __attribute__((aligned(n)))
#define CUDARTAPI
"""


class Unavailable(Exception):
    """This machine cannot have a null GPU; says why."""


class Kind(IntEnum):
    """What a host asks of a GPU. A pageable copy is one between the device and memory that is not page-locked."""

    LAUNCH = 0
    COLLECTIVE = 1
    SYNC = 2
    COPY = 3
    PAGEABLE_COPY = 4


class Event(NamedTuple):
    kind: Kind
    name: str  # of the kernel as the compiler mangled it, of the collective, of the function that waited
    bytes: int


class Counts(NamedTuple):
    """Since the start of the process or the last `reset`."""

    launches: int
    syncs: int  # the host waited for the device
    copies: int  # between host and device
    pageable_copies: int  # of them from or to memory that is not page-locked
    collectives: int
    collective_bytes: int  # that this rank gave to them


def environment(*, gpus: int = 1, memory_gib: float = 80) -> dict[str, str]:
    """Environment variables for a process that shall see `gpus` null GPUs. Builds the library, the first time.

    The process has a HOME of its own: moments of real images that are cached there are zeros, and no run on another device
    must find them.
    Raises Unavailable where there is no gcc, or where torch is not built for CUDA.
    """
    folder = _build()
    search = [str(folder), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    home = folder.with_name(f"{folder.name}-home")
    home.mkdir(exist_ok=True)
    return {
        "LD_PRELOAD": ":".join(map(str, [folder / LIBRARY, *folder.glob("libnvrtc.so.*")])),
        "LD_LIBRARY_PATH": ":".join(search),
        "TRITON_LIBCUDA_PATH": str(folder),
        "HOME": str(home),
        "NULL_GPU_COUNT": str(gpus),
        "NULL_GPU_GIB": str(memory_gib),
    }


def counts() -> Counts:
    """Of this process, which must have been started with `environment`."""
    library = _library()
    number, size = library.null_gpu_count, library.null_gpu_bytes
    pageable = number(Kind.PAGEABLE_COPY)
    copies = number(Kind.COPY) + pageable
    return Counts(number(Kind.LAUNCH), number(Kind.SYNC), copies, pageable, number(Kind.COLLECTIVE), size(Kind.COLLECTIVE))


def reset() -> None:
    """Begins to count anew."""
    _library().null_gpu_reset()


@contextmanager
def recording() -> Iterator[list[Event]]:
    """All events of the block, in their order. They are there once it is left."""
    library, events = _library(), []
    library.null_gpu_reset()
    library.null_gpu_log(1)
    try:
        yield events
    finally:
        library.null_gpu_log(0)
        kind, name, size = ctypes.c_int(), ctypes.c_char_p(), ctypes.c_size_t()
        for number in range(library.null_gpu_log_length()):
            library.null_gpu_log_entry(number, ctypes.byref(kind), ctypes.byref(name), ctypes.byref(size))
            events.append(Event(Kind(kind.value), name.value.decode(), size.value))


def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(os.environ["LD_PRELOAD"].partition(":")[0])
    library.null_gpu_count.restype = library.null_gpu_bytes.restype = ctypes.c_longlong
    library.null_gpu_log_length.restype = ctypes.c_size_t
    library.null_gpu_log_entry.argtypes = [ctypes.c_size_t] + [ctypes.c_void_p] * 3
    return library


def _build() -> Path:
    """The folder of the library; another torch or another source has another one."""
    if not (shutil.which("gcc") and shutil.which("nm")):
        raise Unavailable("gcc is not installed")
    site = Path(find_spec("torch").origin).parents[1]
    if not (site / "torch/lib/libtorch_cuda.so").exists():
        raise Unavailable("torch is built without CUDA")
    headers = [path for name in HEADERS for path in site.glob(f"nvidia/**/include/{name}")]
    if len(headers) < len(HEADERS):
        raise Unavailable("the headers of torch's CUDA are not installed")
    known = [path.read_bytes() for path in (*SOURCES, Path(__file__), *headers)]
    version = (site / "torch/version.py").read_bytes()
    folder = Path(tempfile.gettempdir()) / f"null-gpu-{hashlib.sha256(b''.join([*known, version])).hexdigest()[:16]}"
    if not folder.exists():
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix="null-gpu-") as partial:
            _compile(Path(partial), site, [header.parent for header in headers])
            try:
                Path(partial).chmod(0o755)
                shutil.copytree(partial, f"{partial}.done")
                Path(f"{partial}.done").rename(folder)
            except OSError:
                if not folder.exists():  # else another process has built the same meanwhile
                    raise
    return folder


def _compile(folder: Path, site: Path, headers: list[Path]) -> None:
    """One library with everything, and empty ones with the names by which CUDA's own are searched, which bring it along."""
    (folder / "crt").mkdir()
    (folder / "crt/host_defines.h").write_text(HOST_DEFINES)
    sources = [source for source in SOURCES if source.suffix == ".c"]
    (folder / "generated.c").write_text(_generate(_wanted(site)))
    include = [f"-I{each}" for each in (folder, SOURCES[0].parent, *headers)]
    _gcc("-o", folder / LIBRARY, f"-Wl,-soname,{LIBRARY}", *include, *sources, folder / "generated.c", "-ldl", "-lpthread")
    for path in site.glob("nvidia/**/lib/libnvrtc.so.*"):
        _gcc("-o", folder / path.name, f"-Wl,-soname,{path.name},--no-as-needed", folder / LIBRARY)
    for name in ("libcuda.so.1", "libnvidia-ml.so.1"):
        _gcc("-o", folder / name, f"-Wl,-soname,{name},--no-as-needed", folder / LIBRARY)
    (folder / "libcuda.so").symlink_to("libcuda.so.1")


def _gcc(*arguments: str | Path) -> None:
    done = subprocess.run(["gcc", *FLAGS, *map(str, arguments)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise Unavailable(f"gcc failed: {done.stderr}")


def _wanted(site: Path) -> set[str]:
    """What torch's libraries take from CUDA's, and what they search by its name: the whole driver, and some of NVML."""
    libraries = [*site.glob("torch/lib/*.so"), *site.glob("torchvision/*.so")]
    undefined = subprocess.run(["nm", "-D", "--undefined-only", *libraries], capture_output=True, text=True, check=False).stdout
    symbols = {line.split()[-1].partition("@")[0] for line in undefined.splitlines() if line.startswith(" ")}
    header = next(path for pattern in ("nvidia/**/cuda.h", "triton/**/cuda.h") for path in site.glob(pattern))
    driver = re.findall(r"CUDAAPI\s+(cu\w+)\(", header.read_text())
    versions = re.findall(r"#define\s+cu\w+\s+.*?(cu\w+_v\d+)", header.read_text())
    nvml = re.findall(r"nvml\w+", (site / "torch/include/c10/cuda/driver_api.h").read_text()) + ["nvmlInit"]
    return {symbol for symbol in (*symbols, *driver, *versions, *nvml) if WANTED.match(symbol)}


def _generate(symbols: set[str]) -> str:
    """C: functions that are done at once. Those that create something hand out a new handle, those that compute are counted.

    They are weak: a function of the same name in SOURCES stands in their place.
    """
    lines = ['#include "null_gpu.h"', "#include <stdlib.h>"]
    for symbol in sorted(symbols):
        if CREATES.match(symbol):
            body = "*handle = calloc(1, 4096); "  # some are structures that inline functions of headers write to
        elif COMPUTES.match(symbol):
            body = f'record(LAUNCH, "{symbol}", 0); '
        else:
            body = ""
        lines.append(f"__attribute__((weak)) int {symbol}({'void **handle' if 'handle' in body else ''}) {{ {body}return 0; }}")
    return "\n".join(lines) + "\n"
