"""A disk that is soon full."""

import ctypes
import os
import subprocess
from pathlib import Path


def mount_small_disk(folder: Path, size: int) -> None:
    """A disk of `size` bytes that this process alone sees."""
    user, group = os.getuid(), os.getgid()
    libc = ctypes.CDLL(None, use_errno=True)
    new_user_and_mounts = 0x10000000 | 0x00020000
    if libc.unshare(new_user_and_mounts):
        raise OSError(ctypes.get_errno(), "unshare: this test needs user namespaces")
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder], check=True)
