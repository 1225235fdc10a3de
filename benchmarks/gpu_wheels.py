"""Makes the folder of wheels that `gpu.py` needs on a machine with a GPU and no way to a package index.

    make gpu-wheels                                        # writes dist/gpu
    python benchmarks/gpu_wheels.py --out FOLDER --python-version 3.12

Taken to be there: PyTorch 2.11 or newer with CUDA and Triton, Transformers 5.17, and what these and the usual packages
beside them bring (numpy, pyarrow, pandas, rich, pyyaml, matplotlib, tensorboard). In the folder: a wheel of this
project, as the tree is now; DeepSpeed, whose package is source alone, built without any operator; and the rest as
wheels for that Python, in the versions that are installed here, which fit each other and are tested. Standard library
only; pip does the work, and needs a package index.

Prints the size, and the command that installs it all there. More than `MOST_MB` is an error: such a folder is carried.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILT = "deepspeed"
LACKING = (
    "annotated-types",
    "datasets",
    "dill",
    "docstring-parser",
    "donfig",
    "google-crc32c",
    "hjson",
    "multiprocess",
    "numcodecs",
    "pydantic",
    "pydantic-core",
    "typeguard",
    "typing-extensions",
    "typing-inspection",
    "tyro",
    "zarr",
)
"""What such a machine has not."""
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
PACKED = ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")
MOST_MB = 20


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_options(arguments)
    out = Path(options.out)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    build_project(out)
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out), pinned(BUILT), DS_BUILD_OPS="0")
    kinds = ["--only-binary", ":all:", "--python-version", options.python_version]
    kinds += [f"--platform={name}" for name in PLATFORMS]
    pip("download", "--no-deps", "--dest", str(out), *kinds, *map(pinned, LACKING))
    wheels = sorted(out.glob("*.whl"))
    for wheel in wheels:
        print(f"{wheel.stat().st_size / 1e6:8.2f} MB  {wheel.name}")
    size = sum(wheel.stat().st_size for wheel in wheels) / 1e6
    print(f"{size:8.2f} MB  {len(wheels)} wheels in {out}")
    if size > MOST_MB:
        print(f"{out} has {size:.1f} MB, more than the {MOST_MB} that are carried: take wheels out", file=sys.stderr)
        return 1
    print(f"there: pip install --no-index --no-deps --find-links {out} {out}/*.whl && make gpu")
    return 0


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="dist/gpu", help="folder that is made anew")
    parser.add_argument("--python-version", default="3.12")
    return parser.parse_args(arguments)


def pinned(name: str) -> str:
    """NAME==VERSION, of what is installed here. A build tag such as +cpu is the same version."""
    return f"{name}=={metadata.version(name).partition('+')[0]}"


def build_project(out: Path) -> None:
    """From a copy: a build leaves files where it runs, and takes up old ones that lie there."""
    with tempfile.TemporaryDirectory() as folder:
        for package in ("cli", "student_train", "teacher_cache"):
            shutil.copytree(ROOT / package, Path(folder) / package, ignore=shutil.ignore_patterns("__pycache__"))
        for name in PACKED:
            shutil.copy(ROOT / name, folder)
        pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out), folder)


def pip(*arguments: str, **environment: str) -> None:
    """Run pip, what it says withheld unless it fails."""
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env={**os.environ, **environment})
    if done.returncode != 0:
        raise SystemExit(f"pip {' '.join(arguments)} failed, so that the folder is not complete: {done.stderr[-1500:]}")


if __name__ == "__main__":
    raise SystemExit(main())
