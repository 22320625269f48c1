"""Builds lrkernels._C: the CPU kernels always, the CUDA kernels when nvcc is there (LRKERNELS_CUDA=auto|0|1)."""

import os
import re
import shutil
import subprocess
from pathlib import Path

from setuptools import Extension, setup
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension

# No fused multiply-add but where rules.h asks for it; no errno, so that square roots vectorise.
FLAGS = ["-std=c++17", "-O3", "-g0", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
FLAGS += ["-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi"]
NVCC_FLAGS = ["-std=c++17", "-O3", "--fmad=false", "-prec-div=true", "-prec-sqrt=true", "-ftz=false", "--threads=0"]
NVCC_FLAGS += ["-Werror=all-warnings", "-Xcompiler=-fPIC,-fvisibility=hidden"]
CUDA_SOURCES = [Path("csrc/cuda", name) for name in ("kernels.cu", "chunk.cuh", "memory.cuh")]
CUDA_SOURCES += [Path("csrc", name) for name in ("kernels.h", "rules.h", "halves.h")]
WITHOUT = "or build without CUDA by LRKERNELS_CUDA=0"


def find_nvcc() -> str | None:
    """The compiler, unless LRKERNELS_CUDA says that it is not to be used."""
    asked = os.environ.get("LRKERNELS_CUDA", "auto")
    there = shutil.which("nvcc") or shutil.which("nvcc", path=f"{CUDA_HOME}/bin")
    if asked not in ("auto", "0", "1") or (asked == "1" and not there):
        raise SystemExit(f"lrkernels: LRKERNELS_CUDA={asked}: it must be auto, 0 or 1, and 1 needs nvcc on the PATH")
    return None if asked == "0" else there


def add_cuda(extension: Extension, nvcc: str, target: Path) -> None:
    """Compile kernels.cu to ``target``, where that is not up to date, and link it and CUDA's runtime in."""
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip() or "8.0;9.0;10.0;12.0+PTX"
    codes = [re.sub(r"(.*)\+PTX", r"\1,compute_\1", name) for name in re.split("[; ]+", asked.replace(".", ""))]
    flags = [f"-gencode=arch=compute_{code.split(',')[0]},code=[sm_{code}]" for code in codes]
    command = [nvcc, *NVCC_FLAGS, *flags, "-c", str(CUDA_SOURCES[0]), "-o", str(target)]
    made_of, record = "\n".join([*command, *map(Path.read_text, CUDA_SOURCES)]), target.with_suffix(".txt")
    if not (target.exists() and record.exists() and record.read_text() == made_of):
        target.parent.mkdir(parents=True, exist_ok=True)
        if subprocess.run(command).returncode:
            remedy = "set TORCH_CUDA_ARCH_LIST to what it knows (CUDA 12.8 on knows all of the default)"
            raise SystemExit(f"lrkernels: {nvcc} does not compile {CUDA_SOURCES[0]} for {asked}: {remedy}, {WITHOUT}")
        record.write_text(made_of)
    said = subprocess.run([nvcc, "--dryrun", "-c", str(CUDA_SOURCES[0])], capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.*)", said, re.MULTILINE)
    toolkit = Path(top[1] if top else f"{nvcc}/../..").resolve()
    runtimes = [*toolkit.glob("lib*/libcudart_static.a"), *toolkit.glob("targets/*/lib/libcudart_static.a")]
    if not runtimes:
        raise SystemExit(f"lrkernels: no libcudart_static.a in {toolkit}: install CUDA's static runtime, {WITHOUT}")
    extension.extra_objects += [str(target), str(runtimes[0])]
    extension.extra_link_args += ["-Wl,--exclude-libs,ALL", "-ldl", "-lrt", "-lpthread"]
    extension.define_macros.append(("LRK_CUDA", f'"sm_{" sm_".join(codes).replace(",", " ")}"'))


class Build(BuildExtension):
    """Compiles kernels.cu by nvcc itself: torch's own CUDA extensions want a torch that has CUDA."""

    def build_extensions(self) -> None:
        """Compile the CUDA kernels, and then the rest."""
        if nvcc := find_nvcc():
            add_cuda(self.extensions[0], nvcc, Path(self.build_temp, "kernels.cu.o"))
        super().build_extensions()


SOURCES = ["csrc/module.cpp", "csrc/cpu/kernels.cpp"]
ALL = [str(path) for path in sorted(Path("csrc").glob("**/*.*"))]  # what a source distribution takes along
setup(
    ext_modules=[CppExtension("lrkernels._C", SOURCES, depends=ALL, extra_compile_args=FLAGS, py_limited_api=True)],
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
