import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mesh.errors import ConfigError
from mesh.types import MeshId
from node.folder import DataFolder, read_admin_key, refuse_other_mesh
from node.security.admission import found_membership
from node.security.ca import Authority


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_the_same_node_after_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "data"
    with DataFolder(path) as folder:
        first, key, incarnation = folder.identity(), folder.admin_key(), folder.next_incarnation(1000)
        assert folder.membership() is None
    with DataFolder(path) as folder:
        assert folder.identity().node_id == first.node_id
        assert folder.identity().seal_key.public == first.seal_key.public
        assert folder.admin_key() == key == read_admin_key(path / "admin.key")
        assert folder.next_incarnation(500) == incarnation + 1 == 1001, "the clock went back, the incarnation does not"
        assert folder.next_incarnation(5000) == 5000
        folder.keep_incarnation(6000)
        assert folder.next_incarnation(5500) == 6001


def test_everything_is_private(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.mkdir(mode=0o755)
    with DataFolder(path) as folder:
        folder.identity(), folder.admin_key(), folder.next_incarnation()
        assert mode(path) == mode(folder.subfolder("weights")) == 0o700
        for file in path.iterdir():
            assert mode(file) & 0o077 == 0, file


def test_two_processes_never_share_a_folder(tmp_path: Path) -> None:
    with DataFolder(tmp_path / "data"):
        with pytest.raises(ConfigError, match=f"in use by another node \\(process {os.getpid()}\\)"):
            DataFolder(tmp_path / "data")
        code = "import sys, pathlib, node.folder; node.folder.DataFolder(pathlib.Path(sys.argv[1]))"
        other = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "data")], capture_output=True, text=True, check=False
        )
        assert "in use by another node" in other.stderr
    DataFolder(tmp_path / "data").close()


def test_what_is_wrong_with_a_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        DataFolder(tmp_path / "file")
    with pytest.raises(ConfigError, match="cannot use data folder"):
        DataFolder(tmp_path / "file" / "below")
    with DataFolder(tmp_path / "data") as folder:
        key = folder.path / "identity.key"
        key.write_bytes(b"short")
        key.chmod(0o600)
        with pytest.raises(ConfigError, match="damaged"):
            folder.identity()
        key.chmod(0o644)
        with pytest.raises(ConfigError, match="chmod 600"):
            folder.identity()
        (folder.path / "incarnation").write_text("soon")
        with pytest.raises(ConfigError, match="whole number"):
            folder.next_incarnation()
        folder.membership_path.write_text("not pem")
        folder.membership_path.chmod(0o600)
        with pytest.raises(ConfigError, match=r"mesh\.pem is damaged"):
            folder.membership()
        with pytest.raises(ConfigError, match="no admin key at"):
            read_admin_key(tmp_path / "nowhere")
        (folder.path / "admin.key").write_text("mk-wrong")
        (folder.path / "admin.key").chmod(0o600)
        with pytest.raises(ConfigError, match="holds no admin key"):
            folder.admin_key()


def test_a_folder_belongs_to_one_mesh(tmp_path: Path) -> None:
    mesh = MeshId("1" * 32)
    with DataFolder(tmp_path / "data") as folder:
        membership = found_membership(folder.identity(), Authority.found(mesh, time.time()), ("host",), time.time())
        folder.save_membership(membership)
        assert folder.membership() == membership
        assert mode(folder.membership_path) == 0o600
        refuse_other_mesh(folder, membership, mesh)
        with pytest.raises(ConfigError, match=r"belongs to mesh 11111111.*another --data-dir"):
            refuse_other_mesh(folder, membership, "2" * 32)
