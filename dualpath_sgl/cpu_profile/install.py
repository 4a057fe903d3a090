"""`python -m dualpath_sgl.cpu_profile.install`: makes the CPU stand-ins importable in this environment.

Writes one `.pth` file.  Its path line is appended to `sys.path`, behind site-packages, so a
real `sgl_kernel` is never shadowed; its import line hooks torchvision's import.
"""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path

SITE = Path(__file__).parent / "site"
PTH_NAME = "dualpath_cpu.pth"


def install(site_packages: Path) -> Path:
    """Write the `.pth` file into `site_packages` and return it.  Idempotent."""
    path = site_packages / PTH_NAME
    path.write_text(f"{SITE}\nimport dualpath_torchvision\n")
    return path


if __name__ == "__main__":
    if sys.prefix == sys.base_prefix:
        sys.exit("refusing to change the system's Python: run this inside a virtual environment")
    print(f"wrote {install(Path(sysconfig.get_path('purelib')))}")
