"""Builds lrkernels._C: the CPU kernels always, the CUDA kernels when nvcc is there (LRKERNELS_CUDA=auto|0|1)."""

import os
import re
import shutil
import subprocess
from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension

# No fused multiply-add but where rules.h asks for it; no errno, so that square roots vectorise.
FLAGS = ["-std=c++17", "-O3", "-g0", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
FLAGS += ["-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi"]
NVCC_FLAGS = ["-std=c++17", "-O3", "--fmad=false", "-prec-div=true", "-prec-sqrt=true", "-ftz=false"]
NVCC_FLAGS += ["-Werror=all-warnings", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra"]


def architectures() -> list[str]:
    """What TORCH_CUDA_ARCH_LIST asks for ("8.0;9.0+PTX"), in nvcc's words."""
    wanted = re.split("[; ]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip() or "8.0;9.0;10.0;12.0+PTX")
    found = []
    for name in wanted:
        number = name.removesuffix("+PTX").replace(".", "")
        kinds = f"sm_{number},compute_{number}" if name.endswith("+PTX") else f"sm_{number}"
        found.append(f"-gencode=arch=compute_{number},code=[{kinds}]")
    return found


def find_nvcc() -> str | None:
    """The compiler, unless LRKERNELS_CUDA says that it is not to be used."""
    asked = os.environ.get("LRKERNELS_CUDA", "auto")
    there = shutil.which("nvcc") or shutil.which("nvcc", path=f"{CUDA_HOME}/bin")
    if asked not in ("auto", "0", "1") or (asked == "1" and not there):
        raise SystemExit(f"lrkernels: LRKERNELS_CUDA={asked}: it must be auto, 0 or 1, and 1 needs nvcc on the PATH")
    return None if asked == "0" else there


class Build(BuildExtension):
    """Compiles kernels.cu by nvcc itself: torch's own CUDA extensions want a torch that has CUDA."""

    def build_extensions(self) -> None:
        """Compile the kernels, where they are not up to date, and then the rest."""
        (extension,), nvcc = self.extensions, find_nvcc()
        if nvcc:
            target = Path(self.build_temp).absolute() / "kernels.cu.o"
            command = [
                nvcc,
                *NVCC_FLAGS,
                *architectures(),
                "--threads=0",
                "-c",
                "csrc/cuda/kernels.cu",
                "-o",
                str(target),
            ]
            made_by = target.with_suffix(".txt")
            sources = [Path("csrc", name) for name in ("cuda/kernels.cu", "kernels.h", "rules.h", "halves.h")]
            newest = max(source.stat().st_mtime for source in sources)
            if not target.exists() or made_by.read_text() != str(command) or target.stat().st_mtime < newest:
                target.parent.mkdir(parents=True, exist_ok=True)
                subprocess.run(command, check=True)
                made_by.write_text(str(command))
            said = subprocess.run(
                [nvcc, "--dryrun", "-c", "csrc/cuda/kernels.cu"], capture_output=True, text=True
            ).stderr
            (top,) = re.findall(r"^#\$ TOP=(.*)", said, re.MULTILINE)
            library = next(Path(top).resolve().glob("lib*/libcudart_static.a"), None) or next(
                Path(top).resolve().glob("targets/*/lib/libcudart_static.a")
            )
            extension.extra_objects += [str(target), str(library)]
            extension.extra_link_args += ["-Wl,--exclude-libs,ALL", "-ldl", "-lrt", "-lpthread"]
            codes = re.findall(r"code=\[([^]]*)\]", " ".join(architectures()))
            extension.define_macros.append(("LRK_CUDA", f'"{" ".join(codes).replace(",", " ")}"'))
        super().build_extensions()


setup(
    ext_modules=[
        CppExtension(
            "lrkernels._C",
            ["csrc/module.cpp", "csrc/cpu/kernels.cpp"],
            extra_compile_args=FLAGS,
            py_limited_api=True,
        )
    ],
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
