"""What is known of the file system of a directory, from what Linux lists."""

from pathlib import Path

import pytest

from gateway.kv.tiers.mounts import MOUNTINFO, Mount, mount_of, nfs_risk

LISTED = r"""22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
30 22 0:40 / /mnt/kv rw,relatime shared:2 - nfs4 box:/kv rw,vers=4.2,local_lock=none
31 22 0:41 / /mnt/kv/a\040b rw - nfs4 box:/ab rw,lookupcache=none
32 22 0:42 / /mnt/pos rw - nfs box:/pos rw,lookupcache=pos
33 22 0:43 / /mnt/ceph rw - ceph mon:/ rw
not a mount
"""


@pytest.mark.parametrize(
    ("folder", "point", "kind"),
    [
        ("/", "/", "ext4"),
        ("/mnt/kvx", "/", "ext4"),
        ("/mnt/kv", "/mnt/kv", "nfs4"),
        ("/mnt/kv/a b/c", "/mnt/kv/a b", "nfs4"),
    ],
)
def test_mount_is_the_deepest_above_a_directory(folder: str, point: str, kind: str) -> None:
    mount = mount_of(Path(folder), LISTED)
    assert mount is not None
    assert (mount.point, mount.kind) == (Path(point), kind)


@pytest.mark.parametrize("folder", ["/", "/mnt/kv/a b", "/mnt/pos", "/mnt/ceph"])
def test_local_file_system_and_safe_nfs_are_no_risk(folder: str) -> None:
    assert nfs_risk(mount_of(Path(folder), LISTED)) == ""


def test_nfs_that_remembers_missing_files_is_a_risk() -> None:
    assert nfs_risk(mount_of(Path("/mnt/kv/x"), LISTED)) == (
        "/mnt/kv is nfs4 and remembers missing files; mount it with lookupcache=none or =positive"
    )


def test_this_machine_lists_its_root() -> None:
    assert isinstance(mount_of(Path("/"), MOUNTINFO.read_text()), Mount)
    assert mount_of(Path("/"), "") is None
