"""Builds, tests and measures on a machine with a CUDA GPU: ``make gpu-check``. Needs no network, and ends in 8 minutes.

Each stage has its share of the time; one that fails or runs out of it does not keep the others from running. Of the
tests and the benchmarks one that hangs or crashes is ended, and those after it go on in a new process (unattended.py).
The log and one JSON with every stage and figure go to $OUT, or to benchmarks/results.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from time import perf_counter
from typing import TextIO

from unattended import END, VARIABLE

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

TESTS = ["-m", "gpu", "-vv", "--tb=short", "-p", "unattended"]  # each test's name before it runs


@dataclass
class Stage:
    """What was run, for how long, and how it ended."""

    name: str
    command: list[str]
    seconds: float = 0.0
    status: int | None = None  # None: left out
    end: str = ""
    died: list[str] = field(default_factory=list)  # what a process ended in, before another went on


def stages(out: Path) -> list[tuple[Stage, float]]:
    """Each with the most seconds it may take."""
    python = sys.executable
    pytest = [python, "-m", "pytest", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    marked = sorted(
        str(file.relative_to(ROOT)) for file in (ROOT / "tests").glob("test_*.py") if "mark.gpu" in file.read_text()
    )
    found = [
        (Stage("build", [python, "setup.py", "--quiet", "build_ext", "--inplace"]), 200.0),
        (Stage("info", [python, "-m", "lrkernels", "info"]), 30.0),
        (Stage("tests", [*pytest, *TESTS, *marked]), 170.0),
    ]
    benchmark = [python, "benchmarks/gpu.py", "--seconds", "120", "--json", str(out / "gpu-benchmarks.json")]
    found.append((Stage("benchmarks", benchmark), 180.0))
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    for tool in ("memcheck", "racecheck"):
        command = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1"]  # so that each tensor has ends that are looked at
        command += [sanitizer or "", "--tool", tool, "--error-exitcode", "1", *OURS]
        command += ["--report-api-errors", "no"] if tool == "memcheck" else []  # torch tries what a driver may not have
        command += [python, "-c", SANITIZED]
        found.append((Stage(tool, command if sanitizer else []), 90.0))
    found.append((Stage("machine code", [*pytest, "tests/test_cuda_build.py"]), 60.0))
    return found


def run(stage: Stage, seconds: float, log: Path) -> None:
    """Run one stage into the log; its end is kept for the table."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks"), *filter(None, [os.environ.get("PYTHONPATH")])])
    notes = log.with_suffix(".notes")
    notes.unlink(missing_ok=True)
    environment = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "MAX_JOBS": "16", VARIABLE: str(notes)}
    environment["LRKERNELS_CUDA"] = "1"  # a build without the CUDA kernels would skip the tests
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # whatever else is installed there
    start = perf_counter()
    with log.open("a") as file:
        begun: list[str] = []
        while True:
            file.write(f"\n== {stage.name}: {' '.join(stage.command)}\n")
            file.flush()
            status, stage.end = once(stage.command, environment, start + seconds - perf_counter(), file)
            stage.status = stage.status or status
            done, begun = begun, notes.read_text().splitlines() if notes.exists() else []
            if status == 0 or END in begun or len(begun) == len(done):
                break
            stage.died.append(begun[-1])
            if start + seconds - perf_counter() < 10:
                break
    notes.unlink(missing_ok=True)
    stage.seconds = perf_counter() - start
    stage.end = stage.end or "\n".join(log.read_text(errors="replace").splitlines()[-3:])


def once(command: list[str], environment: dict[str, str], seconds: float, file: TextIO) -> tuple[int, str]:
    """Run a command for so long at most, and end it with all that it has started: its status, and what was wrong."""
    try:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    except OSError as error:
        return 127, str(error)
    try:
        return process.wait(seconds), ""
    except subprocess.TimeoutExpired:
        return 124, ""
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):  # a driver may be in no hurry
            process.wait(20)


def main() -> int:
    """Run the stages; the exit status is 0 when none of them failed."""
    import torch

    if not torch.cuda.is_available():
        print(f"lrkernels: gpu-check needs a CUDA device, and torch {torch.__version__} sees none")
        return 1
    out = Path(os.environ.get("OUT") or ROOT / "benchmarks/results")
    out.mkdir(parents=True, exist_ok=True)
    log, figures, report_file = (out / name for name in ("gpu-check.log", "gpu-benchmarks.json", "gpu-check.json"))
    figures.unlink(missing_ok=True)
    report = {"torch": torch.__version__, "cuda": torch.version.cuda, "device": torch.cuda.get_device_name()}
    log.write_text(f"{datetime.now(timezone.utc).isoformat(timespec='seconds')} {report['device']}\n")
    deadline = perf_counter() + TOTAL
    done: list[Stage] = []
    for stage, most in stages(out):
        left = deadline - perf_counter()
        if stage.command and left > 5:
            run(stage, min(most, left), log)
        done.append(stage)
        state = "left out" if stage.status is None else "passed" if stage.status == 0 else f"failed ({stage.status})"
        last = stage.end.splitlines()[-1:] if stage.status == 0 else [*stage.died, *stage.end.splitlines()]
        first = f"{stage.name:<14}{state:<14}{stage.seconds:6.1f} s"
        print(first, *(line[:160] for line in last), sep="\n    ", flush=True)
        report["stages"] = [asdict(each) for each in done]
        report["benchmarks"] = json.loads(figures.read_text()) if figures.exists() else None
        report_file.write_text(json.dumps(report, indent=1) + "\n")
    figures.unlink(missing_ok=True)
    print(f"{report_file}, {log}")
    if report["benchmarks"]:
        sys.path.insert(0, str(ROOT))  # the package is not installed
        from gpu import show

        show(report["benchmarks"])
    return int(any(stage.status not in (None, 0) for stage in done))


if __name__ == "__main__":
    sys.exit(main())
