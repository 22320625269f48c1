"""Builds, tests and measures on a machine with a CUDA GPU: ``make gpu-check``. Needs no network, and ends in 8 minutes.

Each stage has its share of the time; one that fails or runs out of it does not keep the others from running. The log
and one JSON with every stage and figure go to $OUT, or to benchmarks/results.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from time import perf_counter

ROOT = Path(__file__).parent.parent
TOTAL = 470.0  # seconds

# What compute-sanitizer runs: a step of each kind, small, since every access takes much longer then.
SANITIZED = """
import torch, lrkernels
for dtype in (torch.float32, torch.bfloat16, torch.float64):
    for kind in (lrkernels.FusedSGD, lrkernels.FusedAdamW):
        for more in ({}, {"track": ("direction", "alignment")}, {"max_grad_norm": 1.0}):
            params = [torch.nn.Parameter(torch.randn(n, device="cuda", dtype=dtype)) for n in (20_001, 33, 1, 7)]
            optimizer = kind(params, lr=0.1, **more)
            for _ in range(2):
                for p in params:
                    p.grad = torch.randn_like(p)
                optimizer.step()
torch.cuda.synchronize()
"""
OURS = ["--kernel-name", "kernel_substring=run_step"]  # of the kernels; torch's are many, and slow to look at

# Each test's name before it runs, and where it stands after a while: a kernel that hangs takes the process along.
TESTS = ["-m", "gpu", "-vv", "--tb=short", "-o", "faulthandler_timeout=40"]


@dataclass
class Stage:
    """What was run, for how long, and how it ended."""

    name: str
    command: list[str]
    seconds: float = 0.0
    status: int | None = None  # None: left out
    end: str = ""


def stages(out: Path) -> list[tuple[Stage, float]]:
    """Each with the most seconds it may take."""
    python = sys.executable
    marked = sorted(
        str(file.relative_to(ROOT)) for file in (ROOT / "tests").glob("test_*.py") if "mark.gpu" in file.read_text()
    )
    found = [
        (Stage("build", [python, "setup.py", "--quiet", "build_ext", "--inplace"]), 200.0),
        (Stage("info", [python, "-m", "lrkernels", "info"]), 30.0),
        (Stage("machine code", [python, "-m", "pytest", "tests/test_cuda_build.py"]), 60.0),
        (Stage("tests", [python, "-m", "pytest", *TESTS, *marked]), 180.0),
    ]
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    for tool in ("memcheck", "racecheck"):
        command = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1"]  # so that each tensor has ends that are looked at
        command += [sanitizer or "", "--tool", tool, "--error-exitcode", "1", *OURS]
        command += ["--report-api-errors", "no"] if tool == "memcheck" else []  # torch tries what a driver may not have
        command += [python, "-c", SANITIZED]
        found.append((Stage(tool, command if sanitizer else []), 60.0))
    benchmark = [python, "benchmarks/gpu.py", "--seconds", "120", "--json", str(out / "gpu-benchmarks.json")]
    found.append((Stage("benchmarks", benchmark), 200.0))
    return found


def run(stage: Stage, seconds: float, log: Path) -> None:
    """Run one stage into the log; its end is kept for the table."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "MAX_JOBS": "16"}
    start = perf_counter()
    with log.open("a") as file:
        file.write(f"\n== {stage.name}: {' '.join(stage.command)}\n")
        file.flush()
        how = {"cwd": ROOT, "env": environment, "stdout": file, "stderr": subprocess.STDOUT, "preexec_fn": os.setpgrp}
        try:
            with subprocess.Popen(stage.command, **how) as process:
                try:
                    stage.status = process.wait(seconds)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)  # its children too: they would go on using the device
                    stage.status = 124
        except OSError as error:
            stage.status, stage.end = 127, str(error)
    stage.seconds = perf_counter() - start
    stage.end = stage.end or "\n".join(log.read_text(errors="replace").splitlines()[-3:])


def main() -> int:
    """Run the stages; the exit status is 0 when none of them failed."""
    import torch

    if not torch.cuda.is_available():
        print(f"lrkernels: gpu-check needs a CUDA device, and torch {torch.__version__} sees none")
        return 1
    out = Path(os.environ.get("OUT") or ROOT / "benchmarks/results")
    out.mkdir(parents=True, exist_ok=True)
    log = out / "gpu-check.log"
    log.write_text(f"{datetime.now(timezone.utc).isoformat(timespec='seconds')} {torch.cuda.get_device_name()}\n")
    deadline = perf_counter() + TOTAL
    done = []
    for stage, most in stages(out):
        left = deadline - perf_counter()
        if stage.command and left > 5:
            run(stage, min(most, left), log)
        done.append(stage)
        state = "left out" if stage.status is None else "passed" if stage.status == 0 else f"failed ({stage.status})"
        print(f"{stage.name:<12}{state:<16}{stage.seconds:6.1f} s", flush=True)
        if stage.status not in (None, 0):
            print(stage.end)
    figures = out / "gpu-benchmarks.json"
    report = {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "device": torch.cuda.get_device_name(),
        "stages": [asdict(stage) for stage in done],
        "benchmarks": json.loads(figures.read_text()) if figures.exists() else None,
    }
    figures.unlink(missing_ok=True)
    (out / "gpu-check.json").write_text(json.dumps(report, indent=1) + "\n")
    print(f"{out / 'gpu-check.json'}, {log}")
    if report["benchmarks"]:
        sys.path.insert(0, str(ROOT / "benchmarks"))
        from gpu import show

        show(report["benchmarks"]["rows"])
    return int(any(stage.status not in (None, 0) for stage in done))


if __name__ == "__main__":
    sys.exit(main())
