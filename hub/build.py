"""Writes the package as a kernel for the Hugging Face Hub, in the layout of the `kernels` package (docs/hub.md).

    python -m hub.build [FOLDER] [ORGANIZATION/NAME]     FOLDER is build/hub if none is given

    FOLDER/
      build.toml, flake.nix      what kernel-builder, the Hub's own build tool, reads
      torch-ext/dpo_kernels/     the sources for kernel-builder
      build/torch-cpu/           a finished build, one for each platform of torch; they differ in metadata.json only
      README.md, CARD.md         the card

The files are the package's own, byte for byte, without those of LEFT_OUT. A loaded kernel has the name `id` of metadata.json,
and its operators have this name as their namespace (dpo_kernels/_build.py). The name contains a hash of the files, so different
builds can be used in one process, also beside the installed package.
"""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import sys
from pathlib import Path

import dpo_kernels

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(dpo_kernels.__file__).parent
NAME = "dpo-kernels"
LICENSE = "Apache-2.0"
#: The platforms of torch: where Triton runs, and the CPU for tests and for machines without a GPU.
BACKENDS = ("cpu", "cuda", "rocm")
#: Files and folders that are not part of the kernel: the command, names without torch for the trainer, the drop-ins for other
#: frameworks, and the backends that need a compiled library.
LEFT_OUT = ("__main__.py", "bench.py", "doctor.py", "names.py", "integrations", "backends/cpu.py", "backends/cuda.py")
#: kernel-builder writes its own file of this name, and refuses to overwrite one.
GENERATED = "_ops.py"

BUILD_TOML = """\
[general]
name = "{name}"
version = {version}
edition = 5
license = "{license}"
backends = [{backends}]

[general.hub]
repo-id = "{repository}"

[torch-noarch]
"""

FLAKE = """\
{
  inputs.kernel-builder.url = "github:huggingface/kernels";
  outputs = { self, kernel-builder }: kernel-builder.lib.genKernelFlakeOutputs { inherit self; path = ./.; };
}
"""

CARD = """\
---
library_name: kernels
license: apache-2.0
tags: [kernels, dpo, preference-optimization, triton]
---

# {name}

Fused log-probabilities and DPO losses in Triton, version {release} of the Python package `dpo-kernels`. A plain PyTorch version
of the same functions serves on a CPU.

```python
from kernels import get_kernel

dpo = get_kernel("{repository}", version={version}, trust_remote_code=True)
logps = dpo.linear_logps(hidden, lm_head.weight, labels)  # [..., T, H], [V, H] and [..., T] -> [..., T]
```

Functions and classes:

{names}

The package from pip also has CPU and CUDA kernels in C++, drop-ins for training frameworks, and a trainer.
"""


def sources() -> dict[str, bytes]:
    """The kernel's files: path inside the package -> contents."""
    found = {path.relative_to(PACKAGE).as_posix(): path.read_bytes() for path in sorted(PACKAGE.rglob("*.py"))}
    return {name: text for name, text in found.items() if not any(f"{name}/".startswith(f"{out}/") for out in LEFT_OUT)}


def identity(backend: str, files: dict[str, bytes]) -> str:
    """The unique name under which a build is loaded, such as "_dpo_kernels_cuda_1f0c2a3b". It is an identifier of Python."""
    digest = hashlib.sha256()
    for name, text in files.items():
        digest.update(f"{name} {len(text)}\n".encode() + text)
    return f"_dpo_kernels_{backend}_{digest.hexdigest()[:8]}"


def metadata(backend: str, files: dict[str, bytes], version: int) -> str:
    """metadata.json of a build: who it is, where it runs, and the digests by which a download is checked."""
    digests = {name: base64.b64encode(hashlib.sha256(text).digest()).decode() for name, text in files.items()}
    about = {
        "name": NAME,
        "id": identity(backend, files),
        "version": version,
        "license": LICENSE,
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": digests},
    }
    return json.dumps(about, indent=2) + "\n"


def put(path: Path, content: bytes | str) -> None:
    """Write a file, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def write(folder: Path, repository: str = f"ORGANIZATION/{NAME}") -> None:
    """Write the layout into `folder`. In an earlier layout, torch-ext/ and build/ are replaced.

    Args:
        repository: the repository on the Hub, for build.toml and the card.

    Raises:
        FileExistsError: the folder holds something else than such a layout.
    """
    layout = folder / "build.toml"
    if folder.exists() and any(folder.iterdir()) and not (layout.is_file() and f'"{NAME}"' in layout.read_text()):
        raise FileExistsError(f"{folder} is not empty, and no layout of this kernel is in it; name another folder")
    for replaced in ("torch-ext", "build"):
        shutil.rmtree(folder / replaced, ignore_errors=True)
    files, version = sources(), int(dpo_kernels.__version__.partition(".")[0])
    for name, text in files.items():
        if name != GENERATED:
            put(folder / "torch-ext" / "dpo_kernels" / name, text)
    for backend in BACKENDS:
        build = folder / "build" / f"torch-{backend}"
        for name, text in files.items():
            put(build / name, text)
        put(build / "metadata.json", metadata(backend, files, version))
    backends = ", ".join(f'"{name}"' for name in BACKENDS)
    fields = {"name": NAME, "version": version, "license": LICENSE, "backends": backends, "repository": repository}
    put(layout, BUILD_TOML.format(**fields))
    put(folder / "flake.nix", FLAKE)
    names = "\n".join(f"- `{name}`" for name in dpo_kernels.__all__ if not name.startswith("_"))
    card = CARD.format(**fields, names=names, release=dpo_kernels.__version__)
    # kernel-builder reads CARD.md, and uploads build/CARD.md as README.md.
    for place in ("README.md", "CARD.md", "build/CARD.md"):
        put(folder / place, card)


if __name__ == "__main__":
    if any(word.startswith("-") for word in sys.argv[1:]):
        sys.exit(__doc__)
    target, *repositories = sys.argv[1:] or [str(ROOT / "build" / "hub")]
    write(Path(target), *repositories[:1])
    print(f"wrote {target}")
