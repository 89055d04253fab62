"""What building a wheel adds: on Linux x86-64 the compiled passes, for machines that have no C++ compiler.

The library is for processors with AVX2 (x86-64-v3). Elsewhere, and where this machine has no compiler, the wheel is one
for every machine and holds none.
"""

import importlib.util
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class LibraryHook(BuildHookInterface):  # type: ignore[type-arg]
    """Puts the library beside the file that loads it."""

    PLUGIN_NAME = "custom"
    folder: Path | None = None

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Build it; an editable installation compiles when it first needs to."""
        if version != "standard" or (sys.platform, platform.machine()) != ("linux", "x86_64"):
            return
        place = "initlab/stats/kernels/cpu.py"
        found = importlib.util.spec_from_file_location("cpu", Path(self.root) / place)
        assert found is not None and found.loader is not None
        cpu = importlib.util.module_from_spec(found)
        found.loader.exec_module(cpu)
        self.folder = Path(mkdtemp(prefix="initlab-"))
        built = self.folder / cpu.PORTABLE.name
        try:
            cpu.build_portable(built)
        except (OSError, subprocess.SubprocessError) as error:
            self.app.display_warning(f"no compiled passes in this wheel: {error}")
            return
        build_data["force_include"][str(built)] = str(Path(place).with_name(built.name))
        build_data["tag"], build_data["pure_python"] = "py3-none-linux_x86_64", False

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove the library, of which the wheel has a copy."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
