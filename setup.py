"""Builds of one commit have the same bytes: `SOURCE_DATE_EPOCH` dates the source archive as well.

Everything about the package is in pyproject.toml. setuptools dates wheels by that variable, but its
source archives by the clock and by the files of the checkout.
"""

import gzip
import os
import tarfile
from pathlib import Path

from setuptools import setup
from setuptools.command.sdist import sdist


class ReproducibleSdist(sdist):
    """Source archives that depend on names and contents of their files alone."""

    def make_archive(self, base_name, format, root_dir=None, base_dir=None, owner=None, group=None):
        """Write the archive `base_name`.tar.gz of the folder `base_dir`; return its path."""
        epoch = os.environ.get("SOURCE_DATE_EPOCH")
        if epoch is None or format != "gztar":
            return super().make_archive(base_name, format, root_dir, base_dir, owner, group)

        def plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
            member.mtime = int(epoch)
            member.uid = member.gid = 0
            member.uname = member.gname = ""
            member.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
            return member

        archive = f"{base_name}.tar.gz"
        folder = Path(root_dir or ".", base_dir)
        with (
            open(archive, "wb") as file,
            gzip.GzipFile("", "wb", fileobj=file, mtime=int(epoch)) as packed,
            tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as tar,
        ):
            for path in sorted([folder, *folder.rglob("*")]):
                name = Path(base_dir, path.relative_to(folder))
                tar.add(path, name, recursive=False, filter=plain)
        return archive


setup(cmdclass={"sdist": ReproducibleSdist})
