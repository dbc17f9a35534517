"""Profiles as files: what is written comes back, and nothing else than a profile of this folder does."""

import pytest

from tessera.methods.cache import profile_files as m
from tessera.methods.cache.profile import Profile
from tessera.methods.files.shelf import names

PROFILE = Profile("Taylor Cache", {"interval": 3}, "abc", "sample_euler", 20, {"error": 0.05})


def test_round_trip(tmp_path):
    folder = tmp_path / "tessera_profiles"
    assert names(folder, m.SUFFIX) == []
    path = m.save(folder, "My flux-1.0", PROFILE)
    assert path == folder / "My flux-1.0.json" and m.load(folder, path.name) == m.load(folder, "My flux-1.0") == PROFILE
    other = Profile("Step Cache", {"threshold": 0.1})
    m.save(folder, "My flux-1.0.json", other)
    assert names(folder, m.SUFFIX) == ["My flux-1.0.json"] and m.load(folder, path.name) == other
    assert [p.name for p in folder.iterdir()] == ["My flux-1.0.json"]


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "a\\b", "/etc/passwd", " x", "-x", "a" * 101, "a\n"])
def test_names_that_leave_the_folder(tmp_path, name):
    for act in (lambda: m.save(tmp_path, name, PROFILE), lambda: m.load(tmp_path, name)):
        with pytest.raises(ValueError, match="without a folder"):
            act()


def test_what_is_no_profile(tmp_path):
    folder = tmp_path / "profiles"
    folder.mkdir()
    with pytest.raises(ValueError, match="no profile 'x.json' in profiles. Save one with Solve Threshold"):
        m.load(folder, "x.json")
    outside = tmp_path / "outside.json"
    outside.write_text(PROFILE.to_json())
    (folder / "link.json").symlink_to(outside)
    with pytest.raises(ValueError, match="no profile 'link.json'"):
        m.load(folder, "link.json")
    for content, sentence in (
        (b"[]", "is no cache profile"),
        (b"\xff\xfe", "not text"),
        (b" " * (m.MOST + 1), "too large"),
    ):
        (folder / "bad.json").write_bytes(content)
        with pytest.raises(ValueError, match=sentence):
            m.load(folder, "bad.json")
