"""Cache for compiled programs of the command line, so that the next run does not compile them again."""

import hashlib
import os
import platform
import sys
from pathlib import Path

import jax

# Programs that compile faster are not cached. A laptop preset has many small programs.
_LEAST_SECONDS = 0.1


def user_cache() -> Path:
    """Return the user's cache folder, by the convention of the platform."""
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def keep_compiled() -> Path | None:
    """Turn on JAX's persistent compilation cache, in the user's cache folder.

    As always in JAX, `JAX_COMPILATION_CACHE_DIR` names another folder, and `JAX_ENABLE_COMPILATION_CACHE=false` turns
    the cache off. A program's own configuration is not changed.

    Returns:
      the folder if it was created just now, so that the user can be informed; otherwise None. If it cannot be created,
      nothing is cached, and None is returned.
    """
    if not jax.config.jax_enable_compilation_cache or jax.config.jax_compilation_cache_dir:
        return None
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return None
    folder = user_cache() / "cbp_jax" / "compiled" / _machine()
    new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    for name, value in (
        ("jax_persistent_cache_min_compile_time_secs", _LEAST_SECONDS),
        ("jax_persistent_cache_min_entry_size_bytes", -1),
    ):
        if name.upper() not in os.environ:
            jax.config.update(name, value)
    return folder if new else None


def _machine() -> str:
    """Return an identifier of the machine's type: machines that share a home may not run each other's programs."""
    about = [platform.system(), platform.machine(), platform.processor()]
    try:
        cpu = Path("/proc/cpuinfo").read_text().splitlines()
        about += sorted({line for line in cpu if line.startswith(("model name", "flags", "Features"))})
    except OSError:
        pass
    return hashlib.sha256("\n".join(about).encode()).hexdigest()[:12]
